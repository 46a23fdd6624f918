"""Describes what the workers of one student train, and what they return."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from student_trainer.config import TrainConfig
from student_trainer.training.results import StudentResults

if TYPE_CHECKING:
    import ray.train


FOLDER = "ray_train"
"""In the output folder: what Ray Train keeps."""


@dataclass(frozen=True, slots=True)
class _Job:
    """What every worker is told about one student."""

    config: TrainConfig
    name: str
    texts: Path
    """A file with the sequences of the run, and the teacher's likeliest ids of those held out: read
    where it is, not sent to each worker."""
    tokenizer: Any
    identity: Mapping[str, Any]
    on_gpus: bool
    num_ids: int | None = None
    """Those that student and teacher share."""
    found: Path | None = None
    """A checkpoint that Ray does not know of any more."""

    @property
    def folder(self) -> Path:
        return self.config.output / FOLDER / self.name


@dataclass(frozen=True, slots=True, eq=False)
class _Fitted:
    """What became of one student."""

    results: StudentResults
    bytes_per_token: float | None
    """Of its targets."""
    last: "ray.train.Checkpoint"
