"""Declares the options of `teacher-server plan`."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from logitstream.options import Json, LogOptions, Settings
from teacher_server.config import Quantization
from teacher_server.planning.gpus import NAMES, THIS_MACHINE

DEFAULT_GPU = "h100"


class _Planned(Settings):
    model: str = Field(kw_only=False)
    """Folder with a config.json, or a hub id; the weights are not needed."""


class PlanConfig(LogOptions, _Planned):  # pydantic puts fields of the last base first
    """Say what a teacher will need and deliver, from its config.json: no weights, no GPU.

    Exit code 1: it does not fit. What a plan assumes it says; --measure replaces the largest
    assumption by a measurement on this machine."""

    revision: str | None = None
    """Revision of a hub id."""
    gpus: int = Field(default=1, ge=1)
    """Number of GPUs to plan for."""
    gpu: str = ""
    """Kind of GPU, h100 by default; cpu is this machine. With --measure the device at hand."""
    gpu_memory: float | None = Field(default=None, gt=0.0)
    """Memory of one, in GiB, if it is not what that kind usually has."""
    tensor_parallel_size: int | None = None
    """GPUs per replica (1, 2, 4 or 8); by default as few as the model fits on."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights and the forward pass; auto is the type that config.json names."""
    quantization: Quantization = "none"
    """As for serve. It changes the memory of a plan, and not its speed."""
    length: tuple[Annotated[int, Field(ge=2)], ...] = (2048,)
    """Lengths of sequences, in tokens."""
    targets: tuple[str, ...] = ("sampled:64", "top_k:64", "hidden:int8")
    """Kinds of targets."""
    step_s: float | None = Field(default=None, gt=0.0)
    """Seconds of a trainer's step; with --step-tokens, to say how many trainers can be fed."""
    step_tokens: int | None = Field(default=None, ge=1)
    """Tokens of a trainer's step."""
    price_per_gpu_hour: float | None = Field(default=None, ge=0.0)
    """Price of one GPU for an hour, in any currency."""
    efficiency: float | None = Field(default=None, gt=0.0, le=1.0)
    """Share of the GPU's peak that is assumed; by default that of published training runs."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens of a batch (serve's --batch.max-tokens); by default 4,096 on a CPU and 8,192 on a GPU."""
    head_chunk_mib: int = Field(default=128, ge=1)
    """Size of one chunk of logits, as for serve, in MiB."""
    pool_mib: int = Field(default=1024, ge=0)
    """Memory for texts that are being written (serve's --generation.pool-mib), in MiB."""
    measure: bool = False
    """Measure for ten seconds on the device at hand, with random weights, instead of assuming an
    efficiency. A model that does not fit there is measured with fewer layers, twice."""
    measure_gib: float | None = Field(default=None, gt=0.0)
    """Memory that the measurement may use, in GiB; by default what is free."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of a measurement, as for serve."""
    as_json: Json = False
    """Print JSON."""

    @field_validator("gpu")
    @classmethod
    def _check_gpu(cls, gpu: str) -> str:
        if gpu and gpu.lower() not in NAMES:
            raise ValueError(
                f"unknown GPU {gpu!r}; known are {', '.join(NAMES)} (cpu is this machine)"
            )
        return gpu.lower()

    @field_validator("tensor_parallel_size")
    @classmethod
    def _check_ranks(cls, ranks: int | None) -> int | None:
        if ranks not in (None, 1, 2, 4, 8):
            raise ValueError(f"must be 1, 2, 4 or 8, got {ranks}")
        return ranks

    @field_validator("targets")
    @classmethod
    def _check_targets(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        from logit_codec import parse_targets  # loads torch, which other commands need not wait for

        for each in targets:
            parse_targets(each)
        return targets

    @model_validator(mode="after")
    def _check(self) -> "PlanConfig":
        if (self.step_s is None) != (self.step_tokens is None):
            raise ValueError("a trainer's step needs both: --step-s and --step-tokens")
        if not self.length or not self.targets:
            raise ValueError("give at least one --length and one of --targets")
        if self.measure and self.efficiency is not None:
            raise ValueError("--measure or --efficiency, not both")
        if self.measure and self.quantization != "none":
            raise ValueError(
                f"--measure makes weights of --dtype, not with --quantization {self.quantization}"
            )
        if self.gpu == THIS_MACHINE and self.gpus > 1:
            raise ValueError(f"--gpu {THIS_MACHINE} is this machine, of which there is one")
        return self
