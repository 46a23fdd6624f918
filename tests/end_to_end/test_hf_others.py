"""The Trainer together with what others bring: PEFT's adapters, TRL's SFTTrainer, TensorBoard."""

from pathlib import Path

import peft
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from student_trainer.hf_trainer import DistillationArguments
from tests.conftest import one_torch_thread
from tests.support import tiny
from tests.support.hf import make_trainer, num_trained, weights
from tests.support.sft import make_sft_trainer

one_thread = pytest.fixture(autouse=True)(one_torch_thread)
# Both still use transformers' old names.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing`:FutureWarning")


def make_lora_student(*targets: str) -> peft.PeftModel:
    student = tiny.make_model("Llama", 64)
    torch.manual_seed(1)
    return peft.get_peft_model(
        student, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=list(targets))
    )


def test_lora_trains_its_adapters_only_and_goes_on_from_a_checkpoint(
    teacher_model, rows, tmp_path: Path
):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(
        tmp_path, rows, teacher_model, student=make_lora_student("q_proj", "v_proj"), **settings
    )
    before = {name: p.detach().clone() for name, p in whole.model.named_parameters()}
    whole.train()
    assert whole._batch_loss.head is not None  # the loss in the place of the head
    assert whole.model.get_output_embeddings().weight.grad is None
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name
    logs = [entry for entry in whole.state.log_history if "kd_loss" in entry]
    assert logs[-1]["kd_loss"] < logs[0]["kd_loss"]
    again = make_trainer(
        tmp_path, rows, teacher_model, student=make_lora_student("q_proj", "v_proj"), **settings
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(weights(again), weights(whole))


def test_an_adapter_of_the_head_is_trained_through_its_logits(teacher_model, rows, tmp_path: Path):
    found = []
    for fused in (True, False):
        trainer = make_trainer(
            tmp_path,
            rows,
            teacher_model,
            student=make_lora_student("q_proj", "lm_head"),
            distillation=DistillationArguments(fused=fused),
            max_steps=2,
        )
        trainer.train()
        assert trainer._batch_loss.head is None
        found.append(weights(trainer))
    assert torch.equal(*found)
    adapters = [p for name, p in trainer.model.named_parameters() if "lm_head.lora_B" in name]
    assert adapters
    assert all(adapter.any() for adapter in adapters)


def test_virtual_tokens_are_refused(teacher_model, rows, tmp_path: Path):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    student = peft.get_peft_model(tiny.make_model("Llama", 64), config)
    trainer = make_trainer(tmp_path, rows, teacher_model, student=student)
    with pytest.raises(ValueError, match="virtual tokens"):
        trainer.train()


def test_the_mixin_goes_before_trls_sft_trainer(trained_service, rows, tmp_path: Path):
    trainer = make_sft_trainer(
        *(tmp_path, rows, trained_service.address),
        student=tiny.make_student(),
        targets="top_k:8",
        max_steps=6,
    )
    before = weights(trainer).clone()
    trainer.train()
    trainer.close()
    assert trainer._batch_loss.head is not None
    logs = [entry for entry in trainer.state.log_history if "kd_loss" in entry]
    assert len(logs) == 6
    # One epoch: every row's targets were in the loss once.
    assert logs[-1]["target_rows"] == num_trained(rows)
    for entry in logs:
        # Labels are mixed in by default, since top_k cuts the tail.
        wanted = 0.7 * entry["kd_loss"] + 0.3 * entry["ce_loss"]
        assert entry["loss"] == pytest.approx(wanted, rel=1e-4)
    assert logs[-1]["kd_loss"] < logs[0]["kd_loss"]
    assert not torch.equal(weights(trainer), before)


def test_the_other_losses_of_sft_are_refused(teacher_model, rows, tmp_path: Path):
    with pytest.raises(ValueError, match="loss_type='dft' would have no effect"):
        make_sft_trainer(
            *(tmp_path, rows, teacher_model),
            student=tiny.make_student(),
            targets="sampled",
            loss_type="dft",
        )


def test_tensorboard_shows_the_metrics(trained_service, rows, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make_trainer(
        tmp_path, rows, trained_service.address, report_to=["tensorboard"], max_steps=3
    )
    trainer.train()
    trainer.close()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    shown = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    logs = [entry for entry in trainer.state.log_history if "kd_loss" in entry]
    for name in (
        *("loss", "kd_loss", "ce_loss", "teacher_ce", "top1_agreement", "waiting_fraction"),
        *("lookahead", "bytes_per_token", "tokens_without_target", "target_rows"),
    ):
        scalars = shown[f"train/{name}"]
        assert [scalar.step for scalar in scalars] == [1, 2, 3], name
        assert [scalar.value for scalar in scalars] == pytest.approx([e[name] for e in logs]), name
