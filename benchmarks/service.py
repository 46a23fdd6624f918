"""What the benchmarks of a whole service share: teachers of fixed shapes, a service, its clients.

The clients discard what they get, so that a benchmark measures the service and not their decoding.
"""

import asyncio
import itertools
import math
import multiprocessing
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

import torch
from torch import Tensor

from logit_codec import parse_targets
from logitstream.connection import Connection
from logitstream.messages import fill_targets
from protos import teacher_pb2, teacher_pb2_grpc

VOCABULARY = 32_000
SPAWN = multiprocessing.get_context("spawn")


def save_teacher(folder: Path, architecture: str = "Gemma2", *, context: int = 2048) -> None:
    """Saves a model of about 47 M parameters with random weights (d=512, 8 layers, V=32,000).

    architecture: Gemma2 or Llama. context: the longest sequence, in tokens.
    """
    import transformers

    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=context,
    )
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def start_service(folder: str | Path, *flags: str) -> tuple[subprocess.Popen, str]:
    """Starts the service as an operator does, without Ray; returns it and its address."""
    command = [sys.executable, "-m", "teacher_server", "serve", "--model", str(folder)]
    command += ["--standalone", "--port", "0", *flags]
    service = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert service.stdout is not None
    words = service.stdout.readline().split()
    if words[:1] != ["ready"]:
        raise RuntimeError("the service did not start")
    return service, words[1]


def stop_service(service: subprocess.Popen) -> None:
    """Stops a service as Ctrl-C does."""
    service.send_signal(signal.SIGTERM)
    service.wait(60)


def parse_lengths(text: str) -> tuple[int, int]:
    """Returns the shortest and the longest length of `512` or `32-4096`."""
    shortest, _, longest = text.partition("-")
    return int(shortest), int(longest or shortest)


def make_sequences(
    lengths: tuple[int, int], num_tokens: int, *, vocabulary: int = VOCABULARY, seed: int = 0
) -> list[Tensor]:
    """Makes sequences of random ids, `num_tokens` in total; their lengths are log-uniform.

    The lengths are quantiles in random order, so that every seed has about as many long ones.
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = map(math.log, lengths)
    mean = lengths[0] if high == low else (lengths[1] - lengths[0]) / (high - low)
    count = max(1, round(num_tokens / mean))
    quantiles = (torch.randperm(count, generator=generator) + 0.5) / count
    return [
        torch.randint(vocabulary, (round(math.exp(low + (high - low) * at)),), generator=generator)
        for at in quantiles.tolist()
    ]


class Clients:
    """Processes that stream sequences to a service and discard the answers; a context manager."""

    def __init__(self, address: str, *, targets: str, count: int = 4, window: int = 16) -> None:
        """window: sequences in flight of each client."""
        self._pipes: list[Pipe] = []
        self._processes = []
        for _ in range(count):
            ours, theirs = SPAWN.Pipe()
            arguments = (theirs, address, targets, window)
            process = SPAWN.Process(target=_run_client, args=arguments, daemon=True)
            process.start()
            self._pipes.append(ours)  # type: ignore[arg-type]
            self._processes.append(process)
        for pipe in self._pipes:
            pipe.recv()

    def __enter__(self) -> "Clients":
        return self

    def __exit__(self, *_: object) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if process.is_alive():
                pipe.send(None)
            process.join(30)

    def stream(self, sequences: Sequence[Tensor]) -> None:
        """Gets the targets of some sequences, divided among the clients; waits for the last."""
        for number, pipe in enumerate(self._pipes):
            share = sequences[number :: len(self._pipes)]
            pipe.send([sequence.to(torch.int32).numpy().tobytes() for sequence in share])
        for pipe in self._pipes:
            if (error := pipe.recv()) is not None:
                raise RuntimeError(error)


def _run_client(pipe: Pipe, address: str, targets: str, window: int) -> None:
    """Body of a client's process: streams the sequences that come through the pipe."""
    torch.set_num_threads(1)
    spec = teacher_pb2.TargetSpec()
    fill_targets(spec, parse_targets(targets))

    async def stream(stub: teacher_pb2_grpc.TeacherStub, sequences: list[bytes]) -> None:
        requests = _make_requests(sequences, spec)
        call = stub.Score()
        left = len(sequences)
        for request in itertools.islice(requests, window):
            await call.write(request)
        while left:
            response = await call.read()
            if not response.HasField("part"):
                raise RuntimeError(str(response.error))
            if response.part.last:
                left -= 1
                if (request := next(requests, None)) is not None:
                    await call.write(request)
        await call.done_writing()

    async def serve() -> None:
        options = [("grpc.max_receive_message_length", -1)]
        async with Connection.to(address).channel(address, options) as channel:
            stub = teacher_pb2_grpc.TeacherStub(channel)
            pipe.send(None)
            while (sequences := await asyncio.to_thread(pipe.recv)) is not None:
                try:
                    await stream(stub, sequences)
                except Exception as error:
                    pipe.send(f"{type(error).__name__}: {error}")
                else:
                    pipe.send(None)

    asyncio.run(serve())


def _make_requests(
    sequences: list[bytes], spec: teacher_pb2.TargetSpec
) -> Iterator[teacher_pb2.ScoreRequest]:
    for number, ids in enumerate(sequences):
        yield teacher_pb2.ScoreRequest(
            request_id=number, token_ids=ids, lengths=[len(ids) // 4], targets=spec
        )
