"""Stopped at any step and started again: the same student, bit for bit."""

import json
import logging
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import TrainerCallback

from student_trainer import LocalTeacher, Recorded
from student_trainer.cli import main
from student_trainer.commands.train import describe_checkpoints
from student_trainer.config import TrainConfig
from student_trainer.teachers.teacher import Teacher
from student_trainer.training import checkpoints
from student_trainer.training.arguments import (
    make_distillation_arguments,
    make_training_arguments,
)
from student_trainer.training.corpus import Corpus, read_corpus
from student_trainer.training.held_out import HeldOut
from student_trainer.training.order import EpochOrder
from student_trainer.training.progress import Counts
from student_trainer.training.trainer import StudentTrainer
from tests.conftest import FORKSERVER, one_torch_thread
from tests.end_to_end.conftest import WORDS, write_config
from tests.support import tiny

STEPS = 6

one_thread = pytest.fixture(autouse=True)(one_torch_thread)


class Stop(Exception):
    """The end of the process, as far as training is concerned."""


class StopBefore(TrainerCallback):
    """Ends the run when step `at` would begin."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.at:
            raise Stop


class SeeSteps(TrainerCallback):
    """Notes the sequences of every step, and the gradients of the first."""

    def __init__(self) -> None:
        self.steps: list[list[tuple[int, ...]]] = []
        self.first_gradient = torch.empty(0)

    def see(self, rows: list[Any]) -> None:
        self.steps[-1] += [tuple(np.asarray(row["input_ids"]).tolist()) for row in rows]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            gradients = [p.grad.flatten() for p in kwargs["model"].parameters()]
            self.first_gradient = torch.cat(gradients).clone()


@pytest.fixture(scope="module")
def trained_teacher(teacher_folder: Path) -> LocalTeacher:
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher_folder)
    return LocalTeacher(model, tiny.make_tokenizer(WORDS))


@pytest.fixture(scope="module")
def corpus(text: Path, student_folder: Path, tmp_path_factory) -> Corpus:
    """22 sequences to train on: an epoch of five steps of four, or two of eight."""
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(" ".join(text.read_text().split()[: 23 * 12]))
    settings = {"student": student_folder, "data": [str(path)], "sequence_length": 12}
    config = TrainConfig(**settings, teacher="x:1", output=path.parent)
    return read_corpus(config, tiny.make_tokenizer(WORDS))


def make_trainer(
    corpus: Corpus, teacher: Teacher | None, folder: Path, callbacks=(), **settings: Any
) -> StudentTrainer:
    """Of a student with dropout, so that the random generators matter."""
    given = {"batch_size": 4, "steps": STEPS, "learning_rate": 1e-2, "warmup_steps": 2, "seed": 3}
    given |= {"targets": "sampled:8", "ce_weight": 0.1, "ahead": "2", "log_every": 1}
    config = TrainConfig(
        **{**given, **settings}, student=folder, data=["a"], output=folder, teacher="x:1"
    )
    return StudentTrainer(
        tiny.make_student(dropout=0.2),
        make_training_arguments(config, folder),
        corpus,
        HeldOut(corpus.held_out, corpus.collate),
        label="student",
        teacher=teacher,
        distillation=make_distillation_arguments(config, is_aligned=True),
        uses_muon=config.optimizer == "muon",
        identity={"seed": 3},
        callbacks=callbacks,
    )


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == twin and torch.equal(a, b) for (name, a), (twin, b) in pairs)


def losses_of(trainer: StudentTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "kind",
    [
        *("adamw", "recorded", "labels"),
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("muon", "features")),
    ],
)
def test_stopped_at_any_step_it_ends_with_the_same_weights(
    trained_teacher, corpus, tmp_path: Path, kind
):
    """The epochs end after steps 5 and 10, so that some runs stop and resume there."""
    steps = 11
    settings: dict[str, Any] = {"steps": steps, "accumulation": 1}
    settings["optimizer"] = "muon" if kind in ("muon", "features") else "adamw"
    teacher = trained_teacher
    if kind == "features":
        settings |= {"features": "features:layers=1+2", "feature_layers": "0+1"}
    if kind == "labels":
        teacher = None
    if kind == "recorded":
        teacher = Recorded(tmp_path / "record", trained_teacher, draws=2)
    whole = make_trainer(corpus, teacher, tmp_path / "whole", **settings)
    results = whole.run()
    for stop_at in (1, 4, 5, 6, 10) if kind == "adamw" else (5, 7):
        folder = tmp_path / str(stop_at)
        kept = {**settings, "checkpoint_every": 1 if stop_at == 5 else 2}
        stopping = make_trainer(corpus, teacher, folder, [StopBefore(stop_at)], **kept)
        with pytest.raises(Stop):
            stopping.run()
        torch.manual_seed(1000 + stop_at)  # what a new process has drawn so far
        again = make_trainer(corpus, teacher, folder, **{**kept, "ahead": "3"})
        found = again.run()
        assert same_weights(whole.model, again.model), f"stopped at {stop_at}"
        assert losses_of(again) == losses_of(whole)
        assert found.tokens == results.tokens
        assert found.scores == results.scores
        assert len(checkpoints.find_all(folder)) == 2
    if isinstance(teacher, Recorded):
        teacher.close()


@pytest.mark.parametrize("kind", ["distilled", "labels"])
def test_from_a_checkpoint_of_the_last_step_no_other_is_taken(
    trained_teacher, corpus, tmp_path: Path, kind
):
    """Step 7 is in the middle of an epoch."""
    teacher = trained_teacher if kind == "distilled" else None
    settings: dict[str, Any] = {"steps": 7, "checkpoint_every": 7}
    whole = make_trainer(corpus, teacher, tmp_path, **settings)
    results = whole.run()
    again = make_trainer(corpus, teacher, tmp_path, **settings)
    found = again.run()
    assert again.state.global_step == 7
    assert same_weights(whole.model, again.model)
    assert losses_of(again) == losses_of(whole)
    assert (found.tokens, found.scores) == (results.tokens, results.scores)
    assert len(checkpoints.find_all(tmp_path)) == 1


@pytest.mark.parametrize("kind", ["distilled", "labels"])
def test_however_a_step_is_cut_into_batches_it_is_the_same_step(
    trained_teacher, corpus, tmp_path: Path, kind
):
    found = []
    for batch_size, accumulation in ((8, 1), (4, 2), (1, 8)):
        seen = SeeSteps()
        trainer = make_trainer(
            corpus,
            trained_teacher if kind == "distilled" else None,
            tmp_path,
            [seen],
            batch_size=batch_size,
            accumulation=accumulation,
            targets="top_k:8",
            training={"dataloader_num_workers": 0},
        )
        trainer.model.eval()  # dropout draws anew for each batch
        trainer.model.train = lambda mode=True, model=trainer.model: model  # type: ignore[method-assign]
        order, rows = [], trainer.data_collator

        def collate(some: list[Any], rows=rows, order=order) -> Any:
            order.extend(tuple(np.asarray(row["input_ids"]).tolist()) for row in some)
            return rows(some)

        trainer.data_collator = collate
        trainer.run()
        found.append((order[: STEPS * 8], seen.first_gradient, losses_of(trainer)))
    (order, gradient, losses), *others = found
    assert len(set(order[:16])) == 16  # two steps are an epoch, without what does not fill a third
    for other_order, other_gradient, other_losses in others:
        assert other_order == order
        error = (other_gradient - gradient).norm() / gradient.norm()
        assert error < 1e-6
        assert other_losses == pytest.approx(losses, rel=1e-5)


def test_an_epoch_has_whole_steps_and_every_sequence_has_its_turn():
    order = EpochOrder(44, 8, seed=1)
    epochs = []
    for number in range(30):
        order.set_epoch(number)
        epochs.append(list(order))
    assert all(len(set(epoch)) == len(epoch) == len(order) == 40 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 30
    assert set().union(*epochs) == set(range(44))
    few = EpochOrder(3, 8, seed=1)
    assert len(list(few)) == len(few) == 8
    assert set(few) == {0, 1, 2}


def sealed(folder: Path, step: int, identity: dict[str, Any]) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(bytes(range(256)))
    (checkpoint / "trainer_state.json").write_text("{}")
    checkpoints.seal(checkpoint, identity, Counts(tokens=7))
    return checkpoint


def test_a_checkpoint_of_another_run_is_refused_with_what_differs(tmp_path: Path):
    written = {"learning_rate": 0.1, "data": ["a"], "seed": 1}
    checkpoint = sealed(tmp_path, 4, written)
    assert checkpoints.check(checkpoint, written) == Counts(tokens=7)
    other = {"learning_rate": 0.2, "data": ["a"], "steps": 9, "seed": 1}
    with pytest.raises(ValueError, match="another run") as caught:
        checkpoints.check(checkpoint, other)
    for words in ("-4 ", "learning_rate was 0.1 and is 0.2", "steps was None", "--start-over"):
        assert words in str(caught.value)
    assert "seed" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.json", "run.json"])
def test_a_damaged_checkpoint_is_an_error_that_says_what_to_do(tmp_path: Path, name):
    path = sealed(tmp_path, 1, {}) / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="no older checkpoint: give --start-over") as caught:
        checkpoints.check(path.parent, {})
    assert str(caught.value).startswith(f"{path} is damaged. ")
    assert "\n" not in str(caught.value)
    newer = sealed(tmp_path, 2, {})
    if name != "run.json":
        (newer / name).unlink()
        with pytest.raises(ValueError, match="--start-over") as caught:
            checkpoints.check(newer, {})
        wanted = f"{newer / name} is missing. Delete {newer} to resume from "
        assert str(caught.value).startswith(f"{wanted}{tmp_path / 'checkpoint-1'}")


def test_a_checkpoint_that_was_not_finished_is_removed(tmp_path: Path, caplog):
    sealed(tmp_path, 9, {})
    unfinished = sealed(tmp_path, 10, {}) / checkpoints.SEAL
    unfinished.unlink()
    found = checkpoints.find_newest(tmp_path)
    assert found == tmp_path / "checkpoint-9"
    assert not unfinished.parent.exists()
    assert "was not finished" in caplog.text


def test_what_a_run_reads_may_move_and_not_change(
    trained_service, student_folder, text: Path, tmp_path: Path, caplog, capsys
):
    def train(student: Path, *more: str) -> int:
        corpus = next(tmp_path.glob("text*"))
        return main(
            [
                *("train", "--teacher", trained_service.address, "--student", str(student)),
                *("--data", f"{corpus}/*.txt", "--held-out", f"{corpus}/*.held"),
                *("--output", str(tmp_path / "out"), "--steps", "3", "--checkpoint-every", "1"),
                *("--sequence-length", "16", "--batch-size", "4", *more),
            ]
        )

    folder = tmp_path / "text"
    folder.mkdir()
    words = text.read_text().split()
    (folder / "a.txt").write_text(" ".join(words[:900]))
    (folder / "a.held").write_text(" ".join(words[900:1200]))
    assert train(student_folder) == 0
    folder.rename(tmp_path / "text-moved")
    moved = shutil.copytree(student_folder, tmp_path / "student-moved")
    with caplog.at_level(logging.INFO):
        assert train(moved) == 0
    assert "resuming from" in caplog.text
    for path, change in (
        ("text-moved/a.txt", "the content of data has changed"),
        ("text-moved/a.held", "the content of held_out has changed"),
        ("student-moved/config.json", "the content of student has changed"),
    ):
        file = tmp_path / path
        content = file.read_text()
        file.write_text(f"{content} " if path.endswith("json") else f"w7 w9 {content}")
        capsys.readouterr()
        assert train(moved) == 1
        assert change in capsys.readouterr().err
        file.write_text(content)


def interruptible() -> None:
    """As in a shell."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def wait_for(process: Any, log: Path, is_there: Callable[[], object]) -> None:
    deadline = time.monotonic() + 90
    while not is_there():
        assert process.is_alive(), log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


