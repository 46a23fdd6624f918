"""`student-trainer check`: measures whether the targets line up with the text."""

import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from logit_codec import TopKTargets, parse_targets
from student_trainer.check_config import CheckConfig, parse_count
from student_trainer.client.remote import connect
from student_trainer.commands.show import show
from student_trainer.commands.student import find_student
from student_trainer.hf.alignment import nll_by_shift, shared_ids
from student_trainer.teachers.stream import TargetStream
from student_trainer.teachers.teacher import Teacher

GIVEN_IDS = 16
"""Ids of a row that are asked for with targets of kind given_ids."""


def run_check(config: CheckConfig) -> int:
    """Prints what `check` found; returns 1 if the targets are not where they should be."""
    try:
        parse_targets(config.targets)
    except ValueError as error:
        raise ValueError(f"--targets: {error}") from None
    tokenizer = student_ids = None
    if config.student is not None:
        from student_trainer.training.run import read_student

        student = read_student(find_student(config.student))
        tokenizer, student_ids = student.tokenizer, student.num_ids
    wanted = None if config.tokens is None else parse_count(config.tokens)
    result = check(
        config.address,
        tokenizer=tokenizer,
        student_ids=student_ids,
        targets=config.targets,
        credentials=config.credentials(),
    )
    numbers = dataclasses.asdict(result)
    if wanted is not None:
        numbers["tokens"] = wanted
        numbers["hours"] = wanted / result.tokens_per_s / 3600
        numbers["bytes"] = round(wanted * result.bytes_per_token)
        numbers["disk_gib"] = numbers["bytes"] / 2**30
        numbers["wire_gib"] = wanted * result.wire_bytes_per_token / 2**30
    if config.reference is not None:
        from student_trainer.commands.reference import compare_reference

        compared = compare_reference(
            config.address, config.reference, config.text, credentials=config.credentials()
        )
        numbers["reference"] = compared if config.as_json else _as_text(compared)
    show(numbers, as_json=config.as_json)
    if not result.aligned:
        print(
            "student-trainer: the teacher's NLL is not clearly lowest at shift 1: its targets do "
            "not belong to the tokens that were sent, or the teacher is untrained",
            file=sys.stderr,
        )
        return 1
    return 0


def _as_text(compared: dict[str, Any]) -> str:
    """Formats what the comparison with a reference found, on several lines."""
    lines = [
        f"{compared['model']}, {compared['dtype']}, {compared['rows']:,} rows of text: "
        f"{compared['text']}"
    ]
    for name, label in (
        ("kl", "KL(reference || served)"),
        ("reverse_kl", "KL(served || reference)"),
    ):
        numbers = ", ".join(f"{key} {value:.3g}" for key, value in compared[name].items())
        lines.append(f"{label}: {numbers} nats, {compared['bound']}")
    lines.append(f"top-1 agreement {100 * compared['top1_agreement']:.2f} %")
    return ("\n" + 21 * " ").join(lines)


@dataclass(frozen=True, slots=True)
class CheckResult:
    """Holds what `student-trainer check` prints."""

    address: str
    model: str
    architecture: str
    teacher_fingerprint: str
    tokenizer: str
    """same, not compared (no student given), or unknown (the teacher has none)."""
    vocabulary: str
    """How many ids teacher and student have, and how many of them are shared."""
    dtype: str
    quantization: str
    """How the teacher's linear layers are quantised; "none": they are not."""
    exactness: str
    max_sequence_tokens: int
    targets: str
    aligned: bool
    nll_by_shift: dict[int, float]
    """Teacher's mean NLL of token i + shift at row i, in nats; clearly lowest at shift 1."""
    latency_ms: float
    """Median round trip of a short sequence, as a person at a prompt sees it."""
    tokens_per_s: float
    bytes_per_token: float
    """Size of targets as they are sent and stored."""
    wire_bytes_per_token: float
    """Size of requests and responses together, with token ids, digests and timings."""


def generate_sample(teacher: Teacher, num_tokens: int = 24) -> Tensor:
    """Returns a sequence that the teacher itself finds likely, as (L,) int64.

    Random ids would have no best shift. Neighbours differ, or several shifts would be as good.
    """
    generator = torch.Generator().manual_seed(0)
    largest = teacher.info.effective_vocab_size
    ids = torch.randint(largest, (2,), generator=generator).tolist()
    width = min(4, teacher.info.limits.max_top_k, largest)
    while len(ids) < min(num_tokens, teacher.info.max_sequence_tokens - 1):
        # L tokens have L-1 rows: one more token, which may be anything, brings the next row.
        ((_, targets),) = teacher.stream([[*ids, 0]], targets=f"top_k:{width}", interactive=True)
        row = targets[len(ids) - 1 :]
        assert isinstance(row, TopKTargets)
        best = row.token_ids[row.logprobs.argsort(descending=True)].tolist()
        ids.append(next((token for token in best if token not in ids[-2:]), best[0]))
    return torch.tensor(ids)


def _ask(
    teacher: Teacher, sequences: Iterable[Tensor], targets: str, **options: Any
) -> TargetStream[Tensor]:
    """Streams targets; where ids are to be given, random ones stand in for a student's."""
    if not parse_targets(targets).needs_given_ids:
        return teacher.stream(sequences, targets=targets, **options)
    sequences, again = itertools.tee(sequences)
    width = min(GIVEN_IDS, teacher.info.limits.max_top_k, teacher.info.effective_vocab_size)
    generator = torch.Generator().manual_seed(2)

    def draw(num_rows: int) -> Tensor:
        return torch.randint(
            teacher.info.effective_vocab_size, (num_rows, width), generator=generator
        )

    given_ids = (draw(len(sequence) - 1) for sequence in again)
    return teacher.stream(sequences, targets=targets, given_ids=given_ids, **options)


def check(
    address: str,
    *,
    tokenizer: Any = None,
    student_ids: int | None = None,
    targets: str = "sampled",
    credentials: dict[str, Any],
    seconds: float = 5.0,
) -> CheckResult:
    """Connects, compares, measures for about `seconds`. Raises TeacherError.

    student_ids: rows of the student's head; compared, like the tokenizer, with the teacher's.
    """
    with connect(address, tokenizer=tokenizer, patience_s=10.0, **credentials) as teacher:
        info = teacher.info
        vocabulary = f"teacher {info.vocab_size:,} ({info.effective_vocab_size:,} in use)"
        if tokenizer is not None and student_ids is not None:
            shared = shared_ids(info, tokenizer, student_ids)
            vocabulary += f", student {student_ids:,}: {shared:,} shared, the rest is padding"
        ids = generate_sample(teacher)
        width = min(64, info.limits.max_top_k, info.effective_vocab_size)
        ((_, rows),) = teacher.stream([ids], targets=f"top_k:{width}", interactive=True)
        by_shift = nll_by_shift(ids, rows)
        wrong = min(nll for shift, nll in by_shift.items() if shift != 1)

        waits = []
        for _ in range(9):
            started = time.perf_counter()
            list(_ask(teacher, [ids], targets, ahead=1, interactive=True))
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
            len(sequence) for sequence, _ in _ask(teacher, until_deadline(), targets, ahead=16)
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
        dtype=info.dtype,
        quantization=info.quantization or "not told",
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
