"""Knowledge distillation from a served teacher: the public names of the whole, in one place.

`from logitstream import connect, distillation_loss` imports what each name needs, and nothing else.
"""

from typing import TYPE_CHECKING

from logitstream import lazy

if TYPE_CHECKING:
    from logit_codec import (
        Targets,
        parse_targets,
    )
    from student_trainer import (
        AccessDenied,
        FeatureLoss,
        ForkedClient,
        IncompatibleTeacher,
        InvalidRequest,
        LocalTeacher,
        NotRecorded,
        OnPolicyArguments,
        OnPolicyBatches,
        ProtocolError,
        Recorded,
        RecordError,
        RemoteTeacher,
        TargetsCorrupt,
        Teacher,
        TeacherError,
        TeacherInternalError,
        TeacherOverloaded,
        Teachers,
        TeacherTimeout,
        TeacherUnavailable,
        UnsuitableTargets,
        connect,
        distillation_loss,
        fused_distillation_loss,
        prefetch,
    )
    from student_trainer.hf_trainer import (
        DistillationArguments,
        DistillationMixin,
        DistillationTrainer,
    )

__all__ = [
    "AccessDenied",
    "DistillationArguments",
    "DistillationMixin",
    "DistillationTrainer",
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
    "Targets",
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
    "parse_targets",
    "prefetch",
]

HOMES = {
    "DistillationArguments": "student_trainer.hf_trainer",
    "DistillationMixin": "student_trainer.hf_trainer",
    "DistillationTrainer": "student_trainer.hf_trainer",
    "Targets": "logit_codec",
    "parse_targets": "logit_codec",
}
"""The modules of public names; student_trainer has all others."""

__getattr__, __dir__ = lazy.attach(
    __name__, {name: HOMES.get(name, "student_trainer") for name in __all__}
)
