"""Puts a plan together: memory of each parallelism, speed, bytes, trainers and prices.

A plan states what it assumes. Everything beside the measured speed is arithmetic.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from teacher_server.planning.answers import AnswerSize
from teacher_server.planning.flops import (
    SELECTION_FLOPS,
    SELECTION_NBYTES,
    TokenFlops,
    count_flops,
)
from teacher_server.planning.gpus import GIB, Gpu
from teacher_server.planning.memory import (
    ITEM_NBYTES,
    MemoryOptions,
    RankMemory,
    estimate_memory,
)
from teacher_server.planning.sizes import RANKS, ModelSizes

BILLION = 1e9
HOUR_S = 3600


@dataclass(frozen=True, slots=True)
class Speed:
    """Says how a device computes: from what is assumed, or from what was measured."""

    gpu: Gpu
    efficiency: float
    source: str
    """Where the efficiency comes from."""
    measured: Mapping[tuple[str, int], float]
    """Seconds per token of one device by targets and length, where they were measured."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """Holds what an operator wants to know."""

    gpus: int
    ranks: int | None
    """GPUs per replica; None: as few as will do."""
    lengths: Sequence[int]
    answers: Sequence[AnswerSize]
    memory: MemoryOptions
    step_s: float | None
    step_tokens: int | None
    price_per_gpu_hour: float | None


@dataclass(frozen=True, slots=True)
class Rate:
    """Says what all GPUs deliver together for one kind of targets and one length."""

    targets: str
    length: int
    flops_per_token: float
    selection_s_per_token: float
    """On one GPU."""
    tokens_per_s: float
    """Of all replicas."""
    is_measured: bool
    nbytes_per_token: float
    nbytes_per_s: float
    encode_threads: float
    """Threads, as fast as one of this machine, that encode the answers of one replica."""
    trainers: float | None
    """How many trainers of the given step are fed."""
    hours_per_billion: float
    price_per_billion: float | None


@dataclass(frozen=True, slots=True)
class Plan:
    """Holds everything that is printed."""

    sizes: ModelSizes
    memory: tuple[RankMemory, ...]
    ranks: int
    """GPUs per replica; 0: it fits on none of the tried numbers."""
    replicas: int
    why_not: str
    """Why there is no replica; empty if there is one."""
    flops: tuple[TokenFlops, ...]
    rates: tuple[Rate, ...]

    @property
    def fits(self) -> bool:
        return self.replicas > 0


def make_plan(sizes: ModelSizes, inputs: Inputs, speed: Speed) -> Plan:
    """Works out a plan."""
    possible = [ranks for ranks in RANKS if ranks == 1 or speed.gpu.link_gb_s]
    memory = tuple(estimate_memory(sizes, ranks, inputs.memory) for ranks in possible)
    ranks, why_not = _choose_ranks(memory, inputs)
    replicas = inputs.gpus // ranks if ranks else 0
    return Plan(
        sizes=sizes,
        memory=memory,
        ranks=ranks,
        replicas=replicas,
        why_not=why_not,
        flops=tuple(count_flops(sizes, length) for length in inputs.lengths),
        rates=tuple(
            _rate(sizes, inputs, speed, answer, length, ranks, replicas)
            for answer in inputs.answers
            for length in inputs.lengths
        )
        if replicas
        else (),
    )


def _choose_ranks(memory: Sequence[RankMemory], inputs: Inputs) -> tuple[int, str]:
    """Returns how many GPUs a replica has, and else 0 and why."""
    room = inputs.memory.device_nbytes
    fitting = [each.ranks for each in memory if not each.problem and each.total <= room]
    wanted = fitting if inputs.ranks is None else [n for n in fitting if n == inputs.ranks]
    if not wanted:
        tried = [each for each in memory if inputs.ranks in (None, each.ranks)]
        possible = [each for each in tried if not each.problem]
        if not possible:
            return 0, tried[-1].problem
        best = possible[-1]
        problems = [each.problem for each in tried if each.problem]
        return 0, (
            f"{best.total / GIB:,.1f} GiB per GPU at tensor parallel {best.ranks}, and one has "
            f"{room / GIB:,.1f}{'; ' + problems[0] if problems else ''}"
        )
    if wanted[0] > inputs.gpus:
        return 0, f"it needs {wanted[0]} GPUs per replica, and there are {inputs.gpus}"
    return wanted[0], ""


def _rate(
    sizes: ModelSizes,
    inputs: Inputs,
    speed: Speed,
    answer: AnswerSize,
    length: int,
    ranks: int,
    replicas: int,
) -> Rate:
    flops = count_flops(sizes, length, with_head=answer.reads_logits)
    selection_s = selection_seconds(sizes, speed) if answer.reads_logits else 0.0
    measured_s = speed.measured.get((answer.targets, length))
    if measured_s is None:
        compute_s = flops.total / (speed.gpu.tflops * 1e12 * speed.efficiency) + selection_s
    else:
        compute_s = measured_s
    per_token_s = max(compute_s / ranks, _reading_seconds(sizes, inputs, speed, ranks))
    per_token_s += _link_seconds(sizes, inputs, speed, ranks)
    rate = replicas / per_token_s
    hours = BILLION / rate / HOUR_S
    price = inputs.price_per_gpu_hour
    trainers = None
    if inputs.step_s and inputs.step_tokens:
        trainers = rate * inputs.step_s / inputs.step_tokens
    return Rate(
        targets=answer.targets,
        length=length,
        flops_per_token=flops.total,
        selection_s_per_token=selection_s,
        tokens_per_s=rate,
        is_measured=measured_s is not None,
        nbytes_per_token=answer.nbytes_per_token,
        nbytes_per_s=rate * answer.nbytes_per_token,
        encode_threads=rate / replicas / answer.encode_tokens_per_s,
        trainers=trainers,
        hours_per_billion=hours,
        price_per_billion=None if price is None else hours * price * replicas * ranks,
    )


def selection_seconds(sizes: ModelSizes, speed: Speed) -> float:
    """Estimates the time of selecting from the logits of one token."""
    if speed.gpu.bandwidth_gb_s:
        return sizes.vocab_size * SELECTION_NBYTES / (speed.gpu.bandwidth_gb_s * 1e9)
    return sizes.vocab_size * SELECTION_FLOPS / (speed.gpu.tflops * 1e12 * speed.efficiency)


def _reading_seconds(sizes: ModelSizes, inputs: Inputs, speed: Speed, ranks: int) -> float:
    """Estimates the time, per token, in which a rank reads its weights once for each pack."""
    if not speed.gpu.bandwidth_gb_s:
        return 0.0
    nbytes = estimate_memory(sizes, ranks, inputs.memory).weights
    return nbytes / (speed.gpu.bandwidth_gb_s * 1e9) / inputs.memory.pack_tokens


def _link_seconds(sizes: ModelSizes, inputs: Inputs, speed: Speed, ranks: int) -> float:
    """Estimates the time of the sums over ranks: two in each layer, of D numbers per token.

    Each rank of a ring sends and receives 2 (n - 1) / n times what is summed up.
    """
    if ranks == 1 or not speed.gpu.link_gb_s:
        return 0.0
    item = ITEM_NBYTES[inputs.memory.dtype]
    summed = 2 * len(sizes.layers) * sizes.hidden_size * item
    return summed * 2 * (ranks - 1) / ranks / (speed.gpu.link_gb_s * 1e9)
