"""The command line of student-trainer: one file for several commands."""

import json
import logging
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

from logitstream.command_line import WrongUsage, parse
from student_trainer.cli import COMMANDS, log_above_bars, main
from student_trainer.commands.show import show
from student_trainer.config import RecordConfig, TrainConfig
from student_trainer.training.run import check_settings

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def readme_file(tmp_path: Path) -> Path:
    """The distill.toml of the README."""
    (text,) = re.findall(r"```toml\n(# distill\.toml.*?)```", README.read_text(), re.DOTALL)
    path = tmp_path / "distill.toml"
    path.write_text(text)
    return path


def parsed(*arguments: str) -> Any:
    return parse("student-trainer", COMMANDS, arguments)


def test_the_readmes_file_serves_train_and_record(readme_file: Path):
    content = tomllib.loads(readme_file.read_text())
    assert set(content) <= set(TrainConfig.model_fields)
    live = "--teacher", "x:1"
    trained = parsed("train", f"@{readme_file}", *live)
    recorded = parsed("record", f"@{readme_file}", *live, "--record", "targets")
    assert (trained.steps, trained.checkpoint_every, trained.learning_rate) == (1000, 100, 3e-4)
    shared = set(content) & set(RecordConfig.model_fields)
    assert {name: getattr(recorded, name) for name in shared} == {
        name: getattr(trained, name) for name in shared
    }


def test_what_only_train_takes_is_refused_by_record_as_a_flag(tmp_path: Path):
    path = tmp_path / "wrong.toml"
    path.write_text('stepz = 3\nsteps = 3\nstudent = "s"\ndata = "d"\n')
    with pytest.raises(WrongUsage) as caught:
        parsed("record", f"@{path}", "--steps", "3", "--teacher", "x:1", "--record", "r")
    see = "; see student-trainer record --help"
    assert caught.value.mistakes == (
        f"--steps is an option of train, not of record{see}",
        f"stepz in {path} is not an option of record{see}",
    )


