"""Lets the device of a running replica fail, through the seam by which the engine reaches it."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from logit_codec import Selection
from teacher_server.engine.device import DEVICES, Device, Event

FAULTS = ("thread", "device", "garbage", "allocator", "encoder", "hang")
"""thread: launching ends its thread. device: what was computed cannot be waited for, as after an
error in a kernel. garbage: everything raises an ordinary error. allocator: only a few tokens fit
into memory. encoder: compacting ends the encode thread. hang: launching never returns."""
FITTING_TOKENS = 128
"""What fits with the fault `allocator`."""


class Death(BaseException):
    """Ends a thread: nothing that handles exceptions catches it."""


class _BrokenEvent:
    def synchronize(self) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")


class _DeadlySelection:
    def __getitem__(self, rows: slice) -> Selection:
        raise Death


class FaultyDevice(Device):
    """A CPU that fails as `find_fault()` says, at each of its operations."""

    def __init__(self, device: torch.device, find_fault: Callable[[], str]) -> None:
        super().__init__(device)
        self._find_fault = find_fault

    def queue(self) -> AbstractContextManager[object]:
        match self._find_fault():
            case "thread":
                raise Death
            case "garbage":
                raise ValueError("planted for the test")
            case "hang":
                threading.Event().wait()
        return super().queue()

    def upload(self, tensor: Tensor) -> Tensor:
        if self._find_fault() == "allocator" and len(tensor) > FITTING_TOKENS:
            raise torch.OutOfMemoryError("planted for the test")
        return super().upload(tensor)

    def download(self, selection: Selection) -> Selection:
        if self._find_fault() == "encoder":
            return _DeadlySelection()  # type: ignore[return-value]
        return super().download(selection)

    def mark(self) -> Event:
        return _BrokenEvent() if self._find_fault() == "device" else super().mark()


def install_faults(signs: Path) -> None:
    """Runs in a service: its device has the fault that `signs / PORT` names, as long as it does."""
    from teacher_server.replica import Replica

    start = Replica.start
    ports: list[int] = []

    async def started(self: Replica, *arguments, **options) -> int:
        ports.append(await start(self, *arguments, **options))
        return ports[0]

    def find_fault() -> str:
        try:
            return (signs / str(ports[0])).read_text() if ports else ""
        except OSError:
            return ""

    Replica.start = started
    DEVICES["cpu"] = partial(FaultyDevice, find_fault=find_fault)
