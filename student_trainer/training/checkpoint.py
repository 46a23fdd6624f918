"""Checkpoints of the reference loop: each is whole, or it is not there.

    step-N/student.safetensors    the weights
    step-N/state.pt               optimizers, schedules, random generators, position, curve
    step-N/run.json               what must be the same in a run that goes on from here, and the
                                  digests of the two others

A folder is written under a hidden name, forced to the disk and then renamed, so that a process
that is killed at any time leaves the checkpoint before it as the newest.
"""

import json
import pickle
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from logitstream.files import whole_folder
from student_trainer.disk import writing

DIGEST = "_digest"
"""How the names of those in run.json end that stand for content."""
WEIGHTS, STATE = "student.safetensors", "state.pt"
FILE_DIGESTS = "file_digests"
"""In run.json: of the files beside it."""
UNREADABLE = (
    *(OSError, RuntimeError, EOFError, SafetensorError, KeyError, TypeError, AttributeError),
    *(pickle.UnpicklingError, ValueError),
)
"""What files can raise that are cut off or damaged; JSON that is nested too deep: a RuntimeError."""


class KeepsCheckpoints(Protocol):
    """What `trainer.train` needs: `Checkpoints`, or Ray Train's in ray_train.py."""

    def newest(self) -> object | None:
        """The one to go on from, for a log."""
        ...

    def is_due(self, step: int, steps: int) -> bool:
        """Whether to save behind `step` of `steps`."""
        ...

    def load(self, student: nn.Module) -> dict[str, Any] | None:
        """Puts the newest weights in place and returns the state, if there is one."""
        ...

    def save(self, step: int, student: nn.Module, state: Mapping[str, Any]) -> object:
        """Keeps both; the random generators are added."""
        ...


class Checkpoints:
    """The checkpoints of one run in one folder."""

    def __init__(
        self, folder: Path, *, every: int, identity: Mapping[str, Any], keep: int = 2
    ) -> None:
        """every: steps between two, 0 for none. identity: what JSON can hold, see run.json."""
        self.folder = folder
        self.every = every
        self._keep = keep
        self._identity = json.loads(json.dumps(dict(identity)))

    def newest(self) -> Path | None:
        """The one with the highest step."""
        found = all_in(self.folder)
        return found[-1] if found else None

    def is_due(self, step: int, steps: int) -> bool:
        """Whether to save behind `step` of `steps`; the last is always saved."""
        return self.every > 0 and (step % self.every == 0 or step == steps)

    def save(self, step: int, student: nn.Module, state: Mapping[str, Any]) -> Path:
        """Writes step-N, unless it is there, and removes all but the newest few.

        The random generators are added. Raises NotWritten; then those before it are still there.
        """
        whole = self.folder / f"step-{step}"
        if whole.exists():
            return whole
        with (
            writing(self.folder, f"the checkpoint of step {step} to {self.folder}"),
            whole_folder(whole) as partial,
        ):
            write(partial, student, state, self._identity)
        for old in all_in(self.folder)[: -self._keep]:
            self._remove(old)
        return whole

    def load(self, student: nn.Module) -> dict[str, Any] | None:
        """Puts the newest weights in place and returns the state that was saved with them.

        "random" in it is for `restore_random_states`. None if there is no checkpoint. Raises
        ValueError if it belongs to another run or cannot be read.
        """
        for leftover in self.folder.glob(".step-*.partial"):
            shutil.rmtree(leftover)
        newest = self.newest()
        if newest is None:
            return None
        return read(newest, student, self._identity, before=older(newest))

    def clear(self) -> None:
        """Removes every checkpoint of the folder."""
        for path in (*all_in(self.folder), *self.folder.glob(".step-*.partial")):
            shutil.rmtree(path)

    def _remove(self, checkpoint: Path) -> None:
        """Renamed first: what is killed while it deletes must not leave half a checkpoint."""
        condemned = checkpoint.with_name(f".{checkpoint.name}.partial")
        checkpoint.rename(condemned)
        shutil.rmtree(condemned)


def all_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest last."""
    found = [one for one in folder.glob("step-*") if re.fullmatch(r"step-\d+", one.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step that it was written behind."""
    return int(checkpoint.name.removeprefix("step-"))


