"""One training run as `student-trainer train` describes it: its text, its teacher, its students."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from logit_codec import parse_targets
from student_trainer import data, trainer
from student_trainer.checkpoint import Checkpoints, KeepsCheckpoints
from student_trainer.client import RemoteTeacher, connect
from student_trainer.config import CorpusConfig, TrainConfig
from student_trainer.curves import Curves
from student_trainer.errors import NotRecorded
from student_trainer.prefetch import prefetch
from student_trainer.ranks import Ranks
from student_trainer.recorded import Recorded

logger = logging.getLogger(__name__)

MAY_CHANGE = {
    *(
        "teacher",
        "record",
        "draws",
        "output",
        "ahead",
        "control",
        "device",
        "log_every",
        "tensorboard",
    ),
    *("checkpoint_every", "keep_checkpoints", "start_over"),
    *("workers", "ray_address", "max_failures"),
}
"""What a run that goes on from a checkpoint may set otherwise."""


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """The text of a run, as the student reads it."""

    tokenizer: Any
    sequences: Tensor
    """(N, L) int64: what is trained on."""
    held_out: Tensor
    """(M, L) int64: what is measured on."""


def read_corpus(config: CorpusConfig) -> Corpus:
    """Reads the student's tokenizer and packs the text. Raises ValueError, FileNotFoundError."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not (config.student / "config.json").is_file():
        raise ValueError(f"{config.student} is not a student folder: it has no config.json")
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.student)
    length = config.sequence_length
    sequences = data.pack(data.find_files(config.data), tokenizer, length, label="data")
    if config.held_out:
        files = data.find_files(config.held_out)
        held_out = data.pack(files, tokenizer, length, label="held-out data")
    else:
        is_held_out = torch.arange(len(sequences)) % 20 == 19
        held_out, sequences = sequences[is_held_out], sequences[~is_held_out]
        if len(held_out) == 0:
            raise ValueError("data is too short to hold some out: give --held-out files")
    return Corpus(tokenizer, sequences, held_out[: config.held_out_sequences])


@contextmanager
def open_teacher(config: CorpusConfig, tokenizer: Any) -> Iterator[RemoteTeacher | Recorded]:
    """The teacher that the run is to learn from: served, recorded, or both."""
    with ExitStack() as ending:
        live = None
        if config.teacher:
            live = ending.enter_context(connect(config.teacher, tokenizer=tokenizer))
        if config.record:
            record = Recorded(config.record, live, tokenizer=tokenizer, draws=config.draws)
            yield ending.enter_context(record)
        else:
            assert live is not None
            yield live


def teacher_loss(
    config: CorpusConfig, teacher: RemoteTeacher | Recorded, held_out: Tensor
) -> float | None:
    """The teacher's own loss, in nats; None if a record cannot tell."""
    if not isinstance(teacher, Recorded):
        return trainer.teacher_loss(teacher, held_out)
    if config.temperature != 1.0 or not parse_targets(config.targets).realized:
        return None
    try:
        return trainer.teacher_loss(teacher, held_out, targets=config.targets, seed=config.seed)
    except NotRecorded:
        logger.warning("the held-out text was not recorded: the teacher's own loss is unknown")
        return None


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """What a run made."""

    student: nn.Module
    distilled: trainer.Run
    control: trainer.Run | None
    bytes_per_token: float | None
    """Of the targets that were received; None if none were."""


def train_students(
    config: TrainConfig, corpus: Corpus, teacher: RemoteTeacher | Recorded
) -> Trained:
    """Trains the student in this process, and before it the control if asked for."""
    control = None
    if config.control:
        student, checkpoints = begin(config, corpus, "control")
        pairs = control_pairs(batches(config, corpus))
        control = train_student(config, corpus, student, pairs, "control", checkpoints)
    fingerprint = teacher.info.teacher_fingerprint
    student, checkpoints = begin(config, corpus, "distilled", teacher_fingerprint=fingerprint)
    pairs = DistilledPairs(config, teacher, batches(config, corpus))
    distilled = train_student(
        *(config, corpus, student, pairs.stream, "distilled", checkpoints), also=pairs.measured
    )
    return Trained(student, distilled, control, pairs.bytes_per_token())


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
            ahead=int(config.ahead) if config.ahead.isdigit() else config.ahead,
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
    folder = config.output / "checkpoints"
    checkpoints = Checkpoints(
        folder if name == "distilled" else folder / name,
        every=config.checkpoint_every,
        identity=identity_of(config, corpus, **identity),
        keep=config.keep_checkpoints,
    )
    if config.start_over:
        checkpoints.clear()
    return trainer.make_student(
        config.student, seed=config.seed, device=find_device(config)
    ), checkpoints


def identity_of(config: TrainConfig, corpus: Corpus, **more: str) -> dict[str, Any]:
    """What must be the same in a run that goes on; more: beside the settings and the text."""
    return {
        **config.model_dump(mode="json", exclude=MAY_CHANGE),
        "data_digest": data.digest(corpus.sequences),
        "held_out_digest": data.digest(corpus.held_out),
        **more,
    }


def train_student(
    config: TrainConfig,
    corpus: Corpus,
    student: nn.Module,
    pairs: Any,
    name: str,
    checkpoints: KeepsCheckpoints,
    *,
    also: Callable[[], dict[str, float]] = dict,
    log: Callable[[str], None] | None = None,
) -> trainer.Run:
    """Trains one student of the run on its pairs. also, log: as for `trainer.train`."""
    curves = None
    if config.tensorboard:
        is_first = Ranks.of(student).rank == 0
        curves = Curves(config.output / "tensorboard" / name if is_first else None)
    return trainer.train(
        student,
        pairs,
        steps=config.steps,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        optimizer=config.optimizer,
        kd_weight=config.kd_weight,
        ce_weight=config.ce_weight,
        measure=lambda model: trainer.held_out_loss(model, corpus.held_out),
        label=f"student {name}",
        checkpoints=checkpoints,
        log_every=config.log_every,
        curves=curves,
        also=also,
        log=log,
    )


def find_device(config: TrainConfig) -> str:
    """cpu or cuda."""
    if config.device != "auto":
        return config.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def save_student(student: Any, corpus: Corpus, folder: Path) -> None:
    """Writes a Hugging Face folder."""
    student.save_pretrained(folder)
    corpus.tokenizer.save_pretrained(folder)
