"""What the vocabulary head and the selection take in memory and time, beside plain PyTorch.

Run `python -m benchmarks.head`, or with `--device cuda`, `--quick`. Hidden states of random numbers
(d=512) go through a head of random weights, and targets are kept of every row:

- full logits: all logits at once in float32, then log_softmax and torch.topk, or torch.multinomial
  of the probabilities where targets are drawn;
- in chunks: the same for as many rows at a time as the engine's head takes;
- the engine: `VocabularyHead`, compacted to targets.

`--every 10` instead: what asking for every tenth row saves of the engine's time for all of them, and what
states without a logprob take, which need no logits (`hidden:int8,realized=0`).

Every line is a process of its own, and the three of a table take turns. `MiB` is the peak of memory
beyond what the process had before, `chunks` the same in chunks of logits of the model's dtype;
`us/row` is the median of the turns, and `of full` the median of the ratios of time within a turn.
"""

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

import torch
from torch import Tensor

from logit_codec import SampledSpec, TargetSpec, TopKSpec, parse_targets
from teacher_server.engine.batch import RowRequest
from teacher_server.engine.device import Device, open_device
from teacher_server.engine.head import States, VocabularyHead
from teacher_server.engine.loading import DTYPES, prepare
from teacher_server.engine.model import TeacherModel

VOCABULARIES = (32_000, 128_256, 262_144)
TARGETS = ("sampled:64", "top_k:64", "top_k:min_p=1/256,max_k=128")
HIDDEN = 512
METHODS = ("full logits", "in chunks", "the engine")
SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Setting:
    """What all processes of a table have in common."""

    vocabulary: int
    targets: str
    rows: int
    device: str
    dtype: str
    threads: int | None


def main() -> None:
    """Measures and prints the tables."""
    parser = argparse.ArgumentParser(description="Memory and time of the head and the selection.")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, help="by default float32, on a GPU bfloat16")
    parser.add_argument("--rows", type=int, default=2048, help="of hidden states")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each line")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--quick", action="store_true", help="fewer rows, one vocabulary")
    parser.add_argument("--every", type=int, help="what asking for every n-th row saves")
    options = parser.parse_args()
    dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    rows = min(options.rows, 512) if options.quick else options.rows
    for vocabulary in VOCABULARIES[1:2] if options.quick else VOCABULARIES:
        for targets in TARGETS:
            setting = Setting(vocabulary, targets, rows, options.device, dtype, options.threads)
            rounds = 2 if options.quick else options.rounds
            if options.every is None:
                print_table(setting, rounds)
            elif targets == TARGETS[0]:  # which draws
                print_savings(setting, rounds, options.every)


def print_table(setting: Setting, rounds: int) -> None:
    """Measures the three methods on one vocabulary and one kind of targets."""
    pipes = []
    processes = []
    for method in METHODS:
        ours, theirs = SPAWN.Pipe()
        process = SPAWN.Process(target=work, args=(theirs, method, setting), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)
    chunks = [pipe.recv() for pipe in pipes]
    peaks = [ask(pipe, "memory") for pipe in pipes]
    seconds = [[ask(pipe, "time") for pipe in pipes] for _ in range(rounds)]
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(None)
        process.join(30)
    print(
        f"\nV = {setting.vocabulary:,}, {setting.targets}, {setting.rows:,} rows, {setting.dtype}, "
        f"{setting.device}; a chunk is {chunks[0] / 2**20:,.0f} MiB"
    )
    print(f"{'':12}  {'MiB':>8}  {'chunks':>7}  {'us/row':>8}  {'of full':>8}")
    for number, method in enumerate(METHODS):
        times = [turn[number] for turn in seconds]
        of_full = statistics.median(turn[number] / turn[0] for turn in seconds)
        print(
            f"{method:12}  {peaks[number] / 2**20:8,.0f}  {peaks[number] / chunks[number]:7.2f}  "
            f"{1e6 * statistics.median(times) / setting.rows:8,.0f}  {of_full:8.1%}",
            flush=True,
        )


def open_head(setting: Setting) -> tuple[TeacherModel, Device, VocabularyHead]:
    """Makes a teacher with random weights, the queue of its device, and its head."""
    if setting.threads:
        torch.set_num_threads(setting.threads)
    device = torch.device(setting.device)
    model = make_model(setting, device)
    queue = open_device(device)
    head = VocabularyHead(model, queue)
    return model, queue, head


