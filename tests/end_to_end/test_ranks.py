"""`student-trainer train` in two processes takes the steps of one, and resumes in another number."""

import json
import os
import re
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from student_trainer.cli import main
from student_trainer.config import TrainConfig
from student_trainer.training import run as runs
from student_trainer.training.corpus import read_corpus, read_tokenizer
from student_trainer.training.held_out import HeldOut
from student_trainer.training.results import Results
from student_trainer.training.trainer import StudentTrainer
from tests.conftest import one_torch_thread
from tests.end_to_end.conftest import write_config
from tests.support.hf import shard_on_cpu
from tests.support.ranks import run_ranks

one_thread = pytest.fixture(autouse=True, scope="module")(one_torch_thread)

STEPS = 8


@pytest.fixture(scope="module")
def settings(trained_service, student_folder, text, tmp_path_factory: pytest.TempPathFactory):
    """84 sequences of 16 tokens, every 20th held out, of which three are measured: unequal shares."""
    some = tmp_path_factory.mktemp("some") / "text.txt"
    some.write_text(" ".join(text.read_text().split()[: 84 * 16]))
    return {
        "teacher": trained_service.address,
        "student": str(student_folder),
        "data": [str(some)],
        "held_out_sequences": 3,
        "sequence_length": 16,
        "batch_size": 8,
        "steps": STEPS,
        "learning_rate": 3e-3,
        "targets": "top_k:8",
        "ce_weight": 0.3,
        "log_every": 2,
    }


def write(folder: Path, settings: dict[str, Any], **more: Any) -> str:
    folder.mkdir(exist_ok=True)
    return write_config(folder / "train.toml", output=str(folder), **{**settings, **more})


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    assert main(["train", write(folder, settings), "--control"]) == 0
    return folder


def distance(one: Path, other: Path) -> float:
    """The largest difference of two trained students' weights."""
    found = [load_file(folder / "student" / "model.safetensors") for folder in (one, other)]
    assert found[0].keys() == found[1].keys()
    return max(float((found[0][name] - found[1][name]).abs().max()) for name in found[0])


def assert_same_results(one: Path, other: Path) -> None:
    """Of everything that a report shows, except times."""
    first, second = Results.load(one), Results.load(other)
    for student, expected in first.students.items():
        found = second.students[student]
        assert found.tokens == expected.tokens
        for entry, exact in zip(found.history, expected.history, strict=True):
            for name in {"step", "tokens", "loss", "grad_norm", "kd_loss", "ce_loss"} & set(exact):
                assert entry[name] == pytest.approx(exact[name], rel=1e-5), name
        scores, exact = found.scores.model_dump(), expected.scores.model_dump()
        for name in ("loss", "accuracy", "top1_agreement", "agreement_rows", "sequence_losses"):
            assert scores[name] == pytest.approx(exact[name], rel=1e-5), name


def torchrun(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `student-trainer` in two processes, as a person would."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "-m", "student_trainer", *arguments),
        ],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_under_torchrun_two_processes_take_the_steps_of_one(settings, alone, tmp_path: Path):
    done = torchrun(tmp_path, "train", write(tmp_path, settings), "--control")
    assert done.returncode == 0, done.stderr
    assert distance(alone, tmp_path) < 1e-6
    assert_same_results(alone, tmp_path)
    # Only the first prints and shows bars.
    assert done.stdout.count("written: ") == 1
    assert len(re.findall("student control: *0%", done.stderr)) == 1


@pytest.mark.slow
def test_what_the_first_process_refuses_is_said_once(settings, tmp_path: Path):
    config = write(tmp_path, settings, held_out=[str(tmp_path / "train.toml")], sequence_length=200)
    done = torchrun(tmp_path, "train", config)
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("student-trainer: ")]
    assert len(said) == 1, done.stderr
    assert "held-out data has" in said[0]
    assert "Error: " not in done.stderr.replace("ChildFailedError: ", "")


def note_sequences(folder: Path, config: dict[str, Any], cuts: list[tuple[int, int]]) -> None:
    """Trains with every cut; each rank writes down the sequences of its steps."""
    rank = int(os.environ.get("RANK", "0"))
    for batch_size, accumulation in cuts:
        settings = TrainConfig(
            **{**config, "batch_size": batch_size, "accumulation": accumulation},
            output=folder / f"{batch_size}-{accumulation}",
        )
        corpus = read_corpus(settings, read_tokenizer(settings.student))
        held_out = HeldOut(corpus.held_out, corpus.collate)
        trainer = runs.make_trainer(settings, corpus, held_out, "control", None)
        noted, take = [], trainer.get_batch_samples

        def get_batch_samples(*args: Any, take=take, noted=noted) -> Any:
            samples, num_rows = take(*args)
            noted.append([row for sample in samples for row in sample["input_ids"].tolist()])
            return samples, num_rows

        trainer.get_batch_samples = get_batch_samples  # type: ignore[method-assign]
        trainer.run()
        assert (torch.initial_seed() == settings.seed) == (rank == 0)  # ranks drop other units
        where = folder / f"{batch_size}-{accumulation}-{rank}.json"
        where.write_text(json.dumps(noted))


