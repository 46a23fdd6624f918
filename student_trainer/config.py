"""Everything a trainer can set: as flags, or in a TOML file given as @config.toml."""

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from logitstream.command_line import AddressedService, Json, ServiceOptions, Settings
from logitstream.connection import check_address


def parse_count(text: str) -> int:
    """1000, 300M, 1.5B -> a number of tokens. Raises ValueError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kKmMbBtT]?)", text.strip())
    if match is None:
        raise ValueError(f"a number of tokens is written like 1000, 300M or 1.5B; got {text!r}")
    scale = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}[match.group(2).lower()]
    return round(float(match.group(1)) * scale)


class CorpusConfig(ServiceOptions):
    """What is asked of which teacher, about which text."""

    teacher: str = ""
    """HOST:PORT of the service, or a connection file (*.toml) of it; may be left out if --record has all that is needed."""
    record: str = ""
    """Folder, or URL such as s3://bucket/targets, of recorded targets: they are replayed. With
    --teacher, what is missing there is asked for, and recorded."""
    draws: int = Field(default=1, ge=1)
    """Of `sampled` targets, how many draws of a sequence to record before they are replayed."""
    student: Path
    """Hugging Face folder: config and tokenizer, and weights if it is not to start from random ones."""
    data: list[str] = Field(min_length=1)
    """Text or .jsonl files to train on: paths, folders, glob patterns."""
    held_out: list[str] = Field(default=[])
    """Files to measure on; by default every 20th sequence of data, which is then not trained on."""
    held_out_sequences: int = Field(default=256, ge=1)
    """At most this many held-out sequences are measured on."""
    sequence_length: int = Field(default=512, ge=2)
    """Tokens per sequence."""
    targets: str = "sampled"
    """What to ask the teacher for."""
    temperature: float = Field(default=1.0, gt=0)
    """Of the teacher's and the student's distributions in the distillation loss."""
    seed: int = Field(default=0, ge=0)
    """Of the student's random weights, the order of the data and the teacher's draws."""

    @field_validator("teacher")
    @classmethod
    def _is_an_address(cls, teacher: str) -> str:
        return check_address(teacher) if teacher else teacher


class RecordConfig(CorpusConfig):
    """Write down a served teacher's targets of a text, to train on them later without it.

    A file for `train` serves here too: what only `train` needs is passed over."""

    teacher: str = Field(min_length=1)
    """HOST:PORT of the service, or a connection file (*.toml) of it."""
    record: str = Field(min_length=1)
    """Folder, or URL such as s3://bucket/targets, to write to. What it has already is not asked for
    again."""
    draws: int = Field(default=1, ge=1)
    """Of `sampled` targets, how many draws to record of each sequence, for as many epochs."""
    student: Path
    """Hugging Face folder of the student that is to be trained: its tokenizer reads the text."""
    data: list[str] = Field(min_length=1)
    """Text or .jsonl files to record the targets of: paths, folders, glob patterns."""
    held_out: list[str] = Field(default=[])
    """Files that `train` will measure on, recorded too; by default it measures on a part of data."""
    held_out_sequences: int = Field(default=256, ge=1)
    """At most this many sequences of the held-out files are recorded."""
    temperature: float = Field(default=1.0, gt=0)
    """Of the teacher's distributions; `train` is to be given the same."""
    seed: int = Field(default=0, ge=0)
    """Of the teacher's draws. `train` replays what is recorded, whatever its own seed is."""
    as_json: Json = False
    """Print JSON."""


class TrainConfig(CorpusConfig):
    """Train a student on a served teacher's distributions."""

    output: Path
    """Folder for the trained student and the report."""
    batch_size: int = Field(default=16, ge=1)
    """Sequences per step."""
    steps: int = Field(default=1000, ge=1)
    """Optimizer steps."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """Peak; linear warm-up, then linear decay to zero."""
    warmup_steps: int = Field(default=10, ge=0)
    """Steps of warm-up."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of the layers, AdamW for everything else."""
    kd_weight: float = Field(default=1.0, ge=0)
    """Weight of the divergence from the teacher."""
    ce_weight: float = Field(default=0.0, ge=0)
    """Weight of the cross-entropy on the labels."""
    ahead: str = "30s"
    """Look-ahead: as many batches as are used up in this time, in at most 512 MiB ("30s,2048MiB": in
    at most that), or a number of batches."""
    control: bool = False
    """Also train a second student on labels alone: same seed, data order and steps."""
    shuffled_control: bool = False
    """Also train a student on targets that are shuffled among the rows of each batch: same loss, same
    bytes, wrong places. It must be worse, or it was not the teacher's knowledge that helped."""
    log_every: int = Field(default=10, ge=1)
    """Steps that the progress bar, and each point of --tensorboard, is about."""
    tensorboard: bool = False
    """Write curves to output/tensorboard."""
    checkpoint_every: int = Field(default=0, ge=0)
    """Steps between two checkpoints in output/checkpoints; 0 writes none."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """How many of the newest to keep."""
    start_over: bool = False
    """Delete the checkpoints in output and begin at step 0, instead of going on from the newest."""
    device: str = "auto"
    """auto, cpu or cuda."""
    workers: int = Field(default=0, ge=0)
    """Processes that train together with Ray Train, each on a share of every batch and with a stream
    of its own; on GPUs, one for each. 0: this process, without Ray."""
    ray_address: str = ""
    """HOST:PORT, or auto: the Ray cluster whose machines the workers run on. Without it, they run on
    this machine."""
    max_failures: int = Field(default=3, ge=0)
    """How often the workers are started again, from the newest checkpoint, when one of them failed."""

    @model_validator(mode="after")
    def _has_targets(self) -> Self:
        if not (self.teacher or self.record):
            raise ValueError("give --teacher HOST:PORT, --record FOLDER or both")
        return self

    @model_validator(mode="after")
    def _has_a_share_for_each(self) -> Self:
        if self.workers > self.batch_size:
            raise ValueError(
                f"--workers must be at most --batch-size {self.batch_size}, got {self.workers}: "
                "each trains at least one sequence of a batch"
            )
        if self.ray_address and not self.workers:
            raise ValueError("--ray-address is for several workers: give --workers N too")
        return self


class ReportConfig(Settings):
    """Did it help? One page of finished runs, and the same numbers as JSON."""

    runs: list[Path] = Field(min_length=1, kw_only=False)
    """Folders that `train` wrote: one, several seeds of the same, or several settings."""
    output: Path | None = None
    """The page, FILE.html; the numbers go to FILE.json. Default: report.html in the folder of the run,
    or in the current one if there are several."""
    as_json: Json = False
    """Print the numbers as JSON."""


class CheckConfig(AddressedService):
    """Is this teacher the right one, are its targets in the right place, and how fast is it?"""

    student: Path | None = None
    """Folder of the student: its tokenizer is compared with the teacher's."""
    tokens: str | None = None
    """Estimate hours, bytes and disk for this many tokens, such as 1B or 300M."""
    targets: str = "sampled"
    """What to ask for."""
    as_json: Json = False
    """Print JSON."""

    @field_validator("tokens")
    @classmethod
    def _is_a_count(cls, tokens: str | None) -> str | None:
        if tokens is not None:
            parse_count(tokens)
        return tokens
