"""How near `teacher-server plan --measure` comes to `python -m benchmarks.engine`.

Run `python -m benchmarks.plan`, or with `--quick`, `--threads N`, `--device cuda`. For models of three
shapes (d=512, 8 layers, V=32,000; Llama's, Gemma 2's and Mixtral's with eight experts) it measures in
turns, within one process,

- engine: the line "+ encoding" of benchmarks/engine.py on a CPU, "+ selection" on a GPU: the engine's
  launch and result, two packs in flight; on a CPU compacted and encoded in the same thread;
- plan: what a plan measures in ten seconds (`--seconds`) with all layers;
- fewer: what it measures with 2 and with 4 of the layers, as if no more fitted.

`--cpu-time` counts CPU time instead of the wall's, with one thread, for a machine that others use too.
"""

import argparse
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.engine import Work
from teacher_server.engine.engine import Engine
from teacher_server.engine.loading import load
from teacher_server.planning.gpus import Gpu
from teacher_server.planning.measure import Depths, Measurement, measure_engine
from teacher_server.planning.memory import MemoryOptions
from teacher_server.planning.this_machine import find_device, free_memory

SHAPES = ("Llama", "Gemma2", "Mixtral")
CONTEXT = 4096
LAYERS, FEWER = 8, (2, 4)


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description="A plan's measurement beside the benchmark's.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--lengths", default="512,2048")
    parser.add_argument("--targets", default="sampled:64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, help="of a turn of the engine")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement of a plan")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU time, with one thread")
    parser.add_argument("--quick", action="store_true", help="one shape, one length, one round")
    options = parser.parse_args()
    if options.tokens is None:
        options.tokens = 4096 if options.device == "cpu" else 262_144
    if options.cpu_time:
        options.threads = 1
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.quick:
        options.lengths, options.rounds, options.tokens = "512", 1, min(options.tokens, 2048)
        options.seconds = 3.0
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # as in the service
    logging.getLogger("teacher_server").setLevel(logging.ERROR)
    clock = time.process_time if options.cpu_time else time.perf_counter
    transformers.utils.logging.set_verbosity_error()
    gpu = find_device("cpu" if options.device == "cpu" else "", options.dtype)
    print(
        f"{gpu.name}, {options.dtype}, {torch.get_num_threads()} CPU threads, {options.targets}; "
        f"tokens/s of {'CPU time' if options.cpu_time else 'wall time'}, medians of "
        f"{options.rounds} rounds"
    )
    print(f"{'':10}{'length':>8}{'engine':>10}{'plan':>10}{'of it':>8}{'fewer':>10}{'of it':>8}")
    for shape in SHAPES[:1] if options.quick else SHAPES:
        for length in options.lengths.split(","):
            print_line(shape, int(length), gpu, clock, options)


def make_config(shape: str) -> Any:
    """Makes the config of a shape."""
    return getattr(transformers, f"{shape}Config")(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=CONTEXT,
    )


def print_line(
    shape: str, length: int, gpu: Gpu, clock: Callable[[], float], options: argparse.Namespace
) -> None:
    """Measures one shape and length in turns."""
    config = make_config(shape)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(Path(folder))
        model = load(folder, device=options.device, dtype=options.dtype, load_format="dummy")
    work = Work(Engine(model), (length, length), options)
    on_cpu = options.device == "cpu"
    stage = work.encode if on_cpu else work.select

    def measure(depths: Depths) -> Measurement:
        return measure_engine(
            config,
            gpu,
            MemoryOptions(
                dtype=options.dtype,
                quantization="none",
                pack_tokens=work.engine.pack_tokens,
                chunk_nbytes=128 << 20,
                pool_nbytes=0,
                device_nbytes=free_memory(options.device),
            ),
            device=options.device,
            targets=[options.targets],
            lengths=[length],
            seconds=options.seconds,
            depths=depths,
            clock=clock,
        )

    rates: dict[str, list[float]] = {"engine": [], "plan": [], "fewer": []}
    key = (options.targets, length)
    stage()  # what the first computation makes once is not measured
    for _ in range(options.rounds):
        rates["engine"].append(work.num_tokens / time_of(stage, clock, on_cpu))
        rates["plan"].append(1 / measure(Depths((LAYERS,), LAYERS)).seconds[key])
        rates["fewer"].append(1 / measure(Depths(FEWER, LAYERS)).seconds[key])
        rates["engine"].append(work.num_tokens / time_of(stage, clock, on_cpu))
    engine, plan, fewer = (statistics.median(times) for times in rates.values())
    print(
        f"{shape:10}{length:8,}{engine:10,.0f}{plan:10,.0f}{plan / engine:8.2f}{fewer:10,.0f}"
        f"{fewer / engine:8.2f}",
        flush=True,
    )


def time_of(stage: Callable[[], None], clock: Callable[[], float], on_cpu: bool) -> float:
    """Times a stage."""
    if not on_cpu:
        torch.cuda.synchronize()
    began = clock()
    with torch.inference_mode():
        stage()
    if not on_cpu:
        torch.cuda.synchronize()
    return clock() - began


if __name__ == "__main__":
    main()
