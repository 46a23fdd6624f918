"""CPU-seconds per GB of `Score` beside a bare grpc.aio stream of messages of the same sizes.

The service side is the real TeacherService with its admission, pipeline and writer; only the
teacher is replaced by targets that are there already, so that what is measured is what answers
cost after they were computed: encoding, digests, messages, gRPC. Both directions' processes count.
The bare stream writes ready bytes into messages of one `bytes` field. Rounds alternate.

    python -m benchmarks.transport [--rounds 5] [--mib 512]
"""

import argparse
import asyncio
import multiprocessing
import os
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

ROWS = 63
VOCAB = 32 * 1024
"""63 rows of 32,768 float32 logprobs are 8 MiB: eight parts of just under 1 MiB."""
NUM_PARTS = 9


def score_server(pipe: Connection) -> None:
    """Serves ready targets with the real service; answers "cpu" with its CPU seconds so far."""
    import grpc
    import torch

    from logit_codec import DenseSpec, select_rows
    from protos import teacher_pb2, teacher_pb2_grpc
    from teacher_server.admission.limits import Limits
    from teacher_server.admission.requests import Admission
    from teacher_server.engine.batch import PackTimes, RowRequest
    from teacher_server.engine.engine import Launched
    from teacher_server.engine.head import ScoredRows
    from teacher_server.ledger.accounts import open_accounts
    from teacher_server.monitoring.memory import keep_freed_memory
    from teacher_server.monitoring.metrics import Metrics
    from teacher_server.monitoring.team_stats import TeamStats
    from teacher_server.pipeline import Pipeline
    from teacher_server.rpc.description import Description
    from teacher_server.rpc.score import PART_SLACK_NBYTES
    from teacher_server.rpc.server import server_options
    from teacher_server.rpc.service import TeacherService
    from teacher_server.scheduling.scheduler import Scheduler

    torch.set_num_threads(1)
    keep_freed_memory()
    limits = Limits(
        max_sequence_tokens=1 << 16,
        max_request_tokens=1 << 16,
        max_request_sequences=1024,
        max_request_nbytes=4 << 20,
        max_top_k=256,
        max_reply_nbytes=64 << 20,
        max_stream_nbytes=32 << 20,
        max_queued_tokens=1 << 20,
    )
    teacher = SimpleNamespace(
        vocab_size=VOCAB,
        effective_vocab_size=VOCAB,
        max_sequence_tokens=limits.max_sequence_tokens,
        teacher_fingerprint="ab" * 32,
        id_table=None,
    )
    logits = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(0))
    selection = select_rows(logits, DenseSpec(realized=False, log_z=False))
    rows = ScoredRows(((selection, slice(None)),))

    def launch(batch: Sequence[RowRequest]) -> Launched:
        return Launched((rows,) * len(batch), (), 0.0, 0.0)

    def result(launched: Launched) -> tuple[tuple[ScoredRows, ...], PackTimes]:
        return launched.rows, PackTimes(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)

    async def run() -> None:
        accounts, metrics, team_stats = open_accounts(None), Metrics(), TeamStats()
        scheduler = Scheduler(
            max_batch_tokens=ROWS + 1,
            max_batch_reply_nbytes=limits.max_reply_nbytes,
            max_queued_tokens=limits.max_queued_tokens,
        )
        pipeline = Pipeline(
            scheduler,
            SimpleNamespace(launch=launch, result=result),  # type: ignore[arg-type]
            accounts=accounts,
            metrics=metrics,
            max_unencoded_nbytes=limits.max_reply_nbytes,
            max_payload_nbytes=limits.max_part_nbytes - PART_SLACK_NBYTES,
        )
        pipeline.start()
        service = TeacherService(
            description=Description(teacher_pb2.TeacherInfo(), pipeline, torch.device("cpu")),
            admission=Admission(teacher, limits),  # type: ignore[arg-type]
            pipeline=pipeline,
            accounts=accounts,
            metrics=metrics,
            team_stats=team_stats,
        )
        server = grpc.aio.server(options=server_options(limits))
        teacher_pb2_grpc.add_TeacherServicer_to_server(service, server)
        await serve(server, pipe)

    asyncio.run(run())


