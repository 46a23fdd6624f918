"""The Generate stream of a real server, with a client of its own: what is sent, refused, cancelled."""

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from logit_codec import Targets, decode
from protos import teacher_pb2, teacher_pb2_grpc
from protos.answer_check import generation_check, request_digest
from student_trainer import LocalTeacher
from tests.conftest import Served, one_torch_thread
from tests.support import tiny

VOCAB = 101
PROMPT = [5, 9, 33, 7, 50]
SAMPLED = teacher_pb2.TargetSpec(sampled=teacher_pb2.Sampled(n=16))
TOP_K = teacher_pb2.TargetSpec(top_k=teacher_pb2.TopK(k=4, bits=16))
one_thread = pytest.fixture(autouse=True, scope="module")(one_torch_thread)


@pytest.fixture(scope="module")
def served(serve, model_folder) -> Served:
    return serve(model_folder("Llama", VOCAB), "--standalone", "--threads", "1")


@pytest.fixture(scope="module")
def local() -> LocalTeacher:
    return LocalTeacher(tiny.make_model("Llama", VOCAB))


def pack(ids: Sequence[int]) -> bytes:
    return np.array(ids, dtype="<i4").tobytes()


def make_request(number: int = 1, **fields: Any) -> teacher_pb2.GenerateRequest:
    return teacher_pb2.GenerateRequest(
        **{
            "request_id": number,
            "prompt_ids": pack(PROMPT),
            "targets": TOP_K,
            "max_new_tokens": 20,
            "ignore_teacher_stop_ids": True,
            **fields,
        }
    )


