"""Does the service cost anything beside the teacher's own arithmetic, and does a trainer wait?

Run `python -m benchmarks.stream`. A fixed model (Gemma 2, d=512, 8 layers, V=32,000, random
weights), sequences of 512 tokens, top_k:64, CPU. The bare loop is forward + head + encode in one
process, no gRPC; the service gets the same sequences from four client processes, which discard the
answers. The two take turns, so that what else the machine does hits both; quote the ratio. With
`--mixed` the lengths are log-uniform, 32 to 2,048 tokens, and both sides fill packs of the engine's
own size. Then a trainer trains (its step
is a sleep), and another one whose batches are short and whose teacher is 200 ms away. Run it on a
quiet machine: two busy processes on two cores make both sides wait for each other's threads.
"""

import argparse
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.service import (
    VOCABULARY,
    Clients,
    make_sequences,
    save_teacher,
    start_service,
    stop_service,
)
from tests.support.proxy import Proxy

SEQUENCE = 512  # tokens
BATCH = 2  # sequences in one forward pass, on both sides
CLIENTS = 4
AHEAD = 4  # sequences in flight per client
TARGETS = "top_k:64"
ROUND_TRIP_S = 0.2
MIXED = (32, 2048)  # tokens
SHORT = 16  # tokens of a batch of the trainer that is far away
FAR_STEPS = 200
SPAWN = multiprocessing.get_context("spawn")


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description="The service against a bare loop.")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--sequences", type=int, default=32, help="of each turn")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of the teacher")
    parser.add_argument("--steps", type=int, default=60, help="of the trainer that waits or not")
    parser.add_argument("--mixed", action="store_true", help="lengths of 32 to 2,048 tokens")
    options = parser.parse_args()
    lengths = MIXED if options.mixed else (SEQUENCE, SEQUENCE)
    pack_tokens = None if options.mixed else BATCH * SEQUENCE
    turns = [
        make_sequences(lengths, options.sequences * SEQUENCE, seed=seed)
        for seed in range(options.rounds)
    ]
    with tempfile.TemporaryDirectory() as folder:
        save_teacher(Path(folder))
        bare, bare_end = start_bare_loop(folder, options.threads, pack_tokens)
        flags = ["--threads", str(options.threads)]
        flags += [] if pack_tokens is None else ["--batch.max-tokens", str(pack_tokens)]
        service, address = start_service(folder, *flags)
        try:
            rates: dict[str, list[float]] = {"bare": [], "served": []}
            with Clients(address, targets=TARGETS, count=CLIENTS, window=AHEAD) as clients:
                bare_end.recv()
                clients.stream(turns[0][:CLIENTS])
                for sequences in turns:
                    rates["bare"].append(rate_of(partial(ask, bare_end, sequences), sequences))
                    rates["served"].append(rate_of(partial(clients.stream, sequences), sequences))
            trainer_step_s = 2 * SEQUENCE / statistics.median(rates["served"])
            waiting, later = trainer(address, SEQUENCE, options.steps, trainer_step_s)
            far_step_s = 2 * SHORT / short_rate(address)
            with Proxy(address) as proxy:
                proxy.up.delay_s = proxy.down.delay_s = ROUND_TRIP_S / 2
                far, far_later = trainer(proxy.address, SHORT, FAR_STEPS, far_step_s)
        finally:
            if bare.is_alive():
                bare_end.send(None)
            bare.join(30)
            stop_service(service)
    ratio = statistics.median(
        served / alone for served, alone in zip(rates["served"], rates["bare"], strict=True)
    )
    bare_rate, served_rate = (statistics.median(rates[name]) for name in ("bare", "served"))
    print(f"\n{'':44}      tokens/s   of bare")
    print(f"{'bare forward + head + encode':44}  {bare_rate:12,.0f}      100 %")
    print(f"{f'service, {CLIENTS} clients':44}  {served_rate:12,.0f}   {ratio:6.1%}")
    print(
        f"\ntrainer whose step takes twice the teacher's time per batch ({trainer_step_s:.2f} s):"
    )
    print(
        f"waiting {waiting:.2%} of {options.steps} steps, {later:.2%} without the first one's wait"
    )
    print(
        f"the same for batches of {SHORT} tokens ({far_step_s:.3f} s) and a round trip of "
        f"{ROUND_TRIP_S} s:"
    )
    print(f"waiting {far:.2%} of {FAR_STEPS} steps, {far_later:.2%} without the first one's wait")


