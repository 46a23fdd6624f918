"""Turns the settings of a run into TrainingArguments and DistillationArguments."""

import os
from pathlib import Path
from typing import Any

import torch
import transformers

from student_trainer.config import TrainConfig
from student_trainer.hf.arguments import DistillationArguments

NUM_MEASUREMENTS = 10
"""How often a run is measured on the held-out text by default."""


def make_training_arguments(config: TrainConfig, folder: Path) -> transformers.TrainingArguments:
    """Makes the Trainer's arguments; what `[training]` in the configuration says wins.

    folder: for checkpoints. Raises ValueError for a value that TrainingArguments refuses, and for a
    batch that the processes of the run cannot share.
    """
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if config.batch_size % num_ranks:
        raise ValueError(
            f"--batch-size must be a multiple of the {num_ranks} processes that share each batch, "
            f"got {config.batch_size}"
        )
    every = config.checkpoint_every
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": config.steps,
        "per_device_train_batch_size": config.batch_size // num_ranks,
        "per_device_eval_batch_size": max(1, config.batch_size // num_ranks),
        "gradient_accumulation_steps": config.accumulation,
        "learning_rate": config.learning_rate,
        "warmup_steps": config.warmup_steps,
        "lr_scheduler_type": "linear",
        "adam_beta2": 0.95,
        "weight_decay": 0.0 if config.optimizer == "muon" else 0.01,
        "max_grad_norm": 1.0,
        "seed": config.seed % 2**32,  # what NumPy takes
        "logging_steps": config.log_every,
        "logging_nan_inf_filter": False,  # it waits for the device, and hides a student that diverged
        "eval_strategy": "steps",
        "eval_steps": max(1, config.steps // NUM_MEASUREMENTS),
        "save_strategy": "steps" if every else "no",
        "save_steps": every or 500,
        "report_to": "none",
        "use_cpu": config.device == "cpu",
        "dataloader_pin_memory": config.device != "cpu" and torch.cuda.is_available(),
        "remove_unused_columns": False,
        "disable_tqdm": True,
        **config.training,
    }
    try:
        return transformers.TrainingArguments(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"[training]: {error}") from error


def make_distillation_arguments(config: TrainConfig, *, is_aligned: bool) -> DistillationArguments:
    """Makes the mixin's arguments; is_aligned: whether targets must belong to their tokens."""
    return DistillationArguments(
        targets=config.targets,
        temperature=config.temperature,
        divergence=config.divergence,
        beta=config.beta,
        kd_weight=config.kd_weight,
        ce_weight=config.ce_weight,
        ahead=config.ahead,
        check_first_batch=is_aligned,
    )
