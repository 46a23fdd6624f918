"""A disk without room: one line, what is kept is whole, and nothing is computed for a student that
cannot be saved."""

import json
import os
import re
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import transformers

from student_trainer.cli import main
from student_trainer.training.progress import Progress
from tests.conftest import Served, one_torch_thread
from tests.end_to_end.test_resume import student_trainer

one_thread = pytest.fixture(autouse=True)(one_torch_thread)


@contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Path]:
    """A disk of that size at `folder`, seen by all processes of this machine until the block ends."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let its user mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def command(trained_service: Served, student_folder: Path, text: Path) -> list[str]:
    """A short run that keeps nothing on the way."""
    return [
        *("train", "--teacher", trained_service.address, "--student", str(student_folder)),
        *("--data", str(text), "--sequence-length", "64", "--batch-size", "2", "--steps", "4"),
        *("--targets", "top_k:4", "--held-out-sequences", "4"),
    ]


def last_line(capsys) -> str:
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return printed.splitlines()[-1]


def test_without_room_for_the_student_nothing_is_trained(command, tmp_path: Path, capsys):
    with small_disk(tmp_path / "disk", 1024) as disk:
        assert main([*command, "--output", str(disk / "out")]) == 1
        line = last_line(capsys)
        assert line.startswith(
            f"student-trainer: no room for the student in {disk / 'out'}: No space"
        )
        assert "1.1 MiB are needed, 1.0 MiB are free" in line
        assert "Make room, or give another --output" in line
        assert not list(disk.iterdir())


def test_a_checkpoint_without_room_leaves_the_one_before_and_the_run_goes_on_from_it(
    command, tmp_path: Path, capsys
):
    """The room of the student is kept all the while, so the checkpoint is what does not fit."""
    kept = [*command, "--checkpoint-every", "1"]
    with small_disk(tmp_path / "disk", 2048) as disk:
        output = disk / "out"
        output.mkdir()
        (output / "other").write_bytes(bytes(2**19))
        assert main([*kept, "--output", str(output)]) == 1
        line = last_line(capsys)
        where = output / "checkpoints"
        said = re.fullmatch(
            rf"student-trainer: cannot write the checkpoint of step (\d) to {where}: No space left on "
            rf"device; checkpoint of step (\d) kept in {where}: run the same command to resume",
            line,
        )
        assert said, line
        assert int(said[1]) == int(said[2]) + 1
        assert [one.name for one in where.iterdir()] == [f"checkpoint-{said[2]}"]
        (output / "other").unlink()
        assert not (output / ".room").exists()
        assert main([*kept, "--output", str(output), "--keep-checkpoints", "1"]) == 0
        assert transformers.AutoModelForCausalLM.from_pretrained(output / "student") is not None


def test_what_others_write_meanwhile_cannot_take_the_room_of_the_student(
    command, tmp_path: Path, monkeypatch, capsys
):
    """The disk is full when the last step is done."""
    fill = Progress.on_step_end

    with small_disk(tmp_path / "disk", 4096) as disk:

        def filled(*arguments: Any, **options: Any) -> None:
            with (disk / "log").open("ab") as file, suppress(OSError):
                while True:
                    os.write(file.fileno(), bytes(4096))
            fill(*arguments, **options)

        monkeypatch.setattr(Progress, "on_step_end", filled)
        assert main([*command, "--output", str(disk / "out")]) == 0, last_line(capsys)
        student = disk / "out" / "student"
        assert transformers.AutoModelForCausalLM.from_pretrained(student) is not None
        assert json.loads((disk / "out" / "report.json").read_text())["steps"] == 4


def small_files_only() -> None:
    """As under a quota: no file may have more than 300 KiB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (300 << 10, 300 << 10))


def test_a_limit_of_the_system_is_noticed_like_a_full_disk(command, tmp_path: Path):
    process, log = student_trainer(
        tmp_path, *command, "--output", str(tmp_path / "out"), hook=small_files_only
    )
    process.join(60)
    assert process.exitcode == 1, log.read_text()
    line = log.read_text().splitlines()[-1]
    where = tmp_path / "out"
    assert line.startswith(f"student-trainer: no room for the student in {where}: File too large")
    assert "Traceback" not in log.read_text()
    assert not where.exists()
