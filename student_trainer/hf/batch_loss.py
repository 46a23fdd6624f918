"""Computes the distillation loss of one batch of a Trainer, in the student's head where possible.

Letters: B sequences, T tokens, R trained rows, D hidden size, V vocabulary.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from logit_codec import HiddenTargets, Targets
from student_trainer.hf.arguments import DistillationArguments
from student_trainer.hf.meter import TrainerMeter, cross_entropies
from student_trainer.losses.checks import check_labels, shared_vocabulary
from student_trainer.losses.distillation import distillation_loss, fit
from student_trainer.losses.features import FeatureLoss
from student_trainer.losses.fused import fused_distillation_loss
from student_trainer.losses.fused_chunk import RowStatistics
from student_trainer.losses.fused_head import FusedHead, Unfusable
from student_trainer.losses.options import RowWeight, counts
from student_trainer.teachers.batch_targets import Taken
from student_trainer.transfer import copy_to, move_to_device

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class AttachedTargets:
    """What the loss of one batch needs and a model does not read."""

    targets: Targets | None
    """None if no row of the batch is trained."""
    rows: Tensor
    """(R,) int64: the trained positions of the flattened batch, in reading order."""
    labels: Tensor
    """(R,) int64: the tokens that follow them."""
    num_without: int
    """Tokens, without padding, that are not trained."""
    largest_id: int
    """The largest token id of the batch."""
    features: Targets | None = None
    """States of the teacher's layers in the same rows, if the student learns from them."""
    is_written: bool = False
    """Whether the student wrote the batch itself."""

    @classmethod
    def of(
        cls, taken: Taken, targets: Targets | None, features: Targets | None = None
    ) -> "AttachedTargets":
        """Keeps what the loss needs of a batch, and not the batch, which would fill the host."""
        return cls(
            targets,
            taken.rows,
            taken.labels,
            taken.num_without,
            taken.largest_id,
            features,
            taken.is_written,
        )

    def to_rows(self, head_size: int, used_ids: int, device: Any) -> tuple[Targets, Tensor, Tensor]:
        """Returns targets, rows and labels on the device, over the ids that the student has too.

        used_ids: those that the teacher's tokenizer uses; what its head has after them is padding.

        Ids are checked here, while they are on the host: on a device, a step would wait for that.
        """
        assert self.targets is not None
        width = min(shared_vocabulary(self.targets, head_size), used_ids)
        check_labels(self.labels, None, width)
        targets = fit(self.targets, width, torch.device(device))
        return targets, *move_to_device((self.rows, self.labels), device)


@dataclass(frozen=True, slots=True, eq=False)
class BatchWeights:
    """Holds what decides the loss of one batch beside its targets: numbers, or (R,) of each row."""

    kd: RowWeight
    ce: RowWeight
    beta: dict[str, Any]
    """The argument of the divergences that have one."""

    @classmethod
    def of(
        cls, arguments: DistillationArguments, targets: Targets, progress: float
    ) -> "BatchWeights":
        """Returns the weights in a step; progress: 0 in the first step of a training, 1 in the last.

        Labels replace the teacher by a share of each row: the row's loss is (1 - share) * kd *
        divergence + (ce + share * kd) * cross-entropy. For forward KL at T = 1 this is the divergence
        from (1 - share) * p + share * onehot(label), but for a constant.
        """
        kd, ce = (weight.at(progress) for weight in arguments.weights)
        schedule = arguments.beta_schedule
        beta = {} if schedule is None else {"beta": schedule.at(progress)}
        share_R = _label_share(targets, arguments)
        if share_R is None or not kd:
            return cls(kd, ce, beta)
        return cls(kd * (1.0 - share_R), ce + kd * share_R, beta)


