"""Requests that are larger, deeper or more than allowed: at the limit and one past it (row 19).

What one request may ask for in tokens, sequences, k, rows and bytes of an answer is tried at its
limits in tests/teacher_server/admission/test_requests.py; here is what needs a connection.
"""

from collections.abc import Iterator

import grpc
import numpy as np
import pytest

from protos import teacher_pb2, teacher_pb2_grpc
from tests.support.fleet import Fleet
from tests.support.oracle import VOCAB

LIMIT = 1 << 20
"""--admission.max-request-mib 1."""
TRANSPORT_LIMIT = 4 * LIMIT
METHODS = "/logitstream.v1.Teacher/"


@pytest.fixture(scope="module")
def fleet(serve, folder) -> Iterator[Fleet]:
    flags = ("--admission.max-request-mib", "1", "--admission.max-request-tokens", str(1 << 20))
    with Fleet(serve, folder, 1, flags=flags) as fleet:
        yield fleet


@pytest.fixture
def channel(fleet: Fleet) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(fleet.own[0]) as channel:
        yield channel
        assert scored(channel) == "", "the service goes on"
    assert "Traceback" not in fleet.replicas[0].output()


def request(**fields: object) -> teacher_pb2.ScoreRequest:
    given = {
        "token_ids": np.arange(8, dtype="<i4").tobytes(),
        "lengths": [8],
        "targets": teacher_pb2.TargetSpec(top_k=teacher_pb2.TopK(k=4, bits=16)),
        "request_id": 1,
        **fields,
    }
    return teacher_pb2.ScoreRequest(**given)


def scored(channel: grpc.Channel, **fields: object) -> str:
    """The reason for which a request is refused; empty if it is answered."""
    stub = teacher_pb2_grpc.TeacherStub(channel)
    answers = list(stub.Score(iter([request(**fields)]), timeout=60))
    return answers[-1].error.reason


def padded(nbytes: int) -> dict[str, object]:
    """A request of exactly so many bytes, of which the sequence is the smallest part."""
    short = nbytes - 100
    while (missing := nbytes - request(row_mask=bytes(short)).ByteSize()) != 0:
        short += missing
    return {"row_mask": bytes(short)}


@pytest.mark.parametrize(
    ("nbytes", "reason"),
    [
        (LIMIT, "ROW_MASK_DOES_NOT_FIT"),  # it was looked at
        (LIMIT + 1, "REQUEST_TOO_LARGE"),
        (TRANSPORT_LIMIT, "REQUEST_TOO_LARGE"),
    ],
)
def test_a_message_up_to_the_transports_limit_is_refused_by_a_message(
    channel: grpc.Channel, nbytes: int, reason: str
):
    assert scored(channel, **padded(nbytes)) == reason


def test_one_byte_more_ends_the_stream_and_nothing_else(channel: grpc.Channel):
    with pytest.raises(grpc.RpcError) as caught:
        scored(channel, **padded(TRANSPORT_LIMIT + 1))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"lengths": [2] * 500_000}, "TOO_MANY_SEQUENCES"),
        ({"lengths": [2**32 - 1] * 1000}, "LENGTHS_DO_NOT_FIT"),
        ({"first_rows": [0] * 500_000}, "FIRST_ROWS_DO_NOT_FIT"),
        ({"lengths": [2**32 - 1]}, "LENGTHS_DO_NOT_FIT"),
        (
            {"targets": teacher_pb2.TargetSpec(top_k=teacher_pb2.TopK(k=2**32 - 1, bits=16))},
            "TOP_K_OUT_OF_RANGE",
        ),
        (
            {"targets": teacher_pb2.TargetSpec(sampled=teacher_pb2.Sampled(n=2**32 - 1))},
            "BAD_TARGETS",
        ),
        ({"session_id": bytes(1000)}, "BAD_SESSION_ID"),
        ({"teacher_fingerprint": "f" * 500_000}, "OTHER_TEACHER"),
    ],
)
def test_huge_counts_are_refused_without_room_for_what_they_name(
    fleet: Fleet, channel: grpc.Channel, fields: dict, reason: str
):
    assert scored(channel) == ""
    peak = Peak(fleet)
    assert scored(channel, **fields) == reason
    assert peak.growth_nbytes() < 16 << 20


