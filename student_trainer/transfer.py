"""Copies what a step needs to the device, in such a way that the host waits for no copy.

Copies to a GPU come from pinned memory, and those of `prefetch` run on a stream beside the student's.
For other devices the code is the same, and their stream does nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from logit_codec import SparseTargets, Targets

_MOST_ENTRIES = WeakTensorKeyDictionary()
"""Of targets that were moved, by their row_splits: counted on the host, where nothing waits for it."""


class CopyStream(Protocol):
    """Runs copies beside the student's work, in the order in which they are issued."""

    def issue(self) -> AbstractContextManager[Any]:
        """Makes copies that are issued in the block run here."""
        ...

    def mark(self) -> Any:
        """Returns a mark behind everything that was issued so far."""
        ...

    def join(self, mark: Any, tensors: Sequence[Tensor]) -> None:
        """Lets the student's work from here on use `tensors`, whose copies are before the mark.

        The device waits for the copies, the host does not. Called in the student's thread.
        """
        ...


class CudaStream:
    """A CUDA stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def issue(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream)

    def mark(self) -> Any:
        return self._stream.record_event()

    def join(self, mark: Any, tensors: Sequence[Tensor]) -> None:
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_event(mark)
        for tensor in tensors:
            # Else this stream might reuse the memory while the student's still reads it.
            tensor.record_stream(current)


class NoStream:
    """Of a device whose copies are done when the call that makes them returns."""

    def issue(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def mark(self) -> None:
        return None

    def join(self, mark: None, tensors: Sequence[Tensor]) -> None:
        return None


def open_copy_stream(device: torch.device) -> CopyStream:
    """Returns a stream for copies to the device; call it in the thread that chose the device."""
    return CudaStream(device) if device.type == "cuda" else NoStream()


class Transfer:
    """An item on its way to the device."""

    def __init__(self, item: Any, device: torch.device, stream: CopyStream) -> None:
        """Issues the copies of all tensors of the item."""
        self._stream = stream
        self._tensors: list[Tensor] = []

        def copy(tensor: Tensor) -> Tensor:
            copied = copy_to(tensor, device)
            self._tensors.append(copied)
            return copied

        with stream.issue():
            self._item = move_tensors(item, copy)
            self._mark = stream.mark()

    def finish(self) -> Any:
        """Returns the item, for the student's work that follows."""
        self._stream.join(self._mark, self._tensors)
        return self._item


def copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor to the device, unless it is there; the host does not wait for a GPU."""
    if device.type != "cuda":
        return tensor.to(device)
    # From other memory, the copy would begin only when all work before it is done.
    source = tensor if tensor.is_cuda else tensor.pin_memory()
    return source.to(device, non_blocking=True)


def move_to_device(item: Any, device: torch.device) -> Any:
    """Copies the tensors of an item to the device, in the order of the student's own work there."""
    return move_tensors(item, lambda tensor: copy_to(tensor, device))


def move_tensors(item: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """Applies `move` to each tensor of an item, also inside Targets, tuples, lists and dicts."""
    if isinstance(item, Tensor):
        return move(item)
    if isinstance(item, Targets):
        moved = item.map_tensors(move)
        if isinstance(item, SparseTargets) and isinstance(moved, SparseTargets):
            _remember_most_entries(item, moved)
        return moved
    if isinstance(item, tuple | list):
        parts = [move_tensors(part, move) for part in item]
        return type(item)(*parts) if hasattr(item, "_fields") else type(item)(parts)
    if isinstance(item, Mapping):
        return {name: move_tensors(part, move) for name, part in item.items()}
    return item


def _remember_most_entries(targets: SparseTargets, moved: SparseTargets) -> None:
    if targets.device.type == "cpu" and moved.device.type != "cpu":
        _MOST_ENTRIES[moved.row_splits] = most_entries(targets)


def most_entries(targets: Targets) -> int:
    """Returns K, the most entries of a row; of targets on a device, it was counted before the move.

    Targets that are made on a device, or brought there in another way, are waited for.
    """
    if not isinstance(targets, SparseTargets) or not len(targets.token_ids):
        return 0
    known = _MOST_ENTRIES.get(targets.row_splits)
    return int(targets.row_splits.diff().max()) if known is None else known
