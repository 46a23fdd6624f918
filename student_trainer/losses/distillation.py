"""Computes distillation losses in plain PyTorch: the reference that fused.py is tested against.

Letters: R rows, V vocabulary. p is the teacher, q the student, both at the temperature of the
targets. Every divergence is a sum over *cells* of a function of p and q there. What the cells of a
kind of targets are is in its file in `logit_codec/kinds/`: those of a dense row are its ids; those
of a top_k row are its kept ids, and one more for all other ids together, on both sides (the tail
bucket). docs/losses.md has the formulas.
"""

import torch
from torch import Tensor

from logit_codec import HiddenTargets, Targets, TeacherHead
from logit_codec.kinds import cells_of
from logit_codec.kinds.hidden import HeadTargets
from logit_codec.kinds.tail import TailCells
from student_trainer.losses.checks import (
    IGNORE_INDEX,
    MOST_PADDING,
    check_labels,
    shared_vocabulary,
)
from student_trainer.losses.options import LossOptions, RowWeight
from student_trainer.transfer import copy_to, move_to_device


def distillation_loss(
    logits: Tensor,
    targets: Targets,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    labels: Tensor | None = None,
    kd_weight: float | Tensor = 1.0,
    ce_weight: float | Tensor = 0.0,
    row_weights: Tensor | None = None,
    mask: Tensor | None = None,
    temperature_scaling: bool = True,
    renormalize: bool = False,
    correction: bool = False,
    teacher_head: TeacherHead | None = None,
    effective_vocab_size: int | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
) -> Tensor:
    """Computes the mean over rows of kd_weight * T^2 * D(p, q) + ce_weight * CE(label).

    logits: (R, V) of the student for exactly the target rows, before any temperature. divergence:
    forward_kl, reverse_kl, jsd, skew_kl, skew_reverse_kl or total_variation; `beta` is the share of
    the teacher in jsd's mixture, and the skew of the two skewed ones.

    `dense` and `hidden` targets give the exact divergence; for `hidden`, the teacher's head makes
    (R, V) logits here (teacher_head, by default the one that a connected teacher attached to the
    targets). `top_k` and `given_ids` targets give the one over their entries and one bucket for
    everything else on both sides, a lower bound. `sampled` targets take forward_kl only: an
    unbiased estimate of value and gradient if they carry the teacher's entropy; without it the value
    is the cross-entropy of the draws, which has the same gradient and is larger by what does not
    depend on the student. (The entropy of the draws themselves would be biased.)

    labels: (R,) int64, -100 to leave the cross-entropy of a row out. kd_weight and ce_weight:
    numbers, or (R,) one for each row. row_weights: (R,), multiplies the whole loss of each row.
    mask: (R,) bool, rows that count; others may hold anything. temperature_scaling multiplies the
    divergence by T^2 (Hinton et al. 2015, section 2), which keeps its gradient in proportion to the
    cross-entropy's. renormalize: kept entries are made to sum to 1 and everything else counts as 0,
    instead of the tail bucket. That is biased: the student is taught that the tail is impossible.
    correction: reverse_kl over the kept ids alone, without the tail bucket, plus the teacher's mass
    on them minus the student's (MOPD, arXiv:2606.30406): its gradient is 0 where q = p on them.
    A student's head and a teacher's vocabulary of different size are padded differently: both
    distributions are taken over the ids that they share, cross-entropy included, and ids that one
    of them lacks have no probability and no gradient. effective_vocab_size: ids from here on are
    padding of both (`teacher.info.effective_vocab_size`); without it, those from the smaller size
    on.
    reduction: "mean" divides by the counted rows whatever their weights, or by `num_items` if given
    (trained tokens of the whole accumulation window over all ranks); "sum"; "none" gives (R,).

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
        divergence=divergence,
        beta=beta,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        row_weights=row_weights,
        temperature_scaling=temperature_scaling,
        renormalize=renormalize,
        correction=correction,
        reduction=reduction,
    )
    options.check(targets, labels, mask)
    width = shared_vocabulary(targets, logits.shape[1], effective_vocab_size)
    check_labels(labels if options.uses_labels else None, mask, width)
    targets = prepare(fit(targets, width, logits.device, teacher_head), renormalize)
    if mask is not None:
        mask = copy_to(mask.to(torch.bool), logits.device)
    loss_R = _row_losses(_finite_logits(logits, mask, width), targets, labels, mask, options)
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
    logits: Tensor,
    targets: Targets,
    labels: Tensor | None,
    mask: Tensor | None,
    options: LossOptions,
) -> Tensor:
    """Computes the (R,) weighted sums of divergence and cross-entropy, 0 for masked rows."""
    loss_R = logits.new_zeros(targets.num_rows)

    def add(weight: RowWeight, each_R: Tensor) -> Tensor:
        if mask is not None:  # also the weight of a masked row may be anything
            each_R = each_R.where(mask, 0.0)
            weight = weight.where(mask, 0.0) if isinstance(weight, Tensor) else weight
        return loss_R + weight * each_R

    kd_weight, ce_weight = options.weights(targets.temperature, logits.device, logits.dtype)
    if options.distils:
        scaled = logits if targets.temperature == 1.0 else logits / targets.temperature
        cells = cells_of(targets)
        if options.correction:
            assert isinstance(cells, TailCells)
            loss_R = add(kd_weight, cells.kept_divergence(scaled, options.cell))
        else:
            loss_R = add(kd_weight, cells.divergence(scaled, options.cell))
    if options.uses_labels:
        assert labels is not None
        cross_entropy_R = torch.nn.functional.cross_entropy(
            logits, copy_to(labels, logits.device), ignore_index=IGNORE_INDEX, reduction="none"
        )
        loss_R = add(ce_weight, cross_entropy_R)
    return loss_R


def fit(
    targets: Targets, width: int, device: torch.device, teacher_head: TeacherHead | None = None
) -> Targets:
    """Returns the targets `within` the width, on the device; hidden ones with their head there.

    Raises ValueError as `within` does, and for hidden targets without their head.
    """
    if not isinstance(targets, HiddenTargets):
        if teacher_head is not None and isinstance(targets, HeadTargets):
            raise ValueError(
                "these targets have the heads of several teachers already: leave teacher_head out"
            )
        if teacher_head is not None:
            raise ValueError(
                f"teacher_head is for hidden targets; {targets.kind} targets hold the teacher's "
                "probabilities themselves. Leave it out."
            )
        return move_to_device(within(targets, width), device)
    if teacher_head is not None:
        targets = targets.with_head(teacher_head)
    targets.known_head()  # before anything is computed
    # Ids that are not shared are looked for on the device: on the host, the product takes seconds.
    return within(move_to_device(targets, device), width)


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
