"""How long a team that asks for one sequence at a time waits beside a team that floods the teacher.

Run `python -m benchmarks.latency`, or `python -m benchmarks.fairness --live`. One replica on the CPU
(Gemma 2, d=256, 4 layers, V=32,000, random weights) with a teams file. The light team uses the
default client; the flood, in a process of its own, keeps several streams full and does not decode
what it gets. Times are from the request to the decoded answer, as the light team sees them.
"""

import argparse
import asyncio
import itertools
import multiprocessing
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from logitstream.connection import Connection
from protos import teacher_pb2, teacher_pb2_grpc
from tests.support.teams import add_team

VOCABULARY = 32_000
LIGHT_TOKENS = 64
FLOODS = {
    "alone": None,
    "beside dense, 64 tokens": (64, teacher_pb2.TargetSpec(dense=teacher_pb2.Dense(bits=32))),
    "beside dense, 512 tokens": (512, teacher_pb2.TargetSpec(dense=teacher_pb2.Dense(bits=16))),
    "beside top_k:64, 512 tokens": (
        512,
        teacher_pb2.TargetSpec(top_k=teacher_pb2.TopK(k=64, bits=8)),
    ),
}
WINDOW = 8
"""Requests in flight of each stream of the flood."""
SPAWN = multiprocessing.get_context("spawn")


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description="A light team beside a flood, live.")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each line")
    parser.add_argument("--streams", type=int, default=6, help="of the flood")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the teacher")
    options = parser.parse_args()
    measure(options.seconds, options.streams, options.threads)


def measure(seconds: float = 20.0, streams: int = 6, threads: int = 1) -> None:
    """Prints the table: each line is the light team beside one kind of flood."""
    from student_trainer import connect

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        teams = Path(folder) / "teams.toml"
        tokens = {
            name: add_team(teams, name, "--scopes", "score", "dense") for name in ("light", "flood")
        }
        service, address = start_service(Path(folder), teams, threads)
        ids = torch.arange(LIGHT_TOKENS)
        print(
            f"{'light team, one sequence at a time':36} {'p50, s':>8} {'p99, s':>8} {'answers':>8}"
            f" {'flood, answers/s':>18}"
        )
        try:
            with connect(address, token=tokens["light"]) as teacher:
                for _ in range(10):
                    list(teacher.stream([ids]))
                for name, flood in FLOODS.items():
                    with Flood(address, tokens["flood"], flood, streams) as running:
                        waits = []
                        before, began = running.answers.value, time.perf_counter()
                        while time.perf_counter() < began + seconds:
                            asked = time.perf_counter()
                            list(teacher.stream([ids]))
                            waits.append(time.perf_counter() - asked)
                            time.sleep(0.05)
                        elapsed = time.perf_counter() - began
                        rate = (running.answers.value - before) / elapsed
                    waits.sort()
                    print(
                        f"{name:36} {statistics.median(waits):8.3f} "
                        f"{waits[int(0.99 * len(waits))]:8.3f} {len(waits):8} {rate:18.1f}",
                        flush=True,
                    )
        finally:
            service.send_signal(signal.SIGTERM)
            service.wait(30)


class Flood:
    """A team that keeps its streams full, in a process of its own; a context manager."""

    def __init__(
        self,
        address: str,
        token: str,
        work: tuple[int, teacher_pb2.TargetSpec] | None,
        streams: int,
    ) -> None:
        self.answers = SPAWN.Value("q", 0)
        self._process = None
        if work is not None:
            length, targets = work
            arguments = (address, token, length, targets.SerializeToString(), streams)
            self._process = SPAWN.Process(
                target=flood, args=(*arguments, self.answers), daemon=True
            )

    def __enter__(self) -> "Flood":
        if self._process is not None:
            self._process.start()
            while self.answers.value < 20:
                if not self._process.is_alive():
                    raise RuntimeError("the flood has ended")
                time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.join(30)


def flood(address: str, token: str, length: int, targets: bytes, streams: int, answers) -> None:
    """Body of the flood's process."""
    ids = torch.arange(length, dtype=torch.int32).numpy().tobytes()
    spec = teacher_pb2.TargetSpec.FromString(targets)

    def request(number: int) -> teacher_pb2.ScoreRequest:
        return teacher_pb2.ScoreRequest(
            request_id=number, token_ids=ids, lengths=[length], targets=spec
        )

    async def stream() -> None:
        connection = Connection.to(address, token=token)
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        async with connection.channel(address, options) as channel:
            call = teacher_pb2_grpc.TeacherStub(channel).Score(metadata=connection.metadata)
            numbers = itertools.count()
            for _ in range(WINDOW):
                await call.write(request(next(numbers)))
            async for response in call:
                if not response.HasField("part"):
                    raise RuntimeError(str(response.error))
                if response.part.last:
                    answers.value += 1
                    await call.write(request(next(numbers)))

    async def together() -> None:
        await asyncio.gather(*(stream() for _ in range(streams)))

    asyncio.run(together())


def start_service(folder: Path, teams: Path, threads: int) -> tuple[subprocess.Popen, str]:
    """The service as an operator starts it, and its address."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
    )
    transformers.utils.logging.disable_progress_bar()
    model = folder / "model"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(model)
    command = [sys.executable, "-m", "teacher_server", "serve", "--model", str(model)]
    flags = ["--standalone", "--port", "0", "--threads", str(threads), "--teams", str(teams)]
    service = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True)
    assert service.stdout is not None
    words = service.stdout.readline().split()
    if words[:1] != ["ready"]:
        raise RuntimeError("the service did not start")
    return service, words[1]


if __name__ == "__main__":
    main()
