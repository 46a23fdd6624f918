"""Used inside a trainer: targets from a served teacher, and the losses that take them."""

from student_trainer.client import RemoteTeacher, connect
from student_trainer.errors import (
    AccessDenied,
    ForkedClient,
    IncompatibleTeacher,
    InvalidRequest,
    ProtocolError,
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

__all__ = [
    "AccessDenied",
    "ForkedClient",
    "IncompatibleTeacher",
    "InvalidRequest",
    "LocalTeacher",
    "ProtocolError",
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
