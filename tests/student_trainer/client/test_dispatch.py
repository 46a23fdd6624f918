"""The resume protocol over a simulated network that loses, delays, repeats, reorders and damages.

The machine drives the real Dispatch, assemble and TargetStream as a trainer, its client and any
number of replicas; planted bugs show that it would notice.
"""

import functools
import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from logit_codec import Targets, TopKTargets, encode
from protos import teacher_pb2
from protos.answer_check import answer_check, full_answer_check, request_digest
from student_trainer.client import dispatch as dispatching
from student_trainer.client.dispatch import Dispatch, Fate, Pending, assemble
from student_trainer.client.remote import _request
from student_trainer.teachers import stream as streaming
from student_trainer.teachers.request import Answer, Piece, ScoreOptions
from student_trainer.teachers.stream import TargetStream, stream_sequences

FINGERPRINT = "ab" * 32
VOCAB = 64
SEQUENCES = [torch.arange(first, first + 3 + first % 4) for first in range(12)]
OPTIONS = ScoreOptions.of("top_k:1", 1.0, 0, 0)
REPLICAS = 3


@functools.cache
def container(first_token: int, num_rows: int, replica: int) -> bytes:
    """Targets that say which token they belong to and which replica made them."""
    return encode(
        TopKTargets(
            vocab_size=VOCAB,
            temperature=1.0,
            row_splits=torch.arange(num_rows + 1),
            token_ids=torch.arange(first_token, first_token + num_rows),
            logprobs=torch.full((num_rows,), -0.25),
            tail_logprob=torch.full((num_rows,), -1.5086943),
            realized_logprob=torch.full((num_rows,), -1.0 - replica),
        )
    )


def answers(request: teacher_pb2.ScoreRequest, replica: int) -> list[teacher_pb2.ScoreResponse]:
    """The parts of a whole answer, one per two rows."""
    token_ids = torch.frombuffer(bytearray(request.token_ids), dtype=torch.int32).long()
    num_rows = len(token_ids) - 1
    digest = request_digest(request)
    responses = []
    for first_row in range(0, num_rows, 2):
        count = min(2, num_rows - first_row)
        response = teacher_pb2.ScoreResponse(
            request_id=request.request_id,
            part=teacher_pb2.TargetsPart(
                first_row=first_row,
                num_rows=count,
                last=first_row + count == num_rows,
                ids_digest=xxhash.xxh3_128_digest(request.token_ids),
                payload=container(int(token_ids[1 + first_row]), count, replica),
                teacher_fingerprint=FINGERPRINT,
            ),
        )
        response.check = answer_check(digest, response)
        response.full_check = full_answer_check(digest, response)
        responses.append(response)
    return responses


class SimulatedLink:
    """A stream to one replica: written requests, unsent parts of answers, messages under way."""

    def __init__(self, replica: int) -> None:
        self.replica = replica
        self.outbox: deque[int] = deque()
        self.answering: list[deque[teacher_pb2.ScoreResponse]] = []
        self.under_way: deque[teacher_pb2.ScoreResponse] = deque()
        self.delivered: list[teacher_pb2.ScoreResponse] = []


class Client:
    """What the keeper does, without sockets: one step of the network at a time."""

    def __init__(self) -> None:
        self.links: list[SimulatedLink] = []
        self.dispatch = Dispatch(lambda link, number: link.outbox.append(number))
        self.submitted = 0
        self.items: dict[bytes, int] = {}
        self.numbers: set[int] = set()

    def submit(self, piece: Piece, options: ScoreOptions) -> "Future[Answer]":
        pending = Pending(_request(piece, options), piece.num_rows, PumpedFuture(self))
        self.dispatch.submit(pending)
        self.submitted += 1
        return pending.future

    def open(self, replica: int) -> None:
        link = SimulatedLink(replica)
        self.links.append(link)
        self.dispatch.add_link(link)

    def lose(self, link: SimulatedLink) -> None:
        self.links.remove(link)
        self.dispatch.resend_lost(link)

    def write(self, link: SimulatedLink) -> bool:
        """The replica reads the next request and begins to answer."""
        while link.outbox:
            pending = self.dispatch.find_to_write(link.outbox.popleft())
            if pending is not None:
                request = pending.request
                # One piece of work has one item id, and each attempt a number of its own.
                item = self.items.setdefault(request.token_ids, request.item_id)
                assert request.item_id == item > 0
                assert request.request_id not in self.numbers
                self.numbers.add(request.request_id)
                link.answering.append(deque(answers(request, link.replica)))
                return True
        return False

    def emit(self, link: SimulatedLink, pick: int) -> bool:
        """One of the requests being answered has its next part written."""
        if not link.answering:
            return False
        parts = link.answering[pick % len(link.answering)]
        link.under_way.append(parts.popleft())
        if not parts:
            link.answering.remove(parts)
        return True

    def deliver(self, link: SimulatedLink) -> bool:
        """The client takes one message, and does with it what `Answers` does."""
        if not link.under_way:
            return False
        response = link.under_way.popleft()
        link.delivered.append(response)
        ended = self.dispatch.receive(link, response)
        if ended is None:
            return True
        pending, fate = ended
        if fate is Fate.DAMAGED:
            self.dispatch.resend(pending)
            return True
        assert fate is Fate.ANSWERED
        answer = assemble(pending, FINGERPRINT)
        if pending.future.set_running_or_notify_cancel():
            pending.future.set_result(answer)
        return True

    def step(self) -> None:
        """Something happens that brings an answer nearer."""
        if not self.links:
            self.open(0)
        for link in self.links:
            if self.write(link) or self.emit(link, 0) or self.deliver(link):
                return
        for link in self.links:
            if link in self.dispatch._paused:
                self.lose(link)  # a replica that drains ends its streams in the end
                return
        raise AssertionError("a request waits and nothing is under way: it would hang")


