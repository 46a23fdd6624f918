"""Checks that targets, rows and vocabularies fit a loss, and says what to do where they do not."""

import torch
from torch import Tensor

from logit_codec import Targets
from logit_codec.kinds import kind_named
from student_trainer.errors import UnsuitableTargets
from student_trainer.losses.divergences import DIVERGENCES

IGNORE_INDEX = -100
"""The label of a row without one."""
MOST_PADDING = 0.01
"""Mean probability that a teacher may give to ids that the student lacks."""
OTHERS = "targets='sampled' (forward_kl only) or targets='top_k:min_p=1/256,max_k=128'"
INSTEAD = {
    "realized": "they hold one logprob per row. Read targets.realized_logprob, or for a loss ask the "
    f"teacher for {OTHERS}",
    "features": "they hold states of layers. Use logitstream.FeatureLoss, or for this loss "
    f"ask the teacher for {OTHERS}, or targets='hidden:int8'",
}
"""Of the kinds that no divergence can be computed from: why, and what to do."""


def check_divergence(
    kind: str, divergence: str, beta: float, renormalize: bool = False, correction: bool = False
) -> None:
    """Raises ValueError, or UnsuitableTargets where targets of another kind would do."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    cells = kind_named(kind).cells
    if cells is None:
        raise UnsuitableTargets(
            f"{divergence} cannot be computed from {kind} targets: {INSTEAD[kind]}."
        )
    if cells.is_estimate and divergence != "forward_kl":
        raise UnsuitableTargets(
            f"{divergence} cannot be estimated from {kind} targets: it is not linear in "
            "the teacher's probabilities. Use divergence='forward_kl', or ask the teacher for "
            "targets='top_k:min_p=1/256,max_k=128'."
        )
    if divergence == "jsd" and not 0 < beta < 1:
        raise ValueError(
            f"beta must be between 0 and 1 for jsd, got {beta}: at either end it is 0 for every "
            "student. Divided by beta it becomes forward_kl at 0, by 1 - beta reverse_kl at 1."
        )
    if divergence in ("skew_kl", "skew_reverse_kl") and not 0 <= beta < 1:
        raise ValueError(f"beta must be at least 0 and below 1 for {divergence}, got {beta}")
    if renormalize and not cells.has_tail:
        raise UnsuitableTargets(
            f"renormalize is for top_k and given_ids targets; {kind} targets sum to 1 as they are."
        )
    if correction and divergence != "reverse_kl":
        raise ValueError(
            f"correction is for divergence='reverse_kl', which it truncates to the kept ids; got "
            f"{divergence!r}. Leave it out: the tail bucket needs no correction."
        )
    if correction and not cells.has_tail:
        raise UnsuitableTargets(
            f"correction is for targets that keep a few ids (given_ids, top_k); {kind} targets "
            "have every id, and reverse_kl is exact without it. Leave it out."
        )
    if renormalize and (
        divergence == "reverse_kl" or (divergence == "skew_reverse_kl" and beta == 0)
    ):
        raise UnsuitableTargets(
            "reverse_kl of renormalised targets is infinite: they give everything that is not kept "
            "the probability 0. Leave renormalize out, and the tail bucket is used."
        )


def check_rows(num_rows: int, reduction: str, **per_row: Tensor | float | None) -> None:
    """Raises ValueError for tensors without exactly one element for each target row."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")
    for name, value in per_row.items():
        if isinstance(value, Tensor) and value.shape != (num_rows,):
            raise ValueError(f"{name} must have shape ({num_rows},), got {tuple(value.shape)}")


def check_labels(labels: Tensor | None, mask: Tensor | None, width: int) -> None:
    """Raises ValueError for a label that the student lacks; only on a CPU, where nothing waits."""
    if any(given is not None and given.device.type != "cpu" for given in (labels, mask)):
        return
    if labels is None or not len(labels):
        return
    if mask is not None:
        labels = labels.where(mask.to(torch.bool), IGNORE_INDEX)
    largest = int(labels.max())
    if largest >= width:
        raise ValueError(
            f"label {largest} is not one of the {width} ids that student and teacher share. Use a "
            "student whose head has every id of the tokenizer (student.resize_token_embeddings)."
        )


def shared_vocabulary(
    targets: Targets, head_size: int, effective_vocab_size: int | None = None
) -> int:
    """Returns how many ids have a probability: those that student and teacher both have."""
    shared = min(head_size, targets.vocab_size)
    if effective_vocab_size is None:
        return shared
    if not 1 <= effective_vocab_size <= shared:
        raise ValueError(
            f"effective_vocab_size must be 1 to {shared} for a student of {head_size} ids and a "
            f"teacher of {targets.vocab_size}, got {effective_vocab_size}"
        )
    return effective_vocab_size
