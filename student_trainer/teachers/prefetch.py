"""Makes the next items, and copies them to the device, while the student trains."""

import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch

from student_trainer.errors import TeacherError
from student_trainer.teachers.position import is_stateful, read_position
from student_trainer.transfer import CopyStream, Transfer, open_copy_stream

T = TypeVar("T")


def prefetch(
    iterator: Iterable[T], *, ahead: int = 4, device: torch.device | str | None = None
) -> "Prefetch[T]":
    """Iterates over `iterator` in a thread of its own, up to `ahead` items early.

    With `device`, tensors and Targets inside tuples, lists and dicts are moved to it; to a GPU they
    are copied from pinned memory on a separate CUDA stream. An error of the source is raised where
    its item would have been.
    """
    if ahead < 1:
        raise ValueError(f"ahead must be at least 1, got {ahead}")
    return Prefetch(iterator, ahead, device)


class Prefetch(Iterator[T]):
    """Iterates over the items in order and has a position; what `prefetch` returns.

    The position counts items that were handed out here, not those that the thread has made. If the
    source has a state, the position is that state at the last of them, and interchangeable with it.
    """

    def __init__(
        self,
        source: Iterable[T],
        ahead: int,
        device: torch.device | str | None = None,
        open_stream: Callable[[torch.device], CopyStream] = open_copy_stream,
    ) -> None:
        self._source = source
        self._stateful = is_stateful(source)
        self._device = None if device is None else torch.device(device)
        self._open_stream = open_stream
        self._ready: queue.Queue[tuple[Any, Any, BaseException | None]] = queue.Queue(ahead)
        self._stopped = threading.Event()
        self._started = False
        self._ended = False
        self._skip = 0
        self._handed_out = 0
        self._state: Any = None

    def __next__(self) -> T:
        if self._ended:
            raise StopIteration
        if not self._started:
            if self._stateful and self._state is None:
                self._state = self._source.state_dict()  # type: ignore[attr-defined]
            # The thread must not hold on to this object: dropping it is what ends the thread.
            threading.Thread(
                target=_fill,
                args=(self._source, self._skip, self._stateful, self._make_move()),
                kwargs={"ready": self._ready, "stopped": self._stopped},
                name="prefetch",
                daemon=True,
            ).start()
            self._started = True
        item, state, error = self._ready.get()
        if error is not None:
            self._ended = True
            raise error
        self._handed_out += 1
        self._state = state
        return item.finish() if isinstance(item, Transfer) else item

    def state_dict(self) -> dict[str, Any]:
        """Returns where to resume after the items that were handed out."""
        if not self._stateful:
            return {"handed_out": self._handed_out}
        if self._state is None:
            return self._source.state_dict()  # type: ignore[attr-defined]
        return self._state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes there: a stateful source is set back, from any other the items are skipped.

        Raises TeacherError after the first item was taken, InvalidRequest for another dict.
        """
        if self._started:
            raise TeacherError("load_state_dict must be called before the first item is taken")
        if self._stateful:
            self._source.load_state_dict(state)  # type: ignore[attr-defined]
            self._state = dict(state)
        else:
            self._skip = self._handed_out = read_position(state)

    def close(self) -> None:
        """Ends the thread, and the source with it."""
        self._ended = True
        self._stopped.set()

    def __del__(self) -> None:
        self._stopped.set()

    def _make_move(self) -> Callable[[Any], Any]:
        """Returns what the thread does with each item to bring it to the device."""
        device = self._device
        if device is None:
            return lambda item: item
        stream = self._open_stream(device)
        return lambda item: Transfer(item, device, stream)


def _fill(
    iterable: Iterable[Any],
    skip: int,
    stateful: bool,
    move: Callable[[Any], Any],
    *,
    ready: "queue.Queue[tuple[Any, Any, BaseException | None]]",
    stopped: threading.Event,
) -> None:
    """Runs in the thread: queues each item with the state of the source after it, until stopped."""

    def put(item: Any, state: Any, error: BaseException | None) -> None:
        # In short waits, so that a stop is noticed while the trainer takes nothing.
        while not stopped.is_set():
            try:
                ready.put((item, state, error), timeout=0.1)
                return
            except queue.Full:
                continue

    source: Any = None
    try:
        source = iter(iterable)
        for item in itertools.islice(source, skip, None):
            state = iterable.state_dict() if stateful else None  # type: ignore[attr-defined]
            put(move(item), state, None)
            if stopped.is_set():
                return
        put(None, None, StopIteration())
    except BaseException as error:
        put(None, None, error)
    finally:
        close = getattr(source, "close", None)
        if close is not None:
            close()
