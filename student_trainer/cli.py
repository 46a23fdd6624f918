"""`student-trainer train`, `report`, `record` and `check`: parse first, then import the rest.

Exit codes: 0 done, 1 something went wrong, 2 command line or configuration, 130 Ctrl-C.
"""

import dataclasses
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from logitstream.command_line import Group, WrongUsage, parse
from student_trainer.config import (
    CheckConfig,
    RecordConfig,
    ReportConfig,
    TrainConfig,
    parse_count,
)

COMMANDS = Group(
    "Train students on a served teacher's distributions.",
    {"train": TrainConfig, "report": ReportConfig, "record": RecordConfig, "check": CheckConfig},
    files_of={"record": "train"},
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    try:
        command = parse("student-trainer", COMMANDS, sys.argv[1:] if argv is None else argv)
    except WrongUsage as error:
        for mistake in error.mistakes:
            print(f"student-trainer: {mistake}", file=sys.stderr)
        return 2
    log_above_bars()
    from student_trainer.errors import TeacherError, TrainingFailed

    try:
        if isinstance(command, TrainConfig):
            return run_train(command)
        if isinstance(command, ReportConfig):
            return run_report(command)
        return run_record(command) if isinstance(command, RecordConfig) else run_check(command)
    except KeyboardInterrupt:
        print("student-trainer: interrupted", file=sys.stderr)
        return 130
    except (TeacherError, TrainingFailed, OSError, ValueError) as error:
        print(f"student-trainer: {error}", file=sys.stderr)
        return 1


def log_above_bars() -> None:
    """Logs to stderr, each line on one of its own while a progress bar is shown."""
    from tqdm import tqdm

    class AboveBars(logging.StreamHandler):
        def emit(self, record: logging.LogRecord) -> None:
            with tqdm.external_write_mode(file=self.stream):
                super().emit(record)

    logging.basicConfig(
        level=logging.INFO,
        handlers=[AboveBars(sys.stderr)],
        format="%(asctime)s %(levelname)s %(message)s",
    )


def run_train(config: TrainConfig) -> int:
    """Trains the student, and the controls if asked for; prints and writes the report."""
    from student_trainer.errors import Interrupted, NotWritten
    from student_trainer.report import model_card
    from student_trainer.report import numbers as report
    from student_trainer.training import run as runs

    whole = ""
    try:
        results = runs.train(config)
        whole = f"the student is whole in {config.output / 'student'}; "
        found = report.make_report({str(config.output): results})
        results.save(config.output)
        report.write_report(config.output / "report.html", found)
        report.draw_losses(config.output / "loss.png", found)
        model_card.write_model_card(config.output / "student", results, found)
    except KeyboardInterrupt as error:
        where = f" {error}" if isinstance(error, Interrupted) else ""  # workers do not tell
        kept = runs.what_is_kept(config)
        print(f"student-trainer: interrupted{where}; {kept}", file=sys.stderr)
        return 130
    except NotWritten as error:
        kept = f"; {whole}{runs.what_is_kept(config)}" if config.output.is_dir() else ""
        print(f"student-trainer: {error}{kept}", file=sys.stderr)
        return 1
    print(report.table(found))
    print("\n".join(found["sentences"]))
    print(
        f"written: {config.output / 'report.html'}, report.json, results.json, loss.png, student/"
    )
    return 1 if found["verdict"] == "diverged" else 0


def run_report(config: ReportConfig) -> int:
    """Makes the page of finished runs anew; prints what they say."""
    from student_trainer.report import numbers as report
    from student_trainer.training.results import Results

    same = [
        one
        for one in config.runs
        if [two.resolve() for two in config.runs].count(one.resolve()) > 1
    ]
    if same:
        raise ValueError(f"{same[0]} is given twice: each run counts once")
    found = report.make_report({str(folder): Results.load(folder) for folder in config.runs})
    folder = config.runs[0] if len(config.runs) == 1 else Path()
    page, beside = report.write_report(config.output or folder / "report.html", found)
    if config.as_json:
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(found["sentences"]))
        print(f"written: {page}, {beside}")
    return 0


