"""Lets the processes of one run, which all run the same command, act as one.

torchrun, accelerate launch or Ray Train starts them; accelerate knows how many there are. Where there
is only one, everything here is a plain call.
"""

import os
import socket
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from student_trainer.errors import FailedElsewhere

T = TypeVar("T")

TIMEOUT_S = 1800
"""How long processes wait for each other, unless `[training] ddp_timeout` says another time."""


def count() -> int:
    """Returns how many processes the run has, as every launcher tells them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Returns whether this is the process that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def meet(settings: Mapping[str, Any], *, on_cpu: bool) -> None:
    """Waits until all processes of the run are there; settings: of TrainingArguments."""
    if count() == 1:
        return
    options: dict[str, Any] = {}
    if backend := settings.get("ddp_backend"):
        options["backend"] = backend
    timeout = timedelta(seconds=settings.get("ddp_timeout", TIMEOUT_S))
    PartialState(cpu=on_cpu, timeout=timeout, **options)


def share(make: Callable[[], T]) -> T:
    """Calls a function in the first process and returns what it returns in all of them.

    Raises its error there, and FailedElsewhere in the others.
    """
    if count() == 1:
        return make()
    found = [together(lambda: make() if is_first() else None)]
    return broadcast_object_list(found)[0]  # type: ignore[return-value]


def take_turns(make: Callable[[], T]) -> T:
    """Calls a function in every process, on each machine in its first process before the others.

    What the first leaves in a cache is found by the others. Raises like `together`.
    """
    if count() == 1:
        return make()
    is_early = PartialState().is_local_main_process
    early = together(lambda: make() if is_early else None)
    late = together(lambda: None if is_early else make())
    return early if is_early else late  # type: ignore[return-value]


def together(make: Callable[[], T]) -> T:
    """Calls a function in every process, and returns when all have done so.

    If it fails in one, it fails in all: raises its error there, and FailedElsewhere in the others.
    """
    if count() == 1:
        return make()
    found, error = None, None
    try:
        found = make()
    except Exception as caught:
        error = caught
    errors = [one for one in gather_object([error]) if one is not None]
    if error is not None:
        raise error
    if errors:
        raise FailedElsewhere(errors[0])
    return found  # type: ignore[return-value]


def check_same(digest: str, what: str) -> None:
    """Raises ValueError where what a process has read is not what the first has."""

    def check() -> None:
        if digest != of_first:
            raise ValueError(
                f"{what} is not the same on {socket.gethostname()} as on the machine of the first "
                "process: all machines must have the same files under the same paths"
            )

    of_first = share(lambda: digest)
    together(check)


def has_lost(error: RuntimeError) -> bool:
    """Returns whether an error means that another process of the run has ended."""
    is_of_torch = isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)
    return count() > 1 and is_of_torch


def part() -> None:
    """Ends the connection to the other processes; all have to call it."""
    if count() > 1:
        PartialState().destroy_process_group()
