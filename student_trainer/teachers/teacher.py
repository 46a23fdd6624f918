"""Defines `Teacher`, which served, local and recorded teachers implement."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from types import TracebackType
from typing import Any, ClassVar, Self

from torch import Tensor

from logit_codec import IdTable, TargetSpec
from protos import teacher_pb2
from student_trainer.teachers.look_ahead import Window, make_window
from student_trainer.teachers.request import Answer, Wish
from student_trainer.teachers.stream import TargetStream, stream_loader, stream_sequences


class Teacher(ABC):
    """Where targets come from: a service, a model in this process, a record; a context manager."""

    default_ahead: ClassVar[int] = 16
    """Sequences in flight in `stream` unless it says otherwise."""
    default_look_ahead: ClassVar[int | str] = "30s"
    """The same of `stream_batches`."""
    default_targets: str | TargetSpec = "sampled"
    id_tables: Sequence[IdTable] = ()
    """What payloads may be coded with, beside the built-in identity."""

    @property
    @abstractmethod
    def info(self) -> teacher_pb2.TeacherInfo:
        """Who the teacher is: what Describe says."""

    @abstractmethod
    def submit(self, token_ids: Tensor, rows: Tensor | None, wish: Wish) -> "Future[Answer]":
        """Asks for one sequence: (L,) int64 ids and, if not all rows are wanted, the (N,) int64
        wanted ones."""

    @abstractmethod
    def close(self) -> None:
        """Gives up what is in flight, and what the teacher holds."""

    @abstractmethod
    def check_usable(self) -> None:
        """Raises TeacherError if the teacher is closed, or was made in another process."""

    def make_wish(
        self, targets: str | TargetSpec | None, temperature: float, seed: int, epoch: int
    ) -> Wish:
        """What a stream asks for. Raises InvalidRequest for what is refused in any case."""
        return Wish.of(targets or self.default_targets, temperature, seed, epoch)

    def stream(
        self,
        sequences: Iterable[Any],
        *,
        targets: str | TargetSpec | None = None,
        temperature: float = 1.0,
        seed: int = 0,
        epoch: int = 0,
        ahead: int | None = None,
        interactive: bool = False,
    ) -> TargetStream[Tensor]:
        """(token_ids, targets) of each sequence, in order, with `ahead` sequences in flight.

        token_ids: (L,) int64; targets: L-1 rows, row i is the teacher's distribution of token i+1.
        targets and ahead: by default `default_targets` and `default_ahead` of the teacher.
        interactive: somebody waits for the answers, so a service puts them before the other work of
        the team and, as long as the team uses less than its share, before that of other teams. Raises
        InvalidRequest for what the teacher refuses, TeacherUnavailable after the patience.
        """
        self.check_usable()
        wish = replace(self.make_wish(targets, temperature, seed, epoch), interactive=interactive)
        ahead = self.default_ahead if ahead is None else ahead
        return stream_sequences(self.submit, sequences, wish, ahead, self.check_usable)

    def stream_batches(
        self,
        loader: Iterable[Mapping[str, Any]],
        *,
        targets: str | TargetSpec | None = None,
        temperature: float = 1.0,
        seed: int = 0,
        epoch: int = 0,
        ahead: int | str | Window | None = None,
    ) -> TargetStream[Any]:
        """(batch, targets) of each batch of a loader, in order.

        A batch is a mapping with input_ids and, if it is padded, packed or masked, attention_mask,
        position_ids, cu_seq_lens_q, seq_idx or labels (`Layout.of`); it comes back as it is. The rows
        of `targets` are its trained positions in reading order. A batch with a number under "epoch" is
        of that epoch. ahead: batches in flight, or "30s" for as many as the trainer uses up in that
        time, with at most 512 MiB of batches and targets ("30s,2048MiB": with at most 2 GiB), or a
        window; by default `default_look_ahead`.
        """
        self.check_usable()
        wish = self.make_wish(targets, temperature, seed, epoch)
        ahead = self.default_look_ahead if ahead is None else ahead
        window = make_window(ahead, wish.spec, self.info)
        return stream_loader(self.submit, loader, wish, window, self.check_usable)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
