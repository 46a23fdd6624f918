"""Keeps a process to one pool of OpenMP threads, so that they may spin while they wait.

Every thread that computes in torch has a pool of its own, which ends with the thread. While all
pools together have no more threads than there are cores, a thread that waits for the others of its
pool spins; with one more, each wait puts it to sleep and each piece of work wakes it, tens of
thousands of times per second, and a pack takes a third longer (docs/log.md). So what serves on a
CPU leaves the pool to the thread that launches packs: what is computed before it begins, or in its
stead, runs in a thread that ends, and all other threads compute alone.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

import torch

T = TypeVar("T")

_counting = threading.Lock()
"""Held while torch's number of threads is 1 for a moment."""


def compute_apart(function: Callable[[], T], *, name: str, limit_s: float | None = None) -> T:
    """Calls a function in a thread of its own, whose pool ends with it; returns what it returns.

    limit_s: after it the thread is left alone: nothing can interrupt a device. Raises TimeoutError
    then, and what the function raises.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    thread.join(limit_s)
    return result.result(timeout=0)


def compute_alone() -> None:
    """Lets the calling thread compute without a pool."""
    with _counting:
        before = torch.get_num_threads()
        # This is for the calling thread, and for those that begin to compute later.
        torch.set_num_threads(1)
        compute_apart(partial(torch.set_num_threads, before), name="count")
