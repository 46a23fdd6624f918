"""What one GPU delivers: `python -m benchmarks.gpu`, at most eight minutes on an H200.

Teachers of two shapes, Llama 3.1 8B and Gemma 2 9B, with random weights (`--load-format dummy`), in
bfloat16, and sequences of 512 to 8,192 tokens. It writes docs/gpu.json and prints tables of

- bare compiled: the engine's packs through the base model, its layers compiled with torch.compile, and
  the products of the vocabulary head; nothing is selected. What a service can at most deliver;
- bare: the same without compiling;
- engine: launch and result of the engine, two packs in flight: with the selection;
- service: `teacher-server serve` and client processes that discard what they get;
- share of peak: the arithmetic of bare compiled and of the service (planning/flops.py) by the GPU's
  peak of its data sheet, and by that of one large product, which is measured;
- encode threads: the service's tokens per second by those that one thread of this machine compacts
  and encodes;
- exactness: whether a sequence has the same bytes alone and in any company (engine/probe.py);
- the head alone, of 128,256 and of 262,144 rows: its products, and the engine's products and selection;
- loading: random weights, and a checkpoint of 5 GB from this machine's disk, hashed for the first time,
  and once its hash is known.

What does not fit into `--budget-s` or fails is named under `not measured`, with the reason; then the exit
code is 1. `--device cpu --tiny` runs all of it on tiny shapes, to see whether the code runs; it writes a
file only with --output. `--show FILE` prints the tables of a file.
"""

import argparse
import contextlib
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine import Work, measure
from benchmarks.gpu_tables import print_tables
from benchmarks.service import Clients, make_sequences, start_service, stop_service
from benchmarks.shapes import SHAPES, make_config, save_shape
from logit_codec import encode_parts, ids_digest, parse_targets, uniforms
from logitstream.logs import first_line
from teacher_server.engine.batch import RowRequest
from teacher_server.engine.engine import Engine
from teacher_server.engine.head import States, VocabularyHead
from teacher_server.engine.layers import find_layers
from teacher_server.engine.loading import load, prepare
from teacher_server.engine.probe import is_exact
from teacher_server.planning.flops import count_flops
from teacher_server.planning.gpus import find_gpu
from teacher_server.planning.measure import with_layers
from teacher_server.planning.sizes import measure_sizes

GIB = 1 << 30
OUTPUT = Path(__file__).parents[1] / "docs" / "gpu.json"
PART_NBYTES = 1 << 20
MAX_GRAPHS = 64
"""More would mean that compiled layers are compiled anew all the time."""
LEAST_S = 20.0
"""What one length of one shape needs; with less left it is not begun."""
START_S = 40.0
"""What a service and its clients need before anything is measured; a guess."""
PACKAGES = ("torch", "transformers", "safetensors", "accelerate", "numpy", "grpcio", "logitstream")


@dataclass(frozen=True)
class Scale:
    """Says how large everything is."""

    shapes: tuple[str, ...]
    lengths: tuple[int, ...]
    tokens: int
    """Of a turn, without a service."""
    service_tokens: int
    """Of a turn of the service: so many that filling and emptying it hardly count."""
    rounds: int
    product: int
    """Rows and columns of the product that the peak is measured with."""
    vocabularies: tuple[int, ...]
    hidden_size: int
    head_rows: int
    checkpoint_layers: int
    clients: int
    backend: str
    """Of torch.compile."""


FULL = Scale(
    shapes=("llama-3.1-8b", "gemma-2-9b"),
    lengths=(512, 2048, 4096, 8192),
    tokens=8 * 8192,
    service_tokens=24 * 8192,
    rounds=2,
    product=8192,
    vocabularies=(128_256, 262_144),
    hidden_size=4096,
    head_rows=8192,
    checkpoint_layers=8,
    clients=4,
    backend="inductor",
)
TINY = Scale(
    shapes=("tiny-llama", "tiny-gemma-2"),
    lengths=(32, 64),
    tokens=256,
    service_tokens=512,
    rounds=1,
    product=256,
    vocabularies=(1003, 2001),
    hidden_size=64,
    head_rows=64,
    checkpoint_layers=1,
    clients=1,
    backend="eager",  # it is captured as for a GPU, but nothing is generated
)


