"""A transformers Trainer on a tiny dataset, in this process or in several."""

from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import nn

from student_trainer.hf_trainer import DistillationArguments, DistillationTrainer
from tests.end_to_end.conftest import WORDS
from tests.support import tiny

TOKENIZER = tiny.make_tokenizer(WORDS)
PAD = 0
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "learning_rate": 1e-2,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "dataloader_pin_memory": False,
}
"""Of a Trainer, unless a test says otherwise."""


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Padded on the right, as any collator does."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, value: int) -> torch.Tensor:
        return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])

    masks = [[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in rows]
    return {
        "input_ids": padded("input_ids", PAD),
        "labels": padded("labels", -100),
        "attention_mask": torch.tensor(masks),
    }


def make_trainer(
    folder: Path,
    rows,
    teacher,
    *,
    kind=DistillationTrainer,
    student: nn.Module | None = None,
    distillation: DistillationArguments | None = None,
    collator=collate,
    choice: dict[str, Any] | None = None,
    **arguments,
):
    """choice: which teacher is asked for a row, and what it reads."""
    return kind(
        model=tiny.make_student() if student is None else student,
        args=transformers.TrainingArguments(str(folder), **{**SETTINGS, **arguments}),
        train_dataset=rows,
        eval_dataset=rows[:6] if isinstance(rows, list) else None,
        data_collator=collator,
        processing_class=TOKENIZER,
        teacher=teacher,
        distillation=distillation,
        **(choice or {}),
    )


def shard_on_cpu(trainer: Any) -> None:
    """Puts a Trainer under FSDP2, which accelerate offers for GPUs only; it shards on a CPU as there.

    Takes the place of its `create_accelerator_and_postprocess`.
    """
    transformers.Trainer.create_accelerator_and_postprocess(trainer)
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[f"{type(trainer.model).__name__[:-11]}DecoderLayer"],
    )
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    trainer.is_fsdp_enabled = True
    assert trainer.accelerator.is_fsdp2


def weights(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def num_trained(rows) -> int:
    return sum(label != -100 for row in rows for label in row["labels"][1:])
