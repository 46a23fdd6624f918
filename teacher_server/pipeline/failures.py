"""Says what failed computations mean to the clients that wait for them."""

import grpc
import torch

from teacher_server.engine.device import Device
from teacher_server.errors import RequestRefused


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, of the device or the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError)


def forget_frames(error: BaseException | None) -> None:
    """Drops the traceback of an error: its frames hold the tensors of the batch that failed."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def refuse_broken() -> RequestRefused:
    """Refuses a job because nothing can be computed here any more."""
    return RequestRefused(
        grpc.StatusCode.UNAVAILABLE,
        "STOPPED",
        "this replica cannot compute any more and is about to end; send the request to another "
        "one.",
    )


def refuse_job(error: Exception, device: Device) -> Exception:
    """Turns running out of memory on one sequence into a refusal that its client can act on."""
    if not is_out_of_memory(error):
        return error
    forget_frames(error)
    device.release_memory()
    return RequestRefused(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "OUT_OF_MEMORY",
        "the teacher ran out of memory on this sequence alone. Send a shorter one or ask for "
        "fewer rows.",
    )