@pytest.mark.parametrize("is_stream", [False, True])
def test_however_a_step_is_cut_its_sequences_are_the_same(settings, tmp_path: Path, is_stream):
    """12 steps, of which an epoch has 10."""
    config = {**settings, "steps": 12}
    if is_stream:
        config |= {"streaming": True, "held_out": settings["data"]}
    for num_ranks, cuts in ((1, [(8, 1), (4, 2), (1, 8)]), (2, [(8, 1), (4, 2), (2, 4)])):
        folder = tmp_path / str(num_ranks)
        folder.mkdir()
        if num_ranks == 1:
            note_sequences(folder, config, cuts)
        else:
            assert run_ranks(note_sequences, folder, config, cuts) == [0, 0]
    found = defaultdict(list)
    for path in tmp_path.rglob("*.json"):
        if re.fullmatch(r"\d+-\d+-\d", path.stem):
            cut = (path.parent.name, *path.stem.split("-")[:2])
            found[cut].append(json.loads(path.read_text()))
    steps = [
        [sorted(row for rank in ranks for row in rank[step]) for step in range(12)]
        for ranks in found.values()
    ]
    assert len(steps) == 6
    assert all(len(rows) == 8 for rows in steps[0])
    assert all(one == steps[0] for one in steps)


class Signalled(transformers.TrainerCallback):
    """A signal reaches this process during a step."""

    def __init__(self, number: int) -> None:
        self._number = number

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            os.kill(os.getpid(), self._number)


def run_train(
    folder: Path, config: str, code: int, signals: dict[int, int], checkpoints: str = ""
) -> None:
    """Runs the command in this rank, whose messages go to a file; signals: by rank."""
    rank = int(os.environ["RANK"])
    with (folder / f"log-{rank}").open("w") as file:
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ask = HeldOut.ask
    HeldOut.ask = lambda *args: (folder / f"asked-{rank}").touch() or ask(*args)  # type: ignore
    if checkpoints:
        os.environ["FSDP_STATE_DICT_TYPE"] = f"{checkpoints}_STATE_DICT"
        StudentTrainer.create_accelerator_and_postprocess = shard_on_cpu  # type: ignore[method-assign]
    if rank in signals:
        begin = StudentTrainer.__init__

        def begin_and_interrupt(self: Any, *args: Any, **kwargs: Any) -> None:
            begin(self, *args, **kwargs)
            self.add_callback(Signalled(signals[rank]))

        StudentTrainer.__init__ = begin_and_interrupt
    assert main(["train", config]) == code


def test_ctrl_c_in_one_process_stops_all_at_a_step_that_one_process_resumes_from(
    settings, alone, tmp_path: Path
):
    config = write(tmp_path, settings, checkpoint_every=2)
    assert run_ranks(run_train, tmp_path, config, 130, {1: signal.SIGINT}) == [0, 0]
    assert (tmp_path / "asked-0").exists()
    assert not (tmp_path / "asked-1").exists()
    assert "interrupted" not in (tmp_path / "log-1").read_text()
    said = [line for line in (tmp_path / "log-0").read_text().splitlines() if "interrupted" in line]
    (kept,) = (tmp_path / "checkpoints").glob("checkpoint-5")
    assert said == [
        "student-trainer: interrupted after step 5 of student distilled; checkpoint of step 5 kept in "
        f"{kept.parent}: run the same command to resume"
    ]
    assert main(["train", config]) == 0
    assert distance(alone, tmp_path) < 1e-6
    assert Results.load(tmp_path).students["distilled"].history[-1]["step"] == STEPS


def test_a_process_that_is_killed_ends_the_run_at_its_newest_checkpoint(settings, tmp_path: Path):
    config = write(tmp_path, settings, checkpoint_every=2)
    assert run_ranks(run_train, tmp_path, config, 1, {1: signal.SIGKILL}) == [0, -signal.SIGKILL]
    said = (tmp_path / "log-0").read_text().splitlines()[-1]
    assert said == (
        "student-trainer: another process of the run has ended; checkpoint of step 2 kept in "
        f"{tmp_path / 'checkpoints'}: run the same command to resume"
    )


@pytest.mark.parametrize("kind", ["SHARDED", pytest.param("FULL", marks=pytest.mark.slow)])
def test_a_student_in_parts_is_interrupted_and_saved_whole(settings, alone, tmp_path: Path, kind):
    """FSDP2, with checkpoints in parts and whole ones."""
    config = write(tmp_path, settings, checkpoint_every=2)
    assert run_ranks(run_train, tmp_path, config, 130, {0: signal.SIGINT}, kind) == [0, 0]
    assert run_ranks(run_train, tmp_path, config, 0, {}, kind) == [0, 0]
    assert distance(alone, tmp_path) < 1e-5
