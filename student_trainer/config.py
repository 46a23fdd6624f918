"""Declares every option of `student-trainer`, one class for each command."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from logitstream.connection import check_address
from logitstream.options import Json, ServiceOptions, Settings
from student_trainer import trainer_fields
from student_trainer.aliases import ADVICE, ALIASES
from student_trainer.loss_settings import NO_TARGETS, LossSettings
from student_trainer.on_policy_settings import OnPolicySettings


class MayChange:
    """Marks a setting that may change when a run is resumed; it does not decide the result.

    Of the student and the data, the content must stay the same: it is compared by digest.
    """


class MayDiffer:
    """Marks a setting in which two runs may differ and still repeat each other, as in their
    seed."""


class CorpusConfig(ServiceOptions):
    """Which teacher to ask for which targets of which text."""

    aliases: ClassVar = ALIASES
    shared_names: ClassVar = trainer_fields.OPTIONS

    teacher: Annotated[str | dict[str, str], MayChange] = ""
    """HOST:PORT of the service, or a connection file (*.toml) of it; not needed if --record is
    complete. Several teachers are a table of these by name: --teacher.math HOST:PORT, or
    teacher = { math = "HOST:PORT", code = "HOST:PORT" } in a file."""
    teacher_column: str = ""
    """Column of the data that names the teacher of each row, where there are several."""
    teacher_prefix: str = ""
    """Text that the teacher reads in front of every sequence and the student does not: a system
    prompt as the chat template writes it, or a hint."""
    record: Annotated[str, MayChange] = ""
    """Folder, or URL such as s3://bucket/targets, of recorded targets to replay. With --teacher,
    targets that are missing there are requested and added."""
    draws: Annotated[int, MayChange] = Field(default=1, ge=1)
    """With --record and `sampled` targets: draws of each sequence to record before replaying
    them."""
    student: Annotated[Path, MayChange]
    """Hugging Face folder or hub id: config and tokenizer, and weights unless training starts from
    random ones."""
    revision: Annotated[str | None, MayChange] = None
    """Branch, tag or commit of a student of the hub; by default its main branch."""
    data: Annotated[list[str], MayChange] = Field(min_length=1)
    """What to train on: .txt, .jsonl or .parquet files (paths, folders, glob patterns, URLs such as
    s3://bucket/*.parquet), or data sets of the hub (ORG/NAME or ORG/NAME:CONFIG)."""
    held_out: Annotated[list[str], MayChange] = Field(default=[])
    """Files or data sets to evaluate on; by default every 20th sequence of --data, which is then
    left out of training."""
    held_out_sequences: Annotated[int, MayDiffer] = Field(default=256, ge=1)
    """Maximum number of held-out sequences to evaluate on."""
    split: Annotated[str, MayChange] = "train"
    """Split to train on, of a data set of the hub or a folder of Parquet files."""
    held_out_split: Annotated[str, MayChange] = ""
    """Split to evaluate on, of the data sets in --held-out or else in --data."""
    streaming: bool = False
    """Read and tokenize the data while training, instead of before: it starts at once and needs no
    disk. It begins again when it ends; of several loader workers, each reads and repeats its own
    files. --held-out or --held-out-split must then be given."""
    data_weights: list[Annotated[float, Field(gt=0)]] = Field(default=[])
    """How often to draw from each --data, one number for each. An epoch ends when all of it was
    drawn; what is smaller is repeated. By default everything is drawn once."""
    text_column: Annotated[str, MayChange] = ""
    """Column of .jsonl, Parquet and data sets that holds text, messages or token ids. By default it
    is found: text, messages, prompt with completion, or input_ids."""
    packing: Literal["", "concatenate", "isolate", "pad"] = ""
    """concatenate: documents one after another, cut every --sequence-length tokens. isolate: whole
    documents in a sequence, none of which sees another. pad: one document per sequence. Default:
    concatenate for text, pad for chats and prompts."""
    trained_rows: Literal["", "all", "assistant", "completion"] = ""
    """Tokens to learn to predict: all, those of the assistant's messages, or those of the
    completions; the rest is not asked for. Default: assistant for messages, completion for prompts
    with completions."""
    chat_template: Annotated[str, MayChange] = ""
    """File of a chat template (Jinja), instead of the tokenizer's own; saved with the student."""
    sequence_length: int = Field(default=512, ge=2)
    """Tokens per sequence; longer chats are cut there."""
    targets: str = "sampled"
    """Targets to request from the teacher, such as sampled, sampled:256, top_k:64 or dense:bf16. none:
    `train` learns from the text alone, which a teacher may have written (`generate`)."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the teacher's and the student's distributions in the distillation loss."""
    seed: Annotated[int, MayDiffer] = Field(default=0, ge=0)
    """Seed of the student's random weights, the order of the data and the teacher's draws."""

    @model_validator(mode="after")
    def _check_data(self) -> Self:
        if self.data_weights and len(self.data_weights) != len(self.data):
            raise ValueError(
                f"--data-weights must have one number for each --data: {len(self.data)}, got "
                f"{len(self.data_weights)}"
            )
        if self.streaming and not (self.held_out or self.held_out_split):
            raise ValueError(
                "--streaming needs --held-out or --held-out-split: nothing can be held out of data "
                "that is not read before it is trained on"
            )
        return self

    @field_validator("teacher")
    @classmethod
    def _check_teacher(cls, teacher: str | dict[str, str]) -> str | dict[str, str]:
        if isinstance(teacher, str):
            return check_address(teacher) if teacher else teacher
        return {name: check_address(address) for name, address in teacher.items()}

    @model_validator(mode="after")
    def _check_column(self) -> Self:
        if isinstance(self.teacher, dict) != bool(self.teacher_column):
            raise ValueError(
                "several teachers need --teacher-column NAME, the column of the data that names the "
                "teacher of each row"
                if isinstance(self.teacher, dict)
                else "--teacher-column is for several teachers: --teacher.NAME HOST:PORT for each"
            )
        if self.teacher_column and self.packing not in ("", "pad"):
            raise ValueError(
                f"--teacher-column needs --packing pad: with {self.packing}, documents of several "
                "teachers would share a sequence"
            )
        return self

    @property
    def has_targets(self) -> bool:
        """Whether a student learns from a teacher's targets; if not, from the text alone."""
        return self.targets.strip() != NO_TARGETS

    @classmethod
    def explain_unknown(cls, name: str) -> str:
        if name in trainer_fields.REFUSED:
            return trainer_fields.REFUSED[name]
        if name in trainer_fields.FREE | trainer_fields.MEASURING | trainer_fields.DECIDING:
            return f"set {name} in the table [training], or give {_flag(f'training.{name}')}"
        return ADVICE.get(name, "")


class RecordConfig(CorpusConfig):
    """Record a served teacher's targets, to train on them later without the teacher.

    A file for `train` also works here: settings that only `train` has are ignored."""

    teacher: str | dict[str, str] = Field(min_length=1)
    """HOST:PORT of the service, or a connection file (*.toml) of it. Several teachers are recorded
    one by one, or by `train`."""
    record: str = Field(min_length=1)
    """Folder, or URL such as s3://bucket/targets, to write to. Targets that it already has are not
    requested again."""
    draws: int = Field(default=1, ge=1)
    """With `sampled` targets: draws of each sequence to record, one for each epoch."""
    student: Path
    """Hugging Face folder or hub id of the student to be trained: its tokenizer reads the text."""
    data: list[str] = Field(min_length=1)
    """What to record the targets of: .txt, .jsonl or .parquet files (paths, folders, glob patterns,
    URLs), or data sets of the hub (ORG/NAME or ORG/NAME:CONFIG)."""
    held_out: list[str] = Field(default=[])
    """Files that `train` will evaluate on, recorded too; by default it evaluates on a part of
    --data."""
    held_out_sequences: int = Field(default=256, ge=1)
    """Maximum number of sequences of the held-out files to record."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the teacher's distributions; give `train` the same."""
    seed: int = Field(default=0, ge=0)
    """Seed of the teacher's draws. `train` replays what is recorded, whatever its own seed."""
    as_json: Json = False
    """Print JSON."""

    @field_validator("teacher")
    @classmethod
    def _check_one(cls, teacher: str | dict[str, str]) -> str | dict[str, str]:
        if isinstance(teacher, dict):
            raise ValueError(
                "one teacher at a time is recorded: give --teacher HOST:PORT. `train` with several "
                "teachers records what each of them is asked for, in RECORD/NAME"
            )
        return teacher


class StudentOptions(Settings):
    """How the student is loaded, which of its weights are trained, and where it goes in the end."""

    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Type of the student's weights; auto: as its folder says. To train float32 weights with
    arithmetic of 16 bits, set bf16 or fp16 in [training] instead."""
    attn_implementation: str | None = None
    """Attention of transformers: eager, sdpa, flash_attention_2, ...; by default what it takes."""
    lora_r: int = Field(default=0, ge=0)
    """Rank of LoRA adapters: only they are trained and saved, the student's weights stay as they
    are. 0 trains all weights."""
    lora_alpha: int | None = Field(default=None, ge=1)
    """LoRA's alpha: adapters are scaled by alpha / rank. Default: twice the rank."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout in front of the adapters."""
    lora_target_modules: list[str] = Field(default=["all-linear"], min_length=1)
    """Layers that get an adapter: ends of their names, one regular expression, or all-linear for
    every linear layer except for the head."""
    load_in_8bit: bool = False
    """Keep the student's own weights in 8 bits (bitsandbytes, on a GPU); needs --lora-r."""
    load_in_4bit: bool = False
    """QLoRA: keep the student's own weights in 4 bits (bitsandbytes, on a GPU); needs --lora-r."""
    push_to_hub: Annotated[bool, MayChange] = False
    """Upload the student with its model card to the Hugging Face hub at the end."""
    hub_model_id: Annotated[str | None, MayChange] = None
    """ORG/NAME to upload to. Default: the name of the output folder, of the token's owner."""
    hub_private_repo: Annotated[bool | None, MayChange] = None
    """Whether a new repository is private. Default: as its organisation has it, mostly public."""

    @model_validator(mode="after")
    def _check_adapters(self) -> Self:
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("give --load-in-8bit or --load-in-4bit, not both")
        if self.lora_r:
            return self
        for name in ("lora_alpha", "lora_dropout", "lora_target_modules"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{_flag(name)} does nothing without --lora-r N: give both")
        for name in ("load_in_8bit", "load_in_4bit"):
            if getattr(self, name):
                raise ValueError(
                    f"{_flag(name)} needs --lora-r N: weights of so few bits cannot be trained, "
                    "only adapters of them"
                )
        if self.dtype == "float16":
            raise ValueError(
                "--dtype float16 needs --lora-r N: Adam divides by zero in weights of that type. To "
                "train all weights, use float32 and set fp16 = true in [training]"
            )
        return self

    @model_validator(mode="after")
    def _check_hub(self) -> Self:
        for name in ("hub_model_id", "hub_private_repo"):
            if getattr(self, name) is not None and not self.push_to_hub:
                raise ValueError(f"{_flag(name)} does nothing without --push-to-hub: give both")
        return self


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


Schedule = Literal[
    "linear",
    "cosine",
    "constant",
    "wsd",
    "constant_with_warmup",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "polynomial",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "greedy",
]
"""wsd, and schedules of transformers by their own names."""
Reporter = Literal["wandb", "trackio", "tensorboard", "none"]


class TrainConfig(StudentOptions, OnPolicySettings, LossSettings, CorpusConfig):
    """Train a student on a served teacher's distributions."""

    data: Annotated[list[str], MayChange] = Field(min_length=1)
    """What to train on: .txt, .jsonl or .parquet files (paths, folders, glob patterns, URLs such as
    s3://bucket/*.parquet), data sets of the hub (ORG/NAME or ORG/NAME:CONFIG), or a folder of texts
    that `generate` wrote. Default: --record, if it is such a folder."""
    output: Annotated[Path, MayChange]
    """Folder for the trained student and the report."""
    batch_size: int = Field(default=16, ge=1)
    """Sequences per batch, over all processes."""
    accumulation: int = Field(default=1, ge=1)
    """Batches per optimizer step."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps. Default: 1000, unless --epochs is given."""
    epochs: Annotated[float | None, MayChange] = Field(default=None, gt=0)
    """Passes over the data, instead of --steps."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""
    schedule: Schedule = "linear"
    """How the learning rate goes on after the warm-up: linear and cosine fall to zero, constant has
    no warm-up, wsd is constant and falls over the last fifth of the steps. [training]
    lr_scheduler_kwargs has more."""
    warmup_steps: float = Field(default=10, ge=0)
    """Steps of linear warm-up; below 1, a share of all steps."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Largest norm of the gradient: a larger one is scaled down to it. 0 leaves all as they are."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of the layers, AdamW for everything else."""
    ahead: Annotated[str, MayChange] = "30s"
    """How far to request targets ahead of training: for a time, using up to 512 MiB of memory
    ("30s,2048MiB": up to that), or a number of batches."""
    training: dict[str, Any] = Field(default={})
    """Table of any other fields of transformers' TrainingArguments, by their own names:
    --training.bf16 true, or bf16 = true below [training] in a file."""
    early_stopping: int = Field(default=0, ge=0)
    """Stop after so many measurements on the held-out text without a smaller loss, and go back to the
    student of the smallest. 0 never stops."""
    control: Annotated[bool, MayChange] = False
    """Also train a second student on labels alone: same seed, data order and steps."""
    shuffled_control: Annotated[bool, MayChange] = False
    """Also train a student on targets shuffled among the rows of each batch: same loss, same bytes,
    wrong places. It must be worse, or it was not the teacher's knowledge that helped."""
    eval_tasks: Annotated[list[str], MayChange] = Field(default=[])
    """Tasks of lm-eval to measure every student and the teacher on at the end: names such as sciq,
    or paths of task files (*.yaml) or of folders of them. Tasks that let a model generate are
    refused: a served teacher only scores."""
    eval_limit: Annotated[int | None, MayChange] = Field(default=None, ge=1)
    """Documents of each task to measure on; by default all."""
    log_every: Annotated[int, MayChange] = Field(default=10, ge=1)
    """Steps between updates of the progress bar, and between points in --tensorboard."""
    tensorboard: Annotated[bool, MayChange] = False
    """Write curves to output/tensorboard."""
    report_to: Annotated[list[Reporter], MayChange] = Field(default=[])
    """Where to send curves: wandb, trackio, tensorboard (the same as --tensorboard) or none."""
    checkpoint_every: Annotated[int, MayChange] = Field(default=0, ge=0)
    """Steps between two checkpoints in output/checkpoints; 0 writes none."""
    keep_checkpoints: Annotated[int, MayChange] = Field(default=2, ge=1)
    """How many of the newest checkpoints to keep."""
    start_over: Annotated[bool, MayChange] = False
    """Delete the checkpoints in the output folder and start at step 0, instead of resuming."""
    device: Annotated[str, MayChange] = "auto"
    """auto, cpu or cuda."""
    workers: Annotated[int, MayChange] = Field(default=0, ge=0)
    """Processes that train together with Ray Train, each on an equal share of every batch, with a
    stream of its own, and on GPUs with a GPU of its own. 0: this process, or those that torchrun or
    accelerate launch started."""
    ray_address: Annotated[str, MayChange] = ""
    """Ray cluster to run the workers on: HOST:PORT or auto. By default they run on this machine."""
    max_failures: Annotated[int, MayChange] = Field(default=3, ge=0)
    """How often to restart the workers after one of them failed: from the newest checkpoint, or at
    step 0 without --checkpoint-every."""

    dry_run: Annotated[bool, MayChange] = False
    """Read data and teacher, measure a few steps, print what the run would take, and stop. Nothing is
    written."""
    as_json: Annotated[Json, MayChange] = False
    """Print the results, or those of --dry-run, as JSON."""

    @field_validator("training")
    @classmethod
    def _check_training(cls, table: dict[str, Any]) -> dict[str, Any]:
        return trainer_fields.check_fields(table)

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: Any) -> Any:
        """Chooses what is not given by what is."""
        if not isinstance(given, dict):
            return given
        filled = dict(given)
        if not filled.get("data") and isinstance(filled.get("record"), str) and filled["record"]:
            filled["data"] = [filled["record"]]  # if it holds texts that a teacher wrote
        if filled.get("steps") is None and filled.get("epochs") is None:
            filled["steps"] = 1000
        if filled.get("schedule") == "constant":
            filled.setdefault("warmup_steps", 0)
        if "tensorboard" in (filled.get("report_to") or ()):
            filled["tensorboard"] = True
        return filled

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("--steps and --epochs both say how long to train: give one of them")
        if self.streaming and self.epochs is not None:
            raise ValueError("--streaming data has no epochs to be counted: give --steps")
        if self.schedule == "constant" and self.warmup_steps:
            raise ValueError(
                "--schedule constant has no warm-up: give --schedule constant_with_warmup, or leave "
                "--warmup-steps out"
            )
        return self

    @model_validator(mode="after")
    def _check_optimizer(self) -> Self:
        if self.optimizer == "muon" and "optim" in self.training:
            raise ValueError(
                "--optimizer muon and [training] optim both choose one: give one of them"
            )
        return self

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if not (self.teacher or self.record) and self.has_targets:
            raise ValueError("give --teacher HOST:PORT, --record FOLDER or both")
        if self.features and self.record:
            raise ValueError(
                "--record holds --targets alone: give --features or --record, not both"
            )
        return self

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        if self.has_targets:
            return self
        needing = ("features", "entropy_routing", "adaptive_label_weight", "kd_weight")
        needing += ("teacher_prefix", "teacher_column", "shuffled_control", "on_policy")
        for name in needing:
            if getattr(self, name):
                raise ValueError(
                    f"--targets none asks for nothing that {_flag(name)} could use: leave one of them out"
                )
        if self.control:
            raise ValueError(
                "--control is a student trained on labels alone, which --targets none trains already: "
                "leave it out, and compare with a run that has targets (student-trainer report A B)"
            )
        return self

    @model_validator(mode="after")
    def _check_own_texts(self) -> Self:
        if not self.on_policy:
            return self
        for name, why in (
            ("record", "a record has no targets of texts that the student has yet to write"),
            ("features", "states of layers come by a second pass over the data, not over new text"),
            ("shuffled_control", "ids that the student names for one row are not those of another"),
        ):
            if getattr(self, name):
                raise ValueError(
                    f"--on-policy and {_flag(name)} do not go together: {why}. Leave one of them out"
                )
        return self

    @model_validator(mode="after")
    def _check_tasks(self) -> Self:
        if self.eval_limit and not self.eval_tasks:
            raise ValueError("--eval-limit is for tasks: give --eval-tasks NAME too")
        return self

    @model_validator(mode="after")
    def _check_workers(self) -> Self:
        if self.workers and self.batch_size % self.workers:
            raise ValueError(
                f"--batch-size must be a multiple of --workers {self.workers}, which share each batch "
                f"equally; got {self.batch_size}"
            )
        if self.ray_address and not self.workers:
            raise ValueError("--ray-address is for several workers: give --workers N too")
        return self


def marked(*marks: type[Any]) -> set[str]:
    """Returns the settings of a training run that have one of the marks.

    How a service is reached and what is logged never decide a result: these settings count as
    MayChange.
    """
    names = {*ServiceOptions.model_fields} if MayChange in marks else set()
    return names | {
        name for name, info in TrainConfig.model_fields.items() if {*marks} & {*info.metadata}
    }


def find_deciding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a training run that decide its result, of all of them as JSON."""
    free = marked(MayChange)
    table = trainer_fields.find_deciding(
        settings.get("training", {}),
        by_measurements=bool(settings.get("early_stopping"))
        or settings.get("schedule") in ("reduce_lr_on_plateau", "greedy"),
    )
    found = {name: value for name, value in settings.items() if name not in free}
    return {**found, "training": table}


class ReportConfig(Settings):
    """Report whether the teacher helped: one page about finished runs, and the same numbers as
    JSON."""

    runs: list[Path] = Field(min_length=1, kw_only=False)
    """Folders that `train` wrote: one, several seeds of the same settings, or several settings."""
    output: Path | None = None
    """The page, FILE.html; the numbers go to FILE.json. Default: report.html in the folder of the
    run, or in the current one if there are several."""
    as_json: Json = False
    """Print the numbers as JSON."""