def bare_server(pipe: Connection) -> None:
    """A grpc.aio stream that writes as many messages as asked for, of the sizes asked for."""
    import grpc

    from protos import teacher_pb2
    from teacher_server.monitoring.memory import keep_freed_memory

    keep_freed_memory()

    async def stream(requests: AsyncIterator[bytes], context: Any) -> None:
        async for request in requests:
            sizes = [int(size) for size in request.split()]
            for size in sizes:
                response = teacher_pb2.ScoreResponse()
                response.part.payload = payloads.setdefault(size, os.urandom(size))
                await context.write(response)

    payloads: dict[int, bytes] = {}

    async def run() -> None:
        server = grpc.aio.server(
            options=[("grpc.max_send_message_length", -1), ("grpc.so_reuseport", 0)]
        )
        handler = grpc.stream_stream_rpc_method_handler(
            stream,
            request_deserializer=None,
            response_serializer=teacher_pb2.ScoreResponse.SerializeToString,
        )
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("bare", {"Stream": handler}),)
        )
        await serve(server, pipe)

    asyncio.run(run())


async def serve(server: Any, pipe: Connection) -> None:
    """Says the port, then its CPU seconds whenever asked, until the pipe is closed."""
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    pipe.send(port)
    loop = asyncio.get_running_loop()
    while True:
        try:
            await loop.run_in_executor(None, pipe.recv)
        except EOFError:
            break
        pipe.send(time.process_time())
    await server.stop(0)


async def read_score(port: int, num_requests: int) -> list[int]:
    """Reads the answers to some requests; returns the payload sizes."""
    import grpc
    import numpy as np

    from protos import teacher_pb2, teacher_pb2_grpc

    spec = teacher_pb2.TargetSpec(
        dense=teacher_pb2.Dense(bits=32), omit_realized_logprob=True, omit_log_z=True
    )
    ids = np.zeros(ROWS + 1, dtype="<i4").tobytes()

    async def requests() -> AsyncIterator[teacher_pb2.ScoreRequest]:
        for number in range(num_requests):
            yield teacher_pb2.ScoreRequest(
                request_id=number + 1, token_ids=ids, lengths=[ROWS + 1], targets=spec
            )

    options = [("grpc.max_receive_message_length", -1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        call = teacher_pb2_grpc.TeacherStub(channel).Score(requests())
        return [len(response.part.payload) async for response in call]


async def read_bare(port: int, sizes: list[int]) -> list[int]:
    """Reads messages of the sizes given from the bare server."""
    import grpc

    from protos import teacher_pb2

    async def requests() -> AsyncIterator[bytes]:
        for first in range(0, len(sizes), NUM_PARTS):
            yield " ".join(map(str, sizes[first : first + NUM_PARTS])).encode()

    options = [("grpc.max_receive_message_length", -1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        call = channel.stream_stream(
            "/bare/Stream",
            request_serializer=None,
            response_deserializer=teacher_pb2.ScoreResponse.FromString,
        )(requests())
        return [len(response.part.payload) async for response in call]


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU of Score beside a bare stream")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=512, help="MiB of one round of each")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    servers = {}
    for name, target in (("Score", score_server), ("bare grpc.aio", bare_server)):
        ours, theirs = context.Pipe()
        process = context.Process(target=target, args=(theirs,), daemon=True)
        process.start()
        servers[name] = (process, ours, ours.recv())
    sizes = asyncio.run(read_score(servers["Score"][2], 2))
    sizes = sizes * (options.mib // 16)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}
    for round_number in range(options.rounds + 1):
        for name, (_, pipe, port) in servers.items():
            pipe.send("cpu")
            server_s, client_s, started = pipe.recv(), time.process_time(), time.perf_counter()
            if name == "Score":
                got = asyncio.run(read_score(port, len(sizes) // NUM_PARTS))
            else:
                got = asyncio.run(read_bare(port, sizes))
            elapsed_s = time.perf_counter() - started
            pipe.send("cpu")
            used_s = pipe.recv() - server_s + time.process_time() - client_s
            assert sum(got) == sum(sizes)
            if round_number:  # the first one warms up
                gigabytes = sum(got) / 1e9
                seconds[name].append((used_s / gigabytes, gigabytes / elapsed_s))
    for process, pipe, _ in servers.values():
        pipe.close()
        process.join(10)
    print(f"messages of {max(sizes)} bytes, {sum(sizes) / 1e9:.2f} GB a round")
    print(f"{'':16}{'CPU-s per GB':>14}{'GB/s':>8}")
    for name, rows in seconds.items():
        cpu_s, speed = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{name:16}{cpu_s:14.2f}{speed:8.2f}")
    pairs = zip(seconds["Score"], seconds["bare grpc.aio"], strict=True)
    ratios = sorted(ours[0] / bare[0] for ours, bare in pairs)
    print(f"ratio of CPU: median {statistics.median(ratios):.2f}, {ratios[0]:.2f}-{ratios[-1]:.2f}")


if __name__ == "__main__":
    main()
