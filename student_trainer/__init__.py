"""Used inside a trainer: targets from a served teacher, and the losses that take them."""

import os
from typing import TYPE_CHECKING

from logitstream import lazy

# gRPC's core logs a line for every failed handshake; we explain the failure once, ourselves.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
# A forked child must get ForkedClient: with gRPC's own fork handlers, one in ten crashes instead.
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
    from student_trainer.losses.features import FeatureLoss
    from student_trainer.losses.fused import fused_distillation_loss
    from student_trainer.on_policy.arguments import OnPolicyArguments
    from student_trainer.on_policy.batches import OnPolicyBatches
    from student_trainer.record.recorded import Recorded
    from student_trainer.teachers.local import LocalTeacher
    from student_trainer.teachers.prefetch import prefetch
    from student_trainer.teachers.several import Teachers
    from student_trainer.teachers.teacher import Teacher

__all__ = [
    "AccessDenied",
    "FeatureLoss",
    "ForkedClient",
    "IncompatibleTeacher",
    "InvalidRequest",
    "LocalTeacher",
    "NotRecorded",
    "OnPolicyArguments",
    "OnPolicyBatches",
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
    "Teachers",
    "UnsuitableTargets",
    "connect",
    "distillation_loss",
    "fused_distillation_loss",
    "prefetch",
]

HOMES = {
    "FeatureLoss": "student_trainer.losses.features",
    "LocalTeacher": "student_trainer.teachers.local",
    "OnPolicyArguments": "student_trainer.on_policy.arguments",
    "OnPolicyBatches": "student_trainer.on_policy.batches",
    "Recorded": "student_trainer.record.recorded",
    "RemoteTeacher": "student_trainer.client.remote",
    "Teacher": "student_trainer.teachers.teacher",
    "Teachers": "student_trainer.teachers.several",
    "connect": "student_trainer.client.remote",
    "distillation_loss": "student_trainer.losses.distillation",
    "fused_distillation_loss": "student_trainer.losses.fused",
    "prefetch": "student_trainer.teachers.prefetch",
}
"""The modules of the public names; all others are errors."""

__getattr__, __dir__ = lazy.attach(
    __name__, {name: HOMES.get(name, "student_trainer.errors") for name in __all__}
)
