"""Distillation losses on Targets, in plain PyTorch.

Letters: R rows, V vocabulary, E kept entries of all rows. p is the teacher, q the student, both at
the temperature of the targets.
"""

import torch
from torch import Tensor

from logit_codec import DenseTargets, SampledTargets, Targets, TopKTargets
from student_trainer.errors import UnsuitableTargets

IGNORE_INDEX = -100
DIVERGENCES = ("forward_kl",)
NOT_LINEAR = ("reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation")
"""Divergences that are not linear in p, which an unbiased estimate of p says nothing unbiased about."""


def distillation_loss(
    logits: Tensor,
    targets: Targets,
    *,
    divergence: str = "forward_kl",
    labels: Tensor | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    mask: Tensor | None = None,
    temperature_scaling: bool = True,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
) -> Tensor:
    """sum over rows of kd_weight * T^2 * KL(p || q) + ce_weight * CE(label), divided by the rows.

    logits: (R, V) of the student for exactly the target rows, before any temperature. `dense`
    targets give the exact KL(p || q). `top_k` targets give the KL over their entries and one
    bucket for everything else on both sides, a lower bound of the full KL with gradient q - p on
    the entries. `sampled` targets give an unbiased estimate of the full KL, with gradient
    q - counts / N, if they carry the teacher's entropy; without it the entropy is left out, and the
    value is the cross-entropy of the draws: larger by what does not depend on the student, with the
    same gradient. (The entropy of the draws themselves would be a biased one.) labels: (R,) int64, -100 to leave the cross-entropy of a row out. mask: (R,) bool,
    rows that count. temperature_scaling multiplies the divergence by T^2 (Hinton et al. 2015,
    section 2), which keeps its gradient in proportion to the cross-entropy's. reduction: "mean"
    divides by the counted rows, or by `num_items` if given (trained tokens of the whole
    accumulation window); "sum"; "none" gives (R,).

    Raises ValueError for shapes that do not fit and for an unknown divergence, and UnsuitableTargets
    (also a ValueError) for one that the kind of targets cannot express. The temperature is that of
    the targets; for another one, ask the teacher for it.
    """
    _check(logits, targets, divergence, reduction)
    num_rows = targets.num_rows
    counted = torch.ones(num_rows, dtype=torch.bool, device=logits.device)
    if mask is not None:
        if mask.shape != (num_rows,):
            raise ValueError(f"mask must have shape ({num_rows},), got {tuple(mask.shape)}")
        counted = mask.to(logits.device, torch.bool)

    loss_R = logits.new_zeros(num_rows, dtype=torch.float32)
    if logits.dtype == torch.float64:
        loss_R = loss_R.double()
    if kd_weight:
        scaled = logits.to(loss_R.dtype) / targets.temperature
        scale = targets.temperature**2 if temperature_scaling else 1.0
        loss_R = loss_R + kd_weight * scale * _forward_kl(scaled, targets.to(logits.device))
    if ce_weight:
        if labels is None:
            raise ValueError("ce_weight needs labels, (R,) int64 with -100 for rows without one")
        if labels.shape != (num_rows,):
            raise ValueError(f"labels must have shape ({num_rows},), got {tuple(labels.shape)}")
        loss_R = loss_R + ce_weight * torch.nn.functional.cross_entropy(
            logits.to(loss_R.dtype),
            labels.to(logits.device),
            ignore_index=IGNORE_INDEX,
            reduction="none",
        )
    # A masked row may hold anything, infinities included: chosen away, not multiplied by 0.
    loss_R = torch.where(counted, loss_R, torch.zeros_like(loss_R))
    if reduction == "none":
        return loss_R
    if reduction == "sum":
        return loss_R.sum()
    divisor = counted.sum().clamp(min=1) if num_items is None else num_items
    return loss_R.sum() / divisor


def _check(logits: Tensor, targets: Targets, divergence: str, reduction: str) -> None:
    if isinstance(targets, SampledTargets) and divergence in NOT_LINEAR:
        raise UnsuitableTargets(
            f"{divergence} cannot be estimated from sampled targets: it is not linear in the "
            "teacher's probabilities. Use divergence='forward_kl', or ask the teacher for "
            "targets='top_k:min_p=1/256,max_k=128'."
        )
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")
    if logits.dim() != 2 or logits.shape[0] != targets.num_rows:
        raise ValueError(
            f"logits must be (R, V) with one row for each of the {targets.num_rows} target rows, "
            f"got {tuple(logits.shape)}. For one sequence: student(ids).logits[0, :-1]."
        )
    if logits.shape[1] != targets.vocab_size:
        raise ValueError(
            f"the student has {logits.shape[1]} logits per row, the teacher "
            f"{targets.vocab_size}: token-level distillation needs one vocabulary."
        )


def _forward_kl(scaled: Tensor, targets: Targets) -> Tensor:
    """(R, V) logits / T and targets -> (R,) KL(p || q)."""
    if isinstance(targets, SampledTargets):
        rows = targets.entry_rows()
        share_E = targets.counts.to(scaled.dtype) / targets.num_draws
        mean_R = scaled.new_zeros(targets.num_rows)
        mean_R = mean_R.index_add(0, rows, share_E * scaled[rows, targets.token_ids])
        cross_entropy_R = scaled.logsumexp(1) - mean_R
        return cross_entropy_R if targets.entropy is None else cross_entropy_R - targets.entropy
    logq_RV = scaled.log_softmax(1)
    if isinstance(targets, DenseTargets):
        logp_RV = targets.logprobs.to(scaled.dtype)
        p_RV = logp_RV.exp()
        # Ids that the teacher gives probability 0 add nothing, whatever the student says.
        return torch.where(p_RV > 0, p_RV * (logp_RV - logq_RV), 0.0).sum(1)
    if isinstance(targets, TopKTargets):
        rows = targets.entry_rows()
        logp_E = targets.logprobs.to(scaled.dtype)
        logq_E = logq_RV[rows, targets.token_ids]
        head_R = scaled.new_zeros(targets.num_rows)
        head_R = head_R.index_add(0, rows, logp_E.exp() * (logp_E - logq_E))
        # The student's tail is summed, not 1 - head: that would cancel (error 1.5 at a tail of 5e-7).
        kept = torch.zeros_like(logq_RV, dtype=torch.bool)
        kept[rows, targets.token_ids] = True
        logp_tail_R = targets.tail_logprob.to(scaled.dtype)
        has_tail = (logp_tail_R > -torch.inf) & ~kept.all(1)
        # Rows without a tail go through the sum with nothing masked, so that no gradient is NaN.
        logq_tail_R = logq_RV.masked_fill(kept & has_tail[:, None], -torch.inf).logsumexp(1)
        tail_R = logp_tail_R.exp() * (logp_tail_R - logq_tail_R)
        return head_R + torch.where(has_tail, tail_R, 0.0)
    raise ValueError(f"forward_kl cannot be computed from {type(targets).__name__}")