def run_record(config: RecordConfig) -> int:
    """Asks for what the record has not yet, of the data and the held-out text; prints what it has."""
    import torch
    from tqdm import tqdm

    from student_trainer.record.recorded import Recorded
    from student_trainer.training import run as runs

    runs.check_settings(config)
    student = runs.read_student(config.student)
    runs.find_texts(config)
    record, sequences = None, torch.empty(0, 0)
    try:
        with runs.open_teacher(config, student.tokenizer) as record:
            assert isinstance(record, Recorded)
            num_ids = runs.check_teacher(config, record, student)
            corpus = runs.read_corpus(config, student.tokenizer)
            runs.check_ids(corpus, num_ids)
            sequences = torch.cat([corpus.sequences, corpus.held_out])
            for epoch in range(config.draws):
                missing = [one for one in sequences if not record.has(one, config.seed, epoch)]
                pairs = record.stream_batches(
                    ({"input_ids": one} for one in missing),
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
        kept = "nothing was asked for yet"
        if isinstance(record, Recorded) and len(record):  # closed by now, what came is sealed
            kept = f"{len(record):,} sequences are recorded in {config.record}"
        print(
            f"student-trainer: interrupted; {kept}: run the same command to go on",
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


def run_check(config: CheckConfig) -> int:
    """Prints what `check` found; 1 if the targets are not where they should be."""
    from logit_codec import parse_targets
    from student_trainer.training.alignment import check

    try:
        parse_targets(config.targets)
    except ValueError as error:
        raise ValueError(f"--targets: {error}") from None
    tokenizer = student_ids = None
    if config.student is not None:
        from student_trainer.training.run import read_student

        student = read_student(config.student)
        tokenizer, student_ids = student.tokenizer, student.num_ids
    wanted = None if config.tokens is None else parse_count(config.tokens)
    result = check(
        config.address,
        tokenizer=tokenizer,
        student_ids=student_ids,
        targets=config.targets,
        ca=config.ca,
        cert=config.cert,
        key=config.key,
    )
    numbers = dataclasses.asdict(result)
    if wanted is not None:
        numbers["tokens"] = wanted
        numbers["hours"] = wanted / result.tokens_per_s / 3600
        numbers["bytes"] = round(wanted * result.bytes_per_token)
        numbers["disk_gib"] = numbers["bytes"] / 2**30
        numbers["wire_gib"] = wanted * result.wire_bytes_per_token / 2**30
    show(numbers, as_json=config.as_json)
    if not result.aligned:
        print(
            "student-trainer: the teacher's NLL is not clearly lowest at shift 1: its targets do "
            "not belong to the tokens that were sent, or it has learnt nothing yet",
            file=sys.stderr,
        )
        return 1
    return 0


def show(numbers: Mapping[str, Any], *, as_json: bool) -> None:
    """Prints what a command found: for people, or all of it for scripts."""
    if as_json:
        print(json.dumps(numbers, indent=2))
        return
    for name, value in numbers.items():
        if name.endswith("_gib"):
            print(f"{name.removesuffix('_gib'):20} {shown_size(value)}")
        elif value is not None and name != "bytes":  # nothing was measured; the same as disk
            print(f"{name:20} {shown(value)}")


def shown_size(gib: float) -> str:
    """GiB in a unit that leaves a few digits."""
    for unit, size in (("TiB", 2.0**10), ("GiB", 1.0)):
        if gib >= size:
            return f"{gib / size:,.1f} {unit}"
    return f"{gib * 2**10:,.1f} MiB"


def shown(value: Any) -> str:
    """A value for people: thousands apart, in every number."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.1f}" if value >= 1 or not value else f"{value:.2g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {number:,.2f}" for key, number in value.items())
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
