"""Is this teacher the right one, are its targets in the right place, and how fast is it?"""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from logit_codec import SparseTargets, Targets, TopKTargets
from protos import teacher_pb2
from student_trainer.errors import IncompatibleTeacher, ProtocolError
from student_trainer.teachers.layout import spread_columns
from student_trainer.teachers.view import TeacherView, divide_batch

logger = logging.getLogger(__name__)

SHIFTS = (0, 1, 2)
"""Which token of a row the teacher is asked about: 1 is the row rule, the others are mistakes."""
ENOUGH_ROWS = 1024
"""To tell whether targets are in the right place."""
LEAST_ROWS = 16
"""Fewer say nothing: how likely a teacher finds one token is chance."""
SIGMAS = 4.0
"""By how many standard errors another place must be the better one."""
MARGIN = 0.1
"""And by how much beside, in nats."""
MUCH_TAIL = 0.1
"""Mean probability outside of what is kept, from which on it is worth a warning."""


def nll_by_shift(
    token_ids: Tensor, targets: Targets, rows: Tensor | None = None
) -> dict[int, float]:
    """Mean over rows i of -log p_i(token i + shift), in nats, for each of SHIFTS.

    token_ids: (L,) int64; targets of a sparse kind: the L-1 rows of this sequence, or those of the
    (N,) int64 positions `rows`. Rows whose last token would lie behind the sequence are left out.
    An id that is not kept counts with an equal share of the tail; of draws, with one of a single
    draw.
    """
    return {
        shift: float(nll_R.mean()) for shift, nll_R in _row_nlls(token_ids, targets, rows).items()
    }


def _row_nlls(token_ids: Tensor, targets: Targets, rows: Tensor | None) -> dict[int, Tensor]:
    """As nll_by_shift, but (R,) of each of the R rows that are not left out."""
    if not isinstance(targets, SparseTargets):
        raise ValueError(f"alignment is measured on sparse targets, got {targets.kind}")
    entries, tail = targets.entry_logprobs()
    positions = torch.arange(len(token_ids) - 1) if rows is None else rows
    inside = positions < len(token_ids) - max(SHIFTS)
    row_of_entry = targets.entry_rows()
    others = (targets.vocab_size - targets.row_splits.diff()).clamp(min=1)
    share = (tail - others.log()).clamp(min=-30.0)
    result = {}
    for shift in SHIFTS:
        wanted = token_ids[(positions + shift).clamp(max=len(token_ids) - 1)]
        logprobs = share.clone()
        hit = targets.token_ids == wanted[row_of_entry]
        logprobs[row_of_entry[hit]] = entries[hit]
        result[shift] = -logprobs[inside]
    return result


class Alignment:
    """Whether the targets of some batches belong to their tokens; asked batch by batch.

    The teacher's mean NLL of token i + shift at row i must not be clearly better for another shift
    than for 1. A few rows cannot tell, and are added to those of the next batch. Only sparse kinds can.
    """

    def __init__(self, view: TeacherView | None = None) -> None:
        """view: what the teacher reads in place of the batch; see `stream_batches`."""
        self._view = view
        self._nlls: dict[int, list[Tensor]] = {shift: [] for shift in SHIFTS}
        self._num_rows = 0

    @property
    def is_enough(self) -> bool:
        """Whether more batches would say no more."""
        return self._num_rows >= ENOUGH_ROWS

    def add(self, batch: Mapping[str, Any], targets: Targets) -> None:
        """Raises ProtocolError if all targets so far clearly belong to other tokens."""
        if not isinstance(targets, SparseTargets):
            self._num_rows = ENOUGH_ROWS
            return
        first = 0
        for piece in divide_batch(spread_columns(batch), 0, self._view).values():
            assert piece.rows is not None
            of_piece = targets[first : first + piece.num_rows].to("cpu")
            first += piece.num_rows
            for shift, nll_R in _row_nlls(piece.token_ids, of_piece, piece.rows).items():
                self._nlls[shift].append(nll_R)
            self._num_rows += len(self._nlls[1][-1])
            if self.is_enough:
                break
        if self._num_rows < LEAST_ROWS:
            return
        nlls = {shift: torch.cat(parts) for shift, parts in self._nlls.items()}
        for shift in SHIFTS:
            worse_R = nlls[1] - nlls[shift]
            error = float(worse_R.std()) / math.sqrt(self._num_rows)
            if shift != 1 and float(worse_R.mean()) > MARGIN + SIGMAS * error:
                means = {one: round(float(nll_R.mean()), 2) for one, nll_R in nlls.items()}
                raise ProtocolError(
                    "the teacher's targets do not belong to these tokens: its NLL by shift is "
                    f"{means}, and 1 should be the lowest. Is the student's tokenizer the teacher's?"
                )


def check_alignment(batch: Mapping[str, Any], targets: Targets) -> None:
    """`Alignment` of one batch. Raises ProtocolError if its targets clearly belong to other tokens."""
    Alignment().add(batch, targets)


def shared_ids(info: teacher_pb2.TeacherInfo, tokenizer: Any, student_ids: int) -> int:
    """How many ids teacher and student share: what lies behind them in either head is padding.

    student_ids: rows of the student's head. What the shared tokenizer can make of text has to be in
    both; how far a head is padded behind that does not matter. Special tokens that a head lacks
    (Gemma 3 1B has none for images) are in no text, and warned of. Raises IncompatibleTeacher for a
    student without ids that the teacher uses.
    """
    used = info.effective_vocab_size
    if student_ids >= used:
        return used
    missing = {
        token: number for token, number in tokenizer.get_vocab().items() if number >= student_ids
    }
    special = {one.content for one in tokenizer.added_tokens_decoder.values() if one.special}
    if info.tokenizer_fingerprint and missing.keys() <= special:
        logger.warning(
            "the student has no row for %s (id %d; it has ids 0 to %d): text with it cannot be "
            "trained on",
            *(next(iter(missing)), next(iter(missing.values())), student_ids - 1),
        )
        return student_ids
    raise IncompatibleTeacher(
        f"the student is too small for the teacher's token ids: vocab_size of its config.json is "
        f"{student_ids:,}, the teacher {info.model} uses ids 0 to {used - 1:,}. A student needs at "
        f"least {used:,} (more is padding): take another one, or give it the rows with "
        "resize_token_embeddings."
    )


def warn_of_tail(targets: Targets, ce_weight: float) -> None:
    """Logs a warning if top_k targets leave out much that nothing else in the loss teaches."""
    if ce_weight or not isinstance(targets, TopKTargets):
        return
    tail = float(targets.tail_logprob.exp().mean())
    if tail > MUCH_TAIL:
        logger.warning(
            "%.0f %% of the teacher's probability lies outside the ids that are kept of a row, and "
            "how it is spread there is not taught. Keep more of each row (a larger k), use sampled "
            "targets, or give the labels a weight (ce_weight).",
            100 * tail,
        )
