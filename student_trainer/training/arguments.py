"""Turns the settings of a run into TrainingArguments and DistillationArguments."""

import importlib.util
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

import transformers

from student_trainer.config import TrainConfig
from student_trainer.hf.arguments import DistillationArguments
from student_trainer.on_policy.arguments import OnPolicyArguments
from student_trainer.training import ranks
from student_trainer.training.students import find_device

NUM_MEASUREMENTS = 10
"""How often a run is measured on the held-out text by default."""
DECAY_SHARE = 0.2
"""Of the steps of the schedule wsd, those in which the learning rate falls."""
SERVICES = ("wandb", "trackio")
"""Reporters that need a package, of which the Trainer makes the callbacks."""


def check_reporters(reporters: Collection[str]) -> None:
    """Raises ValueError for a reporter whose package is not installed."""
    for name in SERVICES:
        if name in reporters and importlib.util.find_spec(name) is None:
            raise ValueError(
                f"--report-to {name} needs the package {name}, which is not installed: pip install "
                f"{name}, or leave it out"
            )


def make_training_arguments(
    config: TrainConfig, folder: Path, *, label: str = "distilled"
) -> transformers.TrainingArguments:
    """Makes the Trainer's arguments; what `[training]` in the configuration says wins.

    folder: for checkpoints. label: what the student is called. Raises ValueError for a value that
    TrainingArguments refuses, and for a batch that the processes of the run cannot share.
    """
    num_ranks = ranks.count()
    if config.batch_size % num_ranks:
        raise ValueError(
            f"--batch-size must be a multiple of the {num_ranks} processes that share each batch, "
            f"got {config.batch_size}"
        )
    on_cpu = find_device(config) == "cpu"
    every = config.checkpoint_every
    steps = config.steps or 1  # before the data was read, which says how many epochs have
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": config.batch_size // num_ranks,
        "per_device_eval_batch_size": max(1, config.batch_size // num_ranks),
        "gradient_accumulation_steps": config.accumulation,
        "learning_rate": config.learning_rate,
        "warmup_steps": config.warmup_steps,
        "lr_scheduler_type": config.schedule,
        "adam_beta2": 0.95,
        "weight_decay": 0.0 if config.optimizer == "muon" else 0.01,
        "max_grad_norm": config.max_grad_norm,
        "seed": config.seed % 2**32,  # what NumPy takes
        "logging_steps": config.log_every,
        "logging_nan_inf_filter": False,  # it waits for the device, and hides a student that diverged
        "eval_strategy": "steps",
        "eval_steps": max(1, steps // NUM_MEASUREMENTS),
        "save_strategy": "steps" if every else "no",
        "save_steps": every or 500,
        "report_to": [name for name in config.report_to if name in SERVICES],
        # Else accelerate takes several processes without GPUs for one each.
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }
    if config.schedule == "wsd":
        settings["lr_scheduler_type"] = "warmup_stable_decay"
        settings["lr_scheduler_kwargs"] = {
            "num_decay_steps": max(1, round(DECAY_SHARE * steps)),
            "decay_type": "1-sqrt",
        }
    if config.early_stopping:
        settings["load_best_model_at_end"] = True
        settings["save_strategy"] = "best"
        if every:  # what is saved has been measured
            settings["save_strategy"], settings["eval_steps"] = "steps", every
    given = {_rename(name): value for name, value in config.training.items()}
    for name, value in given.items():
        is_merged = name == "lr_scheduler_kwargs" and isinstance(value, dict)
        settings[name] = {**settings.get(name, {}), **value} if is_merged else value
    settings["run_name"] = f"{given.get('run_name') or config.output.name}/{label}"
    try:
        return transformers.TrainingArguments(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"[training]: {error}") from error


def _rename(name: str) -> str:
    """Returns the name of a field that has a new one, if this transformers knows that."""
    new = name.replace("gradient_checkpointing", "activation_checkpointing")
    known = {one.name for one in fields(transformers.TrainingArguments)}
    return new if new in known else name


def make_distillation_arguments(config: TrainConfig, *, is_aligned: bool) -> DistillationArguments:
    """Makes the mixin's arguments; is_aligned: whether targets must belong to their tokens."""
    return DistillationArguments(
        targets=config.targets,
        temperature=config.temperature,
        divergence=config.divergence,
        beta=config.beta,
        kd_weight=config.kd_weight,
        ce_weight=config.ce_weight,
        entropy_routing=config.entropy_routing,
        adaptive_label_weight=config.adaptive_label_weight,
        features=config.features,
        feature_layers=config.feature_layers,
        feature_loss=config.feature_loss,
        feature_weight=config.feature_weight,
        ahead=config.ahead,
        check_first_batch=is_aligned,
    )


def make_on_policy_arguments(config: TrainConfig) -> OnPolicyArguments | None:
    """Makes the arguments of the student's own texts; None if it writes none."""
    if not config.on_policy:
        return None
    return OnPolicyArguments(
        fraction=config.on_policy,
        targets=config.on_policy_targets,
        divergence=config.on_policy_divergence,
        beta=config.on_policy_beta,
        support=config.on_policy_support,
        prompt_tokens=config.prompt_tokens,
        max_new_tokens=config.max_new_tokens,
        sampling_temperature=config.sampling_temperature,
        sampling_top_k=config.sampling_top_k,
        sampling_top_p=config.sampling_top_p,
        max_staleness=config.max_staleness,
        train_special_tokens=config.train_special_tokens,
    )
