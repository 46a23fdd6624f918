"""Defines the errors that a trainer can catch.

    TeacherError(Exception)
    |-- TeacherUnavailable(ConnectionError)    UNAVAILABLE: retried until the patience ends
    |-- TeacherOverloaded                      RESOURCE_EXHAUSTED: waited out, up to the patience
    |-- TeacherTimeout(TimeoutError)           DEADLINE_EXCEEDED: retried like TeacherUnavailable
    |-- AccessDenied(PermissionError)          UNAUTHENTICATED, PERMISSION_DENIED: not retried
    |-- InvalidRequest(ValueError)             INVALID_ARGUMENT: not retried
    |-- IncompatibleTeacher(ValueError)        at connect, FAILED_PRECONDITION: not retried
    |-- UnsuitableTargets(ValueError)          the kind of targets cannot express the loss
    |-- TargetsCorrupt                         DATA_LOSS, a digest that differs: retried, then raised
    |-- TeacherInternalError                   INTERNAL: tried once on another replica
    |-- ForkedClient(RuntimeError)             used in a fork of its process
    |-- NotRecorded(LookupError)               a record lacks the targets
    |-- RecordError(OSError)                   a record cannot be read or written
    `-- ProtocolError                          an answer that makes no sense

Each takes a message and nothing else, so that it can be pickled.
"""


class TeacherError(Exception):
    """Is the base of all errors that have to do with the teacher."""


class TeacherUnavailable(TeacherError, ConnectionError):
    """No service answers at the address."""


class TeacherOverloaded(TeacherError):
    """The teacher was too busy for longer than the patience."""


class TeacherTimeout(TeacherError, TimeoutError):
    """An answer did not arrive in time."""


class AccessDenied(TeacherError, PermissionError):
    """The teacher does not know the caller, or does not allow this."""


class InvalidRequest(TeacherError, ValueError):
    """The teacher refuses the request; the message says what it allows."""


class IncompatibleTeacher(TeacherError, ValueError):
    """The teacher, its tokenizer or its format version is not the one that this trainer needs."""


class UnsuitableTargets(TeacherError, ValueError):
    """The kind of targets cannot express the loss; the message says which kind can."""


class TargetsCorrupt(TeacherError):
    """Targets arrived damaged, or the teacher's output is not a distribution."""


class TeacherInternalError(TeacherError):
    """The teacher failed twice on one request, on two replicas if it has two.

    Its log has the incident number of the message.
    """


class ForkedClient(TeacherError, RuntimeError):
    """gRPC does not survive a fork: connect in the process that uses the client."""


class NotRecorded(TeacherError, LookupError):
    """A record has no targets of this sequence, and there is no live teacher to ask."""


class RecordError(TeacherError, OSError):
    """A record cannot be read or written; the message names the file."""


class ProtocolError(TeacherError):
    """The answer does not follow the protocol."""


BY_CODE: dict[int, type[TeacherError]] = {
    3: InvalidRequest,
    4: TeacherTimeout,
    7: AccessDenied,
    8: TeacherOverloaded,
    9: IncompatibleTeacher,
    13: TeacherInternalError,
    14: TeacherUnavailable,
    15: TargetsCorrupt,
    16: AccessDenied,
}
"""Error class for each gRPC status number; other numbers are ProtocolError."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C interrupted a run; the message says after which step."""


class TrainingFailed(RuntimeError):
    """The workers of a run failed more often than they are restarted.

    This is not a TeacherError, since the teacher may have nothing to do with it.
    """


class NotWritten(OSError):
    """A run cannot write a file, mostly because the disk is full; the message names it."""


class FailedElsewhere(RuntimeError):
    """Another process of a run failed with the error that this one holds, and says so itself."""
