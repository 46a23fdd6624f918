"""Distillation losses on Targets, in plain PyTorch: the reference that fused.py is tested against.

Letters: R rows, V vocabulary, E kept entries of all rows. p is the teacher, q the student, both at
the temperature of the targets. Every divergence is a sum over *cells* of a function of p and q
there. The cells of a dense row are its ids; those of a top_k row are its kept ids, and one more for
all other ids together, on both sides (the tail bucket). docs/losses.md has the formulas.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from logit_codec import DenseTargets, SampledTargets, SparseTargets, Targets, TopKTargets
from student_trainer.errors import UnsuitableTargets

IGNORE_INDEX = -100
LOWEST = -1e30
"""Stands for log(0): its exp is 0 and 0 times it is 0, where -inf would make NaN."""
FLOOR = -149 * math.log(2)
"""Log of float32's smallest number. Reverse KL divides by p, and reads a p of 0 as this."""


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
    effective_vocab_size: ids from here on are padding, of the student, of the teacher, or both, and
    have no probability; needed if the two differ in size (`teacher.info.effective_vocab_size`).
    reduction: "mean" divides by the counted rows, or by `num_items` if given (trained tokens of the
    whole accumulation window over all ranks); "sum"; "none" gives (R,).

    Raises ValueError for shapes that do not fit and for an unknown divergence, and UnsuitableTargets
    (also a ValueError) for one that the kind of targets cannot express. The temperature is that of
    the targets; for another one, ask the teacher for it.
    """
    if logits.dim() != 2 or logits.shape[0] != targets.num_rows:
        raise ValueError(
            f"logits must be (R, V) with one row for each of the {targets.num_rows} target rows, "
            f"got {tuple(logits.shape)}. For one sequence: student(ids).logits[0, :-1]."
        )
    check_divergence(targets, divergence, beta, renormalize)
    check_rows(targets, labels, mask, ce_weight, reduction)
    width = check_vocabulary(targets, logits.shape[1], effective_vocab_size)
    targets = prepare(targets.to(logits.device), renormalize)

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
        share_E = targets.counts.to(scaled.dtype) / targets.num_draws
        mean_R = scaled.new_zeros(targets.num_rows)
        mean_R = mean_R.index_add(0, rows, share_E * scaled[rows, targets.token_ids])
        cross_entropy_R = scaled.logsumexp(1) - mean_R
        return cross_entropy_R if targets.entropy is None else cross_entropy_R - targets.entropy
    logq_RV = scaled.log_softmax(1)
    if isinstance(targets, DenseTargets):
        logp_RV = targets.logprobs[:, :width].to(scaled.dtype)
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


def cells(divergence: str, beta: float, logp: Tensor, logq: Tensor) -> Tensor:
    """What each cell adds to the divergence; logp and logq may be -inf."""
    return DIVERGENCES[divergence](logp.clamp(min=LOWEST), logq.clamp(min=LOWEST), beta)


def _forward_kl(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    return logp.exp() * (logp - logq)


def _reverse_kl(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    return logq.exp() * (logq - logp.clamp(min=FLOOR))


def _jsd(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    logm = log_mixture(logp, logq, beta)
    return beta * logp.exp() * (logp - logm) + (1 - beta) * logq.exp() * (logq - logm)


def _skew_kl(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    return logp.exp() * (logp - log_mixture(logp, logq, beta))


def _skew_reverse_kl(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    return logq.exp() * (logq - log_mixture(logq, logp.clamp(min=FLOOR), beta))


def _total_variation(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    return 0.5 * (logp.exp() - logq.exp()).abs()


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "total_variation": _total_variation,
}


def log_mixture(first: Tensor, second: Tensor, share: float) -> Tensor:
    """log(share * exp(first) + (1 - share) * exp(second)), for a share below 1."""
    if share == 0:
        return second
    return torch.logaddexp(first + math.log(share), second + math.log1p(-share))


def check_divergence(targets: Targets, divergence: str, beta: float, renormalize: bool) -> None:
    """Raises ValueError, or UnsuitableTargets where other targets could express it."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    if not isinstance(targets, SampledTargets | TopKTargets | DenseTargets):
        raise UnsuitableTargets(
            f"{divergence} cannot be computed from {type(targets).__name__}. Ask the teacher for "
            "targets='sampled' (forward_kl only) or targets='top_k:min_p=1/256,max_k=128'."
        )
    if isinstance(targets, SampledTargets) and divergence != "forward_kl":
        raise UnsuitableTargets(
            f"{divergence} cannot be estimated from sampled targets: it is not linear in the "
            "teacher's probabilities. Use divergence='forward_kl', or ask the teacher for "
            "targets='top_k:min_p=1/256,max_k=128'."
        )
    if divergence == "jsd" and not 0 < beta < 1:
        raise ValueError(
            f"beta must be between 0 and 1 for jsd, got {beta}: at either end it is 0 for every "
            "student. Divided by beta it becomes forward_kl at 0, by 1 - beta reverse_kl at 1."
        )
    if divergence in ("skew_kl", "skew_reverse_kl") and not 0 <= beta < 1:
        raise ValueError(f"beta must be at least 0 and below 1 for {divergence}, got {beta}")
    if renormalize and not isinstance(targets, TopKTargets):
        raise UnsuitableTargets(
            f"renormalize is for top_k targets; {targets.kind} targets sum to 1 as they are."
        )
    if renormalize and (
        divergence == "reverse_kl" or (divergence == "skew_reverse_kl" and beta == 0)
    ):
        raise UnsuitableTargets(
            "reverse_kl of renormalised targets is infinite: they give everything that is not kept "
            "the probability 0. Leave renormalize out, and the tail bucket is used."
        )


def check_rows(
    targets: Targets, labels: Tensor | None, mask: Tensor | None, ce_weight: float, reduction: str
) -> None:
    """Raises ValueError for what does not have one element for each target row."""
    num_rows = targets.num_rows
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")
    if ce_weight and labels is None:
        raise ValueError("ce_weight needs labels, (R,) int64 with -100 for rows without one")
    for name, value in (("labels", labels), ("mask", mask)):
        if value is not None and value.shape != (num_rows,):
            raise ValueError(f"{name} must have shape ({num_rows},), got {tuple(value.shape)}")


def check_vocabulary(targets: Targets, width: int, effective_vocab_size: int | None) -> int:
    """How many ids of a student with `width` of them have a probability."""
    if effective_vocab_size is None:
        if width == targets.vocab_size:
            return width
        raise ValueError(
            f"the student has {width} logits per row, the teacher {targets.vocab_size}: token-level "
            "distillation needs one vocabulary. If the larger one is only padded, say where the "
            "padding begins: effective_vocab_size=teacher.info.effective_vocab_size."
        )
    if not 1 <= effective_vocab_size <= min(width, targets.vocab_size):
        raise ValueError(
            f"effective_vocab_size must be 1 to {min(width, targets.vocab_size)} for a student of "
            f"{width} ids and a teacher of {targets.vocab_size}, got {effective_vocab_size}"
        )
    if isinstance(targets, SparseTargets) and len(targets.token_ids):
        largest = int(targets.token_ids.max())
        if largest >= effective_vocab_size:
            raise ValueError(
                f"the targets keep id {largest}, which effective_vocab_size={effective_vocab_size} "
                "says is padding"
            )
    return effective_vocab_size


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
