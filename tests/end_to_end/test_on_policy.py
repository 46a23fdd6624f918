"""A Trainer whose student writes its own batches: which, how stale, resumed, and what is logged."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from student_trainer import LocalTeacher, OnPolicyArguments
from student_trainer.cli import main
from student_trainer.hf_trainer import DistillationArguments, DistillationTrainer
from tests.conftest import one_torch_thread
from tests.end_to_end.conftest import write_config
from tests.support.hf import make_trainer, weights

one_thread = pytest.fixture(autouse=True)(one_torch_thread)

SHORT = {"max_new_tokens": 12, "prompt_tokens": 4}


def logged(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_it_learns_from_what_a_service_says_about_its_own_texts(
    trained_service, rows, tmp_path: Path
):
    trainer = make_trainer(
        tmp_path,
        rows,
        trained_service.address,
        max_steps=12,
        distillation=DistillationArguments(targets="top_k:16"),
        choice={"on_policy": OnPolicyArguments(fraction=0.5, targets="hidden:bf16", **SHORT)},
    )
    trainer.train()
    trainer.close()
    logs = logged(trainer)
    written = [entry for entry in logs if "on_policy_kd_loss" in entry]
    assert len(written) == 6
    assert sum("kd_loss" in entry for entry in logs) == 6
    for entry in written:
        assert "kd_loss" not in entry
        assert entry["loss"] == pytest.approx(entry["on_policy_kd_loss"], rel=1e-4)
        assert 1 <= entry["on_policy_length"] <= 12
        assert 0 <= entry["on_policy_repetition"] < 1
        assert 0 < entry["on_policy_entropy"] < 5
        assert entry["on_policy_staleness"] <= entry["on_policy_max_staleness"] <= 1
    assert any(entry.get("writing_tokens_per_s", 0) > 0 for entry in logs)
    assert any(entry.get("scoring_tokens_per_s", 0) > 0 for entry in logs)
    assert written[-1]["on_policy_kd_loss"] < written[0]["on_policy_kd_loss"]


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_resumed_from_any_checkpoint_the_weights_are_the_same(
    teacher_model, rows, tmp_path: Path, fraction
):
    def train(folder: Path, resume: str | None = None) -> DistillationTrainer:
        trainer = make_trainer(
            folder,
            rows,
            teacher_model,
            max_steps=10,  # of which 6 are an epoch
            distillation=DistillationArguments(targets="top_k:16"),
            choice={"on_policy": OnPolicyArguments(fraction=fraction, max_staleness=2, **SHORT)},
            save_strategy="steps",
            save_steps=1,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = train(tmp_path)
    for step in (2, 5, 6, 7):
        again = train(tmp_path / f"from {step}", str(tmp_path / f"checkpoint-{step}"))
        assert torch.equal(weights(again), weights(whole)), step


class Slow(LocalTeacher):
    """A teacher elsewhere that takes its time."""

    is_remote = True
    delay_s = 0.2

    def submit(self, piece, options):
        time.sleep(self.delay_s)
        return super().submit(piece, options)


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_however_slow_the_teacher_is_no_text_is_staler_than_allowed(
    teacher_model, rows, tmp_path: Path, staleness
):
    trainer = make_trainer(
        tmp_path,
        rows,
        Slow(teacher_model),
        max_steps=6,
        choice={"on_policy": OnPolicyArguments(max_staleness=staleness, **SHORT)},
    )
    trainer.train()
    trainer.close()
    found = [entry["on_policy_staleness"] for entry in logged(trainer)]
    assert found == [min(step, staleness) for step in range(6)]


@pytest.mark.parametrize("smaller", [0, 1])
def test_resumed_with_a_smaller_bound_no_text_is_staler_than_it_allows(
    teacher_model, rows, tmp_path: Path, smaller
):
    def train(folder: Path, staleness: int, resume: str | None = None) -> DistillationTrainer:
        trainer = make_trainer(
            folder,
            rows,
            teacher_model,
            max_steps=6,
            choice={"on_policy": OnPolicyArguments(max_staleness=staleness, **SHORT)},
            save_strategy="steps",
            save_steps=4,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    before = [entry["on_policy_staleness"] for entry in logged(train(tmp_path, 3))]
    assert before[3:] == [3, 3, 3]
    again = train(tmp_path / "again", smaller, str(tmp_path / "checkpoint-4"))
    resumed = [entry["on_policy_staleness"] for entry in logged(again)[4:]]
    assert resumed == [0, smaller]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "student_trainer", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_run_with_its_own_texts_resumes_and_reports(
    trained_service, student_folder, text, tmp_path: Path
):
    settings = {
        "student": str(student_folder),
        "data": [str(text)],
        "sequence_length": 32,
        "batch_size": 4,
        "accumulation": 2,
        "learning_rate": 1e-2,
        "log_every": 2,
        "checkpoint_every": 4,
        "on_policy": 0.5,
        "on_policy_targets": "hidden:int8",
        "max_new_tokens": 12,
        "prompt_tokens": 4,
        "sampling_top_k": 50,
        "steps": 8,
    }
    config = write_config(tmp_path / "train.toml", output=str(tmp_path / "out"), **settings)
    ended = run("train", config, "--teacher", trained_service.address)
    assert ended.returncode == 0, ended.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["on_policy"] == 0.5
    assert 1 <= report["on_policy_length"] <= 12
    assert 0 <= report["on_policy_repetition"] < 1
    assert 0 < report["on_policy_entropy"] < 5
    assert 0 < report["on_policy_staleness"] <= report["on_policy_max_staleness"] == 1
    assert report["writing_tokens_per_s"] > 0
    assert report["scoring_tokens_per_s"] > 0
    history = json.loads((tmp_path / "out" / "results.json").read_text())
    assert all("on_policy_kd_loss" in one for one in history["students"]["distilled"]["history"])
    page = (tmp_path / "out" / "report.html").read_text()
    card = (tmp_path / "out" / "student" / "README.md").read_text()
    for shown in (page, card):
        assert "written by the student" in shown.lower()
    # From the checkpoint in the middle it goes on to the same weights.
    again = tmp_path / "again"
    shutil.copytree(
        tmp_path / "out" / "checkpoints" / "checkpoint-4", again / "checkpoints" / "checkpoint-4"
    )
    other = write_config(tmp_path / "again.toml", output=str(again), **settings)
    assert run("train", other, "--teacher", trained_service.address).returncode == 0
    whole, resumed = (
        load_file(folder / "student" / "model.safetensors") for folder in (tmp_path / "out", again)
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_policy": 0.5, "record": "somewhere"}, "do not go together"),
        ({"on_policy": 0.5, "shuffled_control": True}, "do not go together"),
        ({"on_policy": 0.5, "on_policy_targets": "sampled"}, "targets='top_k"),
        ({"on_policy": 0.5, "max_new_tokens": 100_000}, "leaves no room for a prompt"),
        ({"max_staleness": 3}, "does nothing without --on-policy"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_step(
    trained_service, student_folder, text, tmp_path: Path, capfd, settings, message
):
    config = write_config(
        tmp_path / "train.toml",
        student=str(student_folder),
        data=[str(text)],
        output=str(tmp_path / "out"),
        sequence_length=32,
        steps=2,
        **settings,
    )
    assert main(["train", config, "--teacher", trained_service.address]) != 0
    assert message in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_write_each_its_own_and_adapters_learn_from_that(
    trained_service, student_folder, text, tmp_path: Path
):
    output, student = tmp_path / "out", tmp_path / "student"
    shutil.copytree(student_folder, student)
    settings = transformers.AutoConfig.from_pretrained(student)
    transformers.AutoModelForCausalLM.from_config(settings).save_pretrained(student)
    config = write_config(
        tmp_path / "train.toml",
        teacher=trained_service.address,
        student=str(student),
        data=[str(text)],
        output=str(output),
        sequence_length=32,
        batch_size=4,
        steps=4,
        learning_rate=1e-2,
        log_every=1,
        checkpoint_every=2,
        lora_r=2,
        on_policy=1.0,
        max_new_tokens=8,
        prompt_tokens=4,
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "-m", "student_trainer", "train", config),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert (output / "student" / "adapter_config.json").is_file()
    results = json.loads((output / "results.json").read_text())
    history = results["students"]["distilled"]["history"]
    assert len(history) == 4
    for entry in history:
        assert entry["on_policy_batches"] == 2  # one of each process
        assert entry["on_policy_max_staleness"] <= 1
    written = [
        load_file(output / "checkpoints" / "checkpoint-2" / f"on_policy_{rank}.safetensors")
        for rank in range(2)
    ]
    assert all(len(one) == 6 for one in written)  # the batch of the next step
    first, second = (one["2.token_ids"] for one in written)
    assert first.shape != second.shape or not torch.equal(first, second)
