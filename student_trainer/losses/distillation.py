"""Computes distillation losses in plain PyTorch: the reference that fused.py is tested against.

Letters: R rows, V vocabulary. p is the teacher, q the student, both at the temperature of the
targets. Every divergence is a sum over *cells* of a function of p and q there. What the cells of a
kind of targets are is in its file in `logit_codec/kinds/`: those of a dense row are its ids; those
of a top_k row are its kept ids, and one more for all other ids together, on both sides (the tail
bucket). docs/losses.md has the formulas.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from logit_codec import Targets
from logit_codec.kinds import cells_of
from logit_codec.kinds.base import Cell
from student_trainer.losses.checks import (
    IGNORE_INDEX,
    MOST_PADDING,
    check_divergence,
    check_labels,
    check_rows,
    shared_vocabulary,
)
from student_trainer.losses.divergences import compute_cells, compute_pulls
from student_trainer.transfer import copy_to, move_to_device


@dataclass(frozen=True, slots=True)
class LossOptions:
    """Holds the arguments of a loss that are not tensors; `distillation_loss` explains each."""

    divergence: str
    beta: float
    kd_weight: float
    ce_weight: float
    temperature_scaling: bool
    renormalize: bool
    reduction: str

    def check(self, targets: Targets, labels: Tensor | None, mask: Tensor | None) -> None:
        """Raises ValueError for what does not fit the targets."""
        check_divergence(targets, self.divergence, self.beta, self.renormalize)
        check_rows(targets, labels, mask, self.ce_weight, self.reduction)

    def scaled_weight(self, temperature: float) -> float:
        """Returns kd_weight, times T^2 if temperature_scaling is on."""
        return self.kd_weight * (temperature**2 if self.temperature_scaling else 1.0)

    @property
    def cell(self) -> Cell:
        """What a cell adds to the divergence."""
        return partial(compute_cells, self.divergence, self.beta)

    @property
    def pull(self) -> Cell:
        """q * dD/dq of a cell."""
        return partial(compute_pulls, self.divergence, self.beta)

    def reduce(
        self, total: Tensor, num_rows: int, mask: Tensor | None, num_items: int | Tensor | None
    ) -> Tensor:
        """Divides the sum over rows as `reduction` and `num_items` ask for."""
        if self.reduction == "sum":
            return total
        return take_mean(total, num_rows, mask, num_items)


def take_mean(
    total: Tensor, num_rows: int, mask: Tensor | None, num_items: int | Tensor | None
) -> Tensor:
    """Divides a sum over rows by `num_items`, or by the rows that the mask counts."""
    if num_items is None:
        num_items = num_rows if mask is None else mask.sum()
    if isinstance(num_items, Tensor):
        # A number on the host becomes an argument of the division: nothing waits for a copy.
        if num_items.dim() or num_items.device.type != "cpu":
            num_items = copy_to(num_items, total.device)
        return total / num_items.clamp(min=1)
    return total / max(num_items, 1)


def distillation_loss(
    logits: Tensor,
    targets: Targets,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    labels: Tensor | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    mask: Tensor | None = None,
    temperature_scaling: bool = True,
    renormalize: bool = False,
    effective_vocab_size: int | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
) -> Tensor:
    """Computes the mean over rows of kd_weight * T^2 * D(p, q) + ce_weight * CE(label).

    logits: (R, V) of the student for exactly the target rows, before any temperature. divergence:
    forward_kl, reverse_kl, jsd, skew_kl, skew_reverse_kl or total_variation; `beta` is the share of
    the teacher in jsd's mixture, and the skew of the two skewed ones.

    `dense` targets give the exact divergence. `top_k` targets give the one over their entries and
    one bucket for everything else on both sides, a lower bound. `sampled` targets take forward_kl
    only: an unbiased estimate of value and gradient if they carry the teacher's entropy; without it
    the value is the cross-entropy of the draws, which has the same gradient and is larger by what
    does not depend on the student. (The entropy of the draws themselves would be biased.)

    labels: (R,) int64, -100 to leave the cross-entropy of a row out. mask: (R,) bool, rows that
    count; others may hold anything. temperature_scaling multiplies the divergence by T^2 (Hinton et
    al. 2015, section 2), which keeps its gradient in proportion to the cross-entropy's.
    renormalize: the kept entries of top_k are made to sum to 1 and everything else counts as 0,
    instead of the tail bucket. That is biased: the student is taught that the tail is impossible.
    A student's head and a teacher's vocabulary of different size are padded differently: both
    distributions are taken over the ids that they share, cross-entropy included, and ids that one
    of them lacks have no probability and no gradient. effective_vocab_size: ids from here on are
    padding of both (`teacher.info.effective_vocab_size`); without it, those from the smaller size
    on.
    reduction: "mean" divides by the counted rows, or by `num_items` if given (trained tokens of the
    whole accumulation window over all ranks); "sum"; "none" gives (R,).

    Raises ValueError for shapes that do not fit, for an unknown divergence and for a teacher that
    uses ids that are not shared, and UnsuitableTargets (also a ValueError) for a divergence that
    the kind of targets cannot express. The temperature is that of the targets; for another one, ask
    the teacher for it.
    """
    if logits.dim() != 2 or logits.shape[0] != targets.num_rows:
        raise ValueError(
            f"logits must be (R, V) with one row for each of the {targets.num_rows} target rows, "
            f"got {tuple(logits.shape)}. For one sequence: student(ids).logits[0, :-1]."
        )
    options = LossOptions(
        divergence, beta, kd_weight, ce_weight, temperature_scaling, renormalize, reduction
    )
    options.check(targets, labels, mask)
    width = shared_vocabulary(targets, logits.shape[1], effective_vocab_size)
    check_labels(labels if ce_weight else None, mask, width)
    targets = prepare(move_to_device(within(targets, width), logits.device), renormalize)
    if mask is not None:
        mask = copy_to(mask.to(torch.bool), logits.device)
    loss_R = _row_losses(_finite_logits(logits, mask, width), targets, labels, options)
    if mask is not None:
        loss_R = loss_R.where(mask, 0.0)
    if reduction == "none":
        return loss_R
    return options.reduce(loss_R.sum(), targets.num_rows, mask, num_items)


def _finite_logits(logits: Tensor, mask: Tensor | None, width: int) -> Tensor:
    """Returns float logits in which masked rows are 0 and ids from `width` on have -inf."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if mask is not None:
        # A masked row may hold anything, infinities included: chosen away, not multiplied by 0.
        logits = logits.masked_fill(~mask[:, None], 0.0)
    if width < logits.shape[1]:
        padding = torch.arange(logits.shape[1], device=logits.device) >= width
        logits = logits.masked_fill(padding, -torch.inf)
    return logits


