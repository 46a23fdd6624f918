"""Hides what differs between a CPU and a GPU: where work is queued, and how one waits for it.

The code that launches packs is the same for both. On a CPU an operation is done when it returns, so
there is nothing to wait for and nothing to copy.
"""

import contextlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from logit_codec import Selection
from teacher_server.engine.orders import LostStep
from teacher_server.engine.threads import compute_alone

T = TypeVar("T")


class Event(Protocol):
    """Marks a point in the work that was queued."""

    def synchronize(self) -> None:
        """Waits until the device has passed it. Raises the device's error, if it had one."""


class Device:
    """Queues work on a CPU: everything is done at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._num_threads = torch.get_num_threads()

    def queue(self) -> AbstractContextManager[object]:
        """Returns a context in which work is queued for the device."""
        return contextlib.nullcontext()

    def upload(self, tensor: Tensor) -> Tensor:
        """Copies a tensor from the host to the device, without waiting."""
        return tensor

    def download(self, selection: Selection) -> Selection:
        """Copies what was selected to the host, without waiting; read it after the next event."""
        return selection

    def mark(self) -> Event:
        """Marks this point in the work."""
        return _Moment()

    def seconds_between(self, first: Event, second: Event) -> float:
        """Measures the device's own time between two points that it has passed."""
        assert isinstance(first, _Moment)
        assert isinstance(second, _Moment)
        return second.at - first.at

    def release_memory(self) -> None:
        """Gives memory back that the allocator keeps for later."""

    def use_cores(self) -> None:
        """Lets the calling thread, which launches packs, compute with all threads of the device."""
        torch.set_num_threads(self._num_threads)

    def spare_cores(self) -> None:
        """Lets the calling thread compute without taking threads that the device needs."""
        compute_alone()


class _Moment:
    def __init__(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass


class CudaDevice(Device):
    """Queues work on one stream of a GPU, through memory that the GPU reads and writes directly."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream = torch.cuda.Stream(device)
        # (reduced precision, split-K): a sum that is split is added up in another order.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = (False, False)
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = (False, False)

    def queue(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def upload(self, tensor: Tensor) -> Tensor:
        # The caching allocator of pinned memory does not reuse it before the copy is done.
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def download(self, selection: Selection) -> Selection:
        return selection.to("cpu", non_blocking=True)  # to pinned memory

    def mark(self) -> Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def seconds_between(self, first: Event, second: Event) -> float:
        assert isinstance(first, torch.cuda.Event)
        assert isinstance(second, torch.cuda.Event)
        return first.elapsed_time(second) / 1e3

    def release_memory(self) -> None:
        torch.cuda.empty_cache()

    def use_cores(self) -> None:
        pass

    def spare_cores(self) -> None:
        pass


DEVICES: dict[str, Callable[[torch.device], Device]] = {"cpu": Device, "cuda": CudaDevice}
"""How work is queued, by the type of a torch device. Another kind of accelerator is added here."""


def open_device(device: torch.device) -> Device:
    """Returns what queues work for a device. Raises KeyError for one of no known kind."""
    return DEVICES[device.type](device)


def is_broken(error: BaseException) -> bool:
    """Whether an error means that the device can compute nothing any more.

    A CUDA context does not recover from an error in a kernel: everything after it fails too. Nor do
    ranks that no longer compute the same.
    """
    if isinstance(error, LostStep):
        return True
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, torch.AcceleratorError) or any(
        sign in str(error)
        for sign in ("CUDA error", "device-side assert", "cuDNN error", "CUBLAS_STATUS", "NCCL")
    )
