"""One tokenizer, vocabularies padded to different sizes: every way to train gives the same losses.

As Qwen's 151,936 and 152,064, or Gemma 3's 1B and 4B.
"""

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from student_trainer import (
    LocalTeacher,
    Recorded,
    connect,
    distillation_loss,
    fused_distillation_loss,
)
from student_trainer.hf_trainer import DistillationArguments
from tests.conftest import one_torch_thread
from tests.end_to_end.conftest import PADDED_IDS
from tests.support import tiny
from tests.support.hf import TOKENIZER, collate, make_trainer
from tests.support.sft import make_sft_trainer

one_thread = pytest.fixture(autouse=True)(one_torch_thread)

IDS = 64
HEADS = (64, 80)
"""A smaller and a larger one."""
TARGETS = "top_k:8"
STEPS = 2


def make_student(size: int) -> nn.Module:
    """The same but for its padding, which is likely if it counts."""
    student = tiny.make_student()
    student.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        student.get_input_embeddings().weight[IDS:] = 1.0
    return student


@pytest.fixture(scope="module")
def record(padded_folder: Path, rows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one epoch of the trainer asks for."""
    folder = tmp_path_factory.mktemp("record")
    model = transformers.AutoModelForCausalLM.from_pretrained(padded_folder)
    with Recorded(folder, LocalTeacher(model.eval(), TOKENIZER)) as recording:
        for _ in recording.stream([row["input_ids"] for row in rows], targets=TARGETS):
            pass
    return folder


@pytest.fixture(scope="module")
def losses(
    teacher_model, padded_folder: Path, rows, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, list[float]]:
    """Of teachers and students of one size: without any padding, and with that of the teacher."""
    folder = tmp_path_factory.mktemp("reference")
    padded = transformers.AutoModelForCausalLM.from_pretrained(padded_folder).eval()
    return {
        64: train(folder, rows, teacher_model, IDS, fused=False),
        80: train(folder, rows, padded, PADDED_IDS, fused=False),
    }


def train(folder: Path, rows, teacher, size: int, *, fused: bool, kind=None) -> list[float]:
    """The loss of each step."""
    arguments = DistillationArguments(targets=TARGETS, ce_weight=0.3, fused=fused)
    student = make_student(size)
    more = {} if kind is None else {"kind": kind}
    trainer = make_trainer(
        folder, rows, teacher, student=student, distillation=arguments, max_steps=STEPS, **more
    )
    trainer.train()
    trainer.close()
    assert (trainer._batch_loss.head is not None) == fused
    # What only the student has is left as it was.
    assert (student.get_input_embeddings().weight[PADDED_IDS:] == 1.0).all()
    logs = [entry for entry in trainer.state.log_history if "kd_loss" in entry]
    for entry in logs:
        assert entry["loss"] == pytest.approx(entry["kd_loss"] + 0.3 * entry["ce_loss"], rel=1e-4)
    return [entry["loss"] for entry in logs]


def own_loop(teacher, rows, size: int, fused: bool) -> list[float]:
    """As examples/plain_loop.py, on the batches of `train` in another order: of the first step."""
    student = make_student(size)
    batches = [collate(rows[:4])]
    found = []
    for batch, targets in teacher.stream_batches(batches, targets=TARGETS, ahead=1):
        trained = batch["attention_mask"][:, 1:].bool() & (batch["labels"][:, 1:] != -100)
        hidden = student.transformer(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state[:, :-1][trained]
        options = {"labels": batch["labels"][:, 1:][trained], "ce_weight": 0.3}
        head = student.get_output_embeddings().weight
        if fused:
            loss = fused_distillation_loss(hidden, head, targets, **options)
        else:
            loss = distillation_loss(hidden @ head.T, targets, **options)
        loss.backward()
        assert not head.grad[PADDED_IDS:].any()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("size", HEADS)
@pytest.mark.parametrize("fused", [True, False])
def test_heads_of_other_sizes_train_with_the_same_losses_live(
    padded_service, rows, losses, tmp_path: Path, size, fused
):
    found = train(tmp_path, rows, padded_service.address, size, fused=fused)
    assert found == pytest.approx(losses[size], rel=1e-5)


@pytest.mark.parametrize("size", HEADS)
def test_heads_of_other_sizes_train_with_the_same_losses_from_a_record(
    record, rows, losses, tmp_path: Path, size
):
    with Recorded(record) as replayed:
        found = train(tmp_path, rows, replayed, size, fused=size != IDS)
    assert found == pytest.approx(losses[size], rel=1e-5)


def test_heads_of_other_sizes_have_the_same_loss_in_a_loop_of_ones_own(
    padded_service, teacher_model, record, rows
):
    (small,) = own_loop(LocalTeacher(teacher_model, TOKENIZER), rows, IDS, False)
    with connect(padded_service.address, tokenizer=TOKENIZER) as live, Recorded(record) as replayed:
        (large,) = own_loop(live, rows, PADDED_IDS, False)
        for teacher in (live, replayed):
            for fused in (True, False):
                assert own_loop(teacher, rows, 64, fused) == pytest.approx([small], rel=1e-5)
                assert own_loop(teacher, rows, 80, fused) == pytest.approx([large], rel=1e-5)


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing`:FutureWarning")
def test_trls_sft_trainer_trains_heads_of_other_sizes_with_the_same_losses(
    record, rows, tmp_path: Path
):
    found = []
    for size in (PADDED_IDS, 80):
        with Recorded(record) as replayed:
            trainer = make_sft_trainer(
                *(tmp_path, rows, replayed),
                student=make_student(size),
                targets=TARGETS,
                max_steps=STEPS,
            )
            trainer.train()
        logs = [entry for entry in trainer.state.log_history if "kd_loss" in entry]
        found.append([entry["loss"] for entry in logs])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_a_student_that_lacks_ids_of_the_text_is_refused_in_one_line(
    teacher_model, rows, tmp_path: Path
):
    """Not an IndexError of its embeddings."""
    student = tiny.make_student()
    student.resize_token_embeddings(30, mean_resizing=False)
    trainer = make_trainer(tmp_path, rows, teacher_model, student=student)
    with pytest.raises(ValueError, match=r"id \d+.*30.*resize_token_embeddings"):
        trainer.train()
    assert trainer.state.global_step == 0
