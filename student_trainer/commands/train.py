"""`student-trainer train`: trains a student and the requested controls."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from logitstream.messages import describe_precision
from protos import teacher_pb2
from student_trainer import disk
from student_trainer.commands.plan import run_plan
from student_trainer.commands.student import find_student, make_hub_repo, push_student
from student_trainer.commands.written import find_written
from student_trainer.config import TrainConfig
from student_trainer.errors import FailedElsewhere, Interrupted, NotWritten, TrainingFailed
from student_trainer.hf.checkpoints import read_step
from student_trainer.record.written import WrittenSummary
from student_trainer.report import build as report
from student_trainer.report import model_card
from student_trainer.teachers.several import Teachers
from student_trainer.teachers.teacher import Teacher
from student_trainer.training import checkpoints, ranks
from student_trainer.training.corpus import check_ids, check_names, find_texts, read_corpus
from student_trainer.training.held_out import HeldOut, find_live
from student_trainer.training.results import Results, Scores, TeacherResults, WrittenResults
from student_trainer.training.run import (
    NAMES,
    RESULTS_NBYTES,
    Student,
    check_checkpoints,
    check_settings,
    check_teacher,
    count_steps,
    folder_of,
    make_view,
    open_measure,
    open_teacher,
    read_student,
    train_students,
)
from student_trainer.training.students import find_device, has_weights
from student_trainer.training.tasks import Tasks


def train(config: TrainConfig) -> Results:
    """Trains the student and the requested controls, and saves the student.

    Where torchrun or accelerate launch runs this in several processes, they train together. Raises
    ValueError, OSError, NotWritten, TrainingFailed, FailedElsewhere, and what a teacher can raise.
    """
    if not config.workers:
        return train_here(config)
    if ranks.count() > 1:
        raise ValueError(
            f"--workers {config.workers} starts processes with Ray Train, and torchrun or accelerate "
            f"launch has started {ranks.count()} already: use one of the two"
        )
    check_settings(config)
    from student_trainer.ray_train.driver import run_workers

    with _make_output(config.output):
        if config.start_over:  # here, since workers that are started again resume
            for name in NAMES:
                checkpoints.clear(folder_of(config, name))
        with _opened(_with_folder(config)):  # what is refused soon comes before Ray is started
            pass
        alike = config.model_copy(update={"start_over": False})
        results = Results.model_validate_json(run_workers(alike, _train_as_worker))
    settings = {**config.model_dump(mode="json"), "steps": results.settings["steps"]}
    return results.model_copy(update={"settings": settings})


def train_here(config: TrainConfig) -> Results:
    """Trains in this process, together with the others that were started like it."""
    ranks.meet(config.training, on_cpu=find_device(config) == "cpu")
    ranks.share(lambda: check_settings(config))
    named = config.student
    config = _with_folder(config)
    with _make_output(config.output), _opened(config) as (read, teacher, num_ids):
        tasks = Tasks.load(config.eval_tasks, read.tokenizer, limit=config.eval_limit)
        # A text of a task names no teacher, so that of several none is measured.
        one = None if isinstance(teacher, Teachers) else teacher
        live = None if one is None else find_live(one)
        ranks.share(lambda: tasks.rehearse(live))
        corpus = ranks.take_turns(lambda: read_corpus(config, read.tokenizer))
        check_ids(corpus, num_ids)
        if isinstance(teacher, Teachers):
            check_names(corpus, config.teacher_column, teacher.teachers)
        config = count_steps(config, corpus)
        ranks.check_same(corpus.digest + corpus.held_out_digest, "the data")
        fingerprint = "" if teacher is None else teacher.info.teacher_fingerprint
        ranks.share(lambda: check_checkpoints(config, corpus, fingerprint))

        view = make_view(config, corpus.tokenizer)

        def ask() -> tuple[Tensor | None, Scores, str]:
            asked = HeldOut.ask(config, teacher, corpus, num_ids, view)
            return asked.best_ids, asked.teacher, asked.unknown

        held_out = HeldOut(corpus.held_out, corpus.collate, *ranks.share(ask), num_ids)
        learnt_from = teacher if config.has_targets else None
        trained = train_students(config, corpus, learnt_from, held_out, tasks)
        written = ranks.share(lambda: find_written(config))
        described = _describe_teacher(teacher, written, held_out, num_ids)
        teacher_tasks = ranks.share(lambda: tasks.measure_teacher(live))
    student = trained.student
    packages = ("logitstream", "torch", "transformers", *(["lm_eval"] if config.eval_tasks else []))
    return Results(
        settings={**config.model_dump(mode="json"), "student": str(named)},
        data_digest=corpus.digest,
        held_out_digest=corpus.held_out_digest,
        held_out_sequences=len(corpus.held_out),
        student_parameters=sum(
            getattr(parameter, "ds_numel", parameter.numel()) for parameter in student.parameters()
        ),
        student_architecture=type(student).__name__,
        student_license=model_card.license_of(config.student),
        starts_from_weights=has_weights(config.student),
        bytes_per_token=trained.bytes_per_token,
        versions={name: version(name) for name in packages},
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        teacher=described.model_copy(update={"tasks": teacher_tasks}),
        students=trained.students,
        written=[WrittenResults(**asdict(one)) for one in written],
    )


def _describe_teacher(
    teacher: Teacher | None, written: Sequence[WrittenSummary], held_out: HeldOut, num_ids: int
) -> TeacherResults:
    """Says who the teacher was: without one, the one that wrote the text, if that is known."""
    who = written[0] if teacher is None and written else None
    info = teacher_pb2.TeacherInfo(vocab_size=num_ids) if teacher is None else teacher.info
    if who is not None:
        info = teacher_pb2.TeacherInfo(
            model=who.teacher,
            revision=who.revision,
            weights_fingerprint=who.weights_fingerprint,
            teacher_fingerprint=who.teacher_fingerprint,
            vocab_size=who.vocab_size,
        )
    return TeacherResults(
        model=info.model,
        revision=info.revision,
        license=model_card.license_of_hub_model(info.model, info.revision),
        weights_fingerprint=info.weights_fingerprint,
        teacher_fingerprint=info.teacher_fingerprint,
        precision=describe_precision(info),
        vocab_size=info.vocab_size,
        scores=held_out.teacher,
        unknown=held_out.unknown,
    )


def _with_folder(config: TrainConfig) -> TrainConfig:
    """Returns the settings with the folder of a student that may be on the hub."""
    student = ranks.take_turns(lambda: find_student(config.student, config.revision))
    return config.model_copy(update={"student": student})


def _train_as_worker(config: TrainConfig) -> str:
    return train_here(config).model_dump_json()


@contextmanager
def _opened(config: TrainConfig) -> Iterator[tuple[Student, Teacher | None, int]]:
    """Yields what the student is, its teacher, and how many ids they share.

    Without targets the teacher, if there is one, only measures.

    What is refused soon comes before what takes long. Keeps room for what is written last.
    """
    read = read_student(config.student)
    ranks.share(lambda: find_written(config))
    find_texts(config)
    if config.push_to_hub:
        ranks.share(lambda: make_hub_repo(config, config.output))
    with ExitStack() as ending:
        if ranks.is_first():
            ending.callback(disk.give_room, config.output)
        nbytes = read.count_saved_nbytes(config.lora_r) + RESULTS_NBYTES
        ranks.share(lambda: disk.keep_room(config.output, nbytes, "the student"))
        opened = open_teacher if config.has_targets else open_measure
        teacher = ending.enter_context(opened(config, read.tokenizer))
        num_ids, fingerprint = read.num_ids, ""
        if teacher is not None:
            num_ids = check_teacher(config, teacher, read)
            fingerprint = teacher.info.teacher_fingerprint
        ranks.share(lambda: check_checkpoints(config, None, fingerprint))
        yield read, teacher, num_ids


@contextmanager
def _make_output(folder: Path) -> Iterator[None]:
    """Creates the output folder before anything is computed; removes it if it stays empty."""

    def make() -> list[Path]:
        missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--output {folder} cannot be created: {error.strerror}") from None
        if not os.access(folder, os.W_OK):
            raise ValueError(f"--output {folder} is not writable for this user")
        return missing

    missing = ranks.share(make)
    try:
        yield
    except BaseException:
        if ranks.is_first():
            with suppress(OSError):  # a folder that is not empty stays
                for parent in missing:
                    parent.rmdir()
        raise


def describe_checkpoints(config: TrainConfig) -> str:
    """Says which checkpoints an interrupted run left, and how to resume from them."""
    folder, newest = config.output / "checkpoints", {}
    for name in NAMES:
        found = checkpoints.find_all(folder_of(config, name))
        newest[name] = read_step(found[-1]) if found else None
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
    if config.dry_run:
        return run_plan(config)
    results = None
    try:
        results = train(config)
        code = ranks.share(lambda: write_report(config, results))
        ranks.part()
        return code
    except KeyboardInterrupt as error:
        if ranks.is_first():
            # Workers do not say where.
            where = f" {error}" if isinstance(error, Interrupted) else ""
            kept = describe_checkpoints(config)
            print(f"student-trainer: interrupted{where}; {kept}", file=sys.stderr)
        return 130
    except NotWritten as error:
        saved = f"the student is saved in {config.output / 'student'}; " if results else ""
        kept = f"; {saved}{describe_checkpoints(config)}" if config.output.is_dir() else ""
        raise NotWritten(f"{error}{kept}") from error
    except RuntimeError as error:
        if not ranks.has_lost(error):
            raise
        if not ranks.is_first():
            raise FailedElsewhere(error) from error
        kept = describe_checkpoints(config)
        raise TrainingFailed(f"another process of the run has ended; {kept}") from error


def write_report(config: TrainConfig, results: Results) -> int:
    """Writes and prints what a run found; returns the exit code. Raises NotWritten."""
    found = report.make_report({str(config.output): results})
    results.save(config.output)
    report.write_report(config.output / "report.html", found)
    report.draw_losses(config.output / "loss.png", found)
    model_card.write_model_card(config.output / "student", results, found)
    if config.as_json:
        print(json.dumps(found, indent=2))
    else:
        print(report.format_table(found))
        print("\n".join(found["sentences"]))
        print(
            f"written: {config.output / 'report.html'}, report.json, results.json, loss.png, student/"
        )
    if config.push_to_hub:
        pushed = push_student(config, config.output)
        print(f"uploaded: {pushed}", file=sys.stderr if config.as_json else sys.stdout)
    return 1 if found["verdict"] == "diverged" else 0
