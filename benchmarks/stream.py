"""Does the service cost anything beside the teacher's own arithmetic, and does a trainer wait?

Run `python -m benchmarks.stream`. A fixed model (Gemma 2, d=512, 8 layers, V=32,000, random
weights), sequences of 512 tokens, top_k:64, CPU. The bare loop is forward + head + encode in one
process, no gRPC; the service gets as many sequences from four client processes. The two take
turns, so that what else the machine does hits both; quote the ratio. Then a trainer trains (its step
is a sleep), and another one whose batches are short and whose teacher is 200 ms away. Run it on a
quiet machine: two busy processes on two cores make both sides wait for each other's threads.
"""

import argparse
import itertools
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from tests.support.proxy import Proxy

VOCABULARY = 32_000
SEQUENCE = 512  # tokens
BATCH = 2  # sequences in one forward pass, on both sides
CLIENTS = 4
AHEAD = 4  # sequences in flight per client
TARGETS = "top_k:64"
ROUND_TRIP_S = 0.2
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
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_teacher(Path(folder))
        bare, bare_end = worker(bare_loop, folder, options.threads)
        service, address = start_service(folder, options.threads)
        clients = [worker(client_loop, address, seed) for seed in range(CLIENTS)]
        try:
            for _, connection in clients:
                connection.recv()
            bare_end.recv()
            rates: dict[str, list[float]] = {"bare": [], "served": []}
            for _ in range(options.rounds):
                rates["bare"].append(ask([bare_end], options.sequences))
                rates["served"].append(ask([end for _, end in clients], options.sequences))
            trainer_step_s = 2 * SEQUENCE / statistics.median(rates["served"])
            waiting, later = trainer(address, SEQUENCE, options.steps, trainer_step_s)
            far_step_s = 2 * SHORT / short_rate(address)
            with Proxy(address) as proxy:
                proxy.up.delay_s = proxy.down.delay_s = ROUND_TRIP_S / 2
                far, far_later = trainer(proxy.address, SHORT, FAR_STEPS, far_step_s)
        finally:
            for process, connection in [(bare, bare_end), *clients]:
                if process.is_alive():
                    connection.send(0)
                process.join(30)
            service.send_signal(signal.SIGTERM)
            service.wait(30)
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


def make_teacher(folder: Path) -> None:
    """Saves the fixed model with random weights."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
    )
    transformers.utils.logging.disable_progress_bar()
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def start_service(folder: str, threads: int) -> tuple[subprocess.Popen, str]:
    """The service as an operator starts it, and its address."""
    tokens = str(BATCH * SEQUENCE)
    command = [sys.executable, "-m", "teacher_server", "serve", "--model", folder, "--standalone"]
    flags = ["--port", "0", "--threads", str(threads), "--batch.max-tokens", tokens]
    service = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True)
    assert service.stdout is not None
    words = service.stdout.readline().split()
    if words[:1] != ["ready"]:
        raise RuntimeError("the service did not start")
    return service, words[1]


def worker(target, *arguments) -> tuple[multiprocessing.Process, Connection]:
    """A process that waits on a pipe for how many sequences to score, and says when it has.

    0 ends it.
    """
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    return process, ours  # type: ignore[return-value]


def ask(connections: list[Connection], sequences: int) -> float:
    """Tokens per second of all workers together, from the first request to the last answer."""
    started = time.perf_counter()
    for connection in connections:
        connection.send(sequences // len(connections))
    for connection in connections:
        connection.recv()
    return sequences * SEQUENCE / (time.perf_counter() - started)


def random_sequences(seed: int):
    """(512,) int64 ids without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(VOCABULARY, (SEQUENCE,), generator=generator)


def bare_loop(connection: Connection, folder: str, threads: int) -> None:
    """Forward, head and encode, one batch after the other, in the service's own functions."""
    from logit_codec import encode_parts, parse_targets
    from teacher_server.engine.batch import RowRequest
    from teacher_server.engine.engine import Engine
    from teacher_server.engine.loading import load

    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # as the service does
    torch.set_num_threads(threads)
    engine = Engine(load(folder))
    spec = parse_targets(TARGETS)
    sequences = random_sequences(99)
    rows = torch.arange(SEQUENCE - 1)

    def one_batch() -> None:
        batch = [RowRequest(next(sequences), rows, spec) for _ in range(BATCH)]
        for targets in engine.score(batch):
            list(encode_parts(targets, spec, max_nbytes=1 << 20))

    one_batch()
    connection.send("ready")
    while count := connection.recv():
        for _ in range(count // BATCH):
            one_batch()
        connection.send("done")


def client_loop(connection: Connection, address: str, seed: int) -> None:
    """Streams as many sequences as it is told to."""
    from student_trainer import connect

    torch.set_num_threads(1)
    sequences = random_sequences(seed)
    with connect(address) as teacher:
        list(teacher.stream([next(sequences)], targets=TARGETS))
        connection.send("ready")
        while count := connection.recv():
            wanted = itertools.islice(sequences, count)
            for _ in teacher.stream(wanted, targets=TARGETS, ahead=AHEAD):
                pass
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
