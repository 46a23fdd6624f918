"""What a trainer can catch.

    TeacherError(Exception)
    |-- TeacherUnavailable(ConnectionError)    UNAVAILABLE: retried until the patience is over
    |-- TeacherOverloaded                      RESOURCE_EXHAUSTED: waited out, up to the patience
    |-- TeacherTimeout(TimeoutError)           DEADLINE_EXCEEDED: retried like TeacherUnavailable
    |-- AccessDenied(PermissionError)          UNAUTHENTICATED, PERMISSION_DENIED: not retried
    |-- InvalidRequest(ValueError)             INVALID_ARGUMENT: not retried
    |-- IncompatibleTeacher(ValueError)        at connect, FAILED_PRECONDITION: not retried
    |-- UnsuitableTargets(ValueError)          the kind of targets cannot express the loss
    |-- TargetsCorrupt                         DATA_LOSS, a digest that differs: retried, then raised
    |-- TeacherInternalError                   INTERNAL: asked once elsewhere, then raised
    |-- ForkedClient(RuntimeError)             the client was made in another process
    |-- NotRecorded(LookupError)               a record has no targets of a sequence
    |-- RecordError(OSError)                   a record cannot be read or written
    `-- ProtocolError                          an answer that cannot be understood

All take just a message, so that they can be pickled across processes.
"""


class TeacherError(Exception):
    """The root of everything that the teacher's side of training can raise."""


class TeacherUnavailable(TeacherError, ConnectionError):
    """Nobody answers at the address."""


class TeacherOverloaded(TeacherError):
    """The teacher kept asking to come back later, for longer than the patience."""


class TeacherTimeout(TeacherError, TimeoutError):
    """An answer did not come in time."""


class AccessDenied(TeacherError, PermissionError):
    """The teacher does not know the caller, or does not allow this."""


class InvalidRequest(TeacherError, ValueError):
    """The teacher cannot do what was asked; the message says what it allows."""


class IncompatibleTeacher(TeacherError, ValueError):
    """Another teacher, tokenizer or format version than this trainer needs."""


class UnsuitableTargets(TeacherError, ValueError):
    """The kind of targets cannot express the loss; the message says which kind can."""


class TargetsCorrupt(TeacherError):
    """Targets arrived damaged, or the teacher's output is not a distribution."""


class TeacherInternalError(TeacherError):
    """The teacher failed twice on one request, on two replicas if there are two; its operator finds the
    incident number in the log."""


class ForkedClient(TeacherError, RuntimeError):
    """gRPC does not survive a fork: connect in the process that uses the client."""


class NotRecorded(TeacherError, LookupError):
    """A record has no targets of this sequence, and no live teacher to ask."""


class RecordError(TeacherError, OSError):
    """A record cannot be read or written; the message names the file."""


class ProtocolError(TeacherError):
    """An answer that cannot be understood."""


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
"""gRPC status numbers to what is raised; others are ProtocolError."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in the steps of a run; the text says after which of them."""


class TrainingFailed(RuntimeError):
    """The workers of a run failed, and more often than they are started again. No TeacherError: the
    teacher need not have to do with it."""


class NotWritten(OSError):
    """A file of a run cannot be written, mostly because the disk is full. The message names it."""
