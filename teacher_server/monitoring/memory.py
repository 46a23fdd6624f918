"""Measures this process's memory, and sets how much of it glibc keeps when it is freed."""

import contextlib
import ctypes
import resource
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def resident_nbytes() -> int:
    """Returns the bytes of this process that are in RAM; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return 0


def device_nbytes(device: torch.device) -> int:
    """Returns the bytes of this process's tensors on an accelerator; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def keep_freed_memory() -> None:
    """Lets glibc reuse buffers of a message's size instead of returning and faulting them again.

    Writing 1 MiB messages then takes about half the CPU time (benchmarks/transport.py). Buffers of
    8 MiB and more are still given back at once. Does nothing with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 8 << 20)
        mallopt(M_TRIM_THRESHOLD, 128 << 20)
