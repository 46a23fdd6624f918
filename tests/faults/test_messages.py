"""Messages that arrive whole and are wrong: damaged, exchanged, repeated, lost (row 9)."""

import asyncio
import random
from collections.abc import Iterator

import grpc
import pytest

from protos import teacher_pb2
from student_trainer import ProtocolError, TargetsCorrupt, TeacherError, TeacherOverloaded, connect
from student_trainer.client import answers, dispatch, links, stalls
from student_trainer.teachers.request import Piece, ScoreOptions
from tests.support import tiny
from tests.support.fleet import Fleet
from tests.support.oracle import VOCAB, digest, within
from tests.support.relay import Relay

SEQUENCES = tiny.random_sequences(80, VOCAB, seed=11)


@pytest.fixture
def relay(fleet: Fleet) -> Iterator[Relay]:
    with Relay(fleet.own[0]) as relay:
        yield relay
    fleet.assert_nothing_left()


@pytest.fixture(scope="module")
def wanted(fleet: Fleet) -> list[str]:
    with connect(fleet.own[0]) as teacher:
        return [digest(targets) for _, targets in teacher.stream(SEQUENCES)]


def changed(kind: str, seed: int):
    """A change of about every eighth answer."""
    chance = random.Random(seed)
    kept: list[teacher_pb2.ScoreResponse] = []

    def change(response: teacher_pb2.ScoreResponse) -> list[teacher_pb2.ScoreResponse]:
        if kept:  # the second of a pair
            (first,) = kept
            kept.clear()
            if kind == "exchanged payloads":
                first.part.payload, response.part.payload = (
                    response.part.payload,
                    first.part.payload,
                )
            elif kind == "exchanged checks":
                first.check, response.check = response.check, first.check
            else:
                first.request_id, response.request_id = response.request_id, first.request_id
            return [first, response]
        if chance.random() > 0.125:
            return [response]
        part = response.part
        if kind.startswith("exchanged"):
            kept.append(response)
            return []
        if kind == "repeated":
            return [response, response]
        if kind == "lost":
            return []
        if kind == "truncated":
            part.payload = part.payload[: chance.randrange(len(part.payload))]
        elif kind == "flipped":
            place = chance.randrange(len(part.payload))
            payload = bytearray(part.payload)
            payload[place] ^= 1 << chance.randrange(8)
            part.payload = bytes(payload)
        elif kind == "other rows":
            part.num_rows += 1
        elif kind == "not the last":
            part.last = False
        elif kind == "another teacher":
            part.teacher_fingerprint = "0" * 64
        elif kind == "another time":
            part.timing.forward_us ^= 1 << 40
        elif kind == "another number":
            response.request_id ^= 1 << chance.randrange(40)
        return [response]

    return change


@pytest.mark.parametrize(
    "kind",
    [
        "exchanged payloads",
        "exchanged checks",
        "exchanged numbers",
        "repeated",
        "lost",
        "truncated",
        "flipped",
        "other rows",
        "not the last",
        "another teacher",
        "another time",
        "another number",
    ],
)
def test_a_wrong_message_is_counted_and_asked_for_again(
    relay: Relay, wanted, monkeypatch: pytest.MonkeyPatch, kind: str
):
    monkeypatch.setattr(stalls, "STALL_S", 0.5)
    monkeypatch.setattr(links, "PROBE_AFTER_S", 0.2)
    monkeypatch.setattr(answers, "MAX_ATTEMPTS", 20)
    relay.change = changed(kind, seed=3)
    with connect(relay.address) as teacher:
        pairs = teacher.stream(SEQUENCES, ahead=40)
        assert within(60, lambda: [digest(targets) for _, targets in pairs]) == wanted
        counters = teacher.counters
        if kind == "repeated":
            assert counters.resent == counters.corrupt == counters.reconnects == 0
        else:
            assert counters.resent > 0
        if kind not in ("repeated", "lost", "another number"):
            assert counters.corrupt > 0
            assert counters.reconnects == 0


