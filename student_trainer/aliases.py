"""Maps the names that TRL and transformers have for settings to ours, in one table.

`docs/connecting.md` shows the table to users.
"""

import os
from collections.abc import Mapping

from logitstream.options import Alias


def _over_all_processes(value: str, given: Mapping[str, str]) -> str:
    workers = given.get("workers", "0")  # of Ray Train, or else those that a launcher started
    if not (value.isdecimal() and workers.isdecimal()):
        return value  # what is wrong is refused as it was given
    return str(int(value) * (int(workers) or int(os.environ.get("WORLD_SIZE", "1"))))


def _read_scheduler(value: str, given: Mapping[str, str]) -> str:
    return "wsd" if value == "warmup_stable_decay" else value


def _train_assistant(value: str, given: Mapping[str, str]) -> str:
    return {"true": "assistant", "false": "all"}.get(value.lower(), value)


def _train_completion(value: str, given: Mapping[str, str]) -> str:
    return {"true": "completion", "false": "all"}.get(value.lower(), value)


ALIASES: dict[str, Alias] = {
    # Of TrainingArguments; these stand in [training] too.
    "output_dir": Alias("output"),
    "max_steps": Alias("steps"),
    "num_train_epochs": Alias("epochs"),
    "per_device_train_batch_size": Alias("batch_size", _over_all_processes),
    "gradient_accumulation_steps": Alias("accumulation"),
    "lr_scheduler_type": Alias("schedule", _read_scheduler),
    "logging_steps": Alias("log_every"),
    "save_steps": Alias("checkpoint_every"),
    "save_total_limit": Alias("keep_checkpoints"),
    # Of TRL's configurations and script arguments.
    "model_name_or_path": Alias("student"),
    "model_revision": Alias("revision"),
    "torch_dtype": Alias("dtype"),
    "dataset_name": Alias("data"),
    "dataset_train_split": Alias("split"),
    "dataset_test_split": Alias("held_out_split"),
    "dataset_streaming": Alias("streaming"),
    "dataset_text_field": Alias("text_column"),
    "chat_template_path": Alias("chat_template"),
    "max_length": Alias("sequence_length"),
    "max_seq_length": Alias("sequence_length"),
    "assistant_only_loss": Alias("trained_rows", _train_assistant),
    "completion_only_loss": Alias("trained_rows", _train_completion),
    "lmbda": Alias("on_policy"),
}
"""Other names of options; a conversion where the values differ too."""

GENERATE_ALIASES: dict[str, Alias] = {
    "model_name_or_path": Alias("student"),
    "model_revision": Alias("revision"),
    "output_dir": Alias("output"),
    "dataset_name": Alias("prompts"),
    "dataset_train_split": Alias("split"),
    "dataset_streaming": Alias("streaming"),
    "chat_template_path": Alias("chat_template"),
    # Of transformers, TRL and vLLM.
    "num_return_sequences": Alias("num_samples"),
    "num_generations": Alias("num_samples"),
    "max_completion_length": Alias("max_new_tokens"),
    "max_tokens": Alias("max_new_tokens"),
    "max_prompt_length": Alias("prompt_tokens"),
    "stop": Alias("stop_strings"),
}
"""The same of the command that lets a teacher write."""

ADVICE = {
    "teacher_model_name_or_path": "the teacher is a service: start one with teacher-server serve "
    "--model NAME, and give --teacher HOST:PORT",
    "teacher_model_server_url": "give --teacher HOST:PORT",
    "dataset_config": "give it with the name of the data set: --data ORG/NAME:CONFIG",
    "loss_type": "the loss is --kd-weight times the divergence from the teacher plus --ce-weight "
    "times the cross-entropy",
    "use_peft": "--lora-r N trains adapters",
}
"""What to do instead of giving a setting that we have not, by its name in TRL."""