@pytest.mark.parametrize("every", [5, 0])
def test_ctrl_c_saves_a_checkpoint_and_says_after_which_step(
    trained_service, student_folder, text: Path, tmp_path: Path, every: int
):
    output = tmp_path / "out"
    process, log = student_trainer(
        tmp_path,
        *("train", "--teacher", trained_service.address, "--student", str(student_folder)),
        *("--data", str(text), "--output", str(output), "--steps", "100000"),
        *("--sequence-length", "32", "--batch-size", "2", "--checkpoint-every", str(every)),
        *("--targets", "top_k:4"),
        hook=interruptible,
    )
    wait_for(
        process,
        log,
        lambda: re.search(r" [1-9]\d/100000", log.read_text() if log.exists() else ""),
    )
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130, log.read_text()
    last = log.read_text().splitlines()[-1]
    at = re.match(r"student-trainer: interrupted after step (\d+) of student distilled; ", last)
    assert at, last
    where = f"kept in {output / 'checkpoints'}: run the same command to resume"
    assert last[at.end() :] == f"checkpoint of step {at[1]} {where}"


def test_what_is_kept_of_several_students_is_named(tmp_path: Path):
    config = TrainConfig(
        student=tmp_path, data=["a"], output=tmp_path, teacher="x:1", start_over=True
    )
    assert describe_checkpoints(config).endswith(
        "the same command without --start-over starts at step 0"
    )
    for path, step in (("control", 9), (".", 4), (".", 12)):
        sealed(tmp_path / "checkpoints" / path, step, {})
    (tmp_path / "checkpoints" / "checkpoint-13").mkdir()
    assert describe_checkpoints(config) == (
        f"checkpoints kept in {tmp_path}/checkpoints: step 9 of student control, step 12 of student "
        "distilled: run the same command without --start-over to resume"
    )


