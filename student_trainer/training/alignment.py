"""Is this teacher the right one, are its targets in the right place, and how fast is it?"""

import logging
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from logit_codec import SampledTargets, SparseTargets, Targets, TopKTargets
from logitstream.connection import Pem
from protos import teacher_pb2
from student_trainer.client.remote import connect
from student_trainer.errors import IncompatibleTeacher, ProtocolError
from student_trainer.teachers.stream import Teacher, split_batch

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


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What `student-trainer check` prints."""

    address: str
    model: str
    architecture: str
    teacher_fingerprint: str
    tokenizer: str
    """same, not compared (no student given), or unknown (the teacher has none)."""
    vocabulary: str
    """How many ids teacher and student have, and how many of them are shared."""
    exactness: str
    max_sequence_tokens: int
    targets: str
    aligned: bool
    nll_by_shift: dict[int, float]
    """Teacher's mean NLL of token i + shift at row i, in nats; clearly lowest at shift 1."""
    latency_ms: float
    """Median of a short sequence, there and back, as somebody at a prompt sees it."""
    tokens_per_s: float
    bytes_per_token: float
    """Of targets, as they are sent and stored."""
    wire_bytes_per_token: float
    """Of requests and answers together, with token ids, digests and timings."""


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
    if isinstance(targets, SampledTargets):
        entries = (targets.counts / targets.num_draws).log()
        tail = torch.tensor(1 / targets.num_draws).log()
    elif isinstance(targets, TopKTargets):
        entries, tail = targets.logprobs, targets.tail_logprob
    else:
        raise ValueError(f"alignment is measured on sparse targets, got {targets.kind}")
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

    def __init__(self) -> None:
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
        for token_ids, rows in split_batch(batch, 0):
            of_piece = targets[first : first + len(rows)].to("cpu")
            first += len(rows)
            for shift, nll_R in _row_nlls(token_ids, of_piece, rows).items():
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


def written_by(teacher: Teacher, num_tokens: int = 24) -> Tensor:
    """(L,) int64: a sequence that the teacher itself finds likely.

    Random ids would have no best shift. Neighbours differ, or several shifts would be as good.
    """
    generator = torch.Generator().manual_seed(0)
    largest = teacher.info.effective_vocab_size
    ids = torch.randint(largest, (2,), generator=generator).tolist()
    width = min(4, teacher.info.limits.max_top_k, largest)
    while len(ids) < min(num_tokens, teacher.info.max_sequence_tokens - 1):
        # L tokens have L-1 rows: one more, which may be anything, brings the row of what comes next.
        ((_, targets),) = teacher.stream([[*ids, 0]], targets=f"top_k:{width}", interactive=True)
        row = targets[len(ids) - 1 :]
        assert isinstance(row, TopKTargets)
        best = row.token_ids[row.logprobs.argsort(descending=True)].tolist()
        ids.append(next((one for one in best if one not in ids[-2:]), best[0]))
    return torch.tensor(ids)


def check(
    address: str,
    *,
    tokenizer: Any = None,
    student_ids: int | None = None,
    targets: str = "sampled",
    seconds: float = 5.0,
    ca: Pem | None = None,
    cert: Pem | None = None,
    key: Pem | None = None,
) -> CheckResult:
    """Connects, compares, measures for about `seconds`. Raises a TeacherError that says what is wrong.

    student_ids: rows of the student's head; with the tokenizer, they are compared with the teacher's.
    """
    with connect(
        address, tokenizer=tokenizer, ca=ca, cert=cert, key=key, patience_s=10.0
    ) as teacher:
        info = teacher.info
        vocabulary = f"teacher {info.vocab_size:,} ({info.effective_vocab_size:,} in use)"
        if tokenizer is not None and student_ids is not None:
            shared = shared_ids(info, tokenizer, student_ids)
            vocabulary += f", student {student_ids:,}: {shared:,} shared, the rest is padding"
        ids = written_by(teacher)
        width = min(64, info.limits.max_top_k, info.effective_vocab_size)
        ((_, rows),) = teacher.stream([ids], targets=f"top_k:{width}", interactive=True)
        by_shift = nll_by_shift(ids, rows)
        wrong = min(nll for shift, nll in by_shift.items() if shift != 1)

        waits = []
        for _ in range(9):
            started = time.perf_counter()
            list(teacher.stream([ids], targets=targets, interactive=True))
            waits.append(time.perf_counter() - started)

        length = min(512, info.max_sequence_tokens)
        generator = torch.Generator().manual_seed(1)
        counters, before = teacher.counters, replace(teacher.counters)
        deadline = time.perf_counter() + seconds

        def until_deadline():
            while time.perf_counter() < deadline:
                yield torch.randint(info.effective_vocab_size, (length,), generator=generator)

        started = time.perf_counter()
        tokens = sum(
            len(sequence)
            for sequence, _ in teacher.stream(until_deadline(), targets=targets, ahead=16)
        )
        elapsed = time.perf_counter() - started
        nbytes = counters.payload_nbytes - before.payload_nbytes
        num_rows = counters.rows - before.rows
        sent = counters.sent_nbytes - before.sent_nbytes
        received = counters.received_nbytes - before.received_nbytes
    if tokenizer is None:
        compared = "not compared"
    else:
        compared = "same" if info.tokenizer_fingerprint else "unknown"
    return CheckResult(
        address=address,
        model=info.model,
        architecture=info.architecture,
        teacher_fingerprint=info.teacher_fingerprint,
        tokenizer=compared,
        vocabulary=vocabulary,
        exactness=info.exactness,
        max_sequence_tokens=info.max_sequence_tokens,
        targets=targets,
        aligned=by_shift[1] < wrong - 0.1,
        nll_by_shift=by_shift,
        latency_ms=1e3 * statistics.median(waits),
        tokens_per_s=tokens / elapsed,
        bytes_per_token=nbytes / max(1, num_rows),
        wire_bytes_per_token=(sent + received) / max(1, tokens),
    )
