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

import pytest
import torch
import transformers
from torch import nn

from student_trainer import LocalTeacher
from student_trainer.cli import main
from student_trainer.commands.train import describe_checkpoints
from student_trainer.config import TrainConfig
from student_trainer.data import batches
from student_trainer.training import loop as trainer
from student_trainer.training.checkpoint import Checkpoints
from tests.conftest import FORKSERVER, one_torch_thread
from tests.end_to_end.conftest import WORDS, write_config
from tests.support import tiny

STEPS = 6


one_thread = pytest.fixture(autouse=True)(one_torch_thread)


class Stop(Exception):
    """The end of the process, as far as training is concerned."""


class Stopping:
    """Pairs that end the run when it asks for item `at`."""

    def __init__(self, pairs, at: int | None) -> None:
        self.pairs, self.at = pairs, at
        self.load_state_dict, self.state_dict = pairs.load_state_dict, pairs.state_dict

    def __iter__(self):
        return self

    def __next__(self):
        if self.state_dict()["handed_out"] == self.at:
            raise Stop
        return next(self.pairs)


@pytest.fixture(scope="module")
def trained_teacher(teacher_folder: Path) -> LocalTeacher:
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher_folder)
    return LocalTeacher(model, tiny.make_tokenizer(WORDS))


@pytest.fixture(scope="module")
def sequences(text: Path) -> torch.Tensor:
    ids = tiny.make_tokenizer(WORDS)(text.read_text()).input_ids
    return torch.tensor(ids)[: 12 * 40].view(-1, 12)


def make_student() -> nn.Module:
    """With dropout, so that the random generators matter."""
    return tiny.make_student(dropout=0.2)


def train(teacher, source, student, *, ahead=1, stop_at=None, checkpoints=None, optimizer="adamw"):
    pairs = teacher.stream_batches(source, targets="sampled:8", seed=3, ahead=ahead)
    return trainer.train(
        student,
        Stopping(pairs, stop_at),
        steps=STEPS,
        learning_rate=1e-2,
        warmup_steps=2,
        optimizer=optimizer,
        kd_weight=1.0,
        ce_weight=0.1,
        measure=lambda _: 0.0,
        label="student",
        checkpoints=checkpoints,
    )


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == twin and torch.equal(a, b) for (name, a), (twin, b) in pairs)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("loader", ["batches", "stateful loader"])
def test_stopped_at_any_step_it_ends_with_the_same_weights(
    trained_teacher, sequences, tmp_path: Path, loader, optimizer
):
    from torchdata.stateful_dataloader import StatefulDataLoader

    def source():
        if loader == "batches":
            return batches(sequences, batch_size=4, steps=STEPS, seed=1)
        rows = [{"input_ids": row} for row in sequences]
        torch.manual_seed(7)  # of the shuffling, and of dropout
        return StatefulDataLoader(rows, batch_size=4, shuffle=True)

    whole = make_student()
    run = train(trained_teacher, source(), whole, optimizer=optimizer)
    for stop_at in range(1, STEPS):
        folder = tmp_path / str(stop_at)
        checkpoints = Checkpoints(folder, every=2, identity={"seed": 3})
        options = {"checkpoints": checkpoints, "optimizer": optimizer}
        student = make_student()
        with pytest.raises(Stop):
            train(trained_teacher, source(), student, ahead=3, stop_at=stop_at, **options)
        student, rest = make_student(), source()
        if stop_at > 2:
            torch.manual_seed(1000 + stop_at)  # what a new process has drawn so far
        again = train(trained_teacher, rest, student, ahead=2, **options)
        assert same_weights(whole, student), f"stopped at {stop_at}"
        assert again.train_losses == run.train_losses
        assert [path.name for path in sorted(folder.iterdir())] == ["step-4", "step-6"]


def test_a_checkpoint_of_another_run_is_refused_with_what_differs(tmp_path: Path):
    student = nn.Linear(2, 2)
    written = {"learning_rate": 0.1, "data": ["a"], "seed": 1}
    Checkpoints(tmp_path, every=1, identity=written).save(4, student, {"step": 4})
    other = {"learning_rate": 0.2, "data": ["a"], "steps": 9, "seed": 1}
    with pytest.raises(ValueError, match="another run") as caught:
        Checkpoints(tmp_path, every=1, identity=other).load(student)
    for words in ("step-4", "learning_rate was 0.1 and is 0.2", "steps was None", "--start-over"):
        assert words in str(caught.value)
    assert "seed" not in str(caught.value)


