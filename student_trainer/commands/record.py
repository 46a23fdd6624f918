"""`student-trainer record`: records a teacher's targets without training."""

import sys

from student_trainer.commands.show import show
from student_trainer.commands.student import find_student
from student_trainer.config import RecordConfig
from student_trainer.training.corpus import check_ids, find_texts, read_corpus


def run_record(config: RecordConfig) -> int:
    """Requests the targets that the record lacks, of data and held-out text; prints what it has."""
    import torch
    from tqdm import tqdm

    from student_trainer.record.recorded import Recorded
    from student_trainer.training import run as runs

    runs.check_settings(config)
    student = runs.read_student(find_student(config.student, config.revision))
    find_texts(config)
    record, sequences = None, torch.empty(0, 0)
    try:
        with runs.open_teacher(config, student.tokenizer) as record:
            assert isinstance(record, Recorded)
            num_ids = runs.check_teacher(config, record, student)
            corpus = read_corpus(config, student.tokenizer)
            check_ids(corpus, num_ids)
            sequences = torch.cat([corpus.sequences, corpus.held_out])
            for epoch in range(config.draws):
                missing = [ids for ids in sequences if not record.has(ids, config.seed, epoch)]
                pairs = record.stream_batches(
                    ({"input_ids": ids} for ids in missing),
                    targets=config.targets,
                    temperature=config.temperature,
                    seed=config.seed,
                    epoch=epoch,
                )
                with tqdm(
                    total=len(missing) * config.sequence_length,
                    desc=f"recording, draw {epoch + 1} of {config.draws}",
                    unit=" tokens",
                    unit_scale=True,
                    disable=not missing,
                ) as progress:
                    for _ in pairs:
                        progress.update(config.sequence_length)
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
        "already_recorded": len(sequences) * config.draws - asked,
        "tokens": asked * config.sequence_length,
        "bytes_per_token": record.counters.payload_nbytes / rows if rows else None,
        "targets": record.default_targets,
        "teacher": record.info.model,
        "teacher_fingerprint": record.info.teacher_fingerprint,
    }
    show(numbers, as_json=config.as_json)
    return 0
