"""`student-trainer record`: records a teacher's targets without training."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor
from tqdm import tqdm

from student_trainer.commands.show import show
from student_trainer.commands.student import find_student
from student_trainer.config import RecordConfig
from student_trainer.record.recorded import Recorded
from student_trainer.teachers.view import TeacherView, divide_batch
from student_trainer.training.corpus import Corpus, check_ids, find_texts, read_corpus


@dataclass(slots=True)
class _Found:
    """Counts what the data has, in all draws."""

    sequences: int = 0
    """As the teacher is asked for them: of a row with isolated documents, each of these."""
    missing_tokens: int = 0


def run_record(config: RecordConfig) -> int:
    """Requests the targets that the record lacks, of data and held-out text; prints what it has."""
    from student_trainer.training import run as runs

    runs.check_settings(config)
    student = runs.read_student(find_student(config.student, config.revision))
    find_texts(config)
    record, found = None, _Found()
    try:
        with runs.open_teacher(config, student.tokenizer) as record:
            assert isinstance(record, Recorded)
            num_ids = runs.check_teacher(config, record, student)
            corpus = read_corpus(config, student.tokenizer, repeat=False)
            check_ids(corpus, num_ids)
            for epoch in range(config.draws):
                _record_draw(config, record, corpus, epoch, found)
    except KeyboardInterrupt:
        kept = "nothing was requested yet"
        if isinstance(record, Recorded) and len(record):  # closed by now: what arrived is sealed
            kept = f"{len(record):,} sequences are recorded in {config.record}"
        print(
            f"student-trainer: interrupted; {kept}: run the same command to resume",
            file=sys.stderr,
        )
        return 130
    asked, rows = record.counters.asked, record.counters.rows
    numbers = {
        "record": config.record,
        "sequences": len(record),
        "asked": asked,
        "already_recorded": found.sequences - asked,
        "tokens": found.missing_tokens,
        "bytes_per_token": record.counters.payload_nbytes / rows if rows else None,
        "targets": record.default_targets,
        "teacher": record.info.model,
        "teacher_fingerprint": record.info.teacher_fingerprint,
    }
    show(numbers, as_json=config.as_json)
    return 0


def _record_draw(
    config: RecordConfig, record: Recorded, corpus: Corpus, epoch: int, found: _Found
) -> None:
    """Requests what the record lacks of one draw: what a Trainer will ask for, row by row."""
    from student_trainer.training.run import make_view

    view, total = make_view(config, corpus.tokenizer), None
    if corpus.num_sequences is not None:
        total = corpus.num_sequences + len(corpus.held_out)
    with tqdm(
        total=total,
        desc=f"recording, draw {epoch + 1} of {config.draws}",
        unit=" rows",
        unit_scale=True,
    ) as progress:
        batches = (corpus.collate([row]) for row in chain(corpus.train, corpus.held_out))
        pairs = record.stream_batches(
            _find_missing(batches, config.seed, epoch, record, found, progress, view),
            targets=config.targets,
            temperature=config.temperature,
            seed=config.seed,
            epoch=epoch,
            teacher_view=view,
        )
        for _ in pairs:
            progress.update()


def _find_missing(
    batches: Iterator[dict[str, Tensor]],
    seed: int,
    epoch: int,
    record: Recorded,
    found: _Found,
    progress: "tqdm[Any]",
    view: TeacherView | None,
) -> Iterator[dict[str, Any]]:
    """Yields the batches of which the record lacks anything; counts, and shows those it has."""
    for number, batch in enumerate(batches):
        pieces = divide_batch(batch, number, view).values()
        missing = [
            piece.token_ids
            for piece in pieces
            if not record.has(piece.token_ids, seed, epoch, piece.rows)
        ]
        found.sequences += len(pieces)
        found.missing_tokens += sum(map(len, missing))
        if missing:
            yield batch
        else:
            progress.update()