def test_a_mistake_is_a_line_on_stderr_and_exit_code_2(tmp_path: Path, capsys):
    given = "--student", "s", "--data", "d", "--output", "o", "--teacher", "x:1"
    for arguments, mistakes in (
        ((), ["a command is missing: give train or report or record or generate or check"]),
        (("trian",), ["'trian' is not a command (did you mean train?): give train or report or"]),
        (
            ("train", *given, "--stepz", "3"),
            ["--stepz is not an option of train (did you mean --s"],
        ),
        (("train", *given, "--steps", "many"), ["--steps must be a valid integer, got 'many'"]),
        (("train", *given, "--control", "yes"), ["unexpected argument 'yes': --control takes no"]),
        (
            ("train", *given[2:]),
            ["--student is missing: Hugging Face folder or hub id: config and tok"],
        ),
        (("train", *given[:-2]), ["give --teacher HOST:PORT, --record FOLDER or both"]),
        (("train", *given[:-1], "nowhere"), ["--teacher: an address is host:port, such as"]),
        (
            ("train", *given, "--steps", "0", "--learning-rate", "-1", "--optimizer", "sgd"),
            [
                "--steps must be greater than or equal to 1, got 0",
                "--learning-rate must be greater than 0, got -1",
                "--optimizer must be 'adamw' or 'muon', got 'sgd'",
            ],
        ),
        (("record", *given[:4]), ["--teacher is missing: HOST:", "--record is missing: Folder"]),
        (
            ("generate", "--prompts", "p.txt", "--student", "s", "--teacher", "x:1"),
            ["--output is missing: Folder, or URL such as"],
        ),
        (("check",), ["ADDRESS is missing: HOST:PORT of the service, or a connection file"]),
        (("check", "x:1", "--tokens", "many"), ["--tokens: a number of tokens is written like"]),
        (("report",), ["RUNS is missing: Folders that `train` wrote"]),
    ):
        assert main(arguments) == 2
        printed = capsys.readouterr()
        lines = printed.err.splitlines()
        assert printed.out == ""
        assert len(lines) == len(mistakes), lines
        for line, mistake in zip(lines, mistakes, strict=True):
            assert line.startswith(f"student-trainer: {mistake}"), line
            command = arguments[0] if arguments and arguments[0] != "trian" else ""
            assert line.endswith(f"; see {' '.join(f'student-trainer {command}'.split())} --help")


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--device", "gpu", "--device must be auto, cpu, cuda"),
        ("--targets", "topk:64", "--targets: unknown kind of targets 'topk'"),
        ("--targets", "given_ids", "needs ids for each row, which a text does not name"),
        ("--targets", "realized", "forward_kl cannot be computed from realized targets"),
        ("--ahead", "3x", "ahead must be a number of batches"),
        ("--output", "/proc/x", "--output /proc/x cannot be created"),
    ],
)
def test_what_can_be_known_at_once_is_refused_before_anything_is_read(
    tmp_path: Path, capsys, option: str, value: str, said: str
):
    where = ("--student", "no-student", "--data", "no-data", "--teacher", "127.0.0.1:1")
    arguments = ["train", *where, "--output", str(tmp_path / "out"), option, value]
    assert main(arguments) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_check_refuses_targets_that_there_are_not_before_it_connects(capsys):
    assert main(["check", "no.such.host:1", "--targets", "topk"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("student-trainer: --targets: unknown kind of targets 'topk'")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_is_looked_for_where_the_student_is_trained():
    where = ("--student", "s", "--data", "d", "--teacher", "127.0.0.1:1", "--output", "o")
    with pytest.raises(ValueError, match="finds no GPU here"):
        check_settings(parsed("train", *where, "--device", "cuda"))
    check_settings(parsed("train", *where, "--device", "cuda", "--workers", "2"))


def helped(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--help"])
    assert not ended.value.code
    return " ".join(re.sub(r"[^\x20-\x7e]", " ", capsys.readouterr().out).split())


def test_help_says_where_options_and_the_token_come_from(capsys):
    for arguments in ((), ("train",), ("record",), ("generate",), ("check",)):
        said = helped(capsys, *arguments)
        assert "@FILE or --config FILE" in said
        assert "TEACHER_TOKEN" in said
        assert "LOGITSTREAM_" in said
    assert "TEACHER_TOKEN" not in helped(capsys, "report")


def test_the_help_of_record_is_about_recording(capsys):
    said = helped(capsys, "record")
    for option in ("--teacher", "--record"):
        assert re.search(rf"{option} STR [^-]*\[required\]", said), said
    assert "loss" not in said.replace("-only-loss", "")  # TRL's names for what is trained
    assert "random" not in said
    assert "batch-size INT" not in said


def test_log_lines_have_a_line_of_their_own_beside_a_progress_bar(capsys, monkeypatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    log_above_bars()
    with tqdm(total=3, desc="bar", mininterval=0) as bar:
        bar.update()
        logging.getLogger("student_trainer").warning("something")
        bar.update()
    printed = capsys.readouterr().err
    (line,) = [one for one in re.split(r"[\r\n]", printed) if "something" in one]
    assert re.fullmatch(r"[-0-9]+ [:,0-9]+ WARNING something", line)
    assert re.search(r"\r *\r[-0-9]+ [:,0-9]+ WARNING something\n\r?bar:", printed), printed


def test_numbers_for_people_have_their_thousands_apart(capsys):
    found = {
        "model": "m",
        "aligned": True,
        "max_sequence_tokens": 8192,
        "tokens_per_s": 12345.678,
        "bytes_per_token": None,
        "hours": 0.0123,
        "bytes": 40_696_832_579,
        "disk_gib": 40_696_832_579 / 2**30,
        "wire_gib": 0.25,
        "nll_by_shift": {0: 12.345, 1: 1.2},
    }
    show(found, as_json=False)
    said = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert said == {
        "model": "m",
        "aligned": "yes",
        "max_sequence_tokens": "8,192",
        "tokens_per_s": "12,345.7",
        "hours": "0.012",
        "disk": "37.9 GiB",
        "wire": "256.0 MiB",
        "nll_by_shift": "0: 12.35, 1: 1.20",
    }
    show(found, as_json=True)
    assert json.loads(capsys.readouterr().out)["bytes_per_token"] is None
