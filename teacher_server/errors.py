"""What can go wrong on the server's side.

TeacherServerError
|-- ModelError            the model cannot be served; `serve` says why and exits with 1
|-- ServeError            the service cannot start (port in use, ...); exits with 1
|-- TeamsError            the teams file cannot be used; at the start, exits with 2
`-- RequestRefused        one request cannot be answered; goes to its client as a RequestError
"""

import logging
import secrets
from typing import NoReturn

import grpc

from protos import teacher_pb2

logger = logging.getLogger(__name__)

QUOTED = 64
"""Characters of what a caller sent that a message to it may repeat."""
ERROR_METADATA = "logitstream-error-bin"
"""The trailing metadata entry with the RequestError of a call that is no stream of requests."""


class TeacherServerError(Exception):
    """The root of this package's own errors."""


class ModelError(TeacherServerError):
    """The model cannot be loaded, or cannot be served as it is."""


class ServeError(TeacherServerError):
    """The service cannot start."""


class TeamsError(TeacherServerError):
    """The file that declares the teams cannot be read, is wrong, or cannot be written."""


class RequestRefused(TeacherServerError):
    """One request cannot be answered.

    `reason` is for programs, `field` names the field of the request at fault, `sequence` and `row`
    the place in it; `retry_after_ms` is a hint, 0 for none.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str,
        message: str,
        *,
        field: str = "",
        retry_after_ms: int = 0,
        sequence: int | None = None,
        row: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.field = field
        self.retry_after_ms = retry_after_ms
        self.sequence = sequence
        self.row = row


def invalid(
    reason: str, message: str, *, field: str, sequence: int | None = None
) -> RequestRefused:
    """The request itself is wrong: INVALID_ARGUMENT, never worth a retry."""
    return RequestRefused(
        grpc.StatusCode.INVALID_ARGUMENT, reason, message, field=field, sequence=sequence
    )


def incident(error: Exception) -> RequestRefused:
    """A failure of ours: in the log as a whole, to the client as a number."""
    number = secrets.token_hex(4)
    logger.error("request failed incident=%s", number, exc_info=error)
    return RequestRefused(
        grpc.StatusCode.INTERNAL,
        "INTERNAL",
        f"the teacher failed on this request, incident {number}: the operator finds it in the "
        "service's log.",
    )


def request_error(refused: RequestRefused) -> teacher_pb2.RequestError:
    """The message for a client."""
    return teacher_pb2.RequestError(
        code=refused.code.value[0],
        message=str(refused),
        field=refused.field,
        retry_after_ms=refused.retry_after_ms,
        reason=refused.reason,
        sequence=refused.sequence,
        row=refused.row,
    )


def quoted(text: str) -> str:
    """What a caller sent, for a message: at most 64 characters of it, without line ends."""
    short = text[:QUOTED]
    return repr(short) + ("..." if len(text) > QUOTED else "")


async def abort(
    context: grpc.aio.ServicerContext, refused: RequestRefused, *more: tuple[str, str]
) -> NoReturn:
    """Ends a call with the status of a refusal and its RequestError; `more`: further metadata."""
    error = request_error(refused)
    metadata = ((ERROR_METADATA, error.SerializeToString()), *more)
    await context.abort(refused.code, error.message, metadata)
    raise AssertionError("abort returns never")