class PumpedFuture(Future):
    """Waiting for it lets the network go on."""

    def __init__(self, client: Client) -> None:
        super().__init__()
        self.client = client

    def result(self, timeout: float | None = None) -> Any:
        while not self.done():
            self.client.step()
        return super().result(0)


class Training(RuleBasedStateMachine):
    """A trainer that takes targets, saves checkpoints and crashes; replicas that come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.trained: list[int] = []
        self.saved: tuple[int, dict[str, int]] = (0, {"handed_out": 0})
        self.start({"handed_out": 0})

    def start(self, state: dict[str, int]) -> None:
        self.client = Client()
        self.stream: TargetStream[torch.Tensor] = stream_sequences(
            self.client.submit, SEQUENCES, OPTIONS, ahead=4
        )
        self.stream.load_state_dict(state)
        self.client.open(0)

    @rule()
    def step(self) -> None:
        pair = next(self.stream, None)
        if pair is None:
            assert len(self.trained) == len(SEQUENCES)
            return
        self.train(*pair)

    def train(self, token_ids: torch.Tensor, targets: Targets) -> None:
        assert isinstance(targets, TopKTargets)
        assert torch.equal(targets.token_ids, token_ids[1:]), "targets of other tokens"
        assert targets.realized_logprob is not None
        assert len(targets.realized_logprob.unique()) == 1, "an answer of two attempts"
        self.trained.append(int(token_ids[0]))

    @rule()
    def save(self) -> None:
        self.saved = (len(self.trained), self.stream.state_dict())

    @rule()
    def crash(self) -> None:
        steps, state = self.saved
        self.stream.close()
        del self.trained[steps:]
        self.start(state)

    @rule(replica=st.integers(0, REPLICAS - 1))
    @precondition(lambda self: len(self.client.links) < 4)
    def open(self, replica: int) -> None:
        self.client.open(replica)

    @rule(pick=st.integers(0, 7))
    @precondition(lambda self: self.client.links)
    def lose(self, pick: int) -> None:
        self.client.lose(self.link(pick))

    @rule(pick=st.integers(0, 7))
    @precondition(lambda self: len(self.client.links) > 1)
    def drain(self, pick: int) -> None:
        self.client.dispatch.set_paused(self.link(pick), True)

    @rule(pick=st.integers(0, 7), trusted=st.booleans())
    @precondition(lambda self: self.client.links)
    def stay(self, pick: int, trusted: bool) -> None:
        dispatch, link = self.client.dispatch, self.link(pick)
        dispatch.set_paused(link, False)
        dispatch.set_trusted(link, trusted)

    @rule(pick=st.integers(0, 7), count=st.integers(1, 4))
    @precondition(lambda self: self.client.links)
    def write(self, pick: int, count: int) -> None:
        for _ in range(count):
            self.client.write(self.link(pick))

    @rule(pick=st.integers(0, 7), which=st.integers(0, 7))
    @precondition(lambda self: self.client.links)
    def emit(self, pick: int, which: int) -> None:
        self.client.emit(self.link(pick), which)

    @rule(pick=st.integers(0, 7), count=st.integers(1, 4))
    @precondition(lambda self: self.client.links)
    def deliver(self, pick: int, count: int) -> None:
        for _ in range(count):
            self.client.deliver(self.link(pick))

    @rule(pick=st.integers(0, 7), which=st.integers(0, 7), count=st.integers(1, 3))
    @precondition(lambda self: self.client.links)
    def answer_partly(self, pick: int, which: int, count: int) -> None:
        link = self.link(pick)
        self.client.write(link)
        for _ in range(count):
            self.client.emit(link, which)
            self.client.deliver(link)

    @rule(pick=st.integers(0, 7), replica=st.integers(0, REPLICAS - 1))
    @precondition(lambda self: self.client.links)
    def fail_over(self, pick: int, replica: int) -> None:
        self.client.lose(self.link(pick))
        self.client.open(replica)

    @rule(pick=st.integers(0, 7), which=st.integers(0, 30))
    @precondition(lambda self: any(link.delivered for link in self.client.links))
    def repeat(self, pick: int, which: int) -> None:
        link = self.link(pick)
        if link.delivered:
            link.under_way.append(link.delivered[which % len(link.delivered)])

    @rule(
        pick=st.integers(0, 7),
        field=st.sampled_from(["payload", "first_row", "last", "check", "full_check"]),
    )
    @precondition(lambda self: any(link.under_way for link in self.client.links))
    def damage(self, pick: int, field: str) -> None:
        link = self.link(pick)
        if not link.under_way:
            return
        damaged = teacher_pb2.ScoreResponse()
        damaged.CopyFrom(link.under_way[0])
        if field == "payload":
            damaged.part.payload = damaged.part.payload[:-1] + b"\0\0"
        elif field in ("check", "full_check"):
            setattr(damaged, field, getattr(damaged, field)[:-1])
        elif field == "last":
            damaged.part.last = not damaged.part.last
        else:
            damaged.part.first_row ^= 1
        link.under_way[0] = damaged

    @rule(pick=st.integers(0, 7))
    @precondition(lambda self: self.client.links)
    def ask_again(self, pick: int) -> None:
        outstanding = self.client.dispatch.outstanding(self.link(pick))
        if outstanding:
            self.client.dispatch.resend(next(iter(outstanding.values())))

    def link(self, pick: int) -> SimulatedLink:
        return self.client.links[pick % len(self.client.links)]

    @invariant()
    def every_batch_once_and_in_order(self) -> None:
        assert self.trained == list(range(len(self.trained)))

    @invariant()
    def the_books_are_right(self) -> None:
        dispatch = self.client.dispatch
        sent = [
            (link, number, pending)
            for link in self.client.links
            for number, pending in dispatch.outstanding(link).items()
        ]
        assert dispatch.num_unanswered == len(sent) + len(dispatch._waiting)
        for link in self.client.links:
            tokens = sum(p.num_tokens for where, _, p in sent if where is link)
            assert dispatch._tokens[link] == tokens
        for link, number, pending in sent:
            assert (pending.link, pending.number) == (link, number)
            assert pending.request.request_id == number
        assert len(set(self.client.items.values())) == len(self.client.items)
        if self.client.links and any(link not in dispatch._paused for link in self.client.links):
            assert not dispatch._waiting

    def teardown(self) -> None:
        for token_ids, targets in self.stream:
            self.train(token_ids, targets)
        assert self.trained == list(range(len(SEQUENCES)))
        assert self.client.dispatch.num_unanswered == 0


SETTINGS = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_trainer_sees_every_batch_once_and_in_order_whatever_the_network_does():
    run_state_machine_as_test(Training, settings=SETTINGS)


def checkpoint_of_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint says how many items were asked for, not how many were handed out."""
    numbered = streaming._number_items
    asked: dict[str, int] = {}

    def counting(items: Any, skip: int) -> Iterator[tuple[int, Any]]:
        for number, item in numbered(items, skip):
            asked["items"] = number + 1
            yield number, item

    monkeypatch.setattr(streaming, "_number_items", counting)
    monkeypatch.setattr(
        TargetStream,
        "state_dict",
        lambda self: {"handed_out": asked.get("items", 0) if self._pairs else self._handed_out},
    )


