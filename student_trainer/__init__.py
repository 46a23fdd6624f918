"""Used inside a trainer: targets from a served teacher, and the losses that take them."""

import os

# gRPC's core writes a line for every handshake that fails; what they mean is said once, by us.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

from typing import TYPE_CHECKING, Any

from student_trainer.client import RemoteTeacher, connect
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
from student_trainer.fused import fused_distillation_loss
from student_trainer.local import LocalTeacher
from student_trainer.losses import distillation_loss
from student_trainer.prefetch import prefetch
from student_trainer.streaming import Teacher

if TYPE_CHECKING:
    from student_trainer.recorded import Recorded

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


def __getattr__(name: str) -> Any:
    # Parquet is in the train extra; those who only stream targets do without it.
    if name != "Recorded":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from student_trainer.recorded import Recorded
    except ImportError as error:
        raise ImportError(
            f"records need more: pip install 'logitstream[train]' ({error})"
        ) from error
    return Recorded
