"""Answers of several parts: each is sent as soon as it is encoded, and an error may come after any."""

import asyncio
from functools import partial
from pathlib import Path

import grpc
import torch

from logit_codec import CodecError, decode
from protos import teacher_pb2, teacher_pb2_grpc
from tests.support.fleet import wait_until

VOCAB = 8009
LENGTH = 100
"""Its dense answer has 3.2 MB, in four parts."""
IDS = torch.arange(LENGTH, dtype=torch.int32).numpy().tobytes()


def gated(sign: Path) -> None:
    """Runs in the service: the second part of an answer waits for a file, or is an error if that
    says so."""
    from teacher_server.pipeline import encoding

    encode_parts = encoding.encode_parts

    def wrapped(*arguments, **options):
        for number, part in enumerate(encode_parts(*arguments, **options)):
            if number == 1:
                wait_until(sign.exists, "the client has the first part", 30)
                if sign.read_text() == "bad":
                    raise CodecError("not normalised", row=part[0])
            yield part

    encoding.encode_parts = wrapped


def request(number: int, sequences: int = 1) -> teacher_pb2.ScoreRequest:
    return teacher_pb2.ScoreRequest(
        request_id=number,
        token_ids=IDS * sequences,
        lengths=[LENGTH] * sequences,
        targets=teacher_pb2.TargetSpec(dense=teacher_pb2.Dense(bits=32)),
    )


async def rest_of(call) -> list[teacher_pb2.TargetsPart]:
    """The parts of an answer, up to the last."""
    parts = []
    while not parts or not parts[-1].last:
        response = await call.read()
        assert response.HasField("part"), response.error
        parts.append(response.part)
    return parts


def rows(parts) -> list[int]:
    """Every row that came, in the order of coming; what is decoded has as many."""
    assert all(decode(part.payload).num_rows == part.num_rows for part in parts)
    return [part.first_row + row for part in parts for row in range(part.num_rows)]


def test_a_part_is_sent_before_the_next_one_is_encoded(serve, model_folder, tmp_path: Path) -> None:
    sign = tmp_path / "sign"
    served = serve(model_folder("Gemma2", VOCAB), hook=partial(gated, sign))

    async def run() -> None:
        async with asyncio.timeout(60), grpc.aio.insecure_channel(served.address) as channel:
            call = teacher_pb2_grpc.TeacherStub(channel).Score()
            await call.write(request(1))
            first = (await call.read()).part
            assert first.first_row == 0
            assert not first.last
            sign.touch()
            rest = await rest_of(call)
            assert rows([first, *rest]) == list(range(LENGTH - 1))
            assert [part.last for part in rest] == [False] * (len(rest) - 1) + [True]
            await call.write(request(2, sequences=3))
            parts = await rest_of(call)
            for number in range(3):
                of_one = [part for part in parts if part.sequence == number]
                assert rows(of_one) == list(range(LENGTH - 1))

    asyncio.run(run())


def test_an_error_after_the_first_part_ends_that_request_alone_and_is_not_counted_as_delivered(
    serve, model_folder, tmp_path: Path
) -> None:
    sign = tmp_path / "sign"
    sign.write_text("bad")
    served = serve(
        model_folder("Gemma2", VOCAB),
        *("--ledger", str(tmp_path / "ledger")),
        hook=partial(gated, sign),
    )

    async def run() -> None:
        async with asyncio.timeout(60), grpc.aio.insecure_channel(served.address) as channel:
            stub = teacher_pb2_grpc.TeacherStub(channel)
            call = stub.Score()
            await call.write(request(1))
            first, error = await call.read(), await call.read()
            assert first.part.first_row == 0
            assert error.error.reason == "BAD_ROW"
            assert f"row {first.part.num_rows}" in error.error.message
            sign.write_text("good")
            await call.write(request(2))
            parts = await rest_of(call)
            assert rows(parts) == list(range(LENGTH - 1))
            asked = teacher_pb2.UsageRequest(since="2000-01-01")
            (row,) = (await stub.Usage(asked)).rows
            assert row.sequences == 2
            assert row.delivered_rows == LENGTH - 1
            assert row.delivered_bytes == sum(len(part.payload) for part in parts)

    asyncio.run(run())