def start_bare_loop(
    folder: str, threads: int, pack_tokens: int | None
) -> tuple[BaseProcess, Connection]:
    """Starts the process of the bare loop, which says through a pipe when it is ready."""
    ours, theirs = SPAWN.Pipe()
    arguments = (theirs, folder, threads, pack_tokens)
    process = SPAWN.Process(target=bare_loop, args=arguments, daemon=True)
    process.start()
    return process, ours


def ask(bare: Connection, sequences: list[Tensor]) -> None:
    """Has the bare loop score some sequences."""
    bare.send([sequence.numpy() for sequence in sequences])
    bare.recv()


def rate_of(run: Callable[[], None], sequences: list[Tensor]) -> float:
    """Tokens per second, from the first request to the last answer."""
    started = time.perf_counter()
    run()
    return sum(map(len, sequences)) / (time.perf_counter() - started)


def bare_loop(connection: Connection, folder: str, threads: int, pack_tokens: int | None) -> None:
    """Forward, head and encode, one pack after the other, in the service's own functions."""
    from logit_codec import encode_parts, parse_targets
    from teacher_server.engine.batch import RowRequest
    from teacher_server.engine.engine import Engine
    from teacher_server.engine.loading import load

    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # as the service does
    torch.set_num_threads(threads)
    engine = Engine(load(folder), pack_tokens=pack_tokens)
    spec = parse_targets(TARGETS)

    def score(sequences: list[Tensor]) -> None:
        requests = [RowRequest(ids, torch.arange(len(ids) - 1), spec) for ids in sequences]
        for pack in engine.packer.pack(requests):
            for targets in engine.score([requests[index] for index in pack.members]):
                list(encode_parts(targets, spec, max_nbytes=1 << 20))

    score(make_sequences((SEQUENCE, SEQUENCE), BATCH * SEQUENCE))
    connection.send("ready")
    while (arrays := connection.recv()) is not None:
        score([torch.from_numpy(array) for array in arrays])
        connection.send("done")


def short_rate(address: str) -> float:
    """Tokens per second of one client with batches of SHORT tokens."""
    from student_trainer import connect

    batch = {"input_ids": torch.arange(SHORT)[None]}
    with connect(address) as teacher:
        pairs = teacher.stream_batches(itertools.repeat(batch, 120), targets=TARGETS, ahead=16)
        for _ in range(20):
            next(pairs)
        started = time.perf_counter()
        tokens = sum(targets.num_rows + 1 for _, targets in pairs)
        return tokens / (time.perf_counter() - started)


def trainer(address: str, length: int, steps: int, step_s: float) -> tuple[float, float]:
    """Fraction of the time that a trainer with batches of `length` tokens and steps of `step_s`
    seconds waits for its targets, with and without the wait for the first batch.

    The student is elsewhere: its step is a sleep, not work on the teacher's cores.
    """
    from student_trainer import connect

    generator = torch.Generator().manual_seed(7)
    batches = (
        {"input_ids": torch.randint(VOCABULARY, (1, length), generator=generator)}
        for _ in range(steps)
    )
    waits = []
    with connect(address) as teacher:
        pairs = teacher.stream_batches(batches, targets=TARGETS, ahead="30s")
        started = time.perf_counter()
        for _ in range(steps):
            asked = time.perf_counter()
            next(pairs)
            waits.append(time.perf_counter() - asked)
            time.sleep(step_s)
        elapsed = time.perf_counter() - started
    return sum(waits) / elapsed, sum(waits[1:]) / elapsed


if __name__ == "__main__":
    main()
