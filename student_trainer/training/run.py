"""One training run as `student-trainer train` describes it: its text, its teacher, its students."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from logit_codec import parse_targets
from logitstream.extras import check_installed
from student_trainer import data
from student_trainer.client.remote import RemoteTeacher, connect
from student_trainer.config import CorpusConfig, MayChange, TrainConfig, marked
from student_trainer.ray_train.job import FOLDER
from student_trainer.record.recorded import Recorded
from student_trainer.teachers.look_ahead import parse_ahead
from student_trainer.teachers.prefetch import prefetch
from student_trainer.training import checkpoint
from student_trainer.training import loop as trainer
from student_trainer.training.alignment import shared_ids
from student_trainer.training.checkpoint import Checkpoints, KeepsCheckpoints
from student_trainer.training.corpus import TOKENIZER_FILES, Corpus, read_tokenizer
from student_trainer.training.held_out import HeldOut
from student_trainer.training.ranks import Ranks
from student_trainer.training.results import Scores, StudentResults
from student_trainer.training.shuffled_control import ShuffledTargets
from student_trainer.training.students import (
    find_device,
    make_student,
    outline,
    save_student,
    student_digest,
)
from student_trainer.training.tensorboard import Curves

logger = logging.getLogger(__name__)

RESULTS_NBYTES = 1 << 20
"""Of what is written beside a student: its model card, results, report and picture."""
NAMES = ("control", "distilled", "shuffled")
"""Of the students of a run, in the order in which they are trained."""


@dataclass(frozen=True, slots=True, eq=False)
class Student:
    """What a folder says of a student before it is made."""

    tokenizer: Any
    num_ids: int
    """Rows of its head."""
    nbytes: int
    """Of its weights as they are trained and saved, in float32, and of its tokenizer."""


def check_settings(config: CorpusConfig) -> None:
    """Raises ValueError or InvalidRequest for what can be refused before anything is read."""
    refuse_launchers()
    try:
        parse_targets(config.targets)
    except ValueError as error:
        raise ValueError(f"--targets: {error}") from None
    if isinstance(config, TrainConfig):
        if config.workers:
            check_installed("ray-train", "ray", "pandas")
        if config.tensorboard:
            check_installed("train", "tensorboard")
        if not config.workers:  # theirs may be on other machines
            find_device(config)
        parse_ahead(ahead_of(config))


def refuse_launchers() -> None:
    """Raises ValueError in one of several processes of torchrun: each would make the whole run."""
    count = os.environ.get("WORLD_SIZE", "")
    if count.isdecimal() and int(count) > 1:
        rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "?"))
        raise ValueError(
            f"this is process {rank} of {count} that torchrun or accelerate started (WORLD_SIZE), and "
            "each would make the whole run in the same folder. Start student-trainer once, without "
            f"them; train --workers {count} trains with {count} processes."
        )


def read_student(folder: Path) -> Student:
    """Reads the tokenizer and the config. Raises ValueError, OSError for what is no student."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = read_tokenizer(folder)
    student = outline(folder)
    head = student.get_output_embeddings()
    if head is None:
        raise ValueError(f"the student in {folder} has no head that gives logits of token ids")
    parameters = sum(parameter.numel() for parameter in student.parameters())
    files = [folder / name for name in {*TOKENIZER_FILES, "vocab.json", "merges.txt"}]
    of_tokenizer = sum(file.stat().st_size for file in files if file.is_file())
    return Student(tokenizer, len(head.weight), 4 * parameters + of_tokenizer)


def check_teacher(config: CorpusConfig, teacher: RemoteTeacher | Recorded, student: Student) -> int:
    """Asks the teacher for what the run is going to ask for, before anything long begins.

    Returns how many ids student and teacher share. Raises ValueError and what `Teacher.stream` does:
    the teacher may not allow the caller these targets, or not know them.
    """
    shared = shared_ids(teacher.info, student.tokenizer, student.num_ids)
    teacher.make_options(config.targets, config.temperature, config.seed, 0)  # as recorded?
    live = teacher.fallback if isinstance(teacher, Recorded) else teacher
    if live is not None:
        found = live.stream(
            [[0, 0]], targets=config.targets, temperature=config.temperature, interactive=True
        )
        list(found)
    return shared


