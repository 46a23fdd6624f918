"""Makes the next items, and copies them to the device, while the student trains."""

import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from logit_codec import Targets
from student_trainer.errors import TeacherError
from student_trainer.teachers.position import is_stateful, read_position

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
        self, source: Iterable[T], ahead: int, device: torch.device | str | None = None
    ) -> None:
        self._source = source
        self._stateful = is_stateful(source)
        self._device = None if device is None else torch.device(device)
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
        return item() if isinstance(item, _CopyInFlight) else item

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
        if device.type != "cuda":
            return lambda item: move_tensors(
                item, lambda tensor: tensor.to(device, non_blocking=True)
            )
        side = torch.cuda.Stream(device)
        return lambda item: _CopyInFlight(item, device, side)


class _CopyInFlight:
    """Copies an item to the GPU on a side stream; calling it hands the item to the trainer's stream."""

    def __init__(self, item: Any, device: torch.device, side: torch.cuda.Stream) -> None:
        self._device = device
        self._tensors: list[Tensor] = []

        def copy(tensor: Tensor) -> Tensor:
            if not tensor.is_cuda:
                tensor = tensor.pin_memory()
            copied = tensor.to(device, non_blocking=True)
            self._tensors.append(copied)
            return copied

        with torch.cuda.stream(side):
            self._item = move_tensors(item, copy)
            self._copied = side.record_event()

    def __call__(self) -> Any:
        current = torch.cuda.current_stream(self._device)
        # The trainer's stream waits for the copy on the device; the host does not.
        current.wait_event(self._copied)
        for tensor in self._tensors:
            # Else the side stream might reuse the memory while the trainer's still reads it.
            tensor.record_stream(current)
        return self._item


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


def move_to_device(item: Any, device: torch.device) -> Any:
    """Copies the tensors of an item to the device; the host does not wait for copies to a GPU."""

    def copy(tensor: Tensor) -> Tensor:
        if device.type != "cuda" or tensor.is_cuda:
            return tensor.to(device)
        return tensor.pin_memory().to(device, non_blocking=True)

    return move_tensors(item, copy)


def move_tensors(item: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """Applies `move` to each tensor of an item, also inside Targets, tuples, lists and dicts."""
    if isinstance(item, Tensor):
        return move(item)
    if isinstance(item, Targets):
        return replace(item, **{name: move(part) for name, part in item._tensors().items()})
    if isinstance(item, tuple | list):
        parts = [move_tensors(part, move) for part in item]
        return type(item)(*parts) if hasattr(item, "_fields") else type(item)(parts)
    if isinstance(item, Mapping):
        return {name: move_tensors(part, move) for name, part in item.items()}
    return item
