"""`student-trainer train`: trains a student and the requested controls."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from student_trainer import disk
from student_trainer.commands.student import find_student
from student_trainer.config import TrainConfig
from student_trainer.report import model_card
from student_trainer.training import checkpoints
from student_trainer.training.corpus import check_ids, find_texts, read_corpus
from student_trainer.training.held_out import HeldOut
from student_trainer.training.results import Results, TeacherResults
from student_trainer.training.run import (
    NAMES,
    RESULTS_NBYTES,
    check_checkpoints,
    check_settings,
    check_teacher,
    count_steps,
    folder_of,
    open_teacher,
    read_student,
    train_students,
)
from student_trainer.training.students import has_weights


def train(config: TrainConfig) -> Results:
    """Trains the student and the requested controls, and saves the student.

    Raises ValueError, OSError, NotWritten, TrainingFailed, and what a teacher can raise.
    """
    check_settings(config)
    named = config.student
    config = config.model_copy(update={"student": find_student(config.student, config.revision)})
    with _make_output(config.output), ExitStack() as ending:
        # What is refused soon comes before what takes long.
        read = read_student(config.student)
        find_texts(config)
        ending.callback(disk.give_room, config.output)
        disk.keep_room(config.output, read.nbytes + RESULTS_NBYTES, "the student")
        teacher = ending.enter_context(open_teacher(config, read.tokenizer))
        num_ids = check_teacher(config, teacher, read)
        check_checkpoints(config, None, teacher.info.teacher_fingerprint)
        corpus = read_corpus(config, read.tokenizer)
        check_ids(corpus, num_ids)
        config = count_steps(config, corpus)
        check_checkpoints(config, corpus, teacher.info.teacher_fingerprint)
        held_out = HeldOut.ask(config, teacher, corpus, num_ids)
        trained = train_students(config, corpus, teacher, held_out)
        info = teacher.info
    student = trained.student
    return Results(
        settings={**config.model_dump(mode="json"), "student": str(named)},
        data_digest=corpus.digest,
        held_out_digest=corpus.held_out_digest,
        held_out_sequences=len(corpus.held_out),
        student_parameters=sum(parameter.numel() for parameter in student.parameters()),
        student_architecture=type(student).__name__,
        student_license=model_card.license_of(config.student),
        starts_from_weights=has_weights(config.student),
        bytes_per_token=trained.bytes_per_token,
        versions={name: version(name) for name in ("logitstream", "torch", "transformers")},
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        teacher=TeacherResults(
            model=info.model,
            revision=info.revision,
            license=model_card.license_of_hub_model(info.model, info.revision),
            weights_fingerprint=info.weights_fingerprint,
            teacher_fingerprint=info.teacher_fingerprint,
            vocab_size=info.vocab_size,
            scores=held_out.teacher,
            unknown=held_out.unknown,
        ),
        students=trained.students,
    )


@contextmanager
def _make_output(folder: Path) -> Iterator[None]:
    """Creates the output folder before anything is computed; removes it if it stays empty."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {folder} cannot be created: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--output {folder} is not writable for this user")
    try:
        yield
    except BaseException:
        with suppress(OSError):  # a folder that is not empty stays
            for parent in missing:
                parent.rmdir()
        raise


def describe_checkpoints(config: TrainConfig) -> str:
    """Says which checkpoints an interrupted run left, and how to resume from them."""
    folder, newest = config.output / "checkpoints", {}
    for name in NAMES:
        found = checkpoints.find_all(folder_of(config, name))
        newest[name] = checkpoints.read_step(found[-1]) if found else None
    newest = {name: step for name, step in newest.items() if step is not None}
    again = "the same command without --start-over" if config.start_over else "the same command"
    if not newest:
        how = "" if config.checkpoint_every else " (--checkpoint-every N writes them)"
        return f"no checkpoint was written{how}: {again} starts at step 0"
    if {*newest} == {"distilled"}:
        return f"checkpoint of step {newest['distilled']} kept in {folder}: run {again} to resume"
    listed = ", ".join(f"step {step} of student {name}" for name, step in newest.items())
    return f"checkpoints kept in {folder}: {listed}: run {again} to resume"


def run_train(config: TrainConfig) -> int:
    """Trains the student and the requested controls; prints and writes the report."""
    from student_trainer.errors import Interrupted, NotWritten
    from student_trainer.report import build as report
    from student_trainer.report import model_card

    saved = ""
    try:
        results = train(config)
        saved = f"the student is saved in {config.output / 'student'}; "
        found = report.make_report({str(config.output): results})
        results.save(config.output)
        report.write_report(config.output / "report.html", found)
        report.draw_losses(config.output / "loss.png", found)
        model_card.write_model_card(config.output / "student", results, found)
    except KeyboardInterrupt as error:
        where = f" {error}" if isinstance(error, Interrupted) else ""  # workers do not say where
        kept = describe_checkpoints(config)
        print(f"student-trainer: interrupted{where}; {kept}", file=sys.stderr)
        return 130
    except NotWritten as error:
        kept = f"; {saved}{describe_checkpoints(config)}" if config.output.is_dir() else ""
        print(f"student-trainer: {error}{kept}", file=sys.stderr)
        return 1
    print(report.format_table(found))
    print("\n".join(found["sentences"]))
    print(
        f"written: {config.output / 'report.html'}, report.json, results.json, loss.png, student/"
    )
    return 1 if found["verdict"] == "diverged" else 0
