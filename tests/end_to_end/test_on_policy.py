"""A Trainer whose student writes its own batches: which, how stale, resumed, and what is logged."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from student_trainer import LocalTeacher
from student_trainer.hf_trainer import DistillationArguments, DistillationTrainer, OnPolicyArguments
from tests.conftest import one_torch_thread
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