def test_a_batch_that_is_said_to_have_taken_days_does_not_delay_the_next_question(
    relay: Relay, wanted, monkeypatch: pytest.MonkeyPatch
):
    """Of a service of before `full_check`, a flipped time cannot be told from a true one."""
    monkeypatch.setattr(stalls, "STALL_S", 0.5)
    seen = 0

    def change(response: teacher_pb2.ScoreResponse) -> list[teacher_pb2.ScoreResponse]:
        nonlocal seen
        seen += 1
        response.ClearField("full_check")
        response.part.timing.forward_us ^= (seen == 1) << 40
        return [] if seen == 20 else [response]

    relay.change = change
    with connect(relay.address) as teacher:
        pairs = teacher.stream(SEQUENCES, ahead=40)
        assert within(60, lambda: [digest(targets) for _, targets in pairs]) == wanted
        assert teacher.counters.corrupt == 0
        assert teacher.counters.resent > 0


def test_the_only_request_is_looked_after_also_when_it_was_to_come_back_later(
    relay: Relay, wanted, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stalls, "STALL_S", 0.5)
    monkeypatch.setattr(links, "PROBE_AFTER_S", 0.2)
    later = teacher_pb2.RequestError(
        code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0],
        reason="RATE_LIMIT",
        message="come back later",
        retry_after_ms=1000,
    )
    seen = 0

    def change(response: teacher_pb2.ScoreResponse) -> list[teacher_pb2.ScoreResponse]:
        nonlocal seen
        seen += 1
        if seen == 1:
            return [relay.refusal(response, later)]
        return [] if seen == 2 else [response]

    relay.change = change
    with connect(relay.address) as teacher:
        pairs = teacher.stream(SEQUENCES[:1])
        assert within(30, lambda: [digest(targets) for _, targets in pairs]) == wanted[:1]
        assert seen == 3


@pytest.mark.slow
def test_an_answer_with_a_flipped_number_is_asked_for_again_within_15_s(relay: Relay, wanted):
    seen = 0

    def change(response: teacher_pb2.ScoreResponse) -> list[teacher_pb2.ScoreResponse]:
        nonlocal seen
        seen += 1
        if seen == len(SEQUENCES):  # the very last: nothing else will arrive after it
            response.request_id ^= 1
        return [response]

    relay.change = change
    with connect(relay.address) as teacher:
        pairs = teacher.stream(SEQUENCES, ahead=40)
        assert within(5 * 15.0, lambda: [digest(targets) for _, targets in pairs]) == wanted


def test_targets_that_are_always_damaged_are_an_error(relay: Relay):
    def change(response: teacher_pb2.ScoreResponse) -> list[teacher_pb2.ScoreResponse]:
        response.part.payload = response.part.payload[:-1]
        return [response]

    relay.change = change
    with (
        connect(relay.address) as teacher,
        pytest.raises(TargetsCorrupt, match=f"stream item 0.*3 times.*{relay.address}"),
    ):
        within(30, lambda: list(teacher.stream(SEQUENCES)))


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, TeacherOverloaded),  # a flipped length of a message
        (grpc.StatusCode.UNIMPLEMENTED, ProtocolError),  # a flipped name of the method
    ],
)
def test_a_stream_that_ends_with_a_strange_status_is_tried_twice(
    relay: Relay, wanted, code: grpc.StatusCode, kind: type[Exception]
):
    relay.refuse = [code]
    with connect(relay.address) as teacher:
        pairs = teacher.stream(SEQUENCES)
        assert within(30, lambda: [digest(targets) for _, targets in pairs]) == wanted
        relay.refuse = [code] * 9
    with connect(relay.address) as teacher, pytest.raises(kind, match="refused on the way"):
        within(30, lambda: list(teacher.stream(SEQUENCES)))


@pytest.mark.parametrize("method", ["Describe", "Score"])
def test_an_answer_that_is_no_message_does_not_stop_the_client(relay: Relay, wanted, method: str):
    relay.garbage = [method]
    with connect(relay.address) as teacher:
        pairs = teacher.stream(SEQUENCES)
        assert within(30, lambda: [digest(targets) for _, targets in pairs]) == wanted
        assert teacher.counters.corrupt == (method == "Score")
    assert not relay.garbage