@contextmanager
def open_teacher(config: CorpusConfig, tokenizer: Any) -> Iterator[RemoteTeacher | Recorded]:
    """The teacher that the run is to learn from: served, recorded, or both.

    Raises ValueError if its sequences cannot be as long as those of the run.
    """
    with ExitStack() as ending:
        live = None
        if config.teacher:
            teacher = connect(config.teacher, tokenizer=tokenizer, **config.credentials())
            live = ending.enter_context(teacher)
            longest = live.info.max_sequence_tokens
            if config.sequence_length > longest:
                raise ValueError(
                    f"--sequence-length must be at most {longest} for the teacher at "
                    f"{config.teacher}, got {config.sequence_length}"
                )
        if config.record:
            record = Recorded(config.record, live, tokenizer=tokenizer, draws=config.draws)
            yield ending.enter_context(record)
        else:
            assert live is not None
            yield live


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """What a run made."""

    student: nn.Module
    students: dict[str, StudentResults]
    """By name: distilled, and control and shuffled if they were asked for."""
    bytes_per_token: float | None
    """Of the targets that were received; None if none were."""


def train_students(
    config: TrainConfig, corpus: Corpus, teacher: RemoteTeacher | Recorded, held_out: HeldOut
) -> Trained:
    """Trains the student in this process and saves it, and the controls if asked for."""
    students: dict[str, StudentResults] = {}
    if config.control:
        student, checkpoints = begin(config, corpus, "control")
        pairs = control_pairs(batches(config, corpus))
        run = train_student(*(config, student, pairs, "control", checkpoints), held_out=held_out)
        students["control"] = results_of(run, held_out.measure(student, config.batch_size))
    fingerprint = teacher.info.teacher_fingerprint
    student, checkpoints = begin(config, corpus, "distilled", teacher_fingerprint=fingerprint)
    made = DistilledPairs(config, teacher, batches(config, corpus))
    run = train_student(
        *(config, student, made.stream, "distilled", checkpoints),
        held_out=held_out,
        also=made.measured,
    )
    nbytes = bytes_per_token(made, run.history)
    students["distilled"] = results_of(run, held_out.measure(student, config.batch_size))
    save_student(student, corpus.tokenizer, config.output / "student")
    if config.shuffled_control:
        other, checkpoints = begin(config, corpus, "shuffled", teacher_fingerprint=fingerprint)
        again = DistilledPairs(config, teacher, batches(config, corpus))
        pairs = ShuffledTargets(again.stream, seed=config.seed)
        run = train_student(*(config, other, pairs, "shuffled", checkpoints), held_out=held_out)
        students["shuffled"] = results_of(run, held_out.measure(other, config.batch_size))
    return Trained(student, students, nbytes)


def results_of(run: trainer.Run, scores: Scores) -> StudentResults:
    """One student's; scores: at the end, for a run that went on behind its last step measured
    nothing on the way."""
    return StudentResults(
        seconds=run.seconds,
        waiting_s=run.waiting_s,
        tokens=run.tokens,
        history=run.history,
        measurements=run.measurements,
        scores=scores,
    )


def batches(config: TrainConfig, corpus: Corpus) -> Iterator[dict[str, Any]]:
    """What the run trains on, in this order."""
    return data.batches(
        corpus.sequences, batch_size=config.batch_size, steps=config.steps, seed=config.seed
    )


def control_pairs(batches: Iterator[dict[str, Any]]) -> Any:
    """Batches without targets."""
    return prefetch(((batch, None) for batch in batches), ahead=1)


class DistilledPairs:
    """Batches with their targets, and what the targets weigh."""

    def __init__(
        self,
        config: TrainConfig,
        teacher: RemoteTeacher | Recorded,
        batches: Iterator[dict[str, Any]],
    ) -> None:
        self._counters = teacher.counters
        self._before = self._counters.payload_nbytes, self._counters.rows
        self.stream = teacher.stream_batches(
            batches,
            targets=config.targets,
            temperature=config.temperature,
            seed=config.seed,
            ahead=ahead_of(config),
        )

    def bytes_per_token(self) -> float | None:
        """None before the first targets."""
        nbytes, rows = self._before
        received = self._counters.rows - rows
        return (self._counters.payload_nbytes - nbytes) / received if received else None

    def measured(self) -> dict[str, float]:
        """For the curves."""
        return {"lookahead": self.stream.in_flight, "bytes_per_token": self.bytes_per_token() or 0}


