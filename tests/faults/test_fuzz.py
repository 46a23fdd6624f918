"""Thousands of messages that no client would send, to every method of a service; the seed is printed."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2

from protos import teacher_pb2
from student_trainer import connect
from student_trainer.client.io_thread import IoThread
from tests.support import tiny
from tests.support.fleet import Fleet
from tests.support.http2 import SERVICE
from tests.support.oracle import VOCAB, digest

SEQUENCES = tiny.random_sequences(20, VOCAB, seed=61)
SEED = random.SystemRandom().randrange(1 << 32)
STREAMS, MESSAGES = 1400, 10
"""Of Score."""
TEXT_STREAMS = 500
"""Of Generate."""
CALLS = 6000
"""Of the other methods."""
AT_ONCE = 8
GROWTH_NBYTES = 96 << 20
OTHERS: dict[str, Callable[[], object]] = {
    f"{SERVICE}/Describe": teacher_pb2.DescribeRequest,
    f"{SERVICE}/Usage": lambda: teacher_pb2.UsageRequest(team="a", since="2027-01-31"),
    f"{SERVICE}/Status": teacher_pb2.StatusRequest,
    f"{SERVICE}/FetchIdTable": lambda: teacher_pb2.FetchIdTableRequest(digest=bytes(16)),
    "/grpc.health.v1.Health/Check": lambda: health_pb2.HealthCheckRequest(service="a"),
}
OF_THE_CLIENT = "Internal error from Core"
"""What grpc.aio says of a write that comes as the stream ends (grpc/grpc issue 36066)."""
ALLOWED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
}


def mutated(data: bytes, chance: random.Random) -> bytes:
    """The bytes of a message with some of them flipped, lost, repeated or made up."""
    changed = bytearray(data)
    for _ in range(chance.choice((0, 0, 0, 1, 1, 2, 4))):
        place = chance.randrange(len(changed) + 1)
        kind = chance.randrange(4)
        if kind == 0 and place < len(changed):
            changed[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del changed[place : place + chance.randint(1, 8)]
        elif kind == 2:
            changed[place:place] = chance.randbytes(chance.randint(1, 8))
        else:
            changed[place:place] = changed[place : place + chance.randint(1, 30)]
    return bytes(changed)


def some_request(chance: random.Random, number: int) -> bytes:
    """A ScoreRequest, mostly a small good one, with bytes that may mean anything."""
    length = chance.randint(2, 12)
    ids = np.array([chance.randrange(VOCAB) for _ in range(length)], dtype="<i4").tobytes()
    spec = chance.choice(
        [
            teacher_pb2.TargetSpec(top_k=teacher_pb2.TopK(k=chance.randint(0, 9), bits=7)),
            teacher_pb2.TargetSpec(sampled=teacher_pb2.Sampled(n=chance.randint(0, 99))),
            teacher_pb2.TargetSpec(dense=teacher_pb2.Dense(bits=chance.choice([16, 32, 5]))),
        ]
    )
    request = teacher_pb2.ScoreRequest(
        request_id=number,
        token_ids=ids,
        lengths=[length],
        targets=spec,
        temperature=chance.choice([0.0, 1.0, 1e-9, float("nan"), float("inf"), 2.0]),
        session_id=chance.choice([b"", bytes(16)]),
        seed=chance.getrandbits(64),
    )
    if chance.random() < 0.3:
        request.first_rows.append(chance.randrange(length))
    if chance.random() < 0.2:
        request.row_mask = chance.randbytes(chance.randint(0, 3))
    return mutated(request.SerializeToString(), chance)


def some_text_request(chance: random.Random, number: int) -> bytes:
    """A GenerateRequest, mostly for a few tokens, with bytes that may mean anything."""

    def some_ids(most: int) -> bytes:
        ids = [chance.randrange(VOCAB) for _ in range(chance.randint(0, most))]
        return np.array(ids, dtype="<i4").tobytes()

    request = teacher_pb2.GenerateRequest(
        request_id=number,
        prompt_ids=some_ids(9) + some_ids(1),
        max_new_tokens=chance.choice([0, 1, 2, 3, 5, 5, 5, 5]),
        draw=teacher_pb2.Draw(
            temperature=chance.choice(
                [0.0, 1.0, 1.0, 1.0, 2.0, 2.0, -1.0, float("nan"), float("inf")]
            ),
            top_k=chance.choice([0, 0, 1, 7, VOCAB, 1 << 31]),
            top_p=chance.choice([0.0, 0.0, 0.5, 1.0, 1.0, 1e-300, float("nan")]),
        ),
        target_temperature=chance.choice([0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, -1.0, float("inf")]),
        stop_ids=[chance.randrange(2 * VOCAB) for _ in range(chance.choice([0, 0, 0, 1]))],
        stop_strings=["a\0\n"] * chance.choice([0, 0, 0, 0, 0, 0, 1]),
        cancel=chance.random() < 0.05,
        seed=chance.getrandbits(64),
        session_id=chance.choice([b"", bytes(16)]),
    )
    if request.cancel:
        request.request_id = max(1, number - chance.randint(0, 3))
    for sample in range(chance.choice([0, 1, 1, 2, 3])):
        received = some_ids(4) if chance.random() < 0.2 else b""
        request.samples.add(
            number=chance.choice([sample, sample, sample, 1]), received_ids=received
        )
    kind = chance.choice(["", "", "top_k", "top_k", "sampled", "dense", "realized", "given_ids"])
    if kind == "top_k":
        request.targets.top_k.CopyFrom(teacher_pb2.TopK(k=chance.randint(0, 9), bits=7))
    elif kind:
        getattr(request.targets, kind).SetInParent()
        if kind == "dense":
            request.targets.dense.bits = chance.choice([16, 32, 32, 5])
        elif kind == "sampled":
            request.targets.sampled.n = chance.randint(0, 99)
    return mutated(request.SerializeToString(), chance)


async def score(channel: grpc.aio.Channel, seed: str, found: Counter[str]) -> None:
    """One stream of messages, up to the first that cannot be read."""
    await stream(channel, "Score", some_request, teacher_pb2.ScoreResponse, seed, found)


async def write_texts(channel: grpc.aio.Channel, seed: str, found: Counter[str]) -> None:
    """The same of Generate."""
    await stream(channel, "Generate", some_text_request, teacher_pb2.GenerateResponse, seed, found)


async def stream(
    channel: grpc.aio.Channel,
    method: str,
    make: Callable[[random.Random, int], bytes],
    response_type: Any,
    seed: str,
    found: Counter[str],
) -> None:
    chance = random.Random(seed)
    messages = [make(chance, number) for number in range(1, MESSAGES + 1)]
    call = channel.stream_stream(f"{SERVICE}/{method}")()

    async def write() -> None:
        try:
            for message in messages:
                await call.write(message)
            await call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # it has ended: the reader sees how

    writing = asyncio.create_task(write())
    try:
        async for data in call:
            answer = response_type.FromString(data)
            found[answer.error.reason or f"part of {method}"] += 1
    except grpc.aio.AioRpcError:
        pass
    await writing
    code, details = await call.code(), await call.details()
    if details == OF_THE_CLIENT:
        return
    found[code.name] += 1
    assert code in ALLOWED, details


async def ask(channel: grpc.aio.Channel, seed: str, found: Counter[str]) -> None:
    """One message to a method that has one."""
    chance = random.Random(seed)
    path = chance.choice(list(OTHERS))
    data = OTHERS[path]().SerializeToString()  # type: ignore[attr-defined]
    data = (
        mutated(data, chance) if chance.random() < 0.7 else chance.randbytes(chance.randint(0, 99))
    )
    try:
        await channel.unary_unary(path)(data, timeout=30)
        code, details = grpc.StatusCode.OK, ""
    except grpc.aio.AioRpcError as error:
        code, details = error.code(), error.details() or ""
    found[code.name] += 1
    assert code in ALLOWED, f"{path} {data!r}: {code} {details}"
    assert len(details) < 700


def test_messages_that_mean_anything_or_nothing_are_refused_and_change_nothing(serve, folder):
    print(f"seed {SEED}")
    with Fleet(serve, folder, 1) as fleet:
        with connect(fleet.own[0]) as teacher:
            wanted = [digest(targets) for _, targets in teacher.stream(SEQUENCES)]
        before = fleet.rss_nbytes(0)
        found: Counter[str] = Counter()

        async def everything() -> None:
            async with grpc.aio.insecure_channel(fleet.own[0]) as channel:
                await channel.unary_unary(f"{SERVICE}/Describe")(b"")  # now it is no stranger
                limit = asyncio.Semaphore(AT_ONCE)

                async def within(work) -> None:
                    async with limit:
                        await work

                async with asyncio.TaskGroup() as tasks:
                    for number in range(STREAMS):
                        tasks.create_task(within(score(channel, f"{SEED} s {number}", found)))
                    for number in range(TEXT_STREAMS):
                        tasks.create_task(within(write_texts(channel, f"{SEED} t {number}", found)))
                    for number in range(CALLS):
                        tasks.create_task(within(ask(channel, f"{SEED} c {number}", found)))

        IoThread.shared().run(everything())
        print(dict(found))
        assert found["part of Score"] > 100
        assert found["part of Generate"] > 40
        assert found["INVALID_ARGUMENT"] > 100
        assert "INTERNAL" not in found
        assert fleet.rss_nbytes(0) - before < GROWTH_NBYTES
        with connect(fleet.own[0]) as teacher:
            assert [digest(targets) for _, targets in teacher.stream(SEQUENCES)] == wanted
        fleet.assert_nothing_left()
        assert "Traceback" not in fleet.replicas[0].output()
        assert "incident" not in fleet.replicas[0].output()