def answers_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is answered first is handed out first."""

    def any_order(
        requests: Any, submit: Any, look_ahead: Any
    ) -> Iterator[tuple[Any, list[Targets]]]:
        waiting: list[Any] = []
        while True:
            for request in itertools.islice(requests, look_ahead.size - len(waiting)):
                for where, piece in request.pieces.items():
                    request.futures[where] = submit(piece, request.options)
                waiting.append(request)
            if not waiting:
                return
            done = (one for one in waiting if all(f.done() for f in one.futures.values()))
            entry = next(done, waiting[0])
            waiting.remove(entry)
            yield entry.item, [future.result().targets for future in entry.futures.values()]

    monkeypatch.setattr(streaming, "answer_in_order", any_order)


def answered_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that was sent again is handed out once per attempt."""
    in_order = streaming.answer_in_order

    def twice(requests: Any, submit: Any, look_ahead: Any) -> Iterator[tuple[Any, list[Targets]]]:
        for item, results in in_order(requests, submit, look_ahead):
            yield item, results
            if int(item[0]) in again:
                again.discard(int(item[0]))
                yield item, results

    again: set[int] = set()
    resend_lost = Dispatch.resend_lost

    def closing(self: Dispatch, link: Any) -> int:
        for pending in self.outstanding(link).values():
            again.add(int.from_bytes(pending.request.token_ids[:4], "little"))
        return resend_lost(self, link)

    monkeypatch.setattr(streaming, "answer_in_order", twice)
    monkeypatch.setattr(Dispatch, "resend_lost", closing)