def test_bytes_that_are_no_request_end_the_stream_after_the_answers(fleet: Fleet):
    ids = SEQUENCES[0].numpy().astype("<i4").tobytes()
    good = teacher_pb2.ScoreRequest(
        request_id=1,
        token_ids=ids,
        lengths=[len(SEQUENCES[0])],
        targets=teacher_pb2.TargetSpec(top_k=teacher_pb2.TopK(k=4, bits=16)),
    ).SerializeToString()
    with grpc.insecure_channel(fleet.own[0]) as channel:
        call = channel.stream_stream(
            "/logitstream.v1.Teacher/Score",
            response_deserializer=teacher_pb2.ScoreResponse.FromString,
        )(iter([good, b"\xff", good]), timeout=10)
        assert next(call).part.last
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
    assert "not a request of" in caught.value.details()  # type: ignore[attr-defined]
    assert "Traceback" not in fleet.replicas[0].output()


@pytest.mark.parametrize(
    "kind", [RuntimeError, MemoryError, ValueError, KeyError, StopIteration, NotImplementedError]
)
@pytest.mark.parametrize(
    ("module", "name"),
    [(answers, "assemble"), (dispatch, "is_what_was_written"), (dispatch, "request_digest")],
    ids=["decoding", "receiving", "submitting"],
)
def test_a_bug_of_the_client_reaches_the_caller_with_its_cause(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], module, name: str
):
    def fail(*_: object) -> None:
        raise kind("a bug")

    with connect(fleet.own[0]) as teacher:
        monkeypatch.setattr(module, name, fail)
        with pytest.raises(ProtocolError, match=f"{kind.__name__}.*a bug") as caught:
            within(20, lambda: list(teacher.stream(SEQUENCES)))
        causes: list[BaseException] = [caught.value]
        while (cause := causes[-1].__cause__) is not None:
            causes.append(cause)
        assert isinstance(causes[-1], kind)
        monkeypatch.undo()
        assert within(20, lambda: len(list(teacher.stream(SEQUENCES)))) == len(SEQUENCES)


def test_a_bug_in_writing_reaches_the_caller(fleet: Fleet, monkeypatch: pytest.MonkeyPatch):
    find_to_write = dispatch.Dispatch.find_to_write
    failed: list[int] = []

    def fail_once(self: dispatch.Dispatch, item: int):
        # Once: a link that is opened anew would fail again, perhaps while the second stream begins.
        if not failed:
            failed.append(item)
            raise ValueError("a bug")
        return find_to_write(self, item)

    with connect(fleet.own[0]) as teacher:
        monkeypatch.setattr(dispatch.Dispatch, "find_to_write", fail_once)
        with pytest.raises(ProtocolError, match="a bug"):
            within(20, lambda: list(teacher.stream(SEQUENCES)))
        assert within(20, lambda: len(list(teacher.stream(SEQUENCES)))) == len(SEQUENCES)


def test_what_is_submitted_while_another_thread_closes_is_an_error(fleet: Fleet):
    with connect(fleet.own[0]) as teacher:
        teacher._io.run(teacher._session.close())
        future = teacher.submit(Piece(SEQUENCES[0]), ScoreOptions.of("top_k:4", 1.0, 0, 0))
        with pytest.raises(TeacherError, match="closed"):
            future.result(20)


@pytest.mark.parametrize("turns", range(5))
def test_closing_ends_although_the_client_is_just_woken(fleet: Fleet, turns: int):
    """A cancellation that comes with the event a task waits for must not be lost."""
    teacher = connect(fleet.own[0])
    next(teacher.stream(SEQUENCES, ahead=64))  # so that answers are outstanding

    async def close() -> None:
        teacher._session._keeper.wake.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        await teacher._session.close()

    within(10, lambda: teacher._io.run(close()))
