"""Defines the errors of the server, and sends those of requests to their clients.

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
"""Characters of a caller's own text that a message to it may repeat."""
ERROR_METADATA = "logitstream-error-bin"
"""Trailing metadata key of the RequestError that ends a call."""


class TeacherServerError(Exception):
    """The base of this package's errors."""


class ModelError(TeacherServerError):
    """The model cannot be loaded, or cannot be served as it is."""


class ServeError(TeacherServerError):
    """The service cannot start."""


class TeamsError(TeacherServerError):
    """The teams file cannot be read or written, or declares something that is not allowed."""


class RequestRefused(TeacherServerError):
    """One request cannot be answered.

    code: the gRPC status that tells a client whether a retry can help. reason: a constant for
    programs. field, sequence, row: the place of the fault in the request. retry_after_ms: when to send
    the same request again; 0: no hint.
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
    """Refuses a request that is itself wrong (INVALID_ARGUMENT): a retry cannot help."""
    return RequestRefused(
        grpc.StatusCode.INVALID_ARGUMENT, reason, message, field=field, sequence=sequence
    )


def incident(error: Exception) -> RequestRefused:
    """Refuses a request for a fault of ours: logs all of it, and sends the client its number only."""
    number = secrets.token_hex(4)
    logger.error("request failed incident=%s", number, exc_info=error)
    return RequestRefused(
        grpc.StatusCode.INTERNAL,
        "INTERNAL",
        f"the teacher failed on this request (incident {number}). Give the operator the number: the "
        "service's log has the details under it.",
    )


def request_error(refused: RequestRefused) -> teacher_pb2.RequestError:
    """Builds the message for a client."""
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
    """Quotes what a caller sent in a message: at most 64 characters, without line ends."""
    short = text[:QUOTED]
    return repr(short) + ("..." if len(text) > QUOTED else "")


async def abort(
    context: grpc.aio.ServicerContext, refused: RequestRefused, *more: tuple[str, str]
) -> NoReturn:
    """Ends a call with a refusal's status and RequestError; more: further trailing metadata."""
    error = request_error(refused)
    metadata = ((ERROR_METADATA, error.SerializeToString()), *more)
    await context.abort(refused.code, error.message, metadata)
    raise AssertionError("abort raises")
