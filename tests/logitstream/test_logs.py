"""One line of JSON per record, whatever it says."""

import io
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from logitstream.logs import JsonFormatter, log_to_stderr
from teacher_server.cli import main


def written(log_format: str, *, error: Exception | None = None, level: str = "info") -> str:
    stream = io.StringIO()
    options = SimpleNamespace(log_level=level, log_format=log_format)
    log_to_stderr(options, logging.StreamHandler(stream), name="logs.of.a.test")
    logger = logging.getLogger("logs.of.a.test")
    try:
        if error is not None:
            raise error
        logger.warning('a "quoted" line\nand another: %s', "ä")
    except Exception:
        logger.exception("failed")
    return stream.getvalue()


def test_a_record_is_one_line_of_json():
    (line,) = written("json").splitlines()
    fields = json.loads(line)
    assert fields.pop("time").endswith("Z")
    assert fields == {
        "level": "warning",
        "logger": "logs.of.a.test",
        "message": 'a "quoted" line\nand another: ä',
    }


def test_a_traceback_is_a_field_of_its_line():
    (line,) = written("json", error=ValueError("why")).splitlines()
    fields = json.loads(line)
    assert fields["message"] == "failed"
    assert fields["exception"].splitlines()[-1] == "ValueError: why"


def test_text_is_for_people():
    first, second = written("text").splitlines()
    assert first.endswith('WARNING a "quoted" line')
    assert second == "and another: ä"


def test_messages_below_the_level_are_not_written():
    assert written("text", level="error") == ""


def test_serve_logs_what_it_is_told_to(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    root = logging.getLogger()
    monkeypatch.setattr(root, "level", root.level)
    command = ["serve", str(tmp_path / "missing"), "--standalone", "--port", "0"]
    for flags, level, formatter in (
        (["--log-format", "json", "--log-level", "debug"], logging.DEBUG, JsonFormatter),
        ([], logging.INFO, logging.Formatter),
    ):
        monkeypatch.setattr(root, "handlers", [])
        assert main([*command, *flags]) == 1
        assert root.level == level
        assert type(root.handlers[0].formatter) is formatter
    for mistake in (["--log-level", "loud"], ["--log-format", "xml"]):
        assert main([*command, *mistake]) == 2
        assert mistake[1] in capfd.readouterr().err.splitlines()[-1]
