"""Students and teacher on the held-out text: loss, likeliest tokens, and whether to believe them.

Letters: N sequences, L tokens of one, B of one forward pass, T tokens of the longest of them, R trained
rows of all sequences, one sequence after another, C rows of one chunk, V vocabulary.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from logit_codec import Targets
from logit_codec.targets import UNKNOWN
from student_trainer.teachers.layout import Layout
from student_trainer.teachers.teacher import Teacher
from student_trainer.teachers.view import TeacherView
from student_trainer.training.results import Bin, Scores
from student_trainer.transfer import copy_to

NUM_BINS = 10
"""Of calibration, equally wide."""
CHUNK_ROWS = 1024
"""Rows whose logits are copied to float32 together."""

Collate = Callable[[Sequence[Any]], Mapping[str, Tensor]]
"""Makes a batch of rows of a data set, with input_ids of (B, T)."""


@torch.inference_mode()
def evaluate(
    student: nn.Module,
    rows: Any,
    best_ids: Tensor | None = None,
    *,
    collate: Collate,
    batch_size: int = 32,
    num_ids: int | None = None,
    rank: int = 0,
    num_ranks: int = 1,
    add_up: Callable[[Tensor], Tensor] = lambda values: values,
) -> Scores:
    """Measures a student on the trained rows of N sequences.

    rows: a data set of N sequences. best_ids: (R,), the teacher's likeliest id of each trained row, or
    UNKNOWN. num_ids: what the head has behind so many ids is padding, and has no probability
    (default: nothing is). Each of num_ranks processes measures a share, with as many forward passes as
    the others; add_up gives the sum of a tensor over all of them. All have to call this, and all
    get the scores of the whole.
    """
    student = student.eval()
    device = next(student.parameters()).device
    labels_R, counts_N = find_labels(rows, collate)
    starts_N = counts_N.cumsum(0) - counts_N
    nll_R = torch.zeros(len(labels_R), device=device)
    best_R = torch.zeros(len(labels_R), dtype=torch.int64, device=device)
    confidence_R = torch.zeros(len(labels_R), device=device)
    share = -(-len(rows) // num_ranks)
    for first in range(0, share, batch_size):
        numbers = range(len(rows))[rank::num_ranks][first : first + batch_size]
        # A rank that has none left runs the student all the same: in FSDP the others wait for it.
        batch = collate([rows[number] for number in numbers or (0,)])
        found = _measure_batch(student, batch, device, num_ids)
        if not numbers:
            continue
        where = torch.cat([starts_N[n] + torch.arange(int(counts_N[n])) for n in numbers])
        for whole, part in zip((nll_R, best_R, confidence_R), found, strict=True):
            whole[where.to(device)] = part
    # Each rank measured a share, and nothing of the others'.
    nll_R, best_R, confidence_R = (add_up(one).cpu() for one in (nll_R, best_R, confidence_R))
    scores = _scores(labels_R, counts_N, nll_R, best_R, confidence_R)
    if best_ids is None:
        return scores
    is_known_R = best_ids != UNKNOWN
    if not is_known_R.any():
        return scores
    agrees_R = (best_R == best_ids)[is_known_R]
    return scores.model_copy(
        update={
            "top1_agreement": float(agrees_R.double().mean()),
            "agreement_rows": len(agrees_R),
        }
    )


def find_labels(rows: Any, collate: Collate) -> tuple[Tensor, Tensor]:
    """Returns (R,) the tokens that follow the trained rows, and (N,) how many of these a sequence has."""
    labels: list[Tensor] = []
    for row in rows:
        layout = Layout.of(collate([row]))
        labels.append(layout.ids[:, 1:][layout.trained[:, :-1]])
    return torch.cat(labels), torch.tensor([len(one) for one in labels])


def _measure_batch(
    student: nn.Module, batch: Mapping[str, Tensor], device: torch.device, num_ids: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the NLL, the likeliest id and its probability of each trained row of a batch."""
    layout = Layout.of(batch)
    rows_R = layout.trained.flatten().nonzero()[:, 0].to(device)
    labels_R = layout.ids[:, 1:][layout.trained[:, :-1]].to(device)
    names = ("input_ids", "attention_mask", "position_ids")
    inputs = {name: copy_to(batch[name], device) for name in names if name in batch}
    # With a cache, models do not keep the documents of a row apart.
    logits = student(**inputs, use_cache=False).logits.flatten(0, 1)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    chunks = zip(rows_R.split(CHUNK_ROWS), labels_R.split(CHUNK_ROWS), strict=True)
    for rows_C, labels_C in chunks:
        some_CV = logits[rows_C, :num_ids].float()
        total_C = some_CV.logsumexp(1)
        largest_C, best_C = some_CV.max(1)
        nll_C = total_C - some_CV.gather(1, labels_C[:, None])[:, 0]
        found.append((nll_C, best_C, (largest_C - total_C).exp()))
    nll, best, confidence = (torch.cat(parts) for parts in zip(*found, strict=True))
    return nll, best, confidence


def evaluate_teacher(
    teacher: Teacher,
    rows: Any,
    *,
    collate: Collate,
    targets: str = "top_k:1",
    temperature: float = 1.0,
    seed: int = 0,
    view: TeacherView | None = None,
) -> tuple[Scores, Tensor]:
    """Measures the teacher itself on the trained rows of N sequences, as far as these targets tell.

    view: what the teacher reads instead of the sequences.

    Returns its scores, and (R,) its likeliest ids, or UNKNOWN. top_k:1 at temperature 1 tells all.
    Samples do not tell the likeliest id, and targets at another temperature neither loss nor
    confidence. Raises what `Teacher.stream_batches` does.
    """
    labels_R, counts_N = find_labels(rows, collate)
    pairs = teacher.stream_batches(
        (collate([row]) for row in rows),
        targets=targets,
        temperature=temperature,
        seed=seed,
        ahead=32,
        teacher_view=view,
    )
    shown = tqdm(pairs, total=len(rows), desc="teacher on held-out text", leave=False)
    of_each = (of_one for _, of_one in shown)
    return _teacher_scores(labels_R, counts_N, of_each, temperature == 1.0)


def _teacher_scores(
    labels_R: Tensor, counts_N: Tensor, found: Iterable[Targets], is_plain: bool
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
    return _scores(labels_R, counts_N, _all(nll), best_R, _all(confidence)), best_R


def _all(parts: list[Tensor | None]) -> Tensor | None:
    known = [part for part in parts if part is not None]
    return torch.cat(known) if len(known) == len(parts) else None


def _scores(
    labels_R: Tensor,
    counts_N: Tensor,
    nll_R: Tensor | None,
    best_R: Tensor,
    confidence_R: Tensor | None,
) -> Scores:
    is_known_R = best_R != UNKNOWN
    is_right_R = (best_R == labels_R)[is_known_R].double()
    sequence_losses = []
    if nll_R is not None:
        of_each = nll_R.double().split(counts_N.tolist())
        sequence_losses = [float(one.mean()) for one in of_each]
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
