"""Decides when a service that refuses this client's streams has meant it."""

import grpc

from student_trainer.client.describe import RETRIED
from student_trainer.client.links import Link, StreamEnd
from student_trainer.errors import BY_CODE, ProtocolError, TeacherError

MAX_UNREADABLE = 3
"""How many streams in a row may end because the service could not read a request."""


class Refusals:
    """Counts the streams since the last answer that ended with a status that is not retried."""

    def __init__(self) -> None:
        self._count = 0

    def clear(self) -> None:
        """Begins to count again: the service works."""
        self._count = 0

    def judge(self, link: Link, end: StreamEnd) -> TeacherError | None:
        """Returns the error of all requests, if this end of a stream was one refusal too many."""
        if end.code in RETRIED or end.code == grpc.StatusCode.OK:
            return None
        self._count += 1
        # Once may be a flipped bit; a request that the other side cannot read always is one.
        num_allowed = MAX_UNREADABLE if end.code == grpc.StatusCode.INVALID_ARGUMENT else 1
        if self._count <= num_allowed:
            return None
        kind = BY_CODE.get(end.code.value[0], ProtocolError)
        return kind(f"{link.address}: {end.reason}")
