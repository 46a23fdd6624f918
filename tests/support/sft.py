"""TRL's SFTTrainer with a teacher; apart from `hf.py`, which is used where TRL is not installed."""

from pathlib import Path
from typing import Any

import datasets
import trl

from student_trainer.hf_trainer import DistillationArguments, DistillationMixin
from tests.support.hf import SETTINGS, TOKENIZER


class Distilled(DistillationMixin, trl.SFTTrainer):
    pass


def make_sft_trainer(
    folder: Path,
    rows: list[dict[str, list[int]]],
    teacher: Any,
    *,
    student: Any,
    targets: str,
    **arguments: Any,
) -> Distilled:
    """As `hf.make_trainer`, over a data set of the rows."""
    return Distilled(
        model=student,
        args=trl.SFTConfig(str(folder), **{**SETTINGS, "bf16": False, **arguments}),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=TOKENIZER,
        teacher=teacher,
        distillation=DistillationArguments(targets=targets),
    )
