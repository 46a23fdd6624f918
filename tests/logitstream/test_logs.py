"""One line of JSON per record, whatever it says."""

import io
import json
import logging

from logitstream.logs import make_handler


def written(log_format, *, error: Exception | None = None) -> str:
    stream = io.StringIO()
    logger = logging.Logger("teacher_server.replica")
    logger.addHandler(make_handler(stream, log_format))
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
        "logger": "teacher_server.replica",
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
