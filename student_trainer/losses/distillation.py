"""Distillation losses on Targets, in plain PyTorch: the reference that fused.py is tested against.

Letters: R rows, V vocabulary, E kept entries of all rows. p is the teacher, q the student, both at
the temperature of the targets. Every divergence is a sum over *cells* of a function of p and q
there. The cells of a dense row are its ids; those of a top_k row are its kept ids, and one more for
all other ids together, on both sides (the tail bucket). docs/losses.md has the formulas.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from logit_codec import DenseTargets, SampledTargets, Targets, TopKTargets
from student_trainer.losses.checks import (
    IGNORE_INDEX,
    MOST_PADDING,
    check_divergence,
    check_labels,
    check_rows,
    shared_vocabulary,
)
from student_trainer.losses.divergences import LOWEST, cells


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
    """sum over rows of kd_weight * T^2 * D(p, q) + ce_weight * CE(label), divided by the rows.

    logits: (R, V) of the student for exactly the target rows, before any temperature. divergence:
    forward_kl, reverse_kl, jsd, skew_kl, skew_reverse_kl or total_variation; `beta` is the share of
    the teacher in jsd's mixture, and the skew of the two skewed ones.

    `dense` targets give the exact divergence. `top_k` targets give the one over their entries and
    one bucket for everything else on both sides, a lower bound. `sampled` targets take forward_kl
    only: an unbiased estimate of value and gradient if they carry the teacher's entropy; without it
    the entropy is left out, and the value is the cross-entropy of the draws: larger by what does not
    depend on the student, with the same gradient. (The entropy of the draws themselves would be a
    biased one.)

    labels: (R,) int64, -100 to leave the cross-entropy of a row out. mask: (R,) bool, rows that
    count; others may hold anything. temperature_scaling multiplies the divergence by T^2 (Hinton et
    al. 2015, section 2), which keeps its gradient in proportion to the cross-entropy's.
    renormalize: the kept entries of top_k are made to sum to 1 and everything else counts as 0,
    instead of the tail bucket. That is biased: the student is taught that the tail is impossible.
    A student's head and a teacher's vocabulary of different size are padded differently: both
    distributions are taken over the ids that they share, cross-entropy included, and ids that one of
    them lacks have no probability and no gradient. effective_vocab_size: ids from here on are padding
    of both (`teacher.info.effective_vocab_size`); without it, those from the smaller size on.
    reduction: "mean" divides by the counted rows, or by `num_items` if given (trained tokens of the
    whole accumulation window over all ranks); "sum"; "none" gives (R,).

    Raises ValueError for shapes that do not fit, for an unknown divergence and for a teacher that
    uses ids that are not shared, and UnsuitableTargets (also a ValueError) for a divergence that the
    kind of targets cannot express. The temperature is that of the targets; for another one, ask the
    teacher for it.
    """
    if logits.dim() != 2 or logits.shape[0] != targets.num_rows:
        raise ValueError(
            f"logits must be (R, V) with one row for each of the {targets.num_rows} target rows, "
            f"got {tuple(logits.shape)}. For one sequence: student(ids).logits[0, :-1]."
        )
    check_divergence(targets, divergence, beta, renormalize)
    check_rows(targets, labels, mask, ce_weight, reduction)
    width = shared_vocabulary(targets, logits.shape[1], effective_vocab_size)
    check_labels(labels if ce_weight else None, mask, width)
    targets = prepare(within(targets, width).to(logits.device), renormalize)

    logits = logits if logits.dtype == torch.float64 else logits.float()
    if mask is not None:
        # A masked row may hold anything, infinities included: chosen away, not multiplied by 0.
        mask = mask.to(logits.device, torch.bool)
        logits = logits.masked_fill(~mask[:, None], 0.0)
    if width < logits.shape[1]:
        padding = torch.arange(logits.shape[1], device=logits.device) >= width
        logits = logits.masked_fill(padding, -torch.inf)

    loss_R = logits.new_zeros(targets.num_rows)
    if kd_weight:
        scaled = logits if targets.temperature == 1.0 else logits / targets.temperature
        scale = kd_weight * (targets.temperature**2 if temperature_scaling else 1.0)
        loss_R = loss_R + scale * _divergence(scaled, targets, width, divergence, beta)
    if ce_weight:
        assert labels is not None
        loss_R = loss_R + ce_weight * torch.nn.functional.cross_entropy(
            logits, labels.to(logits.device), ignore_index=IGNORE_INDEX, reduction="none"
        )
    if mask is not None:
        loss_R = loss_R.where(mask, 0.0)
    if reduction == "none":
        return loss_R
    return reduce(loss_R.sum(), targets.num_rows, mask, reduction, num_items)


def _divergence(
    scaled: Tensor, targets: Targets, width: int, divergence: str, beta: float
) -> Tensor:
    """(R, V) logits / T and targets -> (R,) D(p, q)."""
    if isinstance(targets, SampledTargets):
        rows = targets.entry_rows()
        # Not num_draws: a draw of an id that is not shared was left out.
        draws_R = torch.zeros_like(targets.row_splits[1:]).index_add(0, rows, targets.counts)
        share_E = targets.counts.to(scaled.dtype) / draws_R[rows]
        mean_R = scaled.new_zeros(targets.num_rows)
        mean_R = mean_R.index_add(0, rows, share_E * scaled[rows, targets.token_ids])
        loss_R = scaled.logsumexp(1) - mean_R
        if targets.entropy is not None:
            loss_R = loss_R - targets.entropy
        return loss_R.where(draws_R > 0, 0.0)
    logq_RV = scaled.log_softmax(1)
    if isinstance(targets, DenseTargets):
        logp_RV = targets.logprobs.to(scaled.dtype)
        return cells(divergence, beta, logp_RV, logq_RV[:, :width]).sum(1)
    assert isinstance(targets, TopKTargets)
    rows = targets.entry_rows()
    logp_E = targets.logprobs.to(scaled.dtype)
    logq_E = logq_RV[rows, targets.token_ids]
    # The student's tail is summed, not 1 - head: that would cancel (error 1.5 at a tail of 5e-7).
    # A row that keeps everything goes through the sum whole, so that no gradient is NaN.
    has_tail_R = targets.row_splits.diff() < width
    nothing_E = logq_E.masked_fill(has_tail_R[rows], -torch.inf)
    others_RV = logq_RV.index_put((rows, targets.token_ids), nothing_E)
    logq_tail_R = others_RV.logsumexp(1).where(has_tail_R, LOWEST)
    logp_tail_R = targets.tail_logprob.to(scaled.dtype)
    tail_R = cells(divergence, beta, logp_tail_R, logq_tail_R).where(has_tail_R, 0.0)
    return tail_R.index_add(0, rows, cells(divergence, beta, logp_E, logq_E))


def within(targets: Targets, width: int) -> Targets:
    """The targets given that the id is below `width`: their `vocab_size` becomes that.

    Draws and kept entries from `width` on are left out, and the others of their row weigh more, the
    tail among them. Raises ValueError if that is more than padding has: the student lacks ids that
    the teacher uses.
    """
    if width == targets.vocab_size:
        return targets
    if isinstance(targets, DenseTargets):
        return _dense_within(targets, width)
    assert isinstance(targets, SampledTargets | TopKTargets)
    is_shared_E = targets.token_ids < width
    rows_E = targets.entry_rows()
    if isinstance(targets, SampledTargets):
        mass_E = targets.counts.double() / targets.num_draws
    else:
        mass_E = targets.logprobs.double().exp()
    lost_R = mass_E.new_zeros(targets.num_rows)
    lost_R = lost_R.index_add(0, rows_E, mass_E.masked_fill(is_shared_E, 0.0))
    changed: dict[str, Tensor] = {}
    if isinstance(targets, TopKTargets):
        tail_R = targets.tail_logprob.double().exp()
        sizes_R = torch.zeros_like(targets.row_splits[1:]).index_add(0, rows_E, is_shared_E.long())
        # Behind a row that keeps every shared id there is nothing shared.
        lost_R = lost_R + tail_R.where(sizes_R == width, 0.0)
        tail_R = tail_R.masked_fill(sizes_R == width, 0.0)
        left_R = tail_R.index_add(0, rows_E, mass_E.where(is_shared_E, 0.0))
        # Of a row that has nothing else, nothing is known: all of it is one tail.
        is_shared_E = is_shared_E & (left_R > 0)[rows_E]
        share_R = (left_R / (left_R + lost_R)).log()
        changed["logprobs"] = (targets.logprobs - share_R[rows_E]).float()
        tail_logprob = (tail_R.log() - share_R).float()
        changed["tail_logprob"] = tail_logprob.where(left_R > 0, 0.0)
    _refuse_if_used(targets, lost_R, width)
    entries = {
        name: changed.pop(name, getattr(targets, name))[is_shared_E]
        for name in targets.entry_fields
    }
    sizes_R = torch.zeros_like(targets.row_splits[1:]).index_add(0, rows_E, is_shared_E.long())
    row_splits = nn.functional.pad(sizes_R.cumsum(0), (1, 0))
    return replace(targets, vocab_size=width, row_splits=row_splits, **entries, **changed)


def _dense_within(targets: DenseTargets, width: int) -> DenseTargets:
    logprobs = targets.logprobs[:, :width]
    lost_R = targets.logprobs[:, width:].double().exp().sum(1)
    _refuse_if_used(targets, lost_R, width)
    if lost_R.any():
        left_R = logprobs.double().exp().sum(1)
        logprobs = (logprobs - (left_R / (left_R + lost_R)).log()[:, None]).float()
    return replace(targets, vocab_size=width, logprobs=logprobs)


def _refuse_if_used(targets: Targets, lost_R: Tensor, width: int) -> None:
    """lost_R: the probability of ids from `width` on. A few draws may always hit padding."""
    allowed = MOST_PADDING * targets.num_rows
    if isinstance(targets, SampledTargets):
        allowed = max(allowed, 4 / targets.num_draws)
    lost = float(lost_R.sum())
    if lost > allowed:
        raise ValueError(
            f"the teacher gives {lost / targets.num_rows:.1%} of its probability to ids from {width} "
            f"on, of {targets.vocab_size}, which student and teacher do not share; padding may have "
            f"{MOST_PADDING:.0%}. Use a student whose head has every id of the teacher's tokenizer "
            "(student.resize_token_embeddings), or leave effective_vocab_size out if it was given."
        )


def prepare(targets: Targets, renormalize: bool) -> Targets:
    """The targets; with `renormalize` the kept entries of each row sum to 1, without a tail."""
    if not renormalize:
        return targets
    assert isinstance(targets, TopKTargets)
    rows = targets.entry_rows()
    kept_R = targets.logprobs.new_zeros(targets.num_rows, dtype=torch.float64)
    kept_R = kept_R.index_add(0, rows, targets.logprobs.double().exp())
    logprobs = (targets.logprobs - kept_R.log()[rows]).float()
    nothing = torch.full_like(targets.tail_logprob, -torch.inf)
    return replace(targets, logprobs=logprobs, tail_logprob=nothing)


def reduce(
    total: Tensor,
    num_rows: int,
    mask: Tensor | None,
    reduction: str,
    num_items: int | Tensor | None,
) -> Tensor:
    """The sum over rows, as `reduction` and `num_items` ask for it."""
    if reduction == "sum":
        return total
    if num_items is None:
        num_items = num_rows if mask is None else mask.sum()
    if isinstance(num_items, Tensor):
        return total / num_items.to(total.device).clamp(min=1)
    return total / max(num_items, 1)
