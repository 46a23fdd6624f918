"""`teacher-server plan`: says what a teacher will need and deliver."""

import dataclasses
import json
import logging
import statistics
import sys
from typing import Any

from logit_codec import parse_targets
from teacher_server.commands.columns import format_columns
from teacher_server.environment import set_environment
from teacher_server.errors import ModelError, TeacherServerError
from teacher_server.plan_config import DEFAULT_GPU, PlanConfig
from teacher_server.planning.gpus import GIB, GPUS, THIS_MACHINE, Gpu
from teacher_server.planning.memory import LINEAR_NBYTES, MemoryOptions
from teacher_server.planning.plan import Inputs, Plan, Rate, Speed, make_plan

BUSY = 0.85
"""Share of the cores below which a measurement is said to be disturbed."""


def plan(config: PlanConfig) -> int:
    """Prints a plan; returns the exit code, 1 if the model does not fit."""
    set_environment()  # torch reads it at its first large allocation
    import transformers

    transformers.utils.logging.set_verbosity_error()
    try:
        made, speed, notes = make(config)
    except (TeacherServerError, ValueError) as error:
        print(f"teacher-server: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if config.as_json:
        print(json.dumps(to_json(made, speed, notes, config), indent=2))
    else:
        print("\n\n".join(format_plan(made, speed, notes, config)))
    return 0 if made.fits else 1


def make(config: PlanConfig) -> tuple[Plan, Speed, list[str]]:
    """Works out a plan, what speed it rests on, and notes. Raises ModelError and ValueError."""
    import torch

    from teacher_server.planning.answers import estimate_answers
    from teacher_server.planning.sizes import measure_sizes, read_config

    model_config = read_config(config.model, config.revision)
    sizes = measure_sizes(model_config)
    notes = []
    dtype = sizes.dtype if config.dtype == "auto" else config.dtype
    if config.dtype == "auto" and not sizes.is_dtype_known:
        notes.append("config.json names no dtype: float32 is assumed (--dtype)")
    if saved := getattr(model_config, "quantization_config", None):
        method = saved.get("quant_method") if isinstance(saved, dict) else type(saved).__name__
        notes.append(
            f"config.json says that its weights are packed ({method}): their memory is counted as "
            f"{dtype}, so that the model needs no more than this"
        )
    if config.quantization in LINEAR_NBYTES:
        notes.append(
            f"the speed of {config.quantization} is not measured: that of {dtype} is taken"
        )
        if sizes.num_experts:
            notes.append(f"{config.quantization} leaves experts in {dtype}")
    too_long = [length for length in config.length if length > sizes.max_sequence_tokens]
    if too_long:
        raise ModelError(
            f"--length {too_long[0]} is longer than the model's context of "
            f"{sizes.max_sequence_tokens} tokens"
        )
    if config.threads:
        torch.set_num_threads(config.threads)
    gpu = _find_gpu(config, dtype)
    memory_gib = config.gpu_memory or gpu.memory_gib
    memory = MemoryOptions(
        dtype=dtype,
        quantization=config.quantization,
        pack_tokens=config.batch_tokens or (4096 if gpu.name == THIS_MACHINE else 8192),
        chunk_nbytes=config.head_chunk_mib << 20,
        pool_nbytes=config.pool_mib << 20,
        device_nbytes=memory_gib * GIB,
    )
    if config.measure:
        speed = _measure(config, model_config, gpu, memory, notes)
    elif config.efficiency is not None:
        speed = Speed(gpu, config.efficiency, "given", {})
    else:
        source = f"assumed, not measured ({gpu.efficiency_source})"
        speed = Speed(gpu, gpu.efficiency, source, {})
    inputs = Inputs(
        gpus=config.gpus,
        ranks=config.tensor_parallel_size,
        lengths=config.length,
        answers=estimate_answers(config.targets, sizes.vocab_size, sizes.hidden_size),
        memory=memory,
        step_s=config.step_s,
        step_tokens=config.step_tokens,
        price_per_gpu_hour=config.price_per_gpu_hour,
    )
    return make_plan(sizes, inputs, speed), speed, notes


def _find_gpu(config: PlanConfig, dtype: str) -> Gpu:
    """Finds what to plan for. Raises ModelError if --measure cannot measure that."""
    from teacher_server.planning.this_machine import describe_cpu, find_device

    wanted = config.gpu or DEFAULT_GPU
    if not config.measure:
        return describe_cpu(dtype) if wanted == THIS_MACHINE else GPUS[wanted].for_dtype(dtype)
    return find_device(config.gpu, dtype).for_dtype(dtype)


def _measure(
    config: PlanConfig, model_config: Any, gpu: Gpu, memory: MemoryOptions, notes: list[str]
) -> Speed:
    """Measures the engine on the device at hand."""
    from teacher_server.planning.flops import count_flops
    from teacher_server.planning.measure import measure_engine
    from teacher_server.planning.sizes import measure_sizes
    from teacher_server.planning.this_machine import free_memory

    device = THIS_MACHINE if gpu.name == THIS_MACHINE else "cuda"
    room = free_memory(device) if config.measure_gib is None else config.measure_gib * GIB
    # That its weights are random and that it has no tokenizer is no news here.
    logging.getLogger("teacher_server.engine").setLevel(logging.ERROR)
    measured = measure_engine(
        model_config,
        gpu,
        dataclasses.replace(memory, device_nbytes=room, pool_nbytes=0),
        device=device,
        targets=config.targets,
        lengths=config.length,
    )
    if device == THIS_MACHINE and measured.share_of_cores < BUSY:
        notes.append(
            f"this machine was busy: the measurement had {100 * measured.share_of_cores:.0f} % of its "
            f"{measured.threads} cores, and idle ones deliver more"
        )
    sizes = measure_sizes(model_config)
    shares = [
        count_flops(sizes, length, with_head=parse_targets(targets).reads_logits).total
        / (seconds * gpu.tflops * 1e12)
        for (targets, length), seconds in measured.seconds.items()
    ]
    threads = f", {measured.threads} threads" if device == THIS_MACHINE else ""
    source = f"measured on this {gpu.name}{threads} with {measured.depths.describe()}"
    return Speed(gpu, statistics.mean(shares), source, measured.seconds)


def to_json(made: Plan, speed: Speed, notes: list[str], config: PlanConfig) -> dict[str, Any]:
    """Returns what --json prints."""
    from teacher_server.planning.sizes import PARTS

    sizes = made.sizes
    return {
        "model": config.model,
        "architecture": sizes.architecture,
        "weights": {
            "total": sizes.num_weights,
            "active": sizes.active_weights,
            **{part: sizes.count(part) for part in PARTS},
        },
        "gpu": dataclasses.asdict(speed.gpu),
        "gpus": config.gpus,
        "efficiency": speed.efficiency,
        "efficiency_source": speed.source,
        "memory": [{**dataclasses.asdict(each), "total": each.total} for each in made.memory],
        "fits": made.fits,
        "tensor_parallel_size": made.ranks,
        "replicas": made.replicas,
        "why_not": made.why_not,
        "flops_per_token": [
            {**dataclasses.asdict(each), "total": each.total} for each in made.flops
        ],
        "rates": [dataclasses.asdict(rate) for rate in made.rates],
        "notes": notes,
    }


def format_plan(made: Plan, speed: Speed, notes: list[str], config: PlanConfig) -> list[str]:
    """Writes the parts of a plan for people."""
    parts = [_format_model(made, config), _format_memory(made, speed, config)]
    parts.append(_format_flops(made))
    if made.rates:
        parts.append(_format_rates(made, speed, config))
    verdict = [made.why_not and f"does not fit: {made.why_not}"]
    if made.fits:
        gpus = "GPU" if made.ranks == 1 else "GPUs"
        used = made.replicas * made.ranks
        verdict = [
            f"fits: {made.replicas} replica{'s' * (made.replicas > 1)} of {made.ranks} {gpus} each"
            + (
                f"; {config.gpus - used} of {config.gpus} are left over"
                if used < config.gpus
                else ""
            )
        ]
    return [*parts, "\n".join([*verdict, *(f"note: {note}" for note in notes)])]


def _format_model(made: Plan, config: PlanConfig) -> str:
    sizes = made.sizes
    counts = [("body", sizes.count("body", "small"))]
    counts += [("experts", sizes.count("experts"))] * bool(sizes.num_experts)
    counts += [("embedding", sizes.count("embedding")), ("head", sizes.count("head"))]
    counts += [("outside of the text model", sizes.count("outside"))] * bool(sizes.count("outside"))
    text = ", ".join(f"{name} {number / 1e6:,.0f} M" for name, number in counts if number)
    head = ", the head is the embedding" if sizes.is_tied else ""
    experts = ""
    if sizes.num_experts:
        experts = (
            f"; {sizes.chosen_experts} of {sizes.num_experts} experts: "
            f"{sizes.active_weights / 1e9:,.2f} B weights of the body are active"
        )
    return (
        f"{config.model}: {sizes.architecture}, {sizes.num_weights / 1e9:,.2f} B weights "
        f"({text}{head}{experts})"
    )


def _format_memory(made: Plan, speed: Speed, config: PlanConfig) -> str:
    room = (config.gpu_memory or speed.gpu.memory_gib) * GIB
    header = ("GiB per GPU", "weights", "logits", "pack", "keys", "margin", "total", "fits")
    rows = []
    for each in made.memory:
        parts = (each.weights, each.logits, each.activations, each.keys, each.margin, each.total)
        fits = "no" if each.total > room else f"{100 * each.total / room:.0f} %"
        rows.append(
            (
                f"tensor parallel {each.ranks}",
                *(f"{part / GIB:,.2f}" for part in parts),
                "refused" if each.problem else fits,
            )
        )
    return (
        f"memory: {config.gpus} x {speed.gpu.name} of {room / GIB:,.1f} GiB\n"
        f"{format_columns(header, rows, num_left=1)}"
    )


def _format_flops(made: Plan) -> str:
    header = ("GFLOP per token", "body", "attention", "head", "total")
    rows = [
        (
            f"{each.length:,} tokens",
            *(f"{part / 1e9:,.3f}" for part in (each.body, each.attention, each.head, each.total)),
        )
        for each in made.flops
    ]
    return format_columns(header, rows, num_left=1)


def _format_rates(made: Plan, speed: Speed, config: PlanConfig) -> str:
    header = ["targets", "length", "tokens/s", "bytes/token", "MB/s out", "encode threads"]
    header += ["trainers"] * (config.step_s is not None) + ["h per 1e9"]
    header += ["price per 1e9"] * (config.price_per_gpu_hour is not None)
    text = format_columns(header, [_rate_cells(rate) for rate in made.rates], num_left=1)
    return (
        f"speed: {100 * speed.efficiency:.0f} % of {speed.gpu.tflops:,.4g} TFLOP/s per GPU: "
        f"{speed.source}\n{text}"
    )


def _rate_cells(rate: Rate) -> list[str]:
    cells = [rate.targets, f"{rate.length:,}", f"{rate.tokens_per_s:,.0f}"]
    cells += [f"{rate.nbytes_per_token:,.1f}", f"{rate.nbytes_per_s / 1e6:,.3g}"]
    cells += [f"{rate.encode_threads:.2f}"]
    cells += [] if rate.trainers is None else [f"{rate.trainers:,.1f}"]
    cells += [f"{rate.hours_per_billion:,.2f}"]
    return cells + ([] if rate.price_per_billion is None else [f"{rate.price_per_billion:,.2f}"])
