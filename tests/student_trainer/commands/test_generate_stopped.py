"""`student-trainer generate` that is killed or interrupted in the middle, and started again."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.student_trainer.commands.test_generate import WORDS, read
from tests.support import tiny

PROGRAM = """
import sys
import transformers
from student_trainer import LocalTeacher
from student_trainer.cli import main
from student_trainer.commands import generate
from student_trainer.record import generated

folder, seal_s = sys.argv[1], float(sys.argv[2])


def connect(address, *, tokenizer, **credentials):
    return LocalTeacher(transformers.AutoModelForCausalLM.from_pretrained(folder), tokenizer)


generate.connect, generated.SEAL_S = connect, seal_s
sys.exit(main(["generate", *sys.argv[3:]]))
"""
"""The command, with the teacher in its own process: python -c PROGRAM TEACHER SEAL_S ARGUMENTS..."""
TEXTS = 48


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = tiny.make_tokenizer(WORDS)
    tiny.make_model("Llama", len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def arguments(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """16 prompts, 3 texts of each."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("\n".join(" ".join(WORDS[at : at + 5]) for at in range(16)))
    return [
        *("--teacher", "127.0.0.1:1", "--student", str(teacher_folder), "--prompts", str(prompts)),
        *(
            "--split-lines",
            "--max-new-tokens",
            "24",
            "--num-samples",
            "3",
            "--ahead",
            "2",
            "--json",
        ),
    ]


def start(teacher: Path, seal_s: float, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", PROGRAM, str(teacher), str(seal_s), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def whole(teacher_folder: Path, arguments: list[str], tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("whole") / "set"
    process = start(teacher_folder, 60.0, *arguments, "--output", str(folder))
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert json.loads(printed)["texts"] == TEXTS
    return read(folder)


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_command_that_was_stopped_goes_on_to_the_same_set(
    teacher_folder, arguments, whole, tmp_path: Path, number: signal.Signals
):
    folder = tmp_path / "set"
    process = start(teacher_folder, 0.0, *arguments, "--output", str(folder))
    deadline = time.monotonic() + 120
    while len([*folder.glob("shard-*.parquet")]) < 4:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -number), errors
    count = len(read(folder))
    assert 4 <= count < TEXTS
    if number == signal.SIGINT:
        assert f"interrupted; {count} texts are written in {folder}: run the same" in errors
    again = start(teacher_folder, 60.0, *arguments, "--output", str(folder))
    printed, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    said = json.loads(printed)
    assert (said["texts"], said["already_there"], said["written"]) == (TEXTS, count, TEXTS - count)
    assert read(folder) == whole
    assert f"{TEXTS}/{TEXTS}" in errors  # the bar counts what was there
