"""Defines what a user may set about distillation in a Trainer, and refuses what cannot work."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from logit_codec import select
from student_trainer.losses.checks import check_divergence
from student_trainer.teachers.look_ahead import parse_ahead
from student_trainer.teachers.request import ScoreOptions


@dataclass
class DistillationArguments:
    """How to learn from the teacher; `HfArgumentParser` turns the fields into flags."""

    targets: str = field(
        default="sampled", metadata={"help": "What to ask for: sampled, sampled:N, top_k:K, ..."}
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Temperature of both distributions in the divergence."}
    )
    divergence: str = field(
        default="forward_kl",
        metadata={"help": "Divergence from the teacher, see distillation_loss."},
    )
    beta: float | None = field(
        default=None, metadata={"help": "Parameter of the divergences that have one."}
    )
    kd_weight: float = field(default=1.0, metadata={"help": "Weight of the divergence."})
    ce_weight: float = field(
        default=0.0, metadata={"help": "Weight of the cross-entropy on the labels."}
    )
    ahead: str = field(
        default="30s",
        metadata={
            "help": "How far to request ahead: what is trained in this time, or a number of batches."
        },
    )
    check_first_batch: bool = field(
        default=True, metadata={"help": "Check that targets and tokens belong together."}
    )
    fused: bool = field(
        default=True,
        metadata={"help": "Never make the student's logits in full, where its head allows that."},
    )
    patience_s: float = field(
        default=300.0, metadata={"help": "How long to wait while the teacher does not answer."}
    )

    @property
    def look_ahead(self) -> int | str:
        """`ahead` as `stream_batches` takes it: the values of flags are strings."""
        return int(self.ahead) if str(self.ahead).isdigit() else self.ahead

    def make_request(self, seed: int, epoch: int) -> ScoreOptions:
        """Returns what is asked for of each sequence of an epoch. Raises InvalidRequest."""
        return ScoreOptions.of(self.targets, self.temperature, seed, epoch)


def check_arguments(arguments: DistillationArguments) -> None:
    """Raises ValueError for targets, a divergence or weights that make no loss."""
    spec = arguments.make_request(seed=0, epoch=0).spec
    parse_ahead(arguments.look_ahead)
    row = select(
        torch.zeros(1, getattr(spec, "k", 2)),
        spec,
        temperature=arguments.temperature,
        uniforms=torch.zeros(1, dtype=torch.float64),
        realized_ids=torch.zeros(1, dtype=torch.int64),
    )
    beta = 0.5 if arguments.beta is None else arguments.beta
    check_divergence(spec.kind, arguments.divergence, beta)
    for name in ("kd_weight", "ce_weight"):
        weight = getattr(arguments, name)
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {weight}")
    if not arguments.kd_weight and not arguments.ce_weight:
        raise ValueError("kd_weight and ce_weight are both 0: there is nothing to learn")


def refuse_other_losses(args: transformers.TrainingArguments, loss_func: Any) -> None:
    """Raises ValueError for settings of a Trainer that a loss from a teacher would ignore."""
    reason = (
        "would have no effect: with a teacher the loss is kd_weight times the divergence from it plus "
        "ce_weight times the cross-entropy on the labels"
    )
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} {reason}. Leave it at 0; the "
            "teacher's distribution is already smoother than the labels."
        )
    if getattr(args, "loss_type", "nll") == "dft":
        raise ValueError(
            f"loss_type='dft' {reason}. Leave it at 'nll', or train without a teacher."
        )
    if loss_func is not None:
        raise ValueError(f"compute_loss_func {reason}. Leave it out, or train without a teacher.")