def print_savings(setting: Setting, rounds: int, every: int) -> None:
    """Measures the engine on all rows, on every n-th, and on states that need no logits."""
    model, queue, head = open_head(setting)
    hidden_TD = 20 * torch.randn(setting.rows + 1, HIDDEN).to(model.device, model.dtype)
    ids = torch.zeros(setting.rows + 1, dtype=torch.int64)
    spec, states = parse_targets(setting.targets), parse_targets("hidden:int8,realized=0")
    all_rows = torch.arange(setting.rows)
    drawn = torch.rand(setting.rows, dtype=torch.float64)
    requests = [
        RowRequest(ids, all_rows, spec, uniforms=drawn),
        RowRequest(ids, all_rows[::every], spec, uniforms=drawn[::every]),
        RowRequest(ids, all_rows, model.complete(states)),
    ]
    with torch.inference_mode():
        for request in requests:
            select(head, queue, hidden_TD, request)
        turns = [
            [time_of(lambda r=r: select(head, queue, hidden_TD, r), model.device) for r in requests]
            for _ in range(rounds)
        ]
    names = (f"{setting.targets}, all rows", f"{setting.targets}, every {every}th", str(states))
    print(f"\nV = {setting.vocabulary:,}, {setting.rows:,} rows, {setting.dtype}, {setting.device}")
    for number, name in enumerate(names):
        saved = statistics.median(1 - turn[number] / turn[0] for turn in turns)
        seconds = statistics.median(turn[number] for turn in turns)
        print(f"{name:28}  {1e3 * seconds:10,.1f} ms  saved {saved:6.1%}", flush=True)


def ask(pipe: Pipe, what: str) -> float:
    """The answer of one process."""
    pipe.send(what)
    return pipe.recv()


def work(pipe: Pipe, method: str, setting: Setting) -> None:
    """Body of a process: measures one method whenever it is asked to."""
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # as the service does
    model, queue, head = open_head(setting)
    run = make_run(method, setting, head, queue)
    small = make_run(method, replace(setting, rows=32), head, queue)
    small()  # what comes once, whatever the number of rows
    pipe.send(head.chunk_rows * model.vocab_size * model.dtype.itemsize)
    with torch.inference_mode():
        while what := pipe.recv():
            pipe.send(
                peak_of(run, model.device) if what == "memory" else time_of(run, model.device)
            )


def make_model(setting: Setting, device: torch.device) -> TeacherModel:
    """Makes a model whose base does nothing that is measured."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=setting.vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=8,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    causal_lm = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPES[setting.dtype])
    return prepare(causal_lm.to(device), weights_fingerprint="")


def make_run(
    method: str, setting: Setting, head: VocabularyHead, device: Device
) -> Callable[[], object]:
    """Returns what is measured."""
    model, spec = head.model, parse_targets(setting.targets)
    hidden_TD = 20 * torch.randn(setting.rows + 1, HIDDEN).to(model.device, model.dtype)
    ids = torch.zeros(setting.rows + 1, dtype=torch.int64)
    if method == "the engine":
        drawn = torch.rand(setting.rows, dtype=torch.float64) if spec.needs_uniforms else None
        request = RowRequest(ids, torch.arange(setting.rows), spec, uniforms=drawn)
        return lambda: select(head, device, hidden_TD, request)
    size = setting.rows if method == "full logits" else head.chunk_rows
    realized_T = ids[1:].to(model.device)
    return lambda: [
        select_plainly(model.logits(hidden_CD).float(), spec, realized_C)
        for hidden_CD, realized_C in zip(
            hidden_TD[:-1].split(size), realized_T.split(size), strict=True
        )
    ]


def select(head: VocabularyHead, device: Device, hidden_TD: Tensor, request: RowRequest) -> object:
    """Selects as the engine does."""
    with device.queue():
        (scored,) = head.download(head.select(States(hidden_TD), [request], [0], [0])).values()
        done = device.mark()
    done.synchronize()
    return scored.compact()


def select_plainly(
    logits_CV: Tensor, spec: TargetSpec, realized_C: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, logprobs, logprob of the token that came next) of each row, on the CPU."""
    logprobs_CV = logits_CV.log_softmax(1)
    if isinstance(spec, SampledSpec):
        ids_CK = torch.multinomial(logprobs_CV.exp(), spec.n, replacement=True)
    elif isinstance(spec, TopKSpec):
        ids_CK = logits_CV.topk(spec.k).indices
    else:
        raise ValueError(f"no plain selection for {spec}")
    kept_CK = logprobs_CV.gather(1, ids_CK)
    if isinstance(spec, TopKSpec) and spec.min_p:
        kept_CK = kept_CK.where(kept_CK.exp() >= spec.min_p, -torch.inf)
    realized_C1 = logprobs_CV.gather(1, realized_C[:, None])
    return ids_CK.int().cpu(), kept_CK.cpu(), realized_C1.cpu()


def synchronize(device: torch.device) -> None:
    """Waits until a GPU is done; a CPU always is."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_of(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run."""
    synchronize(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - began


def peak_of(run: Callable[[], object], device: torch.device) -> float:
    """Bytes of the peak of one run, beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = resident_nbytes("VmRSS")
    run()
    return resident_nbytes("VmHWM") - before


def resident_nbytes(name: str) -> int:
    """A line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {name} in /proc/self/status")


if __name__ == "__main__":
    main()
