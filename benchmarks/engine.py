"""What each stage between a teacher's forward pass and the bytes on the wire costs, in tokens/s.

Run `python -m benchmarks.engine`, or with `--device cuda`, `--model DIR`, `--quick`. Two fixed models
of 47 M parameters with random weights (benchmarks/service.py: one of Gemma 2's shape, whose scores
are capped, one of Llama's), sequences of 512 tokens and of log-uniform lengths of 32 to 4,096. The
lines of a table are

- own forward: the base model as transformers runs it, with its own attention, on sequences of one
  exact length at a time, as many as a pack holds;
- packed forward: the engine's, over packs;
- + head: the products of the vocabulary head, tile by tile, nothing kept of the logits;
- + selection: the engine's launch and result, two packs in flight;
- + encoding: compacted to targets and encoded, in the same thread;
- service: `teacher-server serve` and client processes that discard what they get.

The stages take turns on the same sequences. `tokens/s` is the median of the turns; `of forward` and
`of before` are medians of the ratios within a turn, to the packed forward and to the line above.
`fill` is real tokens by rows computed: of the packs, and of the products of the head (rows that were
asked for); `canonical` is what padding to the engine's canonical lengths
would fill. A second table compares sequences of 64 to 4,096 tokens with sequences of 4,096.

`--tiles` measures instead what a row of a product costs in products of 64 to 2,048 rows.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.service import (
    Clients,
    make_sequences,
    parse_lengths,
    save_teacher,
    start_service,
    stop_service,
)
from logit_codec import encode_parts, ids_digest, parse_targets, uniforms
from teacher_server.engine.batch import RowRequest
from teacher_server.engine.engine import Engine
from teacher_server.engine.head import ScoredRows, VocabularyHead
from teacher_server.engine.loading import load
from teacher_server.engine.packing import Pack

Name = TypeVar("Name", bound=Hashable)

CONTEXT = 4096
"""Tokens of the longest sequence."""
LONG, AGAINST_LONG = (4096, 4096), (64, 4096)
PART_NBYTES = 1 << 20
"""Of an encoded part, as in the service."""
IN_FLIGHT = 2
TILE_ROWS = (64, 128, 256, 512, 1024, 2048)
TILE_SHAPES = ((512, 512), (512, 2048), (2048, 512), (2048, 8192), (512, 32_000))
"""Columns of the input and of the output."""


def main() -> None:
    """Measures and prints the tables."""
    options = parse_options()
    # The service turns it on too; torch reads it at its first large allocation.
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.tiles:
        print_tiles(options)
        return
    if options.model:
        print_tables(options.model, options)
        return
    for architecture in ("Gemma2",) if options.quick else ("Gemma2", "Llama"):
        with tempfile.TemporaryDirectory() as folder:
            save_teacher(Path(folder), architecture, context=CONTEXT)
            print_tables(folder, options)


def parse_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Tokens per second of each stage of the engine.")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--model", help="a folder written by save_pretrained, or a hub id")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each stage")
    parser.add_argument(
        "--tokens", type=int, help="of a turn; by default 16,384 on a CPU, 262,144 on a GPU"
    )
    parser.add_argument("--lengths", default="512,32-4096", help="of the sequences, log-uniform")
    parser.add_argument("--targets", default="top_k:64", help="what is kept of each row")
    parser.add_argument("--clients", type=int, default=4, help="of the service")
    parser.add_argument("--threads", type=int, help="CPU threads of the teacher")
    parser.add_argument("--quick", action="store_true", help="one model, two short rounds")
    parser.add_argument("--tiles", action="store_true", help="what a row of a product costs")
    options = parser.parse_args()
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.tokens is None:
        options.tokens = 16_384 if options.device == "cpu" else 262_144
    if options.quick:
        options.rounds, options.tokens = min(options.rounds, 2), min(options.tokens, 4096)
    return options


def print_tables(folder: str, options: argparse.Namespace) -> None:
    """Measures one teacher."""
    model = load(folder, device=options.device, dtype=options.dtype, max_sequence_tokens=CONTEXT)
    engine = Engine(model)
    longest = engine.model.max_sequence_tokens
    flags = ["--device", options.device, "--dtype", options.dtype]
    flags += ["--admission.max-sequence-tokens", str(longest)]
    if options.threads:
        flags += ["--threads", str(options.threads)]
    service, address = start_service(folder, *flags)
    try:
        with Clients(address, targets=options.targets, count=options.clients) as clients:
            for text in options.lengths.split(","):
                shortest, most = parse_lengths(text)
                lengths = (min(shortest, longest), min(most, longest))
                print_stages(engine, clients, lengths, options)
    finally:
        stop_service(service)
    if longest >= LONG[1]:
        print_against_long(engine, options)


class Work:
    """The same sequences for every stage."""

    def __init__(
        self, engine: Engine, lengths: tuple[int, int], options: argparse.Namespace
    ) -> None:
        self.engine, self.model = engine, engine.model
        self.sequences = make_sequences(
            lengths, options.tokens, vocabulary=engine.model.effective_vocab_size
        )
        self.num_tokens = sum(map(len, self.sequences))
        self._spec = parse_targets(options.targets)
        self._requests = [self._make_request(sequence) for sequence in self.sequences]
        self.packs = engine.packer.pack(self._requests)
        self._batches = [[self._requests[index] for index in pack.members] for pack in self.packs]
        self._head = VocabularyHead(engine.model, engine.device)
        self.head_products = [self._divide_head(batch) for batch in self._batches]

    def _make_request(self, sequence: Tensor) -> RowRequest:
        rows = torch.arange(len(sequence) - 1)
        drawn = None
        if self._spec.needs_uniforms:
            drawn = uniforms(0, 0, ids_digest(sequence), rows)
        return RowRequest(sequence, rows, self._spec, uniforms=drawn)

    def _divide_head(self, batch: Sequence[RowRequest]) -> list[tuple[int, int]]:
        """(rows, rows of a tile) of each chunk that the head computes for a batch."""
        large, small, most = self._head.large, self._head.small, self._head.chunk_rows
        counts = [len(request.rows) for request in batch]
        in_large = sum(count // large * large for count in counts)
        in_small = -(-(sum(counts) - in_large) // small) * small
        return [
            (min(most, total - first), tile)
            for total, tile in ((in_large, large), (in_small, small))
            for first in range(0, total, most)
        ]

    def own_forward(self) -> None:
        """Runs the model as transformers does, on one exact length at a time."""
        by_length: dict[int, list[Tensor]] = {}
        for sequence in self.sequences:
            by_length.setdefault(len(sequence), []).append(sequence)
        for length, same in by_length.items():
            most = max(1, self.engine.pack_tokens // length)
            for first in range(0, len(same), most):
                ids = torch.stack(same[first : first + most]).to(self.model.device)
                self.model.causal_lm.base_model(input_ids=ids, use_cache=False)

    def _hidden_states(self, pack: Pack) -> Tensor:
        upload = self.engine.device.upload
        return self.model.hidden_states(
            upload(pack.token_ids), upload(pack.positions), upload(pack.cu_seqlens), pack
        )

    def packed_forward(self) -> None:
        """Runs the packs."""
        for pack in self.packs:
            with self.engine.device.queue():
                self._hidden_states(pack)

    def head(self) -> None:
        """Runs the packs, and the products of the head."""
        for pack, chunks in zip(self.packs, self.head_products, strict=True):
            with self.engine.device.queue():
                hidden_TD = self._hidden_states(pack)
                buffer_CV = hidden_TD.new_empty(self._head.chunk_rows, self.model.vocab_size)
                first = 0
                for rows, tile in chunks:
                    index = torch.arange(first, first + rows) % len(hidden_TD)
                    hidden_CD = hidden_TD[self.engine.device.upload(index)]
                    self.model.logits_into(hidden_CD, buffer_CV[:rows], tile)
                    first += rows

    def scored(self) -> Iterator[ScoredRows]:
        """Yields what the engine gives for each sequence, two packs in flight."""
        launched = []
        for batch in self._batches:
            if len(launched) == IN_FLIGHT:
                yield from self.engine.result(launched.pop(0))[0]
            launched.append(self.engine.launch(batch))
        for last in launched:
            yield from self.engine.result(last)[0]

    def select(self) -> None:
        """Runs the engine, up to what was selected."""
        for _ in self.scored():
            pass

    def encode(self) -> None:
        """Runs the engine, and encodes what it gives."""
        for rows in self.scored():
            for _ in encode_parts(rows.compact(), self._spec, max_nbytes=PART_NBYTES):
                pass

    def fill(self) -> dict[str, float]:
        """Real tokens, or wanted rows, by rows computed."""
        in_packs = sum(len(pack.token_ids) for pack in self.packs)
        wanted = self.num_tokens - len(self.sequences)
        in_head = sum(rows for chunks in self.head_products for rows, _ in chunks)
        canonical = sum(self.model.bucket_length(len(sequence)) for sequence in self.sequences)
        return {
            "packs": self.num_tokens / in_packs,
            "head": wanted / in_head,
            "canonical": self.num_tokens / canonical,
        }


def print_stages(
    engine: Engine, clients: Clients, lengths: tuple[int, int], options: argparse.Namespace
) -> None:
    """Measures every stage on sequences of some lengths, in turns."""
    work = Work(engine, lengths, options)
    stages: dict[str, Callable[[], None]] = {
        "own forward": work.own_forward,
        "packed forward": work.packed_forward,
        "+ head": work.head,
        "+ selection": work.select,
        "+ encoding": work.encode,
        f"service, {options.clients} clients": lambda: clients.stream(work.sequences),
    }
    if not engine.model.is_packed:
        print(f"{engine.model.architecture} cannot run packs: only what is served is measured")
        del stages["packed forward"], stages["+ head"]
    seconds = measure(stages, options.rounds, engine.model.device)
    first = "packed forward" if engine.model.is_packed else "+ selection"
    fill = ", ".join(f"{name} {value:.1%}" for name, value in work.fill().items())
    print(
        f"\n{describe(engine)}; {name_of(lengths)} tokens: {len(work.sequences)} sequences, ",
        end="",
    )
    print(f"{work.num_tokens:,} tokens, {len(work.packs)} packs; {options.targets}")
    print(f"{'':24}  {'tokens/s':>10}  {'of forward':>10}  {'of before':>9}")
    before = None
    for name, times in seconds.items():
        of_first = ratio(seconds[first], times)
        of_before = "" if before is None else f"{ratio(seconds[before], times):9.1%}"
        rate = work.num_tokens / statistics.median(times)
        print(f"{name:24}  {rate:10,.0f}  {of_first:10.1%}  {of_before:>9}")
        before = name
    print(f"fill: {fill}", flush=True)


def print_against_long(engine: Engine, options: argparse.Namespace) -> None:
    """Measures mixed lengths against long sequences, which fill packs by themselves."""
    mixed, long = Work(engine, AGAINST_LONG, options), Work(engine, LONG, options)
    stages: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        "own forward": (mixed.own_forward, long.own_forward),
        "packed forward": (mixed.packed_forward, long.packed_forward),
        "+ selection": (mixed.select, long.select),
    }
    if not engine.model.is_packed:
        del stages["packed forward"]
    turns = {
        (name, which): run
        for name, pair in stages.items()
        for which, run in zip(("mixed", "long"), pair, strict=True)
    }
    seconds = measure(turns, options.rounds, engine.model.device)
    print(f"\n{describe(engine)}; {name_of(AGAINST_LONG)} tokens against {name_of(LONG)}")
    print(f"{'tokens/s':24}  {'long':>10}  {'mixed':>10}  {'of long':>9}")
    for name in stages:
        times = {"mixed": seconds[name, "mixed"], "long": seconds[name, "long"]}
        rates = {
            "mixed": mixed.num_tokens / statistics.median(times["mixed"]),
            "long": long.num_tokens / statistics.median(times["long"]),
        }
        share = ratio(times["long"], times["mixed"]) * mixed.num_tokens / long.num_tokens
        print(f"{name:24}  {rates['long']:10,.0f}  {rates['mixed']:10,.0f}  {share:9.1%}")


def measure(
    stages: dict[Name, Callable[[], None]], rounds: int, device: torch.device
) -> dict[Name, list[float]]:
    """Seconds of each turn of each stage, after one turn that does not count."""
    seconds: dict[Name, list[float]] = {name: [] for name in stages}
    for number in range(rounds + 1):
        for name, run in stages.items():
            took = time_of(run, device)
            if number:
                seconds[name].append(took)
    return seconds


def time_of(run: Callable[[], None], device: torch.device) -> float:
    """Seconds until a stage, and what it has left to the device, is done."""
    synchronize(device)
    began = time.perf_counter()
    with torch.inference_mode():
        run()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Waits until a GPU is done; a CPU always is."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(before: Sequence[float], after: Sequence[float]) -> float:
    """Median of how fast `after` is, compared with `before` in the same turn."""
    return statistics.median(one / other for one, other in zip(before, after, strict=True))


def describe(engine: Engine) -> str:
    """Names a teacher and how it runs."""
    model = engine.model
    parameters = sum(weight.numel() for weight in model.causal_lm.parameters())
    dtype = str(model.dtype).removeprefix("torch.")
    threads = f", {torch.get_num_threads()} threads" if model.device.type == "cpu" else ""
    return (
        f"{model.architecture}, {parameters / 1e6:,.0f} M parameters, {dtype}, "
        f"{model.device.type}{threads}, packs of {engine.pack_tokens:,}"
    )


def name_of(lengths: tuple[int, int]) -> str:
    """Writes a length or a range of lengths."""
    shortest, longest = lengths
    return f"{shortest:,}" if shortest == longest else f"{shortest:,} to {longest:,}"


def print_tiles(options: argparse.Namespace) -> None:
    """Measures products of several numbers of rows, in turns, per row."""
    device = torch.device(options.device)
    rounds = max(3, options.rounds)
    print("time per row of a product, relative to one of as many rows as in the last column")
    print(f"{'':30}" + "".join(f"{rows:8,}" for rows in TILE_ROWS) + "    us/row")
    for dtype in (torch.float32, torch.bfloat16):
        for columns, outputs in TILE_SHAPES[:3] if options.quick else TILE_SHAPES:
            with contextlib.suppress(NotImplementedError):  # a type that a device lacks
                print_tile_line(columns, outputs, dtype, device, rounds)


def print_tile_line(
    columns: int, outputs: int, dtype: torch.dtype, device: torch.device, rounds: int
) -> None:
    """Measures products with one weight."""
    most = max(TILE_ROWS)
    rows_TD = torch.randn(most, columns, device=device).to(dtype)
    weight_DN = torch.randn(outputs, columns, device=device).to(dtype).t()
    out_TN = torch.empty(most, outputs, device=device, dtype=dtype)

    def multiply(size: int) -> None:
        for start in range(0, most, size):
            tile = slice(start, start + size)
            torch.mm(rows_TD[tile], weight_DN, out=out_TN[tile])

    stages = {size: (lambda size=size: multiply(size)) for size in TILE_ROWS}
    seconds = measure(stages, rounds, device)
    relative = [ratio(seconds[size], seconds[most]) for size in TILE_ROWS]
    name = f"{columns:,} to {outputs:,}, {str(dtype).removeprefix('torch.')}"
    per_row = 1e6 * statistics.median(seconds[most]) / most
    print(
        f"{name:30}" + "".join(f"{one:8.2f}" for one in relative) + f"{per_row:10.1f}", flush=True
    )


if __name__ == "__main__":
    main()
