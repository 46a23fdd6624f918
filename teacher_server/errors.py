"""What can go wrong on the server's side.

TeacherServerError
|-- ModelError            the model cannot be served; `serve` says why and exits with 1
|-- ServeError            the service cannot start (port in use, ...); exits with 1
`-- RequestRefused        one request cannot be answered; goes to its client as a RequestError
"""

import grpc


class TeacherServerError(Exception):
    """The root of this package's own errors."""


class ModelError(TeacherServerError):
    """The model cannot be loaded, or cannot be served as it is."""


class ServeError(TeacherServerError):
    """The service cannot start."""


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
