"""Used inside a trainer: targets from a served teacher, and the losses that take them."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# gRPC's core writes a line for every handshake that fails; what they mean is said once, by us.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
# A forked child must get ForkedClient: gRPC's own fork handlers crash one in ten of them instead.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

if TYPE_CHECKING:
    from student_trainer.client.remote import RemoteTeacher, connect
    from student_trainer.errors import (
        AccessDenied,
        ForkedClient,
        IncompatibleTeacher,
        InvalidRequest,
        NotRecorded,
        ProtocolError,
        RecordError,
        TargetsCorrupt,
        TeacherError,
        TeacherInternalError,
        TeacherOverloaded,
        TeacherTimeout,
        TeacherUnavailable,
        UnsuitableTargets,
    )
    from student_trainer.losses.distillation import distillation_loss
    from student_trainer.losses.fused import fused_distillation_loss
    from student_trainer.record.recorded import Recorded
    from student_trainer.teachers.local import LocalTeacher
    from student_trainer.teachers.prefetch import prefetch
    from student_trainer.teachers.teacher import Teacher

__all__ = [
    "AccessDenied",
    "ForkedClient",
    "IncompatibleTeacher",
    "InvalidRequest",
    "LocalTeacher",
    "NotRecorded",
    "ProtocolError",
    "RecordError",
    "Recorded",
    "RemoteTeacher",
    "TargetsCorrupt",
    "Teacher",
    "TeacherError",
    "TeacherInternalError",
    "TeacherOverloaded",
    "TeacherTimeout",
    "TeacherUnavailable",
    "UnsuitableTargets",
    "connect",
    "distillation_loss",
    "fused_distillation_loss",
    "prefetch",
]


HOMES = {
    "LocalTeacher": "teachers.local",
    "Recorded": "record.recorded",
    "RemoteTeacher": "client.remote",
    "Teacher": "teachers.teacher",
    "connect": "client.remote",
    "distillation_loss": "losses.distillation",
    "fused_distillation_loss": "losses.fused",
    "prefetch": "teachers.prefetch",
}
"""The modules of the public names; all others are errors."""


def __getattr__(name: str) -> Any:
    # Imported when they are used: torch takes seconds, and a command line that is wrong or asks for
    # help needs none of it.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        found = getattr(import_module(f"{__name__}.{HOMES.get(name, 'errors')}"), name)
    except ImportError as error:
        from logitstream.extras import explain

        line = explain(error, "train")  # such as Parquet, which those who only stream do without
        if line is None:
            raise
        raise ImportError(f"{name}: {line}", name=error.name, path=error.path) from error
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
