"""One training run as `student-trainer train` describes it: its text, its teacher, its students."""

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from logit_codec import parse_targets
from logitstream.extras import check_installed
from student_trainer import data, disk
from student_trainer.client.remote import RemoteTeacher, connect
from student_trainer.config import CorpusConfig, TrainConfig
from student_trainer.errors import NotRecorded
from student_trainer.record.recorded import Recorded
from student_trainer.report import model_card
from student_trainer.teachers.prefetch import prefetch
from student_trainer.teachers.window import parse_ahead
from student_trainer.training import checkpoint
from student_trainer.training import loop as trainer
from student_trainer.training.alignment import shared_ids
from student_trainer.training.checkpoint import Checkpoints, KeepsCheckpoints, step_of
from student_trainer.training.evaluate import evaluate, evaluate_teacher
from student_trainer.training.ranks import Ranks
from student_trainer.training.results import Results, Scores, StudentResults, TeacherResults
from student_trainer.training.shuffled_control import ShuffledTargets
from student_trainer.training.tensorboard import Curves

logger = logging.getLogger(__name__)

RESULTS_NBYTES = 1 << 20
"""Of what is written beside a student: its model card, results, report and picture."""
TOKENIZER_FILES = {"tokenizer.json", "tokenizer.model", "tekken.json", "tiktoken.model"}
"""Beside those that the class of a tokenizer names."""
NAMES = ("control", "distilled", "shuffled")
"""Of the students of a run, in the order in which they are trained."""
MAY_CHANGE = {
    # Their content may not: see `identity_of`.
    *("student", "data", "held_out"),
    *(
        "teacher",
        "ca",
        "cert",
        "key",
        "record",
        "draws",
        "output",
        "ahead",
        "control",
        "shuffled_control",
        "device",
        "log_every",
        "tensorboard",
    ),
    *("checkpoint_every", "keep_checkpoints", "start_over"),
    *("workers", "ray_address", "max_failures"),
}
"""What a run that goes on from a checkpoint may set otherwise."""


@dataclass(frozen=True, slots=True, eq=False)
class Student:
    """What a folder says of a student before it is made."""

    tokenizer: Any
    num_ids: int
    """Rows of its head."""
    nbytes: int
    """Of its weights as they are trained and saved, in float32, and of its tokenizer."""


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """The text of a run, as the student reads it."""

    tokenizer: Any
    sequences: Tensor
    """(N, L) int64: what is trained on."""
    held_out: Tensor
    """(M, L) int64: what is measured on."""


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


def check_folder(student: Path) -> None:
    """Raises ValueError for what is no folder of a student: the hub would be asked for it."""
    if (student / "config.json").is_file():
        return
    if student.exists():
        raise ValueError(f"{student} is not a student folder: it has no config.json")
    name = str(student)
    advice = "Give the path of a Hugging Face folder."
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        folder = name.rpartition("/")[2]
        advice = (
            "If it is a model of the Hugging Face hub, download it first (hf download "
            f"{name} --local-dir {folder}) and give --student {folder}."
        )
    raise ValueError(f"there is no folder {name}, where the student should be. {advice}")


def read_tokenizer(student: Path) -> Any:
    """Of a student's folder. Raises ValueError if it has none."""
    import transformers

    check_folder(student)
    no_tokenizer = (
        f"the student in {student} has no tokenizer (no tokenizer.json or the like): put the "
        "teacher's into it, AutoTokenizer.from_pretrained(TEACHER).save_pretrained(STUDENT)"
    )
    names = {one.name for one in student.iterdir()}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(student)
    except RecursionError:
        raise ValueError(f"a file of the tokenizer in {student} is nested too deep") from None
    except (OSError, ValueError):
        if names & {*TOKENIZER_FILES, "vocab.json", "vocab.txt"}:
            raise  # there is one, and something is wrong with it
        raise ValueError(no_tokenizer) from None
    # Without any file of it some classes make an empty one, which knows no word.
    files = set(type(tokenizer).vocab_files_names.values())
    if files and not names & (files | TOKENIZER_FILES):
        raise ValueError(no_tokenizer)
    return tokenizer