def older(checkpoint: Path) -> Path | None:
    """The one before it, if it is there."""
    found = [one for one in all_in(checkpoint.parent) if step_of(one) < step_of(checkpoint)]
    return found[-1] if found else None


def write(
    folder: Path, student: nn.Module, state: Mapping[str, Any], identity: Mapping[str, Any]
) -> None:
    """Puts the three files into a folder; the random generators are added to the state."""
    save_model(student, str(folder / WEIGHTS))
    torch.save({**state, "random": random_states()}, folder / STATE)
    digests = {name: _digest(folder / name) for name in (WEIGHTS, STATE)}
    run = {**identity, FILE_DIGESTS: digests}
    (folder / "run.json").write_text(json.dumps(run, indent=2) + "\n")
    shutil.copymode(folder / "run.json", folder / WEIGHTS)  # safetensors writes for the owner only


def read(
    folder: Path,
    student: nn.Module,
    identity: Mapping[str, Any],
    where: object = None,
    before: Path | None = None,
) -> dict[str, Any]:
    """Puts the weights in place and returns the state.

    where: how the folder is called in what is raised; before: the older checkpoint, if there is
    one. Raises ValueError if it is of another run or cannot be read.
    """
    where = where or folder
    file, state = "run.json", {}
    try:
        saved = json.loads((folder / file).read_text())
        digests = saved.pop(FILE_DIGESTS)
        different = _differences(saved, identity)
        if not different:
            for file in (STATE, WEIGHTS):
                if _digest(folder / file) != digests[file]:
                    raise EOFError("its bytes have changed")
            file = STATE
            # Only tensors and plain values are read back: a file cannot run code here.
            state = torch.load(folder / file, map_location="cpu", weights_only=True)
            file = WEIGHTS
            load_model(student, folder / file)
    except UNREADABLE as error:
        wrong = "is damaged"
        if isinstance(error, FileNotFoundError):
            wrong = "is missing"
        elif isinstance(error, PermissionError):
            wrong = "may not be read by this user"
        what = f"Delete {where} to go on from {before}, or give"
        if isinstance(error, PermissionError):
            what = "Make it readable, or give"
        elif before is None:
            what = "There is no older checkpoint: give"
        raise ValueError(
            f"{where}/{file} {wrong}. {what} --start-over to begin at step 0."
        ) from error
    if different:
        raise _of_another_run(where, different)
    return state


def refuse_another_run(folder: Path, identity: Mapping[str, Any]) -> None:
    """Raises ValueError if the newest checkpoint in a folder is of another run.

    As far as the identity goes: it may lack what is not known yet. One that cannot be read is left
    to `read`, which says what to do.
    """
    newest = next(reversed(all_in(folder)), None)
    if newest is None:
        return
    try:
        found = json.loads((newest / "run.json").read_text())
        saved = {name: found[name] for name in found if name in identity}
    except UNREADABLE:
        return
    if different := _differences(saved, json.loads(json.dumps(dict(identity)))):
        raise _of_another_run(newest, different)


def _of_another_run(where: object, different: list[str]) -> ValueError:
    return ValueError(
        f"{where} belongs to another run: {'; '.join(different)}. Give what it had, "
        "another --output, or --start-over to delete it and begin again."
    )


def _digest(path: Path) -> str:
    if path.stat().st_size == 0:
        return ""
    return xxhash.xxh3_128_hexdigest(np.memmap(path, np.uint8, "r").data)


def _differences(saved: Mapping[str, Any], identity: Mapping[str, Any]) -> list[str]:
    """What is not the same in two runs, in words."""
    names = [*identity, *(name for name in saved if name not in identity)]
    return [
        f"the content of {name.removesuffix(DIGEST)} has changed"
        if name.endswith(DIGEST)
        else f"{name} was {saved.get(name)!r} and is {identity.get(name)!r}"
        for name in names
        if saved.get(name) != identity.get(name)
    ]


def random_states() -> dict[str, Any]:
    """Of all generators of this process, for `restore_random_states`."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],  # type: ignore[union-attr]
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Puts the random generators back where they were when the checkpoint was written.

    To be called behind the first batch of the run that goes on: a loader draws a seed from them
    when it starts.
    """
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
