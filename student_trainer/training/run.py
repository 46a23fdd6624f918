"""One training run as `student-trainer train` describes it: its text, its teacher, its students."""

import itertools
import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from logit_codec import parse_targets
from logitstream.extras import check_installed
from student_trainer.client.remote import connect
from student_trainer.config import CorpusConfig, TrainConfig, find_deciding
from student_trainer.hf.alignment import shared_ids
from student_trainer.hf.arguments import check_arguments
from student_trainer.hf.checkpoints import read_step
from student_trainer.on_policy.batches import find_longest_prompt
from student_trainer.record.recorded import Recorded
from student_trainer.teachers.several import Teachers, split_teachers
from student_trainer.teachers.teacher import Teacher
from student_trainer.teachers.view import PrefixView
from student_trainer.training import checkpoints, ranks
from student_trainer.training.arguments import (
    check_reporters,
    make_distillation_arguments,
    make_on_policy_arguments,
    make_training_arguments,
)
from student_trainer.training.corpus import TOKENIZER_FILES, Corpus, read_tokenizer
from student_trainer.training.early_stopping import EarlyStopping
from student_trainer.training.held_out import HeldOut, find_live
from student_trainer.training.results import StudentResults
from student_trainer.training.shuffled_control import ShuffledTeacher
from student_trainer.training.students import (
    check_student_options,
    make_student,
    outline,
    student_digest,
)
from student_trainer.training.tasks import Tasks
from student_trainer.training.trainer import StudentTrainer

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
    """Of its weights in float32, as they are trained and saved, and of its tokenizer."""
    layer_widths: int
    """Inputs and outputs of all linear layers but the head, added up."""

    def count_saved_nbytes(self, lora_r: int) -> int:
        """Returns what the trained student takes on the disk: with LoRA, the adapters of all layers."""
        return 4 * lora_r * self.layer_widths + (1 << 20) if lora_r else self.nbytes


def check_settings(config: CorpusConfig) -> None:
    """Raises ValueError or InvalidRequest for what can be refused before anything is read."""
    _check_targets(config)
    if isinstance(config, TrainConfig):
        if config.workers:
            check_installed("ray-train", "ray", "pandas")
        if config.tensorboard:
            check_installed("train", "tensorboard")
        check_reporters(config.report_to)
        if config.has_targets:
            check_arguments(make_distillation_arguments(config, is_aligned=True))
        _check_own_texts(config)
        if config.packing == "isolate" and "flash" in (config.attn_implementation or ""):
            # From transformers' flash_attention_forward; there is no GPU here to try it.
            raise ValueError(
                f"--attn-implementation {config.attn_implementation} does not keep the documents of "
                "several rows apart: leave it out, or give --packing pad"
            )
        if not config.workers:  # theirs may be on other machines
            check_student_options(config)
            make_training_arguments(config, config.output)


def _check_own_texts(config: TrainConfig) -> None:
    on_policy = make_on_policy_arguments(config)
    if on_policy is not None:
        try:
            on_policy.check()
        except ValueError as error:
            raise ValueError(f"--on-policy: {error}") from None


