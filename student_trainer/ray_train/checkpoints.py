"""Reads and writes checkpoints through `ray.train`."""

import json
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import nn

from student_trainer.disk import writing
from student_trainer.training import checkpoint
from student_trainer.training.ranks import unwrapped

if TYPE_CHECKING:
    import ray.train
from student_trainer.ray_train.job import _Job

logger = logging.getLogger(__name__)


SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Where Ray Train notes which checkpoints there are."""


def _mended(job: _Job) -> _Job:
    """The job, with the newest checkpoint if Ray's note of what there is was damaged by a kill.

    Ray Train writes it in place, and refuses a folder in which it is cut off.
    """
    snapshot = job.folder / SNAPSHOT
    try:
        noted = json.loads(snapshot.read_text())["checkpoint_results"]
        if all((job.folder / one["checkpoint_dir_name"]).is_dir() for one in noted):
            return job
    except FileNotFoundError:
        return job  # a checkpoint that was not noted may be half of one
    except (ValueError, KeyError, TypeError, RecursionError):
        logger.warning("%s is damaged: going on from the newest checkpoint beside it", snapshot)
    snapshot.unlink(missing_ok=True)
    found = checkpoint.all_in(job.folder)
    return replace(job, found=found[-1] if found else None)


def newest_step(folder: Path) -> int | None:
    """The last checkpoint that Ray noted in the folder of a student; None if there is none."""
    try:
        noted = json.loads((folder / SNAPSHOT).read_text())["checkpoint_results"]
        steps = [int(one["checkpoint_dir_name"].removeprefix("step-")) for one in noted]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return max(steps, default=None)


def _seed_of(*numbers: int) -> int:
    """Of a generator of torch, whose one for the CPU looks at the low 32 bits only."""
    return xxhash.xxh32_intdigest(" ".join(map(str, numbers)).encode())


class _Checkpoints:
    """The checkpoints of a run as Ray Train keeps them; what `trainer.train` needs of them.

    The files of checkpoint.py, of the first worker, and random-N.pt: the generators of worker N.
    """

    def __init__(self, job: _Job, rank: int) -> None:
        self._job = job
        self._rank = rank

    def newest(self) -> "ray.train.Checkpoint | None":
        """The one to go on from."""
        import ray.train

        found = ray.train.get_checkpoint()
        if found is None and self._job.found is not None:
            found = ray.train.Checkpoint(self._job.found)
        return found

    def is_due(self, step: int, steps: int) -> bool:
        """Whether to save behind `step`; the last always is: the student comes from there."""
        every = self._job.config.checkpoint_every
        return step == steps or (every > 0 and step % every == 0)

    def load(self, student: nn.Module) -> dict[str, Any] | None:
        """As `Checkpoints.load`."""
        newest = self.newest()
        if newest is None:
            return None
        with newest.as_directory() as name:
            state = checkpoint.read(
                *(Path(name), unwrapped(student), self._job.identity),
                where=newest.path,
                before=checkpoint.older(Path(newest.path)),
            )
            own = Path(name) / f"random-{self._rank}.pt"
            if own.exists():
                state["random"] = torch.load(own, weights_only=True)
            else:  # there were fewer workers
                torch.manual_seed(_seed_of(self._job.config.seed, self._rank, state["step"]))
                state["random"] = checkpoint.random_states()
        return state

    def save(self, step: int, student: nn.Module, state: Mapping[str, Any]) -> None:
        """All workers together; returns when it is written."""
        import ray.train

        with tempfile.TemporaryDirectory(prefix="student-step-") as name:
            folder = Path(name)
            torch.save(checkpoint.random_states(), folder / f"random-{self._rank}.pt")
            if self._rank == 0:
                with writing(folder, f"the checkpoint of step {step} to {folder}"):
                    checkpoint.write(folder, unwrapped(student), state, self._job.identity)
            metrics = {"step": step, "loss": state["run"]["train_losses"][-1]}
            if state["run"]["curve"]:
                metrics["held_out_loss"] = state["run"]["curve"][-1][1]
            ray.train.report(
                metrics,
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                checkpoint_dir_name=f"step-{step}",
            )
