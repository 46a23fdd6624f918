"""Decides about every field of transformers' TrainingArguments: what `[training]` may hold.

transformers is imported only to check a table that is not empty.
"""

import difflib
import enum
import json
from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

OPTIONS = {
    *("output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps"),
    *("max_grad_norm", "logging_steps", "save_steps", "save_total_limit", "seed", "report_to"),
    *("push_to_hub", "hub_model_id", "hub_private_repo"),
}
"""Fields that are options, by this name or another: in the table they mean the same."""

_MEASURED = "measuring on the held-out text, beside the teacher, is the run's own: it has no effect"
_UPLOADED = "the student is uploaded once, at the end: give --push-to-hub"
_COMMAND = "train trains and measures; it is the command that decides this"
_SHARED = "how processes share a batch is settled: every one gets an equal share of the same step"
REFUSED = {
    "label_smoothing_factor": "it would have no effect on the loss from a teacher, whose "
    "distribution is already smoother than the labels",
    "use_liger_kernel": "it replaces the loss; the loss here is fused with the head already",
    "liger_kernel_config": "it replaces the loss; the loss here is fused with the head already",
    "average_tokens_across_devices": "the loss is always the mean over the tokens of all processes",
    "auto_find_batch_size": "it would change the batch, and so the result, without a word",
    "dataloader_drop_last": "every step has whole batches already",
    "dataloader_in_order": "the order of the data would depend on chance, and resuming on luck",
    "ignore_data_skip": "a resumed run would train on the same data again",
    "restore_callback_states_from_checkpoint": "a resumed run would stop where it was stopped",
    "save_only_model": "nothing could be resumed from such a checkpoint",
    "enable_jit_checkpoint": "its checkpoints have no digests: use --checkpoint-every N",
    "accelerator_config": _SHARED,
    "parallelism_config": "a file cannot hold it: start the run with accelerate launch",
    "use_cache": "with a cache, models do not keep the documents of a row apart",
    "local_rank": "the launcher of the processes sets it",
    "use_cpu": "give --device cpu",
    "remove_unused_columns": "the data has only columns that the student reads",
    "logging_nan_inf_filter": "it would hide that a student has diverged",
    "disable_tqdm": "the progress bar is the run's own: it has no effect",
    "log_level": "give --log-level",
    "resume_from_checkpoint": "a run resumes from the newest checkpoint in --output by itself; "
    "--start-over begins again",
    "do_train": _COMMAND,
    "do_eval": _COMMAND,
    "do_predict": _COMMAND,
    "label_names": _MEASURED,
    "prediction_loss_only": _MEASURED,
    "eval_do_concat_batches": _MEASURED,
    "eval_use_gather_object": _MEASURED,
    "eval_accumulation_steps": _MEASURED,
    "include_for_metrics": _MEASURED,
    "batch_eval_metrics": _MEASURED,
    "bf16_full_eval": _MEASURED,
    "fp16_full_eval": _MEASURED,
    "hub_token": "a file is no place for secrets: run hf auth login, or set HF_TOKEN",
    "hub_strategy": _UPLOADED,
    "hub_always_push": _UPLOADED,
    "hub_revision": _UPLOADED,
}
"""Fields that would break a promise or do nothing, and why."""

FREE = {
    *("activation_checkpointing", "activation_checkpointing_kwargs"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "torch_empty_cache_steps"),
    *("logging_strategy", "logging_first_step", "log_on_each_node", "log_level_replica"),
    *("include_num_input_tokens_seen", "skip_memory_metrics", "debug"),
    *("run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *("save_strategy", "save_on_each_node", "per_device_eval_batch_size"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
    *("ddp_static_graph", "ddp_backend", "ddp_timeout"),
}
"""Fields that do not decide the result: they may change when a run is resumed."""

MEASURING = {"eval_strategy", "eval_steps", "eval_delay", "eval_on_start"}
"""Fields that say when to measure. They are free too, unless measurements decide the result."""

DECIDING = {
    *("lr_scheduler_kwargs", "optim", "optim_args", "optim_target_modules", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "neftune_noise_alpha", "data_seed"),
    *("bf16", "fp16", "tf32", "full_determinism"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    *("train_sampling_strategy", "length_column_name", "fsdp", "fsdp_config", "deepspeed"),
}
"""Fields that decide the result, as does any that a newer transformers may have."""


def check_fields(table: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields with values of their types, read from text where that was given.

    Raises ValueError with a line for each mistake: an unknown field, a wrong value, a refused field.
    """
    if not table:
        return {}
    from transformers import TrainingArguments

    hints = get_type_hints(TrainingArguments)
    fields = TrainingArguments.__dataclass_fields__
    found, mistakes = {}, []
    for name, value in table.items():
        try:
            if name in REFUSED:
                raise ValueError(f"is refused: {REFUSED[name]}")
            if name not in fields:
                near = difflib.get_close_matches(
                    name, [one for one in fields if one not in REFUSED]
                )
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise ValueError(f"is not a field of transformers' TrainingArguments{hint}")
            found[name] = _read_value(hints[name], value)
        except ValueError as error:
            mistakes.append(f"[training] {name} {error}")
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return found


def _read_value(hint: Any, value: Any) -> Any:
    """Returns a value as its type. Raises ValueError."""
    from pydantic import TypeAdapter, ValidationError

    kinds = get_args(hint) or (hint,)
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            allowed = [one.value for one in kind]
            text = "no" if value is False else value  # as YAML reads no
            if text not in allowed:
                raise ValueError(f"must be {' or '.join(map(str, allowed))}, got {value!r}")
            return text
    if isinstance(value, dict):
        value = {
            key: _read_text(one) if isinstance(one, str) else one for key, one in value.items()
        }
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        said = [one["msg"].removeprefix("Input should be ") for one in error.errors()]
        text = " or ".join(dict.fromkeys(one.partition(",")[0] for one in said))
        raise ValueError(f"must be {text}, got {value!r}") from None


def _read_text(text: str) -> Any:
    """Reads a value within a table, whose type is not known, as JSON if it is that."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def find_deciding(table: Mapping[str, Any], *, by_measurements: bool = False) -> dict[str, Any]:
    """Returns the fields that decide the result of a run.

    by_measurements: whether measurements decide too, as with early stopping.
    """
    best = "load_best_model_at_end", "metric_for_best_model"
    by_measurements = by_measurements or any(table.get(name) for name in best)
    free = FREE if by_measurements else FREE | MEASURING
    return {name: value for name, value in table.items() if name not in free}