def test_the_largest_message_takes_no_more_than_a_few_times_its_size(
    fleet: Fleet, channel: grpc.Channel
):
    assert scored(channel, **padded(TRANSPORT_LIMIT)) == "REQUEST_TOO_LARGE"
    peak = Peak(fleet)
    assert scored(channel, **padded(TRANSPORT_LIMIT)) == "REQUEST_TOO_LARGE"
    # As received, as one piece, as a message; the rest is the allocator's.
    assert peak.growth_nbytes() < 4 * TRANSPORT_LIMIT


class Peak:
    """The largest resident memory of a replica's process since now."""

    def __init__(self, fleet: Fleet) -> None:
        self._pid = fleet.replicas[0].process.pid
        with open(f"/proc/{self._pid}/clear_refs", "w") as file:
            file.write("5")
        self._before = self._read("VmRSS")

    def _read(self, name: str) -> int:
        with open(f"/proc/{self._pid}/status") as file:
            (line,) = [line for line in file if line.startswith(name)]
        return int(line.split()[1]) << 10

    def growth_nbytes(self) -> int:
        return self._read("VmHWM") - self._before


def nested(depth: int) -> bytes:
    """An unknown group in a group in a group."""
    return b"\xa3\x06" * depth + b"\xa4\x06" * depth


@pytest.mark.parametrize("depth", [101, 10_000, 500_000])
def test_deep_nesting_is_no_message_and_costs_nothing(channel: grpc.Channel, depth: int):
    score = channel.stream_stream(f"{METHODS}Score")
    with pytest.raises(grpc.RpcError) as caught:
        list(score(iter([nested(depth)]), timeout=10))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]


def test_nesting_that_a_parser_allows_is_ignored(channel: grpc.Channel):
    data = request().SerializeToString() + nested(20)
    call = channel.stream_stream(f"{METHODS}Score")(iter([data]), timeout=10)
    (answer,) = [teacher_pb2.ScoreResponse.FromString(one) for one in call]
    assert answer.part.last


def accepted(channel: grpc.Channel, nbytes: int) -> bool:
    """Whether a call with so many bytes of metadata is answered."""
    stub = teacher_pb2_grpc.TeacherStub(channel)
    call = stub.Describe.future(
        teacher_pb2.DescribeRequest(), timeout=10, metadata=[("x-padding", "x" * nbytes)]
    )
    if call.code() == grpc.StatusCode.OK:
        return True
    assert call.code() == grpc.StatusCode.RESOURCE_EXHAUSTED, call.details()
    return False


def test_metadata_has_a_limit_and_a_few_bytes_more_are_refused(channel: grpc.Channel):
    low, high = 4096, 64 << 10
    assert accepted(channel, low)
    assert not accepted(channel, high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if accepted(channel, middle) else (low, middle)
    # The deadline of a call is metadata too, and its text is longer or shorter by some bytes.
    assert accepted(channel, low - 8)
    assert not accepted(channel, low + 8)
    assert 15 << 10 < low < 17 << 10, "--- of all entries together: 16 KiB"
    assert not accepted(channel, 1 << 20)


def test_tokens_at_the_edge_of_the_vocabulary(channel: grpc.Channel):
    for last, reason in (
        (VOCAB - 1, ""),
        (VOCAB, "TOKEN_ID_OUT_OF_RANGE"),
        (-1, "TOKEN_ID_OUT_OF_RANGE"),
    ):
        ids = np.array([0, 1, last], dtype="<i4").tobytes()
        assert scored(channel, token_ids=ids, lengths=[3]) == reason
