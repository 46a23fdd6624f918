"""Makes the negative control: a teacher whose targets are in the wrong places."""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
import xxhash

from logit_codec import Targets, TargetSpec, TeacherHead
from protos import teacher_pb2
from student_trainer.teachers.look_ahead import LookAhead
from student_trainer.teachers.request import Answer, Piece, ScoreOptions
from student_trainer.teachers.stream import TargetStream
from student_trainer.teachers.teacher import Teacher


class ShuffledTeacher(Teacher):
    """Gives the rows of each batch's targets in another order.

    The loss, the bytes and the tokens are the same, but no row has the targets that belong to it. A
    student of these must be worse than one of the targets as they are; if it is not, what helped was
    not what the teacher knows about the text.
    """

    def __init__(self, teacher: Teacher, *, seed: int) -> None:
        self._teacher = teacher
        self._seed = seed
        self.counters = getattr(teacher, "counters", None)
        self.column = getattr(teacher, "column", None)

    @property
    def info(self) -> teacher_pb2.TeacherInfo:
        return self._teacher.info

    def submit(self, piece: Piece, options: ScoreOptions) -> "Future[Answer]":
        return self._teacher.submit(piece, options)

    def close(self) -> None:
        """Leaves the teacher as it is: it belongs to somebody else."""

    def head(self) -> TeacherHead:
        return self._teacher.head()

    def check_usable(self) -> None:
        self._teacher.check_usable()

    def make_options(
        self, targets: str | TargetSpec | None, temperature: float, seed: int, epoch: int
    ) -> ScoreOptions:
        return self._teacher.make_options(targets, temperature, seed, epoch)

    def stream_batches(
        self,
        loader: Iterable[Mapping[str, Any]],
        *,
        ahead: int | str | LookAhead | None = None,
        **options: Any,
    ) -> "TargetStream[Any]":
        """Yields the pairs of the teacher, shuffled. Raises ValueError for a batch of one row."""
        pairs = self._teacher.stream_batches(loader, ahead=ahead, **options)
        return _ShuffledStream(pairs, self._seed)  # type: ignore[return-value]


class _ShuffledStream(Iterator[tuple[Any, Targets]]):
    def __init__(self, pairs: TargetStream[Any], seed: int) -> None:
        self._pairs = pairs
        self._seed = seed
        self.close = pairs.close

    def __next__(self) -> tuple[Any, Targets]:
        batch, targets = next(self._pairs)
        return batch, shuffle(batch, targets, self._seed)


def shuffle(batch: Mapping[str, Any], targets: Targets, seed: int) -> Targets:
    """Returns the rows in an order that depends on the seed and the batch alone: none stays in place.

    Raises ValueError for targets of one row, which has no other place.
    """
    if targets.num_rows < 2:
        raise ValueError("targets of a single row cannot be shuffled: make batches larger")
    ids = torch.as_tensor(batch["input_ids"]).cpu().contiguous()
    # Not torch's generator: that one looks at the low 32 bits of a seed only.
    chance = np.random.default_rng((seed, xxhash.xxh3_64_intdigest(ids.numpy().tobytes())))
    cycle_R = torch.from_numpy(chance.permutation(targets.num_rows))
    order_R = torch.empty_like(cycle_R)
    order_R[cycle_R] = cycle_R.roll(1)  # one cycle through all rows
    return targets[order_R]
