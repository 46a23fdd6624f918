"""The ways of using a teacher that `benchmarks.distill --modes` compares, each as it is used.

Every mode trains the demo's student from the same initial weights on the same batches, and asks the
demo's teacher for each batch when it trains on it, through the encoder and the decoder of a service.
"""

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.training import minimise
from logit_codec import Targets
from student_trainer import FeatureLoss, LocalTeacher, distillation_loss
from student_trainer.teachers.request import Answer, Piece, ScoreOptions
from student_trainer.teachers.teacher import Teacher

SUPPORT = 16
"""Ids that the student names for each row, beside the token that came next."""

Batch = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Mode:
    """Says what is asked of the teacher for a batch, and what the loss makes of it."""

    targets: str | None
    """None: the student learns from the labels alone."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of `distillation_loss`."""
    ask: dict[str, Any] = field(default_factory=dict)
    """Of `stream_batches`."""
    from_student: bool = False
    """Whether the student's own likeliest ids are given."""
    mixes: bool = False
    """Whether a second teacher, trained like the first from another seed, counts as much as the first."""
    sees_more: bool = False
    """Whether the teacher reads the text that comes before a sequence, which the student does not."""
    features: dict[int, int] = field(default_factory=dict)
    """The teacher's layers whose states are learnt as well, and the student's that learn them."""

    def give_ids(self, logits_RV: Tensor, labels_R: Tensor) -> Tensor:
        """Returns (R, m) ids: the student's likeliest ones, and the token that came next."""
        likeliest_RM = logits_RV.topk(SUPPORT, 1).indices
        return torch.cat([likeliest_RM, labels_R[:, None]], 1)


MODES: dict[str, Mode] = {
    "labels": Mode(None),
    "dense": Mode("dense:f32"),
    "hidden:bf16": Mode("hidden:bf16"),
    "hidden:int8": Mode("hidden:int8"),
    "sampled:64": Mode("sampled:64"),
    "top_k, label weight 0": Mode("top_k:min_p=1/256,max_k=128"),
    "top_k, label weight 0.3": Mode(
        "top_k:min_p=1/256,max_k=128", {"kd_weight": 0.7, "ce_weight": 0.3}
    ),
    "given ids, forward KL": Mode("given_ids", from_student=True),
    "given ids, reverse KL": Mode("given_ids", {"divergence": "reverse_kl"}, from_student=True),
    "given ids, corrected": Mode(
        "given_ids", {"divergence": "reverse_kl", "correction": True}, from_student=True
    ),
    "dense, reverse KL": Mode("dense:f32", {"divergence": "reverse_kl"}),
    "hidden:int8, jsd": Mode("hidden:int8", {"divergence": "jsd"}),
    "sampled:64 + features": Mode("sampled:64", features={1: 1, 2: 2}),
    "two teachers, mixed": Mode("hidden:int8", mixes=True),
    "teacher sees more": Mode("sampled:64", sees_more=True),
}
"""By the name in the table."""


class CountingTeacher(LocalTeacher):
    """Counts the bytes of its answers."""

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        super().__init__(model, tokenizer)
        self.nbytes = 0

    def submit(self, piece: Piece, options: ScoreOptions) -> "Future[Answer]":
        """Answers as a LocalTeacher does."""
        future = super().submit(piece, replace(options, keep_payloads=True))
        self.nbytes += sum(map(len, future.result().payloads))
        return future


def train_mode(
    mode: Mode,
    student: nn.Module,
    teacher: Teacher,
    batches: list[Batch],
    held_out: Tensor,
    *,
    learning_rate: float,
    measure_every: int,
) -> list[float]:
    """Trains a student; returns the curve of held-out losses."""
    feature_loss = None
    if mode.features:
        config: Any = student.config
        feature_loss = FeatureLoss(mode.features, config.hidden_size, teacher.info.hidden_size)
    return minimise(
        student,
        (compute_loss(mode, student, teacher, batch, feature_loss) for batch in batches),
        held_out,
        learning_rate=learning_rate,
        measure_every=measure_every,
        steps=len(batches),
        beside=feature_loss,
    )


def compute_loss(
    mode: Mode,
    student: nn.Module,
    teacher: Teacher,
    batch: Batch,
    feature_loss: FeatureLoss | None,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Asks for the targets of a batch and computes its loss; mask: (R,) which rows count, or all."""
    ids = batch["input_ids"]
    labels_R = ids[:, 1:].flatten()
    outputs = student(input_ids=ids, output_hidden_states=bool(mode.features))
    logits_RV = outputs.logits[:, :-1].flatten(0, 1)
    if mode.targets is None:
        return nn.functional.cross_entropy(logits_RV, labels_R)
    targets = _ask(mode, teacher, batch, logits_RV.detach(), labels_R)
    options = dict(mode.options)
    if options.get("ce_weight"):
        options["labels"] = labels_R
    loss = distillation_loss(logits_RV, targets, mask=mask, **options)
    if feature_loss is not None:
        layers = "+".join(map(str, mode.features))
        wanted = Mode(f"features:layers={layers},realized=0")
        states = [state[:, :-1].flatten(0, 1) for state in outputs.hidden_states]
        loss = loss + feature_loss(states, _ask(wanted, teacher, batch, logits_RV, labels_R))
    return loss


def _ask(
    mode: Mode, teacher: Teacher, batch: Batch, logits_RV: Tensor, labels_R: Tensor
) -> Targets:
    """Asks the teacher for one batch."""
    ask = dict(mode.ask)
    if mode.sees_more:
        ask["teacher_view"] = lambda ids, row: [*row["before"], *ids.tolist()]
    if mode.from_student:
        ask["given_ids"] = lambda _: mode.give_ids(logits_RV, labels_R)
    stream: Iterator[tuple[Any, Targets]] = teacher.stream_batches(
        [batch], targets=mode.targets, **ask
    )
    return next(stream)[1]
