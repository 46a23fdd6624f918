"""Checkpoints: whole, or not there, wherever the process is killed."""

import itertools
import sys
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import nn

from student_trainer.training import checkpoint
from student_trainer.training.checkpoint import Checkpoints


class Killed(BaseException):
    """The end of the process."""


class KillAtLine:
    """Ends whatever runs in checkpoint.py at the n-th line of it; a context manager."""

    def __init__(self, line: int) -> None:
        self.left = line

    def __enter__(self) -> None:
        self.before = sys.gettrace()
        sys.settrace(self.trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)

    def trace(self, frame: FrameType, event: str, _: object):
        if frame.f_code.co_filename != checkpoint.__file__:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise Killed
        return self.trace


def student_of(step: int) -> nn.Module:
    """Its weights tell the step."""
    student = nn.Linear(3, 2)
    for parameter in student.parameters():
        nn.init.constant_(parameter, step)
    return student


def checkpoints(folder: Path) -> Checkpoints:
    return Checkpoints(folder, every=2, identity={"seed": 1}, keep=2)


def test_killed_at_any_line_of_a_save_it_leaves_a_whole_checkpoint(tmp_path: Path):
    found = []
    for line in itertools.count(1):
        folder = tmp_path / str(line)
        for step in (2, 4):
            checkpoints(folder).save(step, student_of(step), {"step": step})
        try:
            with KillAtLine(line):
                checkpoints(folder).save(6, student_of(6), {"step": 6})
        except Killed:
            pass
        else:
            break
        student = nn.Linear(3, 2)
        state = checkpoints(folder).load(student)
        assert state is not None
        found.append(state["step"])
        assert torch.equal(student.weight, torch.full((2, 3), float(state["step"])))
        for step in (6, 8):
            checkpoints(folder).save(step, student_of(step), {"step": step})
        assert {path.name for path in folder.iterdir()} == {"step-6", "step-8"}
    assert len(found) > 30
    assert set(found) == {4, 6}
    assert found[-1] == 6


@pytest.mark.parametrize("name", ["state.pt", "student.safetensors", "run.json"])
def test_a_byte_that_changed_is_noticed_wherever_it_is(tmp_path: Path, name: str):
    path = checkpoints(tmp_path).save(2, student_of(2), {"step": 2})
    whole = (path / name).read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 100)):
        changed = bytearray(whole)
        changed[place] ^= 1
        (path / name).write_bytes(changed)
        student = student_of(7)
        with pytest.raises(ValueError, match=r"is damaged|belongs to another run"):
            checkpoints(tmp_path).load(student)
        assert torch.equal(student.weight, student_of(7).weight), "nothing of it was taken"
    (path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"step-2/{name} is damaged"):
        checkpoints(tmp_path).load(student_of(7))
    (path / name).write_bytes(whole)
    assert checkpoints(tmp_path).load(student_of(7)) is not None


def test_whoever_may_read_the_settings_may_read_the_weights(tmp_path: Path):
    path = checkpoints(tmp_path).save(2, student_of(2), {"step": 2})
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1


def test_a_checkpoint_that_is_there_is_not_written_again(tmp_path: Path):
    path = checkpoints(tmp_path).save(2, student_of(2), {"step": 2})
    assert checkpoints(tmp_path).save(2, student_of(3), {"step": 2}) == path
    student = nn.Linear(3, 2)
    checkpoints(tmp_path).load(student)
    assert torch.equal(student.weight, student_of(2).weight)


def test_killed_at_any_line_of_a_load_it_can_be_loaded_again(tmp_path: Path):
    for line in itertools.count(1):
        checkpoints(tmp_path).save(2, student_of(2), {"step": 2})
        (tmp_path / ".step-4.partial").mkdir()
        try:
            with KillAtLine(line):
                checkpoints(tmp_path).load(nn.Linear(3, 2))
        except Killed:
            state = checkpoints(tmp_path).load(nn.Linear(3, 2))
            assert state is not None
            assert state["step"] == 2
            assert [path.name for path in tmp_path.iterdir()] == ["step-2"]
        else:
            break
    assert line > 10