def _row_losses(
    logits: Tensor, targets: Targets, labels: Tensor | None, options: LossOptions
) -> Tensor:
    """Computes the (R,) weighted sums of divergence and cross-entropy."""
    loss_R = logits.new_zeros(targets.num_rows)
    if options.kd_weight:
        scaled = logits if targets.temperature == 1.0 else logits / targets.temperature
        scale = options.scaled_weight(targets.temperature)
        loss_R = loss_R + scale * cells_of(targets).divergence(scaled, options.cell)
    if options.ce_weight:
        assert labels is not None
        loss_R = loss_R + options.ce_weight * torch.nn.functional.cross_entropy(
            logits, copy_to(labels, logits.device), ignore_index=IGNORE_INDEX, reduction="none"
        )
    return loss_R


def within(targets: Targets, width: int) -> Targets:
    """Conditions the targets on an id below `width`: their `vocab_size` becomes that.

    Draws and kept entries from `width` on are left out, and the others of their row weigh more, the
    tail among them. Raises ValueError if they have more probability than padding has: then the
    student lacks ids that the teacher uses.
    """
    if width == targets.vocab_size:
        return targets
    cells = cells_of(targets)
    shared, lost_R = cells.within(width)
    lost = float(lost_R.sum())
    if lost > max(MOST_PADDING * targets.num_rows, cells.stray_mass):
        raise ValueError(
            f"the teacher gives {lost / targets.num_rows:.1%} of its probability to ids from "
            f"{width} on, of {targets.vocab_size}, which student and teacher do not share; padding "
            f"may have {MOST_PADDING:.0%}. Use a student whose head has every id of the "
            "teacher's tokenizer (student.resize_token_embeddings), or leave effective_vocab_size "
            "out if it was given."
        )
    return shared


def prepare(targets: Targets, renormalize: bool) -> Targets:
    """Returns the targets; with `renormalize` kept entries sum to 1 in each row, without a tail."""
    return cells_of(targets).renormalized() if renormalize else targets