class Text:
    """What came of one sample."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.targets: list[Targets] = []
        self.finish = 0


def take(
    request: teacher_pb2.GenerateRequest,
    response: teacher_pb2.GenerateResponse,
    texts: dict[int, Text],
    received: int = 0,
) -> None:
    """Checks a part and appends it."""
    assert response.HasField("part"), response.error
    assert response.check == generation_check(request_digest(request), response)
    part = response.part
    text = texts.setdefault(part.sample, Text())
    ids = np.frombuffer(part.token_ids, "<i4").tolist()
    assert part.first == len(PROMPT) + received + len(text.ids)
    assert not text.finish
    text.ids += ids
    if part.payload:
        text.targets.append(decode(part.payload))
        assert len(text.targets[-1]) == len(ids)
    text.finish = part.finish


async def generate(
    address: str, request: teacher_pb2.GenerateRequest, received: int = 0
) -> dict[int, Text]:
    """Sends one request and returns its texts by sample."""
    texts: dict[int, Text] = {}
    async with grpc.aio.insecure_channel(address) as channel:
        call = teacher_pb2_grpc.TeacherStub(channel).Generate()
        await call.write(request)
        while True:
            response = await call.read()
            take(request, response, texts, received)
            if response.part.last:
                break
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
    return texts


async def ask_usage(address: str) -> teacher_pb2.UsageRow:
    """What has been used so far, without teams."""
    async with grpc.aio.insecure_channel(address) as channel:
        usage = await teacher_pb2_grpc.TeacherStub(channel).Usage(teacher_pb2.UsageRequest())
    return usage.rows[0] if usage.rows else teacher_pb2.UsageRow()


async def refuse(address: str, *requests: teacher_pb2.GenerateRequest) -> list[Any]:
    """Sends requests that are refused on one stream; returns the errors in order."""
    async with grpc.aio.insecure_channel(address) as channel:
        call = teacher_pb2_grpc.TeacherStub(channel).Generate()
        errors = []
        for request in requests:
            await call.write(request)
            response = await call.read()
            assert response.HasField("error"), response
            assert response.request_id == request.request_id
            assert response.check == generation_check(request_digest(request), response)
            errors.append(response.error)
        # The stream goes on after each of them.
        good = make_request(99, max_new_tokens=1)
        await call.write(good)
        assert (await call.read()).part.last
    return errors


def write_here(local: LocalTeacher, targets: str | None, num_new: int, **options: Any) -> list[Any]:
    return list(
        local.generate(
            [PROMPT],
            targets=targets,
            max_new_tokens=num_new,
            ignore_teacher_stop_ids=True,
            **options,
        )
    )


@pytest.mark.parametrize(
    ("message", "spec"), [(SAMPLED, "sampled:16"), (TOP_K, "top_k:4,bits=16"), (None, None)]
)
def test_samples_and_targets_are_those_of_the_same_teacher_here(served, local, message, spec):
    request = make_request(
        targets=message, samples=[{"number": 0}, {"number": 7}], seed=3, max_new_tokens=100
    )
    texts = asyncio.run(generate(served.address, request))
    mine = write_here(local, spec, 100, seed=3, num_samples=8)
    for number, text in texts.items():
        assert text.ids == mine[number].token_ids.tolist()
        assert text.finish == teacher_pb2.FINISH_LENGTH
        if spec is None:
            assert not text.targets
        else:
            found = Targets.cat(text.targets)._tensors()
            expected = mine[number].targets._tensors()
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_text_goes_on_from_what_was_received_and_is_billed_once(served, local):
    (mine,) = write_here(local, "sampled:16", 100, seed=4)
    ids = mine.token_ids.tolist()
    request = make_request(
        targets=SAMPLED,
        seed=4,
        max_new_tokens=100,
        samples=[{"number": 0, "received_ids": pack(ids[:70])}],
    )
    before = asyncio.run(ask_usage(served.address))
    texts = asyncio.run(generate(served.address, request, received=70))
    assert texts[0].ids == ids[70:]
    after = asyncio.run(ask_usage(served.address))
    # The first 64 new tokens were counted where they were written; those from there on are counted here,
    # the six among them that came from elsewhere too.
    assert after.delivered_rows - before.delivered_rows == 100 - 64
    assert after.sequences - before.sequences == 1
    assert after.tokens - before.tokens == len(PROMPT) + 100
    whole = make_request(targets=SAMPLED, seed=4, max_new_tokens=100)
    assert asyncio.run(generate(served.address, whole))[0].ids == ids
    last = asyncio.run(ask_usage(served.address))
    assert last.delivered_rows - after.delivered_rows == 100


def test_the_likeliest_tokens_and_a_stop_id(served, local):
    (mine,) = write_here(local, None, 30, temperature=0.0)
    ids = mine.token_ids.tolist()
    stop = ids[9]
    request = make_request(
        draw={"temperature": 0.0}, max_new_tokens=30, stop_ids=[stop], targets=None
    )
    text = asyncio.run(generate(served.address, request))[0]
    assert text.ids == ids[: ids.index(stop) + 1]
    assert text.finish == teacher_pb2.FINISH_STOP


REFUSALS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt_ids": b""}, "EMPTY_REQUEST", "prompt_ids"),
    ({"prompt_ids": b"123"}, "LENGTHS_DO_NOT_FIT", "prompt_ids"),
    ({"prompt_ids": pack([5, VOCAB])}, "TOKEN_ID_OUT_OF_RANGE", "prompt_ids"),
    ({"prompt_ids": pack([-1])}, "TOKEN_ID_OUT_OF_RANGE", "prompt_ids"),
    ({"max_new_tokens": 0}, "BAD_MAX_NEW_TOKENS", "max_new_tokens"),
    ({"max_new_tokens": 10_000}, "TOO_MANY_TOKENS", "max_new_tokens"),
    ({"samples": [{"number": 1}, {"number": 1}]}, "BAD_SAMPLES", "samples"),
    ({"samples": [{"number": i} for i in range(300)]}, "TOO_MANY_SEQUENCES", "samples"),
    (
        {"samples": [{"received_ids": pack([1] * 20)}]},
        "BAD_MAX_NEW_TOKENS",
        "max_new_tokens",
    ),
    (
        {"samples": [{"received_ids": pack([VOCAB])}]},
        "TOKEN_ID_OUT_OF_RANGE",
        "samples.received_ids",
    ),
    (
        {"samples": [{"received_ids": pack([8])}], "stop_ids": [8]},
        "BAD_SAMPLES",
        "samples",
    ),
    (
        {"targets": {"given_ids": {"bits": 16}}},
        "BAD_TARGETS",
        "targets.given_ids",
    ),
    ({"targets": {"top_k": {"k": 0, "bits": 7}}}, "TOP_K_OUT_OF_RANGE", "targets.top_k.k"),
    ({"draw": {"temperature": -1.0}}, "TEMPERATURE_OUT_OF_RANGE", "draw.temperature"),
    ({"draw": {"temperature": float("nan")}}, "TEMPERATURE_OUT_OF_RANGE", "draw.temperature"),
    ({"draw": {"top_p": 1.5}}, "TOP_P_OUT_OF_RANGE", "draw.top_p"),
    ({"target_temperature": 1e9}, "TEMPERATURE_OUT_OF_RANGE", "target_temperature"),
    ({"stop_ids": [VOCAB]}, "TOKEN_ID_OUT_OF_RANGE", "stop_ids"),
    ({"stop_strings": ["x"]}, "BAD_STOP_STRINGS", "stop_strings"),
    ({"stop_strings": ["x" * 300]}, "BAD_STOP_STRINGS", "stop_strings"),
    ({"level": 9}, "BAD_LEVEL", "level"),
    ({"session_id": b"123"}, "BAD_SESSION_ID", "session_id"),
    ({"teacher_fingerprint": "ab"}, "OTHER_TEACHER", "teacher_fingerprint"),
]


def test_what_cannot_be_written_is_refused_by_name_and_the_stream_goes_on(served):
    requests = [make_request(i, **fields) for i, (fields, _, _) in enumerate(REFUSALS)]
    errors = asyncio.run(refuse(served.address, *requests))
    found = [(error.reason, error.field) for error in errors]
    assert found == [(reason, field) for _, reason, field in REFUSALS]
    assert all(len(error.message) > 20 for error in errors)


async def cancel(address: str) -> tuple[Any, Any]:
    async with grpc.aio.insecure_channel(address) as channel:
        call = teacher_pb2_grpc.TeacherStub(channel).Generate()
        await call.write(make_request(1, max_new_tokens=240))
        await call.write(make_request(1))
        twice = await call.read()
        while not twice.HasField("error"):
            twice = await call.read()
        await call.write(teacher_pb2.GenerateRequest(request_id=77, cancel=True))
        await call.write(teacher_pb2.GenerateRequest(request_id=1, cancel=True))
        while (response := await call.read()).HasField("part"):
            pass
        # Its id is free again, and nothing of the old one comes any more.
        again = make_request(1, max_new_tokens=3)
        await call.write(again)
        texts: dict[int, Text] = {}
        take(again, await call.read(), texts)
        assert len(texts[0].ids) == 3
        return twice.error, response.error


def test_a_request_is_cancelled_and_one_id_is_not_used_twice(served):
    twice, cancelled = asyncio.run(cancel(served.address))
    assert (twice.reason, twice.code) == ("DUPLICATE_REQUEST_ID", 3)
    assert (cancelled.reason, cancelled.code) == ("CANCELLED", 1)


def test_a_teacher_that_writes_nothing_says_why(serve, model_folder):
    served = serve(
        model_folder("Llama", VOCAB), "--standalone", "--threads", "1", "--generation.pool-mib", "0"
    )

    async def ask() -> Any:
        async with grpc.aio.insecure_channel(served.address) as channel:
            stub = teacher_pb2_grpc.TeacherStub(channel)
            info = await stub.Describe(teacher_pb2.DescribeRequest())
            call = stub.Generate()
            await call.write(make_request())
            return info, (await call.read()).error

    info, error = asyncio.run(ask())
    assert info.max_generation_tokens == 0
    assert (error.reason, error.code) == ("CANNOT_GENERATE", 9)
    assert "--generation.pool-mib 0" in error.message
