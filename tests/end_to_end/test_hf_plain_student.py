"""A student that is no transformers model: its forward takes what it needs and nothing else."""

from pathlib import Path

import pytest
from torch import Tensor, nn

from student_trainer.hf_trainer import DistillationArguments
from tests.conftest import one_torch_thread
from tests.support import tiny
from tests.support.hf import make_trainer, weights

one_thread = pytest.fixture(autouse=True)(one_torch_thread)


class Plain(nn.Module):
    """Without keyword arguments, from which transformers concludes how losses are scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny.make_student()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner(input_ids, attention_mask=attention_mask).logits}


def test_a_step_cut_into_batches_is_the_same_step(rows, tmp_path: Path):
    teacher, found = tiny.make_model("Gemma2", 64), []
    for batch, accumulation in ((8, 1), (2, 4)):
        trainer = make_trainer(
            tmp_path,
            rows,
            teacher,
            student=Plain(),
            distillation=DistillationArguments(check_first_batch=False),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            remove_unused_columns=False,
            max_grad_norm=0.0,
        )
        trainer.train()
        found.append(weights(trainer))
    assert (found[0] - weights(make_trainer(tmp_path, rows, teacher, student=Plain()))).any()
    assert (found[1] - found[0]).abs().max() < 1e-6