@pytest.mark.parametrize("name", ["student.safetensors", "state.pt", "run.json"])
def test_a_damaged_checkpoint_is_an_error_that_says_what_to_do(tmp_path: Path, name):
    student = nn.Linear(20, 20)
    checkpoints = Checkpoints(tmp_path, every=1, identity={})
    path = checkpoints.save(1, student, {"step": 1}) / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="no older checkpoint: give --start-over") as caught:
        checkpoints.load(student)
    assert str(caught.value).startswith(f"{path} is damaged. ")
    assert "\n" not in str(caught.value)
    checkpoints.save(2, student, {"step": 2})
    newer = tmp_path / "step-2"
    (newer / name).unlink()
    with pytest.raises(ValueError, match="--start-over") as caught:
        checkpoints.load(student)
    wanted = f"{newer / name} is missing. Delete {newer} to go on from "
    assert str(caught.value).startswith(f"{wanted}{tmp_path / 'step-1'}")


def test_state_that_would_run_code_is_refused(tmp_path: Path):
    student = nn.Linear(2, 2)
    checkpoints = Checkpoints(tmp_path, every=1, identity={})
    path = checkpoints.save(1, student, {"step": 1}) / "state.pt"
    torch.save({"step": os.getcwd, "random": None}, path)
    with pytest.raises(ValueError, match=r"state\.pt is damaged"):
        checkpoints.load(student)


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
    assert "going on from" in caplog.text
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


@pytest.mark.parametrize("every", [5, 0])
def test_ctrl_c_says_after_which_step_and_what_is_kept(
    trained_service, student_folder, text: Path, tmp_path: Path, every: int
):
    output = tmp_path / "out"
    process, log = student_trainer(
        tmp_path,
        *("train", "--teacher", trained_service.address, "--student", str(student_folder)),
        *(
            "--data",
            str(text),
            "--output",
            str(output),
            "--steps",
            "100000",
            "--targets",
            "top_k:4",
        ),
        *("--sequence-length", "32", "--batch-size", "2", "--checkpoint-every", str(every)),
        hook=interruptible,
    )
    deadline = time.monotonic() + 60
    while not re.search(r" [1-9]\d/100000", log.read_text() if log.exists() else ""):
        assert process.is_alive(), log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130, log.read_text()
    last = log.read_text().splitlines()[-1]
    at = re.match(r"student-trainer: interrupted after step (\d+) of student distilled; ", last)
    assert at, last
    rest = last[at.end() :]
    if every:
        saved = (output / "checkpoints").glob("step-*")
        newest = max(int(path.name.removeprefix("step-")) for path in saved)
        assert newest <= int(at[1]) <= newest + every
        where = f"kept in {output / 'checkpoints'}: run the same command to resume"
        assert rest == f"checkpoint of step {newest} {where}"
    else:
        assert rest.startswith("no checkpoint was written (--checkpoint-every N writes them): ")
        assert not output.exists()


def test_what_is_kept_of_several_students_is_named(tmp_path: Path):
    config = TrainConfig(
        student=tmp_path, data=["a"], output=tmp_path, teacher="x:1", start_over=True
    )
    assert describe_checkpoints(config).endswith(
        "the same command without --start-over starts at step 0"
    )
    for path in ("control/step-9", "step-4", "step-12", ".step-13.partial"):
        (tmp_path / "checkpoints" / path).mkdir(parents=True)
    assert describe_checkpoints(config) == (
        f"checkpoints kept in {tmp_path}/checkpoints: step 9 of student control, step 12 of student "
        "distilled: run the same command without --start-over to resume"
    )


def hold_the_second_checkpoint() -> None:
    """Forcing anything of step-8 to the disk takes for ever."""
    force = os.fsync

    def held(descriptor: int) -> None:
        if ".step-8.partial" in os.readlink(f"/proc/self/fd/{descriptor}"):
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


def test_a_trainer_killed_while_it_writes_goes_on_from_the_checkpoint_before(
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
    checkpoints = killed / "checkpoints" / "control"
    deadline = time.monotonic() + 60
    while not (checkpoints / ".step-8.partial").exists():
        assert process.is_alive(), log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert {path.name for path in checkpoints.iterdir()} == {"step-4", ".step-8.partial"}

    # Others of its settings are another run; another look-ahead is not.
    other, _ = student_trainer(killed, *arguments(killed), "--control", "--learning-rate", "0.02")
    never, _ = student_trainer(whole, *arguments(whole), "--ahead", "3", "--control")
    other.join(60)
    assert other.exitcode == 1, log.read_text()
    assert "learning_rate was 0.01 and is 0.02" in log.read_text()
    again, _ = student_trainer(killed, *arguments(killed), "--ahead", "5", "--control")
    again.join(60)
    never.join(60)
    assert again.exitcode == never.exitcode == 0, log.read_text()
    assert f"going on from {checkpoints}/step-4" in log.read_text()
    for name in ("checkpoints/control", "checkpoints"):
        for step in ("step-8", "step-12"):
            weights = [folder / name / step / "student.safetensors" for folder in (killed, whole)]
            assert weights[0].read_bytes() == weights[1].read_bytes()
    reports = [json.loads((folder / "report.json").read_text()) for folder in (killed, whole)]
    assert reports[0]["curves"] == reports[1]["curves"]
    assert not list(killed.rglob("*.partial"))
