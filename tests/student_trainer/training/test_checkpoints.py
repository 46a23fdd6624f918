"""Checkpoints: whole, or not there, wherever the process is killed."""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest

from student_trainer.hf.checkpoints import read_step
from student_trainer.training import checkpoints
from student_trainer.training.progress import Counts

IDENTITY = {"seed": 1}
NAMES = ("model.safetensors", "optimizer.pt", "trainer_state.json")


class Killed(BaseException):
    """The end of the process."""


class KillAtLine:
    """Ends whatever runs in checkpoints.py at the n-th line of it; a context manager."""

    def __init__(self, line: int) -> None:
        self.left = line

    def __enter__(self) -> None:
        self.before = sys.gettrace()
        sys.settrace(self.trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)

    def trace(self, frame: FrameType, event: str, _: object):
        if frame.f_code.co_filename != checkpoints.__file__:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise Killed
        return self.trace


def save(folder: Path, step: int, keep: int = 2, also: str | None = None) -> Path:
    """As a Trainer does: its own files first, which tell the step, and a part in a folder."""
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "shards").mkdir(parents=True, exist_ok=True)
    for name in (*NAMES, "shards/0"):
        (checkpoint / name).write_text(f"{step} of {name}")
    (checkpoint / NAMES[0]).chmod(0o600)
    checkpoints.seal(checkpoint, IDENTITY, Counts(tokens=step))
    checkpoints.rotate(folder, keep, also=also)
    return checkpoint


def load(folder: Path) -> int:
    """Returns the step of the newest checkpoint, which must be whole."""
    newest = checkpoints.find_newest(folder)
    assert newest is not None
    step = checkpoints.check(newest, IDENTITY).tokens
    assert read_step(newest) == step
    assert all((newest / name).read_text() == f"{step} of {name}" for name in NAMES)
    return step


def killed_at_every_line(folder: Path, act: Callable[[Path], object]) -> list[int]:
    """Returns the step that is resumed from after a kill at each line of what `act` does."""
    found = []
    for line in itertools.count(1):
        place = folder / str(line)
        for step in (2, 4):
            save(place, step)
        try:
            with KillAtLine(line):
                act(place)
        except Killed:
            found.append(load(place))
            for step in (6, 8):
                save(place, step)
            assert {path.name for path in place.iterdir()} == {"checkpoint-6", "checkpoint-8"}
        else:
            return found
    raise AssertionError


# Killed as it enters a `with`, nobody closes the file: that is not what is tested.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_killed_at_any_line_of_a_save_it_leaves_a_whole_checkpoint(tmp_path: Path):
    found = killed_at_every_line(tmp_path, lambda folder: save(folder, 6))
    assert len(found) > 20
    assert set(found) == {4, 6}
    assert found[-1] == 6


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_killed_at_any_line_of_a_load_it_can_be_loaded_again(tmp_path: Path):
    def begin(folder: Path) -> None:
        (folder / "checkpoint-9").mkdir()
        load(folder)

    found = killed_at_every_line(tmp_path, begin)
    assert len(found) > 20
    assert set(found) == {4}


@pytest.mark.parametrize("name", [*NAMES, "shards/0", "run.json"])
def test_a_byte_that_changed_is_noticed_wherever_it_is(tmp_path: Path, name: str):
    path = save(tmp_path, 2)
    whole = (path / name).read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 100)):
        changed = bytearray(whole)
        changed[place] ^= 1
        (path / name).write_bytes(changed)
        with pytest.raises(ValueError, match=r"is damaged|is missing|belongs to another run"):
            load(tmp_path)
    (path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"checkpoint-2/{name} is damaged"):
        load(tmp_path)
    (path / name).write_bytes(whole)
    assert load(tmp_path) == 2


def test_whoever_may_read_the_settings_may_read_the_weights(tmp_path: Path):
    path = save(tmp_path, 2)
    assert len({file.stat().st_mode for file in path.iterdir() if file.is_file()}) == 1


def test_the_best_checkpoint_is_kept_too(tmp_path: Path):
    for step in (2, 4, 6, 8):
        save(tmp_path, step, keep=1, also=str(tmp_path / "checkpoint-4"))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", "checkpoint-8"}
