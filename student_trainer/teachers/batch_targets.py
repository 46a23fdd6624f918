"""Takes the batches of one pass over a loader early, and asks for their targets well in advance.

What is taken and not handed out yet is bounded, whether it is trained or not: in number and, with a
look-ahead in seconds, in bytes of batches and targets together. Some loaders communicate with all
ranks for each batch (accelerate's dispatcher reads on one rank and sends to the others). From those,
every rank takes the same number of batches at the same places, whatever its own clock says.

Letters: R trained rows.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from logit_codec import Targets
from student_trainer.errors import ProtocolError
from student_trainer.teachers.in_order import nbytes_of
from student_trainer.teachers.layout import Layout, spread_columns
from student_trainer.teachers.look_ahead import LookAhead, make_look_ahead
from student_trainer.teachers.request import Answer, ScoreOptions
from student_trainer.teachers.teacher import Teacher
from student_trainer.teachers.view import TeacherView

Agree = Callable[[int, int], tuple[int, int]]
"""Takes how many batches this rank wants ahead and has room for; returns the most that any rank wants and
the least that any has room for."""


@dataclass(frozen=True, slots=True, eq=False)
class Taken:
    """Holds a batch that came from the loader."""

    batch: Any
    rows: Tensor
    """(R,) int64: the trained positions of the flattened batch, in reading order."""
    labels: Tensor
    """(R,) int64: the tokens that follow them."""
    num_without: int
    """Tokens, padding aside, that are not trained."""
    largest_id: int
    """The largest id in the batch."""
    is_written: bool = False
    """Whether the student wrote what is trained."""

    @classmethod
    def of(cls, batch: Mapping[str, Any], *, is_written: bool = False) -> "Taken":
        """Reads what is trained of a batch. Raises InvalidRequest if it is not a batch."""
        layout = Layout.of(batch)
        rows = layout.trained.flatten().nonzero()[:, 0]
        labels = layout.labels.flatten()[rows + 1]
        num_without = int(layout.real.sum()) - len(rows)
        return cls(batch, rows, labels, num_without, int(layout.ids.max()), is_written)

    @property
    def is_trained(self) -> bool:
        """Whether anything of the batch is trained."""
        return len(self.rows) > 0

    @property
    def nbytes(self) -> int:
        """The memory of all of it."""
        return nbytes_of(self.batch) + self.rows.nbytes + self.labels.nbytes


class BatchTargets:
    """Takes batches from a loader and asks a teacher for their targets; `take` hands both out."""

    def __init__(
        self,
        batches: Iterator[Any],
        teacher: Teacher,
        options: ScoreOptions,
        ahead: int | str,
        *,
        agree: Agree | None = None,
        view: TeacherView | None = None,
    ) -> None:
        """teacher: anything with info and stream_batches will do. agree: called by every `take`, if all
        ranks must take from the loader together. view: what the teacher reads instead of the batches.
        Raises InvalidRequest."""
        self._batches = batches
        self._agree = agree
        self._look_ahead = make_look_ahead(ahead, options.spec, teacher.info)
        self._waiting: deque[Taken] = deque()
        """Taken from the loader and not handed out."""
        self._unasked: deque[Taken] = deque()
        """Those of them that must be asked for and are not yet."""
        self._in_flight = 0
        self._num_untrained = 0
        """How many of the waiting batches have nothing to train."""
        self._last_size = 0, 0
        """The rows and bytes of the last batch that was taken."""
        self._ended = False

        # Only where it is needed: other teachers need not know of views.
        viewed: dict[str, Any] = {} if view is None else {"teacher_view": view}

        def ask(
            source: Iterator[Any], ahead: int | str | LookAhead
        ) -> Iterator[tuple[Any, Targets]]:
            return iter(
                teacher.stream_batches(
                    source,
                    targets=str(options.spec),
                    temperature=options.temperature,
                    seed=options.seed,
                    epoch=options.epoch,
                    ahead=ahead,
                    **viewed,
                )
            )

        if isinstance(teacher, Teacher):
            self._stream = ask(self._batches_to_ask(), _WithinBatches(self))
        elif agree is None:
            self._stream = ask(self._batches_to_ask(), ahead)
        else:  # other teachers pull as they like, so each stream gets a single batch
            self._stream = (next(ask(iter([batch]), 1)) for batch in self._batches_to_ask())

    @property
    def in_flight(self) -> int:
        """Batches that were asked for and not handed out."""
        return self._in_flight

    def take(self, count: int) -> list[tuple[Taken, Targets | None]]:
        """Returns the next batches, fewer at the end; without targets where nothing is trained.

        Raises what the loader and the teacher raise.
        """
        if self._agree is not None:
            self._pull_to(count)
            wanted = self._look_ahead.size + self._num_untrained
            self._pull_to(min(self._agree(wanted, len(self._waiting) + self._estimate_room())))
        pairs: list[tuple[Taken, Targets | None]] = []
        while len(pairs) < count and (self._waiting or self._pull()):
            targets = self._next_targets() if self._waiting[0].is_trained else None
            taken = self._waiting.popleft()
            self._num_untrained -= not taken.is_trained
            self._look_ahead.hold(-taken.nbytes)
            pairs.append((taken, targets))
        return pairs

    def close(self) -> None:
        """Gives up what is in flight."""
        close = getattr(self._stream, "close", None)
        if close is not None:
            close()
        self._waiting.clear()
        self._unasked.clear()

    def _next_targets(self) -> Targets:
        """Waits for the targets of the oldest batch that was asked for."""
        pair = next(self._stream, None)
        if pair is None:
            raise ProtocolError("the teacher's stream ended before the batches did")
        self._in_flight -= 1
        return pair[1]

    def _pull_to(self, count: int) -> None:
        """Takes batches until this many wait, or the loader ends."""
        while len(self._waiting) < count and self._pull():
            pass

    def _pull(self) -> bool:
        """Takes a batch from the loader; False at its end."""
        batch = None if self._ended else next(self._batches, None)
        if batch is None:
            self._ended = True
            return False
        taken = Taken.of(batch)
        self._last_size = len(taken.rows), taken.nbytes
        self._look_ahead.hold(taken.nbytes)
        self._waiting.append(taken)
        if taken.is_trained:
            self._unasked.append(taken)
        else:
            self._num_untrained += 1
        return True

    def _estimate_room(self) -> int:
        """Estimates how many more batches like the last one may be held."""
        return self._look_ahead.room_for(*self._last_size)

    def _batches_to_ask(self) -> Iterator[Any]:
        """Yields batches to the stream; it pulls when it wants to ask for more."""
        while self._unasked or (self._agree is None and self._pull()):
            if self._unasked:
                self._in_flight += 1
                yield spread_columns(self._unasked.popleft().batch)

    def _fill(self, size: int) -> int:
        """Returns how many of `size` batches can be in flight now.

        Takes batches first, as many as there is room for, if the loader belongs to this rank alone.
        """
        while (
            self._agree is None
            and self._in_flight < size
            and not self._unasked
            and self._num_untrained <= size
            and (not self._waiting or self._estimate_room() >= 1)
        ):
            if not self._pull():
                break
        return min(size, self._in_flight + len(self._unasked))


class _WithinBatches(LookAhead):
    """Restricts a look-ahead to the batches that there are; the stream asks with it."""

    def __init__(self, batches: BatchTargets) -> None:
        self._fill = batches._fill
        self._look_ahead = batches._look_ahead

    @property
    def size(self) -> int:  # type: ignore[override]
        return self._fill(self._look_ahead.size)

    def has_room(self, num_tokens: int, num_rows: int, nbytes: int = 0) -> bool:
        return self._look_ahead.has_room(num_tokens, num_rows)  # a batch is held since it was taken

    def add_request(self, future: "Future[Answer]", num_tokens: int, num_rows: int) -> None:
        self._look_ahead.add_request(future, num_tokens, num_rows)

    def wait(self, futures: "Collection[Future[Answer]]") -> bool:
        return self._look_ahead.wait(futures)

    def hand_out(self, nbytes: int) -> None:
        self._look_ahead.hand_out(nbytes)