def begin(
    config: TrainConfig, corpus: Corpus, name: str, **identity: str
) -> tuple[nn.Module, Checkpoints]:
    """One student of the run, untrained, and its checkpoints; "distilled" is what the run is about.

    identity: as for `identity_of`.
    """
    checkpoints = Checkpoints(
        folder_of(config, name),
        every=config.checkpoint_every,
        identity=identity_of(config, corpus, **identity),
        keep=config.keep_checkpoints,
    )
    if config.start_over:
        checkpoints.clear()
    return make_student(config).to(find_device(config)), checkpoints


def folder_of(config: TrainConfig, name: str) -> Path:
    """Where the checkpoints of one student are."""
    folder = config.output / "checkpoints"
    return folder if name == "distilled" else folder / name


def identity_of(config: TrainConfig, corpus: Corpus | None, **more: str) -> dict[str, Any]:
    """What must be the same in a run that goes on; more: beside the settings and the text.

    Without the text, as far as it is known before that is read.
    """
    texts = {}
    if corpus is not None:
        texts["data_digest"] = data.digest(corpus.sequences)
        texts["held_out_digest"] = data.digest(corpus.held_out)
    return {
        **config.model_dump(mode="json", exclude=marked(MayChange)),
        "student_digest": student_digest(config.student),
        **texts,
        **more,
    }


def check_checkpoints(config: TrainConfig, corpus: Corpus | None, fingerprint: str) -> None:
    """Raises ValueError if the checkpoints in the output are of another run, as far as is known."""
    if config.start_over:
        return
    wanted = {"control": config.control, "shuffled": config.shuffled_control, "distilled": True}
    folders = {name: folder_of(config, name) for name in NAMES if wanted[name]}
    if config.workers:
        folders = {name: config.output / FOLDER / name for name in folders}
    folders = {name: folder for name, folder in folders.items() if checkpoint.all_in(folder)}
    if not folders:
        return
    identity = identity_of(config, corpus)  # which reads the student's weights and the whole text
    for name, folder in folders.items():
        more = {} if name == "control" else {"teacher_fingerprint": fingerprint}
        checkpoint.refuse_another_run(folder, {**identity, **more})


def train_student(
    config: TrainConfig,
    student: nn.Module,
    pairs: Any,
    name: str,
    checkpoints: KeepsCheckpoints,
    *,
    held_out: HeldOut,
    also: Callable[[], dict[str, float]] = dict,
    log: Callable[[str], None] | None = None,
) -> trainer.Run:
    """Trains one student of the run on its pairs.

    held_out: what to measure on. also, log: as for `trainer.train`.
    """
    curves = None
    if config.tensorboard:
        is_first = Ranks.of(student).rank == 0
        curves = Curves(config.output / "tensorboard" / name if is_first else None)

    def measure(model: nn.Module) -> float:
        loss = held_out.measure(model, config.batch_size).loss
        assert loss is not None
        return loss

    return trainer.train(
        student,
        pairs,
        steps=config.steps,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        optimizer=config.optimizer,
        kd_weight=config.kd_weight,
        ce_weight=config.ce_weight,
        measure=measure,
        label=f"student {name}",
        checkpoints=checkpoints,
        log_every=config.log_every,
        curves=curves,
        also=also,
        log=log,
        measured=held_out.beside_the_loss,
        num_ids=held_out.num_ids,
        is_aligned=name != "shuffled",
    )


def bytes_per_token(pairs: DistilledPairs, history: list[dict[str, float]]) -> float | None:
    """Of the targets of a run; what it last logged, if it was at its end when it went on."""
    logged = (entry["bytes_per_token"] for entry in reversed(history) if "bytes_per_token" in entry)
    return pairs.bytes_per_token() or next(logged, None) or None


def ahead_of(config: TrainConfig) -> int | str:
    """As `stream_batches` takes it."""
    return int(config.ahead) if config.ahead.isdecimal() else config.ahead
