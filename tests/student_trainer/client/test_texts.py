"""Texts of a service whose replicas die, drain, refuse and send damaged parts."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from protos import teacher_pb2
from student_trainer import connect
from student_trainer.client import stalls, texts
from student_trainer.errors import (
    IncompatibleTeacher,
    InvalidRequest,
    TargetsCorrupt,
    TeacherInternalError,
    TeacherOverloaded,
)
from student_trainer.teachers.generation import Generation
from student_trainer.teachers.local import LocalTeacher
from tests.support import tiny
from tests.support.fleet import wait_until
from tests.support.oracle import digest
from tests.support.text_service import TextService

VOCAB = 300
PROMPTS = [
    torch.randint(2, VOCAB, (length,), generator=torch.Generator().manual_seed(length))
    for length in (1, 5, 64, 65, 30, 40)
]
ARGUMENTS: dict[str, Any] = {"max_new_tokens": 20, "num_samples": 2, "targets": "top_k:8"}


@pytest.fixture(scope="module")
def wanted() -> list[tuple[Any, ...]]:
    return told(LocalTeacher(tiny.make_model("Llama", VOCAB)).generate(PROMPTS, **ARGUMENTS))


@pytest.fixture
def services() -> Iterator[list[TextService]]:
    found = [TextService(tiny.make_model("Llama", VOCAB), replica_id=name) for name in "ab"]
    found[0].others, found[1].others = [found[1]], [found[0]]
    yield found
    for one in found:
        one.stop()


def told(texts: Iterator[Generation]) -> list[tuple[Any, ...]]:
    """What must be the same wherever a text was written."""
    return [
        (
            one.index,
            one.sample,
            one.token_ids.tolist(),
            one.finish,
            one.targets and digest(one.targets),
        )
        for one in texts
    ]


def test_texts_of_a_service_are_those_of_a_local_teacher(services, wanted):
    with connect(services[0].address) as teacher:
        assert told(teacher.generate(PROMPTS, **ARGUMENTS)) == wanted
        assert teacher.counters.texts == len(wanted)
        assert teacher.counters.new_tokens == sum(len(one[2]) for one in wanted)
        assert teacher.counters.rows == teacher.counters.new_tokens
        unordered = told(teacher.generate(PROMPTS, **ARGUMENTS, as_finished=True))
        assert sorted(unordered) == wanted
        without = told(teacher.generate(PROMPTS, **{**ARGUMENTS, "targets": None}))
        assert [one[:4] for one in without] == [one[:4] for one in wanted]
        assert all(one[4] is None for one in without)
        assert teacher.counters.resent == teacher.counters.reconnects == 0


def test_a_replica_that_dies_in_the_middle_leaves_no_trace(services, wanted):
    first, second = services
    first.die_after = 9
    for one in services:
        one.pause_s = 0.005
    with connect([one.address for one in services]) as teacher:
        assert told(teacher.generate(PROMPTS, **ARGUMENTS)) == wanted
        assert teacher.counters.reconnects >= 1
    resumed = [
        len(sample.received_ids) // 4
        for request in second.requests
        for sample in request.samples
        if sample.received_ids
    ]
    assert resumed, "nothing was resumed in the middle"
    items = [one.item_id for one in (*first.requests, *second.requests) if not one.cancel]
    assert len(set(items)) == len(PROMPTS)
    # What the first had delivered was not written again.
    keys = {request.item_id: request.prompt_ids for request in first.requests}
    assert all(keys.get(one.item_id, one.prompt_ids) == one.prompt_ids for one in second.requests)
    written = len(first.delivered) + len(second.delivered)
    parts = sum(-(-len(one[2]) // 3) for one in wanted)
    assert written <= parts + len(PROMPTS) * 2


def test_closing_the_iterator_cancels_what_is_outstanding(services):
    for one in services:
        one.pause_s = 0.05
    free = [one.num_free_pages for one in services]
    with connect(services[0].address) as teacher:
        stream = teacher.generate(PROMPTS, max_new_tokens=150, ignore_teacher_stop_ids=True)
        next(iter(teacher.generate([[5]], max_new_tokens=1)))
        pulled = teacher.generate(
            PROMPTS, max_new_tokens=150, as_finished=True, stop_ids=range(100)
        )
        next(pulled)
        pulled.close()
        stream.close()
        wait_until(lambda: [one.num_free_pages for one in services] == free, "pages come back", 10)
        assert any(request.cancel for one in services for request in one.requests)
        assert len(list(teacher.generate(PROMPTS, max_new_tokens=3))) == len(PROMPTS)


def test_damaged_parts_are_asked_for_again(services, wanted):
    damaged = []

    def change(response: teacher_pb2.GenerateResponse, number: int) -> None:
        if number in (4, 11, 17):
            damaged.append(number)
            data = bytearray(response.part.token_ids)
            data[0] ^= 1
            response.part.token_ids = bytes(data)

    services[0].change = change
    with connect(services[0].address) as teacher:
        assert told(teacher.generate(PROMPTS, **ARGUMENTS)) == wanted
        assert 1 <= teacher.counters.corrupt <= len(damaged) == 3


def test_a_payload_that_is_damaged_inside_is_found_when_it_is_decoded(services, wanted):
    def change(response: teacher_pb2.GenerateResponse, number: int) -> None:
        if number in (4, 11):
            data = bytearray(response.part.payload)
            data[len(data) // 2] ^= 1  # the container's digest stays, so the check does not see it
            response.part.payload = bytes(data)

    services[0].change = change
    with connect(services[0].address) as teacher:
        assert told(teacher.generate(PROMPTS, **ARGUMENTS)) == wanted
        assert teacher.counters.corrupt >= 1


def test_a_service_that_damages_everything_is_given_up(services):
    def change(response: teacher_pb2.GenerateResponse, number: int) -> None:
        response.part.first += 1

    for one in services:
        one.change = change
    with (
        connect(services[0].address) as teacher,
        pytest.raises(TargetsCorrupt, match=r"prompt 0: .*3 times"),
    ):
        next(teacher.generate(PROMPTS, **ARGUMENTS))


def refusal(code: int, **fields: Any) -> teacher_pb2.RequestError:
    return teacher_pb2.RequestError(code=code, message="what it says", **fields)


def test_refusals_are_waited_out_or_asked_elsewhere_or_raised(services, wanted):
    busy = refusal(8, reason="QUEUE_FULL", retry_after_ms=50)
    services[0].refuse = [busy, refusal(14), refusal(13)]
    with connect([one.address for one in services]) as teacher:
        assert told(teacher.generate(PROMPTS, **ARGUMENTS)) == wanted
        assert services[0].refuse == []
        assert teacher.counters.resent >= 3
        for code, kind in ((3, InvalidRequest), (9, IncompatibleTeacher)):
            for one in services:
                one.refuse = [refusal(code)]
            with pytest.raises(kind, match="prompt 0: what it says"):
                next(teacher.generate([[5]], max_new_tokens=2))
            for one in services:
                one.refuse = []
        for one in services:
            one.refuse = [refusal(13)] * 2
        with pytest.raises(TeacherInternalError):
            next(teacher.generate([[5]], max_new_tokens=2))


def test_a_teacher_that_stays_busy_is_given_up_after_the_patience(services):
    for one in services:
        one.refuse = [refusal(8, reason="QUEUE_FULL", retry_after_ms=300)] * 50
    began = time.monotonic()
    with (
        connect(services[0].address, patience_s=1.0) as teacher,
        pytest.raises(TeacherOverloaded),
    ):
        next(teacher.generate([[5]], max_new_tokens=2))
    assert time.monotonic() - began < 5


def test_a_replica_that_drains_gets_no_more_prompts_and_its_texts_end(services, wanted):
    first, second = services
    for one in services:
        one.pause_s = 0.03
    with connect(first.address) as teacher:
        stream = teacher.generate(PROMPTS * 4, **ARGUMENTS, ahead=4)
        found = [next(stream)]
        first.state = "draining"
        found += stream
        assert [one[2:] for one in told(iter(found))] == [one[2:] for one in wanted] * 4
        assert teacher.counters.resent == 0
        assert len(first.requests) + len(second.requests) == len(PROMPTS) * 4
        assert 0 < len(first.requests) < len(second.requests)


def test_texts_that_wait_for_their_turn_are_not_asked_for_twice(services, wanted, monkeypatch):
    monkeypatch.setattr(stalls, "STALL_S", 0.5)
    monkeypatch.setattr(texts, "SILENT_FACTOR", 2.0)  # nothing of a text for 1 s counts as long
    model = tiny.make_model("Llama", VOCAB)
    service = TextService(model, replica_id="c", max_running=1)
    service.pause_s = 0.05
    try:
        with connect(service.address) as teacher:
            began = time.monotonic()
            assert told(teacher.generate(PROMPTS, **ARGUMENTS)) == wanted
            assert time.monotonic() - began > 3, "nothing waited for long"
            assert teacher.counters.resent == 0
        assert len(service.requests) == len(PROMPTS)
    finally:
        service.stop()


def test_a_request_that_is_lost_on_its_way_is_asked_again(services, wanted, monkeypatch):
    monkeypatch.setattr(stalls, "STALL_S", 0.5)
    monkeypatch.setattr(texts, "SILENT_FACTOR", 2.0)
    first, second = services
    first.lose = {1}
    second.state = "draining"
    first.pause_s = (
        0.15  # so that the others take long enough for the lost one to be missed meanwhile
    )
    with connect(first.address) as teacher:
        assert told(teacher.generate(PROMPTS, **ARGUMENTS)) == wanted
        assert teacher.counters.resent >= 1
        assert teacher.counters.reconnects == 0
    lost = first.requests[1]
    again = [one for one in first.requests if one.item_id == lost.item_id and not one.cancel]
    assert len(again) == 2
    assert any(one.cancel and one.request_id == lost.request_id for one in first.requests)


def test_many_samples_of_a_prompt_are_several_requests(services):
    arguments: dict[str, Any] = {"max_new_tokens": 2, "num_samples": 300, "targets": "sampled:4"}
    local = LocalTeacher(tiny.make_model("Llama", VOCAB))
    for one in services:
        one.pause_s = 0.01
    with connect([one.address for one in services]) as teacher:
        other = teacher.generate(
            [[5]],
            max_new_tokens=200,
            num_samples=8,  # the service writes them one after the other
            ignore_teacher_stop_ids=True,
        )
        next(other)
        wait_until(lambda: len(teacher.replicas) == 2, "both replicas write", 30)
        assert told(teacher.generate([PROMPTS[1]], **arguments)) == told(
            local.generate([PROMPTS[1]], **arguments)
        )
        other.close()
    requests = [one for service in services for one in service.requests if not one.cancel]
    assert max(len(one.samples) for one in requests) <= 64
    assert len({one.item_id for one in requests}) == len(requests)
    shares = [sum(len(one.samples) > 8 for one in service.requests) for service in services]
    assert sum(shares) == 5
    assert all(shares), "one replica wrote all of them"
