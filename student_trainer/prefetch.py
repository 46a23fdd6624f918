"""Bounded look-ahead: the next pairs are made, and copied to the device, while the student trains."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from logit_codec import Targets

T = TypeVar("T")


def prefetch(
    iterator: Iterable[T], *, ahead: int = 4, device: torch.device | str | None = None
) -> Iterator[T]:
    """The items of `iterator`, made up to `ahead` items early by a thread of their own.

    With `device`, tensors and Targets inside tuples, lists and dicts are moved to it. The source
    runs in that thread. An error of the source is raised where its item would have been.
    """
    if ahead < 1:
        raise ValueError(f"ahead must be at least 1, got {ahead}")
    return _prefetch(iterator, ahead, device)


def _prefetch(iterator: Iterable[T], ahead: int, device: torch.device | str | None) -> Iterator[T]:
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(ahead)
    stopped = threading.Event()

    def put(item: T | None, error: BaseException | None) -> None:
        while not stopped.is_set():
            try:
                ready.put((item, error), timeout=0.1)
                return
            except queue.Full:
                continue

    def fill() -> None:
        source = iter(iterator)
        try:
            for item in source:
                put(item if device is None else _moved(item, device), None)
                if stopped.is_set():
                    return
            put(None, StopIteration())
        except BaseException as error:
            put(None, error)
        finally:
            close = getattr(source, "close", None)
            if close is not None:
                close()

    thread = threading.Thread(target=fill, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        stopped.set()


def _moved(item: Any, device: torch.device | str) -> Any:
    if isinstance(item, Tensor | Targets):
        return item.to(device, non_blocking=True)
    if isinstance(item, tuple | list):
        return type(item)(_moved(part, device) for part in item)
    if isinstance(item, dict):
        return {name: _moved(part, device) for name, part in item.items()}
    return item
