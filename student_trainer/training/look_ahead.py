"""The batches of one pass over a loader, taken early, with their targets asked for well before.

What is taken and not handed out yet is bounded, whether anything of it is trained or not: in number
and, with a look-ahead in seconds, in bytes of batches and targets together. Some loaders do something
with all ranks for each batch (accelerate's dispatcher reads on one rank and sends to the others). From
those every rank takes as many, at the same places, whatever its own clock says.

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
from student_trainer.teachers.layout import Layout
from student_trainer.teachers.look_ahead import Window, make_window
from student_trainer.teachers.request import Answer, Wish
from student_trainer.teachers.stream import nbytes_of
from student_trainer.teachers.teacher import Teacher

Agree = Callable[[int, int], tuple[int, int]]
"""(batches wanted ahead, batches that there is room for) of this rank -> the most wanted by any rank, and
the least that any has room for."""


@dataclass(frozen=True, slots=True, eq=False)
class Taken:
    """A batch that came from the loader."""

    batch: Any
    rows: Tensor
    """(R,) int64: the trained positions of the flattened batch, in reading order."""
    labels: Tensor
    """(R,) int64: the tokens that come behind them."""
    num_without: int
    """Tokens, padding aside, that are not trained."""
    largest_id: int

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> "Taken":
        """Raises InvalidRequest if it is no batch."""
        layout = Layout.of(batch)
        rows = layout.trained.flatten().nonzero()[:, 0]
        labels = layout.labels.flatten()[rows + 1]
        num_without = int(layout.real.sum()) - len(rows)
        return cls(batch, rows, labels, num_without, int(layout.ids.max()))

    @property
    def is_trained(self) -> bool:
        """Whether anything of it is."""
        return len(self.rows) > 0

    @property
    def nbytes(self) -> int:
        """Memory of all of it."""
        return nbytes_of(self.batch) + self.rows.nbytes + self.labels.nbytes


class LookAhead:
    """Takes batches from a loader and asks a teacher for their targets; `take` hands both out."""

    def __init__(
        self,
        batches: Iterator[Any],
        teacher: Teacher,
        wish: Wish,
        ahead: int | str,
        *,
        agree: Agree | None = None,
    ) -> None:
        """teacher: also anything else with info and stream_batches. agree: called by every `take`, if
        all ranks have to take from the loader together. Raises InvalidRequest."""
        self._batches = batches
        self._agree = agree
        self._window = make_window(ahead, wish.spec, teacher.info)
        self._waiting: deque[Taken] = deque()
        """Taken from the loader and not handed out."""
        self._unasked: deque[Taken] = deque()
        """Of these, what is to be asked for and is not yet."""
        self._in_flight = 0
        self._num_untrained = 0
        """Of what waits."""
        self._last_size = 0, 0
        """Rows and bytes of the last batch that was taken."""
        self._ended = False

        def ask(source: Iterator[Any], ahead: int | str | Window) -> Iterator[tuple[Any, Targets]]:
            return iter(
                teacher.stream_batches(
                    source,
                    targets=str(wish.spec),
                    temperature=wish.temperature,
                    seed=wish.seed,
                    epoch=wish.epoch,
                    ahead=ahead,
                )
            )

        if isinstance(teacher, Teacher):
            self._stream = ask(self._to_ask(), _Within(self))
        elif agree is None:
            self._stream = ask(self._to_ask(), ahead)
        else:  # others take what they like, and so must not be given more than one
            self._stream = (next(ask(iter([batch]), 1)) for batch in self._to_ask())

    @property
    def in_flight(self) -> int:
        """Batches that were asked for and not handed out."""
        return self._in_flight

    def take(self, count: int) -> list[tuple[Taken, Targets | None]]:
        """The next batches, fewer at the end; without targets where nothing is trained.

        Raises what the loader and the teacher raise.
        """
        if self._agree is not None:
            self._pull_to(count)
            wanted = self._window.size + self._num_untrained
            self._pull_to(min(self._agree(wanted, len(self._waiting) + self._room())))
        found: list[tuple[Taken, Targets | None]] = []
        while len(found) < count and (self._waiting or self._pull()):
            targets = self._next_targets() if self._waiting[0].is_trained else None
            taken = self._waiting.popleft()
            self._num_untrained -= not taken.is_trained
            self._window.hold(-taken.nbytes)
            found.append((taken, targets))
        return found

    def close(self) -> None:
        """Gives up what is in flight."""
        close = getattr(self._stream, "close", None)
        if close is not None:
            close()
        self._waiting.clear()
        self._unasked.clear()

    def _next_targets(self) -> Targets:
        pair = next(self._stream, None)
        if pair is None:
            raise ProtocolError("the teacher's stream ended before the batches did")
        self._in_flight -= 1
        return pair[1]

    def _pull_to(self, count: int) -> None:
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
        self._window.hold(taken.nbytes)
        self._waiting.append(taken)
        if taken.is_trained:
            self._unasked.append(taken)
        else:
            self._num_untrained += 1
        return True

    def _room(self) -> int:
        """About how many more batches may be held, if they are like the last."""
        return self._window.room_for(*self._last_size)

    def _to_ask(self) -> Iterator[Any]:
        """The source of the stream."""
        while self._unasked or (self._agree is None and self._pull()):
            if self._unasked:
                self._in_flight += 1
                yield self._unasked.popleft().batch

    def _fill(self, size: int) -> int:
        """Of so many batches that are wanted in flight, how many can be now. Takes from a loader of
        this rank alone what there is room for."""
        while (
            self._agree is None
            and self._in_flight < size
            and not self._unasked
            and self._num_untrained <= size
            and (not self._waiting or self._room() >= 1)
        ):
            if not self._pull():
                break
        return min(size, self._in_flight + len(self._unasked))


class _Within(Window):
    """The look-ahead's window, as far as there are batches: what its stream asks for."""

    def __init__(self, ahead: LookAhead) -> None:
        self._fill = ahead._fill
        self._window = ahead._window

    @property
    def size(self) -> int:  # type: ignore[override]
        return self._fill(self._window.size)

    def has_room(self, num_tokens: int, num_rows: int, nbytes: int = 0) -> bool:
        return self._window.has_room(num_tokens, num_rows)  # a batch is held since it was taken

    def asked(self, future: "Future[Answer]", num_tokens: int, num_rows: int) -> None:
        self._window.asked(future, num_tokens, num_rows)

    def wait(self, futures: "Collection[Future[Answer]]") -> bool:
        return self._window.wait(futures)

    def handed_out(self, nbytes: int) -> None:
        self._window.handed_out(nbytes)
