"""A client and a service of different versions: each works with the one of before."""

from typing import Any

import grpc
import pytest
import xxhash
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from logit_codec import decode
from protos import teacher_pb2
from student_trainer import connect
from tests.support import tiny
from tests.support.fleet import Fleet
from tests.support.oracle import VOCAB, digest, within
from tests.support.relay import Relay

SEQUENCES = tiny.random_sequences(12, VOCAB, seed=12)
ADDED_SINCE = {"ScoreResponse": {"full_check"}}
"""Fields that a client or service of before does not know."""


@pytest.fixture(scope="module")
def wanted(fleet: Fleet) -> list[str]:
    with connect(fleet.own[0]) as teacher:
        return [digest(targets) for _, targets in teacher.stream(SEQUENCES, targets="top_k:16")]


@pytest.fixture(scope="module")
def messages_of_before() -> Any:
    """message(name): a class of the proto without the fields of ADDED_SINCE."""
    file = descriptor_pb2.FileDescriptorProto()
    teacher_pb2.DESCRIPTOR.CopyToProto(file)
    for message in file.message_type:
        for field in list(message.field):
            if field.name in ADDED_SINCE.get(message.name, ()):
                message.field.remove(field)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)

    def message(name: str) -> Any:
        return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"logitstream.v1.{name}"))

    return message


def check_of_before(request: Any, response: Any) -> bytes:
    """What a client of before computes, as teacher.proto said it then."""
    part = response.part
    state = xxhash.xxh3_128(xxhash.xxh3_128_digest(request.SerializeToString(deterministic=True)))
    for number in (part.sequence, part.first_row, part.num_rows):
        state.update(number.to_bytes(4, "little"))
    state.update(bytes([part.last]))
    state.update(part.payload[-16:])
    return state.digest()


def test_a_client_of_before_is_answered_by_a_service_of_today(
    fleet: Fleet, wanted: list[str], messages_of_before
):
    request_class, response_class = map(messages_of_before, ("ScoreRequest", "ScoreResponse"))
    assert "full_check" not in response_class.DESCRIPTOR.fields_by_name
    requests = [
        request_class(
            request_id=number,
            token_ids=ids.numpy().astype("<i4").tobytes(),
            lengths=[len(ids)],
            targets={"top_k": {"k": 16, "bits": 7}},
        )
        for number, ids in enumerate(SEQUENCES)
    ]
    payloads: dict[int, bytes] = {}
    with grpc.insecure_channel(fleet.own[0]) as channel:
        score = channel.stream_stream(
            "/logitstream.v1.Teacher/Score",
            request_serializer=request_class.SerializeToString,
            response_deserializer=response_class.FromString,
        )
        for response in score(iter(requests), timeout=30):
            assert response.part.last
            assert response.check == check_of_before(requests[response.request_id], response)
            payloads[response.request_id] = response.part.payload
    assert [digest(decode(payloads[number])) for number in range(len(SEQUENCES))] == wanted


def test_a_client_of_today_is_answered_by_a_service_of_before(fleet: Fleet, wanted: list[str]):
    def change(response: teacher_pb2.ScoreResponse) -> list[teacher_pb2.ScoreResponse]:
        for name in ADDED_SINCE["ScoreResponse"]:
            assert getattr(response, name)
            response.ClearField(name)  # type: ignore[arg-type]
        return [response]

    with Relay(fleet.own[0]) as relay:
        relay.change = change
        with connect(relay.address) as teacher:
            pairs = teacher.stream(SEQUENCES, targets="top_k:16")
            assert within(30, lambda: [digest(targets) for _, targets in pairs]) == wanted
            assert teacher.counters.resent == teacher.counters.corrupt == 0