def _check_targets(config: CorpusConfig) -> None:
    if not config.has_targets:
        if not isinstance(config, TrainConfig):
            raise ValueError("--targets none records nothing: give the targets that are wanted")
        return
    try:
        spec = parse_targets(config.targets)
    except ValueError as error:
        raise ValueError(f"--targets: {error}") from None
    if spec.needs_given_ids:
        raise ValueError(
            f"--targets {config.targets} needs ids for each row, which a text does not name. Give "
            "them in a loop of your own: teacher.stream_batches(..., given_ids=...); or use "
            "--targets top_k, whose ids the teacher chooses"
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
    layers = [one for one in student.modules() if isinstance(one, nn.Linear) and one is not head]
    widths = sum(one.in_features + one.out_features for one in layers)
    return Student(tokenizer, len(head.weight), 4 * parameters + of_tokenizer, widths)


def list_targets(config: CorpusConfig) -> list[str]:
    """Returns what the run asks the teacher for, of each row of the text."""
    if not config.has_targets:
        return []
    features = config.features if isinstance(config, TrainConfig) else ""
    return [config.targets, *([features] if features else [])]


def make_view(config: CorpusConfig, tokenizer: Any) -> PrefixView | None:
    """Makes what the teacher reads in place of the data, if it is another text. Raises ValueError."""
    if not config.teacher_prefix:
        return None
    try:
        return PrefixView(config.teacher_prefix, tokenizer)
    except ValueError as error:
        raise ValueError(f"--teacher-prefix: {error}") from None


def check_teacher(config: CorpusConfig, teacher: Teacher, student: Student) -> int:
    """Asks the teacher for what the run is going to ask for, before anything long begins.

    Returns how many ids student and teacher share. Raises ValueError and what `Teacher.stream` does:
    the teacher may not allow the caller these targets, or not know them.
    """
    shared = shared_ids(teacher.info, student.tokenizer, student.num_ids)
    if not config.has_targets:
        return shared
    teacher.make_options(config.targets, config.temperature, config.seed, 0)  # as recorded?
    every = [*split_teachers(teacher).values()]
    asked = itertools.product(map(find_live, every), list_targets(config))
    for live, targets in asked:
        if live is not None:
            found = live.stream(
                [[0, 0]], targets=targets, temperature=config.temperature, interactive=True
            )
            list(found)
    if isinstance(config, TrainConfig):
        _ask_about_own_texts(config, every, student.tokenizer)
    return shared


def _ask_about_own_texts(config: TrainConfig, teachers: list[Teacher], tokenizer: Any) -> None:
    """Asks each teacher for what it will be asked about texts that the student writes, if it does."""
    on_policy = make_on_policy_arguments(config)
    if on_policy is None:
        return
    spec = on_policy.make_request(config.temperature, 0, 0).spec
    for teacher in teachers:
        find_longest_prompt(on_policy, teacher, None, make_view(config, tokenizer))
        found = teacher.stream(
            [[0, 0]],
            targets=spec,
            temperature=config.temperature,
            interactive=True,
            given_ids=[[[0]]] if spec.needs_given_ids else None,
        )
        list(found)


@contextmanager
def open_teacher(config: CorpusConfig, tokenizer: Any, *, write: bool = True) -> Iterator[Teacher]:
    """The teacher that the run is to learn from: served, recorded, or both; or several of them.

    write: whether what a record lacks is added to it. Several teachers have a record each, in folders
    of their names. Raises ValueError if its sequences cannot be as long as those of the run.
    """
    view = make_view(config, tokenizer)
    num_before = 0 if view is None else len(view)
    with ExitStack() as ending:

        def open_one(address: str, folder: str) -> Teacher:
            live = None
            if address:
                live = connect(address, tokenizer=tokenizer, **config.credentials())
                ending.enter_context(live)
                _check_length(config, num_before, live, address)
            if not folder:
                assert live is not None
                return live
            record = Recorded(folder, live, tokenizer=tokenizer, draws=config.draws, write=write)
            return ending.enter_context(record)

        if isinstance(config.teacher, str):
            yield open_one(config.teacher, config.record)
        else:
            root = config.record.rstrip("/")
            found = {
                name: open_one(address, f"{root}/{name}" if root else "")
                for name, address in config.teacher.items()
            }
            yield Teachers(found, column=config.teacher_column)


@contextmanager
def open_measure(config: TrainConfig, tokenizer: Any) -> Iterator[Teacher | None]:
    """The teacher that the students of labels are measured beside, if one is given.

    That is a served one, or else the record of the texts that they are trained on. It is asked about
    the held-out text alone.
    """
    if config.teacher:
        with open_teacher(config.model_copy(update={"record": ""}), tokenizer) as teacher:
            yield teacher
    elif config.record:
        with Recorded(config.record, tokenizer=tokenizer) as record:
            yield record
    else:
        yield None


def _check_length(config: CorpusConfig, num_before: int, live: Teacher, address: str) -> None:
    """Raises ValueError for sequences that the teacher does not take.

    num_before: tokens that it reads in front of them.
    """
    longest = live.info.max_sequence_tokens - num_before
    if config.sequence_length > longest:
        prefix = f", which reads {num_before} tokens of --teacher-prefix too" if num_before else ""
        raise ValueError(
            f"--sequence-length must be at most {longest} for the teacher at {address}{prefix}, got "
            f"{config.sequence_length}"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """Holds what a run made."""

    student: nn.Module
    students: dict[str, StudentResults]
    """By name: distilled, and control and shuffled if they were asked for."""
    bytes_per_token: float | None
    """Of the targets that were received; None if none were."""


def count_steps(config: TrainConfig, corpus: Corpus) -> TrainConfig:
    """Returns the configuration with as many steps as its epochs have."""
    if config.epochs is None:
        return config
    assert corpus.num_sequences is not None  # a stream is refused
    per_step = config.batch_size * config.accumulation
    steps = math.ceil(config.epochs * max(corpus.num_sequences // per_step, 1))
    return config.model_copy(update={"steps": steps})


def train_students(
    config: TrainConfig,
    corpus: Corpus,
    teacher: Teacher | None,
    held_out: HeldOut,
    tasks: Tasks,
) -> Trained:
    """Trains the student and saves it, and the controls if asked for.

    teacher: None where the student learns from labels.
    """
    students: dict[str, StudentResults] = {}

    def train(name: str, teacher: Teacher | None, folder: Path | None = None) -> nn.Module:
        trainer = make_trainer(config, corpus, held_out, name, teacher)
        results = trainer.run()
        if "wandb" in config.report_to:  # whose callback leaves the run open: the next has its own
            import_module("wandb").finish()
        if folder is not None:
            trainer.save_student(folder)  # before anything else can fail
        student = trainer.accelerator.unwrap_model(trainer.model)
        scores = tasks.measure(student, f"student {name}", batch_size=config.batch_size)
        students[name] = results.model_copy(update={"tasks": scores})
        return student

    if config.control:
        train("control", None)
    student = train("distilled", teacher, config.output / "student")
    if config.shuffled_control and teacher is not None:
        train("shuffled", ShuffledTeacher(teacher, seed=config.seed))
    history = students["distilled"].history
    nbytes = next((e["bytes_per_token"] for e in reversed(history) if "bytes_per_token" in e), None)
    return Trained(student, students, nbytes)


def make_trainer(
    config: TrainConfig, corpus: Corpus, held_out: HeldOut, name: str, teacher: Teacher | None
) -> StudentTrainer:
    """Makes the Trainer of one student of the run, which is not trained yet."""
    folder = folder_of(config, name)
    if config.start_over:
        ranks.share(lambda: checkpoints.clear(folder))
    known = {}
    if teacher is not None:
        known = {"teacher_fingerprint": teacher.info.teacher_fingerprint}
    callbacks: list[transformers.TrainerCallback] = []
    if config.early_stopping:
        callbacks.append(EarlyStopping(config.early_stopping))
    if config.tensorboard and ranks.is_first():
        callbacks.append(make_tensorboard(config.output / "tensorboard" / name, folder))
    return StudentTrainer(
        make_student(config),
        make_training_arguments(config, folder, label=name),
        corpus,
        held_out,
        label=f"student {name}",
        teacher=teacher,
        teacher_view=None if teacher is None else make_view(config, corpus.tokenizer),
        distillation=make_distillation_arguments(config, is_aligned=name != "shuffled")
        if config.has_targets
        else None,
        on_policy=None if teacher is None else make_on_policy_arguments(config),
        uses_muon=config.optimizer == "muon",
        identity=identity_of(config, corpus, **known),
        keep_checkpoints=config.keep_checkpoints,
        callbacks=callbacks,
        say=logger.info if config.workers else None,
    )


def make_tensorboard(folder: Path, checkpoints_folder: Path) -> transformers.TrainerCallback:
    """Writes curves into a folder; points after the step that the run resumes from are hidden."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    found = checkpoints.find_all(checkpoints_folder)
    step = read_step(found[-1]) if found else 0
    return TensorBoardCallback(SummaryWriter(str(folder), purge_step=step + 1))


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
        texts["data_digest"] = corpus.digest
        texts["held_out_digest"] = corpus.held_out_digest
    settings = find_deciding(config.model_dump(mode="json"))
    if config.steps is None:  # which the data will tell
        del settings["steps"]
    return {
        **settings,
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
    folders = {name: folder for name, folder in folders.items() if checkpoints.find_all(folder)}
    if not folders:
        return
    identity = identity_of(config, corpus)  # which reads the student's weights and the whole text
    for name, folder in folders.items():
        is_taught = name != "control" and config.has_targets
        more = {"teacher_fingerprint": fingerprint} if is_taught else {}
        checkpoints.refuse_another_run(folder, {**identity, **more})