def parts_of_two_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that came before a link was lost are kept for the next attempt."""
    place = Dispatch._place

    def keeping(self: Dispatch, pending: Pending, *, avoid: Any) -> None:
        parts = pending.parts
        place(self, pending, avoid=avoid)
        pending.parts = parts

    monkeypatch.setattr(Dispatch, "_place", keeping)


def old_numbers_still_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request keeps its number when it is sent again, and answers are not checked."""
    place = Dispatch._place

    def same_number(self: Dispatch, pending: Pending, *, avoid: Any) -> None:
        if pending.number:
            self._numbers = itertools.chain([pending.number], self._numbers)  # type: ignore[assignment]
        place(self, pending, avoid=avoid)

    monkeypatch.setattr(Dispatch, "_place", same_number)
    monkeypatch.setattr(dispatching, "is_what_was_written", lambda digest, response: True)


BUGS = [
    checkpoint_of_what_was_asked,
    answers_as_they_come,
    answered_twice,
    parts_of_two_attempts,
    old_numbers_still_count,
]


@pytest.mark.parametrize("plant", BUGS, ids=lambda plant: plant.__name__)
def test_the_state_machine_notices_planted_bugs(plant, monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch)
    find = settings(SETTINGS, max_examples=600, phases=[Phase.generate], derandomize=True)
    with pytest.raises(Exception) as caught:  # noqa: PT011 - any complaint will do, but of the bug
        run_state_machine_as_test(Training, settings=find)
    assert not isinstance(caught.value, TypeError | AttributeError)


def placed(count: int) -> tuple[Dispatch, dict[str, list[int]]]:
    """A Dispatch with that many links, named "a", "b", ..., and the numbers sent to each."""
    sent: dict[str, list[int]] = {}
    dispatch = Dispatch(lambda link, number: sent[link].append(number))
    for name in "abc"[:count]:
        sent[name] = []
        dispatch.add_link(name)
    return dispatch, sent


def test_a_request_that_failed_at_two_links_goes_to_the_third():
    dispatch, _ = placed(3)
    pending = Pending(_request(Piece(SEQUENCES[0]), OPTIONS), 2)
    dispatch.submit(pending)
    visited = []
    for _ in range(3):
        visited.append(pending.link)
        pending.failed_at.add(pending.link)
        dispatch.resend(pending)
    assert sorted(map(str, visited)) == ["a", "b", "c"]
    assert not dispatch.has_another(pending)
    assert pending.link is not None, "where all failed, it waits nowhere"


def test_a_distrusted_link_is_asked_only_where_there_is_no_other():
    dispatch, sent = placed(2)
    dispatch.set_trusted("a", False)
    for sequence in SEQUENCES:
        dispatch.submit(Pending(_request(Piece(sequence), OPTIONS), len(sequence) - 1))
    assert (len(sent["a"]), len(sent["b"])) == (0, len(SEQUENCES))
    dispatch.set_paused("b", True)
    dispatch.submit(Pending(_request(Piece(SEQUENCES[0]), OPTIONS), 2))
    assert len(sent["a"]) == 1
    dispatch.set_paused("b", False)
    dispatch.set_trusted("a", True)
    dispatch.submit(Pending(_request(Piece(SEQUENCES[0]), OPTIONS), 2))
    assert len(sent["a"]) == 2, "it has fewer outstanding tokens"


def test_a_request_that_was_sent_again_while_it_waited_is_not_sent_twice():
    dispatch, sent = placed(2)
    pending = Pending(_request(Piece(SEQUENCES[0]), OPTIONS), 2)
    dispatch.submit(pending)
    dispatch.forget(pending)  # refused for now: it is submitted again after a pause
    dispatch.resend(pending)  # meanwhile something of it turned out to be damaged
    dispatch.submit(pending)
    assert [len(numbers) for numbers in sent.values()] == [1, 1]
    dispatch.forget(pending)
    assert dispatch.num_unanswered == 0