def read_student(folder: Path) -> Student:
    """Reads the tokenizer and the config. Raises ValueError, OSError for what is no student."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = read_tokenizer(folder)
    student = trainer.outline(folder)
    head = student.get_output_embeddings()
    if head is None:
        raise ValueError(f"the student in {folder} has no head that gives logits of token ids")
    parameters = sum(parameter.numel() for parameter in student.parameters())
    files = [folder / name for name in {*TOKENIZER_FILES, "vocab.json", "merges.txt"}]
    of_tokenizer = sum(file.stat().st_size for file in files if file.is_file())
    return Student(tokenizer, len(head.weight), 4 * parameters + of_tokenizer)


def find_texts(config: CorpusConfig) -> tuple[list[Path], list[Path]]:
    """The files to train on, and those to measure on, if they are given. Raises FileNotFoundError."""
    return data.find_files(config.data), data.find_files(config.held_out)


def read_corpus(config: CorpusConfig, tokenizer: Any) -> Corpus:
    """Reads and packs the text. Raises ValueError, FileNotFoundError."""
    length = config.sequence_length
    of_data, of_held_out = find_texts(config)
    data.look_through(of_data, label="data")
    if of_held_out:
        data.look_through(of_held_out, label="held-out data")
    sequences = data.pack(of_data, tokenizer, length, label="data")
    if of_held_out:
        held_out = data.pack(of_held_out, tokenizer, length, label="held-out data")
    else:
        is_held_out = torch.arange(len(sequences)) % 20 == 19
        held_out, sequences = sequences[is_held_out], sequences[~is_held_out]
        if len(held_out) == 0:
            raise ValueError(
                f"data is too short to hold some out: it has {len(sequences)} sequences of {length} "
                "tokens, and every 20th is held out. Give more, or --held-out files."
            )
    return Corpus(tokenizer, sequences, held_out[: config.held_out_sequences])


def check_teacher(config: CorpusConfig, teacher: RemoteTeacher | Recorded, student: Student) -> int:
    """Asks the teacher for what the run is going to ask for, before anything long begins.

    Returns how many ids student and teacher share. Raises ValueError and what `Teacher.stream` does:
    the teacher may not allow the caller these targets, or not know them.
    """
    shared = shared_ids(teacher.info, student.tokenizer, student.num_ids)
    teacher.make_wish(config.targets, config.temperature, config.seed, 0)  # as recorded?
    live = teacher.fallback if isinstance(teacher, Recorded) else teacher
    if live is not None:
        found = live.stream(
            [[0, 0]], targets=config.targets, temperature=config.temperature, interactive=True
        )
        list(found)
    return shared


def check_ids(corpus: Corpus, num_ids: int) -> None:
    """Raises ValueError for a token that student and teacher do not share."""
    for name, sequences in (("data", corpus.sequences), ("the held-out text", corpus.held_out)):
        largest = int(sequences.max()) if len(sequences) else 0
        if largest >= num_ids:
            token = corpus.tokenizer.convert_ids_to_tokens(largest)
            raise ValueError(
                f"{name} has token {token!r}, id {largest:,}; student and teacher share ids 0 to "
                f"{num_ids - 1:,}. Leave it out of the text."
            )


@contextmanager
def open_teacher(config: CorpusConfig, tokenizer: Any) -> Iterator[RemoteTeacher | Recorded]:
    """The teacher that the run is to learn from: served, recorded, or both.

    Raises ValueError if its sequences cannot be as long as those of the run.
    """
    with ExitStack() as ending:
        live = None
        if config.teacher:
            teacher = connect(
                config.teacher, tokenizer=tokenizer, ca=config.ca, cert=config.cert, key=config.key
            )
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


class HeldOut:
    """The held-out text, what the teacher makes of it, and what a student did last time."""

    def __init__(
        self,
        sequences: Tensor,
        best_ids: Tensor | None = None,
        teacher: Scores | None = None,
        unknown: str = "",
        num_ids: int | None = None,
    ) -> None:
        """best_ids, num_ids: as for `evaluate`. teacher: its scores; unknown: why some of them are
        not known."""
        self.sequences = sequences
        self.num_ids = num_ids
        self.best_ids = best_ids
        self.teacher = teacher or Scores(loss=None)
        self.unknown = unknown
        self.last: Scores | None = None

    @classmethod
    def ask(
        cls,
        config: CorpusConfig,
        teacher: RemoteTeacher | Recorded,
        sequences: Tensor,
        num_ids: int | None = None,
    ) -> Self:
        """Asks the teacher, as far as it can tell. Raises what `Teacher.stream` does."""
        if not isinstance(teacher, Recorded):
            scores, best_ids = evaluate_teacher(teacher, sequences)
            return cls(sequences, best_ids, scores, num_ids=num_ids)
        try:
            scores, best_ids = evaluate_teacher(
                teacher,
                sequences,
                targets=config.targets,
                temperature=config.temperature,
                seed=config.seed,
            )
        except NotRecorded:
            unknown = "the held-out text was not recorded"
            logger.warning("%s: the teacher's own loss is unknown", unknown)
            return cls(sequences, unknown=unknown, num_ids=num_ids)
        if None not in (scores.loss, scores.accuracy, scores.calibration_error):
            return cls(sequences, best_ids, scores, num_ids=num_ids)
        if teacher.fallback is not None:
            live, best_ids = evaluate_teacher(teacher.fallback, sequences)
            if scores.loss is not None:  # the same, whether there is a live teacher or not
                same = {"loss": scores.loss, "sequence_losses": scores.sequence_losses}
                live = live.model_copy(update=same)
            return cls(sequences, best_ids, live, num_ids=num_ids)
        found = f"the record holds {config.targets} at temperature {config.temperature:g}"
        unknown = f"{found}, which does not tell it; with --teacher too, the teacher is asked"
        return cls(sequences, best_ids, scores, unknown, num_ids)

    def measure(self, student: nn.Module, batch_size: int) -> Scores:
        """A student on the text, beside the teacher."""
        self.last = evaluate(
            *(student, self.sequences, self.best_ids), batch_size=batch_size, num_ids=self.num_ids
        )
        return self.last

    def beside_the_loss(self) -> dict[str, float]:
        """What else the last measurement found."""
        assert self.last is not None
        found = {
            "held_out_accuracy": self.last.accuracy,
            "held_out_top1_agreement": self.last.top1_agreement,
        }
        return {name: value for name, value in found.items() if value is not None}


def train(config: TrainConfig) -> Results:
    """Trains the student, and the controls that were asked for, and saves the student.

    Raises ValueError, OSError, NotWritten, TrainingFailed, and what a teacher can raise.
    """
    if config.workers:
        from student_trainer.ray_train.driver import train_students as train_them
    else:
        train_them = train_students
    check_settings(config)
    with _made(config.output), ExitStack() as ending:
        # What is refused soon comes before what takes long, down to here from there.
        read = read_student(config.student)
        find_texts(config)
        ending.callback(disk.give_room, config.output)
        disk.keep_room(config.output, read.nbytes + RESULTS_NBYTES, "the student")
        teacher = ending.enter_context(open_teacher(config, read.tokenizer))
        num_ids = check_teacher(config, teacher, read)
        check_checkpoints(config, None, teacher.info.teacher_fingerprint)
        corpus = read_corpus(config, read.tokenizer)
        check_ids(corpus, num_ids)
        check_checkpoints(config, corpus, teacher.info.teacher_fingerprint)
        held_out = HeldOut.ask(config, teacher, corpus.held_out, num_ids)
        trained = train_them(config, corpus, teacher, held_out)
        info = teacher.info
    student = trained.student
    return Results(
        settings=config.model_dump(mode="json"),
        data_digest=data.digest(corpus.sequences),
        held_out_digest=data.digest(corpus.held_out),
        held_out_sequences=len(corpus.held_out),
        student_parameters=sum(parameter.numel() for parameter in student.parameters()),
        student_architecture=type(student).__name__,
        student_license=model_card.license_of(config.student),
        starts_from_weights=trainer.has_weights(config.student),
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
def _made(folder: Path) -> Iterator[None]:
    """Makes a folder, before anything is computed for it; if nothing came of it, it is not left."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {folder} cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--output {folder} cannot be written to by this user")
    try:
        yield
    except BaseException:
        with suppress(OSError):  # something is in it
            for one in missing:
                one.rmdir()
        raise