@dataclass
class Run:
    """Holds the settings and collects what is measured."""

    scale: Scale
    device: torch.device
    targets: str
    budget_s: float
    report: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)
    has_failed: bool = False

    @property
    def left_s(self) -> float:
        return self.budget_s - (time.perf_counter() - self.began)

    def section(self, name: str, body: Callable[[], None], *, least_s: float = 0.0) -> None:
        """Runs a part of the benchmark; the others go on if it fails or there is no time for it."""
        if self.left_s < least_s:
            self.leave_out(name, f"{self.left_s:.0f} s were left of {self.budget_s:.0f} s")
            return
        print(f"[{self.budget_s - self.left_s:4.0f} s] {name}", file=sys.stderr, flush=True)
        try:
            body()
        except Exception as error:  # a device can fail in any way
            traceback.print_exc()
            self.leave_out(name, f"{type(error).__name__}: {first_line(error)}")
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def leave_out(self, name: str, why: str) -> None:
        """Notes what was not measured."""
        self.has_failed = True
        self.report["not_measured"][name] = why
        print(f"not measured: {name}: {why}", file=sys.stderr, flush=True)


def main() -> int:
    """Measures, writes the report and prints the tables; returns the exit code."""
    options = parse_options()
    if options.show:
        print_tables(json.loads(options.show.read_text()))
        return 0
    if options.device == "cpu" and not options.tiny:
        print("a CPU is for --tiny only: see `python -m benchmarks.engine`", file=sys.stderr)
        return 2
    if options.device != "cpu" and not torch.cuda.is_available():
        print(
            "this measures a GPU, and torch finds no CUDA device here; to see whether it runs: "
            "python -m benchmarks.gpu --device cpu --tiny",
            file=sys.stderr,
        )
        return 1
    device = torch.device(options.device)
    scale = TINY if options.tiny else FULL
    if options.shapes:
        scale = replace(scale, shapes=tuple(options.shapes))
    if options.lengths:
        scale = replace(scale, lengths=tuple(options.lengths))
    run = Run(scale, device, options.targets, options.budget_s)
    run.report |= describe_machine(device, options)
    run.section("peak", lambda: measure_peak(run))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LOGITSTREAM_CACHE"] = folder  # no hash is known from before
        # What is quick comes first: if time runs out, it does so among the lengths.
        run.section("head", lambda: measure_heads(run), least_s=LEAST_S)
        run.section("loading", lambda: measure_loading(run, Path(folder)), least_s=LEAST_S)
        for shape in run.scale.shapes:
            run.section(
                shape,
                lambda shape=shape: measure_shape(run, shape, Path(folder)),
                least_s=START_S + LEAST_S,
            )
    run.report["seconds"] = round(time.perf_counter() - run.began, 1)
    output = options.output or (None if options.tiny else OUTPUT)
    if output is not None:
        output.write_text(json.dumps(run.report, indent=1) + "\n")
    if options.json:
        print(json.dumps(run.report))
    else:
        print_tables(run.report)
    return 1 if run.has_failed else 0


def parse_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="What one GPU delivers.")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu with --tiny")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the code")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="instead of both")
    parser.add_argument("--lengths", nargs="+", type=int, help="of sequences, in tokens")
    parser.add_argument("--targets", default="top_k:64", help="what is kept of each row")
    parser.add_argument("--budget-s", type=float, default=480.0, help="seconds for everything")
    parser.add_argument("--output", type=Path, help="JSON file; docs/gpu.json without --tiny")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--show", type=Path, help="print the tables of a JSON file")
    return parser.parse_args()


