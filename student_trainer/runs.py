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
from student_trainer.checkpoint import Checkpoints
from student_trainer.client import RemoteTeacher, connect
from student_trainer.config import CorpusConfig, TrainConfig
from student_trainer.curves import Curves
from student_trainer.errors import NotRecorded
from student_trainer.recorded import Recorded

logger = logging.getLogger(__name__)

MAY_CHANGE = {
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
        "device",
        "log_every",
        "tensorboard",
    ),
    *("checkpoint_every", "keep_checkpoints", "start_over"),
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
            teacher = connect(
                config.teacher, tokenizer=tokenizer, ca=config.ca, cert=config.cert, key=config.key
            )
            live = ending.enter_context(teacher)
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


def train_student(
    config: TrainConfig,
    corpus: Corpus,
    pairs: Any,
    name: str,
    *,
    also: Callable[[], dict[str, float]] = dict,
    **identity: str,
) -> tuple[nn.Module, trainer.Run]:
    """Trains one student of the run on its pairs; "distilled" is the one it is about.

    also: as for `trainer.train`. identity: what must be the same in a run that goes on, beside the
    settings and the text.
    """
    folder = config.output / "checkpoints"
    checkpoints = Checkpoints(
        folder if name == "distilled" else folder / name,
        every=config.checkpoint_every,
        identity={
            **config.model_dump(mode="json", exclude=MAY_CHANGE),
            "data_digest": data.digest(corpus.sequences),
            "held_out_digest": data.digest(corpus.held_out),
            **identity,
        },
        keep=config.keep_checkpoints,
    )
    if config.start_over:
        checkpoints.clear()
    student = trainer.make_student(config.student, seed=config.seed, device=find_device(config))
    curves = Curves(config.output / "tensorboard" / name) if config.tensorboard else None
    run = trainer.train(
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
    )
    return student, run


def find_device(config: TrainConfig) -> str:
    """cpu or cuda."""
    if config.device != "auto":
        return config.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def save_student(student: Any, corpus: Corpus, folder: Path) -> None:
    """Writes a Hugging Face folder."""
    student.save_pretrained(folder)
    corpus.tokenizer.save_pretrained(folder)