def _label_share(targets: Targets, arguments: DistillationArguments) -> Tensor | None:
    """Computes (R,) how much of the teacher is replaced by the label, or None for nowhere.

    adaptive_label_weight: that times 1 - p(label): where the teacher did not expect the token that
    came, the token says more than the teacher. entropy_routing: all of it in that share of the rows,
    of which the teacher is surest (token routing, arXiv:2509.01649).
    """
    share_R = None
    if arguments.adaptive_label_weight:
        assert targets.realized_logprob is not None
        share_R = -arguments.adaptive_label_weight * torch.expm1(targets.realized_logprob)
        share_R = share_R.clamp(min=0.0)  # a logprob of 16 bits may be rounded up to above 0
    num_routed = int(arguments.entropy_routing * targets.num_rows)
    if num_routed:
        assert targets.entropy is not None
        lowest_K = targets.entropy.topk(num_routed, largest=False).indices
        share_R = torch.zeros_like(targets.entropy) if share_R is None else share_R
        share_R = share_R.index_fill(0, lowest_K, 1.0)
    return share_R


class BatchLoss:
    """Sums the loss over the rows of a batch; remembers whether the student's head can be fused."""

    def __init__(
        self,
        arguments: DistillationArguments,
        meter: TrainerMeter,
        *,
        used_ids: int,
        may_fuse: bool,
        unwrap: Callable[[nn.Module], nn.Module],
        feature_loss: FeatureLoss | None = None,
    ) -> None:
        """used_ids: as for `AttachedTargets.to_rows`. unwrap: returns the student inside of what
        accelerate has wrapped it in. feature_loss: added to the loss with its weight."""
        self._arguments = arguments
        self._meter = meter
        self._used_ids = used_ids
        self._may_fuse = may_fuse
        self._unwrap = unwrap
        self._feature_loss = feature_loss
        self.head: FusedHead | None = None
        """The student's head, if the loss is computed in its place."""
        self._is_new = True

    def begin_training(self) -> None:
        """Forgets the head: another training may have wrapped the student in another way."""
        self._is_new = True

    def compute(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        attached: AttachedTargets,
        *,
        keep: bool,
        progress: float,
    ) -> tuple[Tensor, Any]:
        """Returns kd_weight * divergence + ce_weight * cross-entropy summed over the rows.

        And feature_weight * the loss on features, if there is one. With `keep`, returns the model's
        outputs as well, for which its logits are made in full. progress: as for `BatchWeights.of`.
        """
        self._meter.num_without += attached.num_without
        # Given labels, the model would compute a loss of its own.
        inputs = {k: v for k, v in inputs.items() if k not in ("labels", "shift_labels")}
        head = None if keep else self._find_head(model, inputs)
        if self._feature_loss is not None:
            inputs["output_hidden_states"] = True
        if head is not None:
            compute = partial(self._sum_in_head, head, attached, progress)
            loss, outputs = head.loss(model, inputs, compute)
        else:
            outputs = model(**inputs)
            logits_BTV = self._get_logits(outputs, inputs["input_ids"])
            loss = self._sum_of_logits(logits_BTV, attached, progress)
        if self._feature_loss is not None:
            loss = loss + self._sum_of_features(self._feature_loss, outputs, attached)
        return loss, outputs if keep else None

    @staticmethod
    def _get_logits(outputs: Any, input_ids: Tensor) -> Tensor:
        """Returns (B, T, V). Raises ValueError unless there is one row for each token."""
        logits_BTV = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        if logits_BTV.shape[:2] != input_ids.shape:
            raise ValueError(
                f"the student gave logits of {tuple(logits_BTV.shape[:2])} tokens for input_ids "
                f"of {tuple(input_ids.shape)}; the targets belong to the latter. "
                "Adapters that add virtual tokens (prompt tuning) are not supported."
            )
        return logits_BTV

    def _find_head(self, model: nn.Module, inputs: Mapping[str, Any]) -> FusedHead | None:
        # Whether a head can be fused is found by a forward pass: once in a training is enough.
        if self._is_new:
            self._is_new, self.head = False, None
            if self._may_fuse and self._arguments.fused:
                try:
                    self.head = FusedHead.of(model, self._unwrap(model), inputs)
                except Unfusable as reason:
                    logger.info("the student's logits are made in full: %s", reason)
        return self.head

    def _sum_in_head(
        self,
        head: FusedHead,
        attached: AttachedTargets,
        progress: float,
        hidden_BTD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
    ) -> Tensor:
        """Computes the same as _sum_of_logits without the logits."""
        arguments, device = self._arguments, hidden_BTD.device
        if attached.targets is None:
            used = [hidden_BTD, weight_VD, *([] if bias_V is None else [bias_V])]
            return sum((tensor.sum() * 0.0 for tensor in used), start=hidden_BTD.new_zeros(()))
        targets, rows_R, labels_R = attached.to_rows(len(weight_VD), self._used_ids, device)
        statistics = RowStatistics.zeros(targets.num_rows, device)
        weights = BatchWeights.of(arguments, targets, progress)
        loss = fused_distillation_loss(
            hidden_BTD.flatten(0, 1)[rows_R],
            weight_VD,
            targets,
            head_bias=bias_V,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            divergence=arguments.divergence,
            labels=labels_R,
            kd_weight=weights.kd,
            ce_weight=weights.ce,
            reduction="sum",
            statistics=statistics,
            **weights.beta,
        )
        distils = counts(weights.kd)
        self._meter.add(
            targets,
            statistics.divergence.sum() * targets.temperature**2 if distils else None,
            statistics.cross_entropy.sum(),
            statistics.best,
            # Hidden targets would multiply by the teacher's head once more.
            statistics.teacher_best if distils and isinstance(targets, HiddenTargets) else None,
        )
        return loss

    def _sum_of_logits(
        self, logits_BTV: Tensor, attached: AttachedTargets, progress: float
    ) -> Tensor:
        arguments, device = self._arguments, logits_BTV.device
        if attached.targets is None:
            return logits_BTV.sum() * 0.0  # every rank and batch takes part in the backward pass
        targets, rows_R, labels_R = attached.to_rows(logits_BTV.shape[-1], self._used_ids, device)
        logits_RV = logits_BTV.flatten(0, 1)[rows_R, : targets.vocab_size]
        weights = BatchWeights.of(arguments, targets, progress)
        loss = logits_RV.new_zeros((), dtype=torch.float32)
        kd = None
        if counts(weights.kd):
            kd_R = distillation_loss(
                logits_RV,
                targets,
                divergence=arguments.divergence,
                reduction="none",
                **weights.beta,
            )
            loss, kd = loss + (weights.kd * kd_R).sum(), kd_R.sum()
        has_labels = counts(weights.ce)
        ce_R = cross_entropies(logits_RV if has_labels else logits_RV.detach(), labels_R)
        if has_labels:
            loss = loss + (weights.ce * ce_R).sum()
        self._meter.add(targets, kd, ce_R.sum(), logits_RV.argmax(1))
        return loss

    def _sum_of_features(
        self, feature_loss: FeatureLoss, outputs: Any, attached: AttachedTargets
    ) -> Tensor:
        """Computes feature_weight * the sum over the rows of the loss on features."""
        states = getattr(outputs, "hidden_states", None)
        if states is None:
            raise ValueError(
                "the student returns no hidden_states when it is called with "
                "output_hidden_states=True, and the loss on features needs them: leave features out"
            )
        if attached.features is None:
            used = [parameter.sum() * 0.0 for parameter in feature_loss.parameters()]
            return torch.stack(used).sum()
        rows_R = copy_to(attached.rows, states[-1].device)
        own = set(feature_loss.layers.values())
        hidden = {layer: states[layer].flatten(0, 1)[rows_R] for layer in own}
        total = feature_loss(hidden, attached.features, reduction="sum")
        self._meter.add_features(total, attached.features.num_rows)
        return self._arguments.feature_weight * total