def what_is_kept(config: TrainConfig) -> str:
    """What is there of an interrupted run, and how it goes on."""
    folder, newest = config.output / "checkpoints", {}
    if config.workers:
        from student_trainer.ray_train import driver as ray_train

        folder = config.output / ray_train.FOLDER
        newest = {name: ray_train.newest_step(folder / name) for name in NAMES}
    else:
        for name in NAMES:
            found = Checkpoints(folder_of(config, name), every=0, identity={}).newest()
            newest[name] = None if found is None else step_of(found)
    newest = {name: step for name, step in newest.items() if step is not None}
    again = "the same command without --start-over" if config.start_over else "the same command"
    if not newest:
        how = "" if config.checkpoint_every else " (--checkpoint-every N writes them)"
        return f"no checkpoint was written{how}: {again} begins at step 0"
    if {*newest} == {"distilled"}:
        return f"checkpoint of step {newest['distilled']} kept in {folder}: run {again} to go on"
    listed = ", ".join(f"step {step} of student {name}" for name, step in newest.items())
    return f"checkpoints kept in {folder}: {listed}: run {again} to go on"


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
    save_student(student, corpus, config.output / "student")
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
    return trainer.make_student(
        config.student, seed=config.seed, device=find_device(config)
    ), checkpoints


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
        **config.model_dump(mode="json", exclude=MAY_CHANGE),
        "student_digest": trainer.student_digest(config.student),
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
        from student_trainer.ray_train import driver as ray_train

        folders = {name: config.output / ray_train.FOLDER / name for name in folders}
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


def find_device(config: TrainConfig) -> str:
    """The device of torch. Raises ValueError for one that there is not."""
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(config.device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise ValueError(
            f"--device must be auto, cpu, cuda or one such as cuda:1, got {config.device!r}"
        )
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {config.device}: torch {torch.__version__} finds no GPU here")
    return config.device


def save_student(student: Any, corpus: Corpus, folder: Path) -> None:
    """Writes a Hugging Face folder, whole or not at all. Raises NotWritten."""
    disk.give_room(folder.parent)
    with disk.whole_folder(folder) as partial:
        student.save_pretrained(partial)
        corpus.tokenizer.save_pretrained(partial)
        for weights in partial.glob("*.safetensors"):  # which safetensors writes for the owner only
            shutil.copymode(partial / "config.json", weights)