def describe_machine(device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Returns where and how this is measured."""
    found: dict[str, Any] = {"name": platform.processor() or platform.machine()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found = {"name": properties.name, "memory_gib": properties.total_memory / GIB}
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return {
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "device": found,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "targets": options.targets,
        "dtype": "bfloat16",
        "peak": {},
        "shapes": {},
        "head": [],
        "loading": {},
        "not_measured": {},
    }


def measure_peak(run: Run) -> None:
    """Measures one large product, and looks the GPU up."""
    size = run.scale.product
    a, b = (torch.randn(size, size, device=run.device, dtype=torch.bfloat16) for _ in range(2))

    def multiply() -> None:
        torch.mm(a, b)

    (times,) = measure({"product": multiply}, 5, run.device).values()
    gpu = find_gpu(run.report["device"]["name"]) if run.device.type == "cuda" else None
    run.report["peak"] = {
        "product_tflops": 2 * size**3 / statistics.median(times) / 1e12,
        "data_sheet_tflops": None if gpu is None else gpu.tflops,
    }


@contextlib.contextmanager
def starting_service(place: Path, *flags: str) -> Iterator[Future[tuple[subprocess.Popen, str]]]:
    """Starts a service while the body goes on, and stops it in the end."""
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(start_service, place, *flags)
        try:
            yield starting
        finally:
            if starting.exception() is None:  # which waits for it
                stop_service(starting.result()[0])


def measure_shape(run: Run, shape: str, folder: Path) -> None:
    """Measures a teacher of one shape, at all lengths."""
    place = save_shape(shape, folder)
    flags = ["--load-format", "dummy", "--device", str(run.device), "--generation.pool-mib", "0"]
    with starting_service(place, *flags) as starting:
        began = time.perf_counter()
        model = load(str(place), device=str(run.device), load_format="dummy")
        found: dict[str, Any] = {"load_s": time.perf_counter() - began}
        weights = {weight.data_ptr(): weight for weight in model.causal_lm.parameters()}
        found["weights"] = sum(weight.numel() for weight in weights.values())
        found["gib"] = sum(weight.nbytes for weight in weights.values()) / GIB
        found |= {"is_packed": model.is_packed, "exact": is_exact(Engine(model)), "lengths": {}}
        run.report["shapes"][shape] = found
        # On a CPU products in tiles, which make bytes exact there, cannot be compiled.
        engine = Engine(model, exact=run.device.type == "cuda")
        layers = CompiledLayers(engine, run.scale.backend)
        _, address = starting.result()
        with Clients(address, targets=run.targets, count=run.scale.clients) as clients:
            for length in run.scale.lengths:
                run.section(
                    f"{shape}, {length:,} tokens",
                    lambda length=length: measure_length(
                        run, shape, engine, layers, clients, length
                    ),
                    least_s=LEAST_S,
                )
    torch._dynamo.reset()  # it holds what it has compiled, and with it the weights


class CompiledLayers:
    """The layers of a teacher, which can be compiled for a while. They share one graph or two."""

    def __init__(self, engine: Engine, backend: str) -> None:
        layers = find_layers(engine.model.causal_lm)
        if layers is None:
            raise ValueError(f"the layers of {engine.model.architecture} were not found")
        self._layers = list(layers)
        # Else layers beyond a limit of 8 graphs would run as they are, and nobody would know.
        torch._dynamo.config.recompile_limit = MAX_GRAPHS
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        self._compiled = [
            torch.compile(layer._call_impl, dynamic=False, backend=backend)
            for layer in self._layers
        ]

    @contextlib.contextmanager
    def compiled(self) -> Iterator[None]:
        """Makes a context in which the model runs compiled layers."""
        for layer, implementation in zip(self._layers, self._compiled, strict=True):
            layer._compiled_call_impl = implementation
        try:
            yield
        finally:
            for layer in self._layers:
                layer._compiled_call_impl = None


def measure_length(
    run: Run, shape: str, engine: Engine, layers: CompiledLayers, clients: Clients, length: int
) -> None:
    """Measures a teacher with sequences of one length, the stages in turns."""
    scale = run.scale
    lengths = (length, length)
    settings = argparse.Namespace(tokens=scale.tokens, targets=run.targets)
    work = Work(engine, lengths, settings)
    vocabulary = engine.model.effective_vocab_size
    served = make_sequences(lengths, scale.service_tokens, vocabulary=vocabulary)

    def bare_compiled() -> None:
        with layers.compiled():
            work.head()

    stages: dict[str, Callable[[], None]] = {
        "bare_compiled": bare_compiled,
        "bare": work.head,
        "engine": work.select,
        "service": lambda: clients.stream(served),
    }
    began = time.perf_counter()
    try:
        with torch.inference_mode():
            bare_compiled()
    except Exception as error:  # what cannot be compiled is served all the same
        run.leave_out(f"{shape}, {length:,} tokens, compiled", first_line(error))
        del stages["bare_compiled"]
    first_s = time.perf_counter() - began
    seconds = measure(stages, scale.rounds, run.device)
    tokens = dict.fromkeys(stages, work.num_tokens) | {"service": sum(map(len, served))}
    rates = {name: tokens[name] / statistics.median(times) for name, times in seconds.items()}
    flops = count_flops(measure_sizes(make_config(shape)), length).total
    per_thread = encode_rate(work, run)
    run.report["shapes"][shape]["lengths"][str(length)] = {
        "first_bare_compiled_s": first_s,
        "tokens_per_s": rates,
        "service_of_bare_compiled": (
            rates["service"] / rates["bare_compiled"] if "bare_compiled" in rates else None
        ),
        "flops_per_token": flops,
        "share_of_peak": {name: share_of_peak(run, rates[name] * flops) for name in rates},
        "encoded_tokens_per_s_and_thread": per_thread,
        "encode_threads": math.ceil(rates["service"] / per_thread),
    }


def share_of_peak(run: Run, flops_per_s: float) -> dict[str, float | None]:
    """Returns the share of each peak that is known."""
    return {
        name.removesuffix("_tflops"): None if tflops is None else flops_per_s / (tflops * 1e12)
        for name, tflops in run.report["peak"].items()
    }


def encode_rate(work: Work, run: Run) -> float:
    """Returns the tokens per second that one thread compacts and encodes."""
    spec = parse_targets(run.targets)
    with torch.inference_mode():
        rows = list(work.scored())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = []
        for _ in range(3):
            began = time.perf_counter()
            for one in rows:
                for _part in encode_parts(one.compact(), spec, max_nbytes=PART_NBYTES):
                    pass
            times.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return work.num_tokens / statistics.median(times)


def measure_heads(run: Run) -> None:
    """Measures the head alone: its products, and the engine's products and selection."""
    for vocabulary in run.scale.vocabularies:
        measure_head(run, vocabulary)


def measure_head(run: Run, vocabulary: int) -> None:
    """Measures one size of vocabulary, on a model whose body does nothing that is measured."""
    import transformers

    rows, size = run.scale.head_rows, run.scale.hidden_size
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=size,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=max(1, size // 128),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(run.device):
        causal_lm = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = prepare(causal_lm, weights_fingerprint="")
    device = Engine(model).device
    head = VocabularyHead(model, device)
    hidden_TD = 20 * torch.randn(rows + 1, size, device=run.device, dtype=torch.bfloat16)
    weight_DV = model.causal_lm.get_output_embeddings().weight.t()
    ids = torch.zeros(rows + 1, dtype=torch.int64)

    def multiply() -> None:
        for chunk in hidden_TD[:rows].split(head.chunk_rows):
            torch.mm(chunk, weight_DV)

    def select(targets: str) -> None:
        spec = parse_targets(targets)
        positions = torch.arange(rows)
        drawn = uniforms(0, 0, ids_digest(ids), positions) if spec.needs_uniforms else None
        request = RowRequest(ids, positions, spec, uniforms=drawn)
        with device.queue():
            head.download(head.select(States(hidden_TD), [request], [0], [0]))

    stages: dict[str, Callable[[], None]] = {"products": multiply}
    for targets in ("top_k:64", "sampled:64"):
        stages[targets] = lambda targets=targets: select(targets)
    seconds = measure(stages, 3, run.device)
    us = {name: 1e6 * statistics.median(times) / rows for name, times in seconds.items()}
    run.report["head"].append(
        {
            "vocabulary": vocabulary,
            "hidden_size": size,
            "rows": rows,
            "us_per_row": us,
            "products_tflops": 2 * size * vocabulary / us["products"] / 1e6,
        }
    )


def measure_loading(run: Run, folder: Path) -> None:
    """Measures a checkpoint of some layers of the first shape."""
    shape = run.scale.shapes[0]
    config = with_layers(make_config(shape), run.scale.checkpoint_layers)
    config.save_pretrained(folder / "checkpoint-config")
    model = load(
        str(folder / "checkpoint-config"), device=str(run.device), load_format="dummy"
    ).causal_lm
    nbytes = sum({w.data_ptr(): w.nbytes for w in model.parameters()}.values())
    place = folder / "checkpoint"
    model.save_pretrained(place, max_shard_size="1GB")
    del model
    seconds = {}
    for name in ("hashed", "hash_known"):
        began = time.perf_counter()
        load(str(place), device=str(run.device))
        seconds[name] = time.perf_counter() - began
        gc.collect()
    run.report["loading"] = {
        "gib": nbytes / GIB,
        "gib_per_s": {name: nbytes / GIB / took for name, took in seconds.items()},
        "seconds": seconds,
    }


if __name__ == "__main__":
    sys.exit(main())
