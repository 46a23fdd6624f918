"""Students and teacher on the held-out text: loss, likeliest tokens, and whether to believe them.

Letters: N sequences, L tokens of each, B of one forward pass, R rows, C rows of one chunk,
V vocabulary.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from logit_codec import Targets
from logit_codec.targets import UNKNOWN
from student_trainer.teachers.teacher import Teacher
from student_trainer.training.results import Bin, Scores

NUM_BINS = 10
"""Of calibration, equally wide."""
CHUNK_ROWS = 1024
"""Rows whose logits are copied to float32 together."""


@torch.inference_mode()
def evaluate(
    student: nn.Module,
    sequences: Tensor,
    best_ids: Tensor | None = None,
    *,
    batch_size: int = 32,
    num_ids: int | None = None,
    rank: int = 0,
    num_ranks: int = 1,
    add_up: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Scores:
    """A student on (N, L) sequences.

    best_ids: (N, L-1), the teacher's likeliest id of each row, or UNKNOWN. num_ids: what the head has
    behind so many ids is padding, and has no probability (default: nothing is). The ranks measure a share
    each, in equally many forward passes; add_up: sums a tensor over them. All get the scores of the whole.
    """
    student = student.eval()
    device = next(student.parameters()).device
    num, rows = len(sequences), sequences.shape[1] - 1
    nll = torch.zeros(num, rows, device=device)
    best = torch.zeros(num, rows, dtype=torch.int64, device=device)
    confidence = torch.zeros(num, rows, device=device)
    # A student in parts computes on all ranks together, so where shares are unequal, the last of one
    # is measured and not counted.
    mine = torch.arange(rank, -(-num // num_ranks) * num_ranks, num_ranks)
    for first in range(0, len(mine), batch_size):
        number_B = mine[first : first + batch_size]
        ids = sequences[number_B % num].to(device)
        logits = student(input_ids=ids).logits[:, :-1, :num_ids].flatten(0, 1)
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        chunks = zip(logits.split(CHUNK_ROWS), ids[:, 1:].flatten().split(CHUNK_ROWS), strict=True)
        for some_CV, labels_C in chunks:
            some_CV = some_CV.float()
            total_C = some_CV.logsumexp(1)
            largest_C, best_C = some_CV.max(1)
            nll_C = total_C - some_CV.gather(1, labels_C[:, None])[:, 0]
            found.append((nll_C, best_C, (largest_C - total_C).exp()))
        counted_B = number_B < num
        where_B = number_B[counted_B].to(device)
        for whole, parts in zip((nll, best, confidence), zip(*found, strict=True), strict=True):
            whole[where_B] = torch.cat(parts).view(-1, rows)[counted_B.to(device)]
    # Each rank measured a share, and nothing of the others'.
    nll_R, best_R, confidence_R = (
        add_up(whole).flatten().cpu() for whole in (nll, best, confidence)
    )
    scores = _scores(sequences, nll_R, best_R, confidence_R)
    if best_ids is None:
        return scores
    is_known_R = best_ids.flatten() != UNKNOWN
    if not is_known_R.any():
        return scores
    agrees_R = (best_R == best_ids.flatten())[is_known_R]
    return scores.model_copy(
        update={
            "top1_agreement": float(agrees_R.double().mean()),
            "agreement_rows": len(agrees_R),
        }
    )


def evaluate_teacher(
    teacher: Teacher,
    sequences: Tensor,
    *,
    targets: str = "top_k:1",
    temperature: float = 1.0,
    seed: int = 0,
) -> tuple[Scores, Tensor]:
    """The teacher itself on (N, L) sequences, as far as these targets tell, and (N, L-1) its
    likeliest ids, or UNKNOWN.

    top_k:1 at temperature 1 tells all. Samples do not tell the likeliest id, and targets at another
    temperature neither loss nor confidence. Raises what `Teacher.stream` does.
    """
    pairs = teacher.stream(sequences, targets=targets, temperature=temperature, seed=seed, ahead=32)
    shown = tqdm(pairs, total=len(sequences), desc="teacher on held-out text", leave=False)
    return _teacher_scores(sequences, (of_one for _, of_one in shown), temperature == 1.0)


def _teacher_scores(
    sequences: Tensor, found: Iterable[Targets], is_plain: bool
) -> tuple[Scores, Tensor]:
    """is_plain: the targets are of the teacher's own distribution, at temperature 1."""
    nll: list[Tensor | None] = []
    best: list[Tensor] = []
    confidence: list[Tensor | None] = []
    for targets in found:
        has_nll = is_plain and targets.realized_logprob is not None
        nll.append(-targets.realized_logprob.float() if has_nll else None)  # type: ignore[union-attr]
        ids_R, confidence_R = targets.mode() or (torch.full((targets.num_rows,), UNKNOWN), None)
        best.append(ids_R)
        confidence.append(confidence_R if is_plain else None)
    best_R = torch.cat(best)
    scores = _scores(sequences, _all(nll), best_R, _all(confidence))
    return scores, best_R.view(len(sequences), -1)


def _all(parts: list[Tensor | None]) -> Tensor | None:
    known = [part for part in parts if part is not None]
    return torch.cat(known) if len(known) == len(parts) else None


def _scores(
    sequences: Tensor, nll_R: Tensor | None, best_R: Tensor, confidence_R: Tensor | None
) -> Scores:
    labels_R = sequences[:, 1:].flatten()
    is_known_R = best_R != UNKNOWN
    is_right_R = (best_R == labels_R)[is_known_R].double()
    sequence_losses = []
    if nll_R is not None:
        sequence_losses = nll_R.double().view(len(sequences), -1).mean(1).tolist()
    bins: list[Bin] = []
    error = None
    if confidence_R is not None and len(is_right_R):
        bins, error = _calibration(confidence_R[is_known_R].double(), is_right_R)
    return Scores(
        loss=sum(sequence_losses) / len(sequence_losses) if sequence_losses else None,
        sequence_losses=sequence_losses,
        accuracy=float(is_right_R.mean()) if len(is_right_R) else None,
        calibration_error=error,
        bins=bins,
    )


def _calibration(confidence_R: Tensor, is_right_R: Tensor) -> tuple[list[Bin], float]:
    """The bins that are not empty, and the expected calibration error."""
    # A confidence that is not a number, of a student that diverged, is as wrong as can be.
    confidence_R = confidence_R.nan_to_num(1.0)
    bin_R = (confidence_R * NUM_BINS).long().clamp(0, NUM_BINS - 1)
    counts = torch.bincount(bin_R, minlength=NUM_BINS).tolist()
    confident = torch.bincount(bin_R, confidence_R, minlength=NUM_BINS).tolist()
    right = torch.bincount(bin_R, is_right_R, minlength=NUM_BINS).tolist()
    bins = [
        Bin(count=count, confidence=sum_ / count, accuracy=hits / count)
        for count, sum_, hits in zip(counts, confident, right, strict=True)
        if count
    ]
    error = sum(one.count * abs(one.confidence - one.accuracy) for one in bins)
    return bins, error / len(confidence_R)