def hold_the_second_checkpoint() -> None:
    """Forcing anything of checkpoint-8 to the disk takes for ever."""
    force = os.fsync

    def held(descriptor: int) -> None:
        if "checkpoint-8" in os.readlink(f"/proc/self/fd/{descriptor}"):
            time.sleep(60)
        force(descriptor)

    os.fsync = held


def _run_trainer(arguments: list[str], log: Path, hook: Callable[[], None] | None) -> None:
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    from student_trainer.cli import main

    if hook is not None:
        hook()
    sys.exit(main(arguments))


def student_trainer(folder: Path, *arguments: str, hook: Callable[[], None] | None = None):
    log = folder / "log"
    process = FORKSERVER.Process(target=_run_trainer, args=([*arguments], log, hook), daemon=True)
    process.start()
    return process, log


def test_a_trainer_killed_while_it_writes_resumes_from_the_checkpoint_before(
    trained_service, student_folder, text: Path, tmp_path: Path
):
    def arguments(folder: Path) -> list[str]:
        folder.mkdir(exist_ok=True)
        config = write_config(
            folder / "train.toml",
            teacher=trained_service.address,
            student=str(student_folder),
            data=[str(text)],
            output=str(folder),
            sequence_length=32,
            batch_size=4,
            steps=12,
            learning_rate=1e-2,
            targets="sampled:16",
            held_out_sequences=4,
        )
        return ["train", config, "--device", "cpu", "--checkpoint-every", "4"]

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process, log = student_trainer(
        killed, *arguments(killed), "--control", hook=hold_the_second_checkpoint
    )
    folder = killed / "checkpoints" / "control"
    wait_for(process, log, (folder / "checkpoint-8" / "trainer_state.json").exists)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert {path.name for path in folder.iterdir()} == {"checkpoint-4", "checkpoint-8"}

    # Others of its settings are another run; another look-ahead is not.
    other, _ = student_trainer(killed, *arguments(killed), "--control", "--learning-rate", "0.02")
    never, _ = student_trainer(whole, *arguments(whole), "--ahead", "3", "--control")
    other.join(90)
    assert other.exitcode == 1, log.read_text()
    assert "learning_rate was 0.01 and is 0.02" in log.read_text()
    again, _ = student_trainer(killed, *arguments(killed), "--ahead", "5", "--control")
    again.join(90)
    never.join(90)
    assert again.exitcode == never.exitcode == 0, log.read_text()
    assert f"resuming from {folder}/checkpoint-4" in log.read_text()
    for name in ("checkpoints/control", "checkpoints"):
        for step in ("checkpoint-8", "checkpoint-12"):
            weights = [folder / name / step / "model.safetensors" for folder in (killed, whole)]
            assert weights[0].read_bytes() == weights[1].read_bytes()
    reports = [json.loads((folder / "report.json").read_text()) for folder in (killed, whole)]
    assert reports[0]["curves"] == reports[1]["curves"]
    assert not list(killed.rglob("*.partial"))
