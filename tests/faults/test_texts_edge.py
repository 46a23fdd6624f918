"""Clients of texts that do not read, give up, ask for too much, or may not ask at all."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from logitstream.connection import Connection
from protos import teacher_pb2, teacher_pb2_grpc
from tests.conftest import Serve
from tests.support.fleet import Fleet, wait_until
from tests.support.teams import add_team, make_certs

DENSE = teacher_pb2.TargetSpec(dense=teacher_pb2.Dense(bits=32))
PROMPT = np.array([5, 9, 33, 7, 50], dtype="<i4").tobytes()
PROMPT_TOKENS = 5
WIDE, NARROW = 32_003, 101
"""Sizes of vocabularies: a row of dense targets of the first has 128 KB."""
GROWTH_NBYTES = 160 << 20
WRITTEN = 'teacher_written_tokens_total{team="default"}'


def make_request(number: int, **fields: Any) -> teacher_pb2.GenerateRequest:
    return teacher_pb2.GenerateRequest(
        **{
            "request_id": number,
            "prompt_ids": PROMPT,
            "max_new_tokens": 20,
            "ignore_teacher_stop_ids": True,
            **fields,
        }
    )


def make_cancel(number: int) -> teacher_pb2.GenerateRequest:
    return teacher_pb2.GenerateRequest(request_id=number, cancel=True)


def number_samples(count: int) -> list[dict[str, int]]:
    return [{"number": number} for number in range(count)]


def end_of(response: teacher_pb2.GenerateResponse) -> str:
    """What this message ends its request with; empty: it does not."""
    if response.HasField("error"):
        return response.error.reason
    return "last" if response.part.last else ""


class Reader:
    """A stream of which nothing is read until it is asked for."""

    def __init__(self, address: str, method: str = "Generate") -> None:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]
        self._channel = grpc.aio.insecure_channel(address, options=options)
        self.call = getattr(teacher_pb2_grpc.TeacherStub(self._channel), method)()

    async def write_all(self, requests: Sequence[Any]) -> None:
        """Writes all that this stream asks for; the stream may end meanwhile."""
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            for request in requests:
                await self.call.write(request)
            await self.call.done_writing()

    async def read_all(self) -> Counter[tuple[int, str]]:
        """Reads to the end; returns how often each request ended, and how."""
        ends: Counter[tuple[int, str]] = Counter()
        async for response in self.call:
            if end := end_of(response):
                ends[response.request_id, end] += 1
        return ends

    async def close(self) -> None:
        self.call.cancel()
        await self._channel.close()


def wait_paused(fleet: Fleet, least: float) -> float:
    """Until texts have been written and none goes on; returns how many tokens they have."""
    found = [0.0, -1.0]

    def is_paused() -> bool:
        time.sleep(0.5)
        found.append(fleet.gauges(0).get(WRITTEN, 0.0))
        return found[-1] == found[-2] > least

    wait_until(is_paused, "the texts pause", 60.0)
    return found[-1]


def assert_no_text_left(fleet: Fleet) -> None:
    fleet.assert_nothing_left(15.0)
    wait_until(lambda: fleet.gauge(0, "teacher_texts_running") == 0, "texts run", 10.0)
    found = fleet.gauges(0)
    assert found["teacher_texts_waiting"] == 0
    assert found["teacher_free_key_pages"] == found["teacher_key_pages"] > 0


async def give_up(address: str) -> tuple[list[str], int, list[str]]:
    """Cancels requests whose samples fill the budget and wait for it; returns how all of them ended,
    samples that ended after that, and how a request ended that was sent later."""
    reader = Reader(address)
    call, ends, finished = reader.call, {}, 0
    await call.write(
        make_request(1, targets=DENSE, max_new_tokens=240, samples=number_samples(200))
    )
    for number in range(2, 8):
        await call.write(make_request(number, targets=DENSE, max_new_tokens=240))
    await call.read()
    for number in (7, 1, *range(2, 7)):
        await call.write(make_cancel(number))
    while len(ends) < 7:
        response = await call.read()
        finished += bool(response.part.finish)
        if end := end_of(response):
            assert response.request_id not in ends
            ends[response.request_id] = end
    await call.write(make_request(1, max_new_tokens=2))
    later = [end_of(await call.read())]
    await reader.close()
    return [ends[number] for number in range(1, 8)], finished, later


def test_a_client_is_heard_while_its_texts_use_up_the_budget(serve, model_folder):
    flags = ("--admission.max-stream-mib", "1")
    with Fleet(serve, model_folder("Llama", NARROW), 1, flags=flags) as fleet:
        ends, finished, later = asyncio.run(give_up(fleet.own[0]))
        assert ends == ["CANCELLED"] * 7
        # Some 17 texts fit; a stream that heard nothing before all 200 had started would end 180.
        assert finished < 60
        assert later == ["last"]
        assert_no_text_left(fleet)


def test_a_reader_that_stops_pauses_its_texts_and_each_request_ends_once(serve, model_folder):
    flags = ("--admission.max-stream-mib", "64")
    with Fleet(serve, model_folder("Llama", WIDE), 1, flags=flags) as fleet:

        async def stop_reading() -> Counter[tuple[int, str]]:
            warm = Reader(fleet.own[0])
            await warm.call.write(make_request(1, targets=DENSE, samples=number_samples(8)))
            await warm.call.done_writing()
            assert await warm.read_all() == {(1, "last"): 1}
            await warm.close()
            before_nbytes, before = fleet.rss_nbytes(0), fleet.gauge(0, WRITTEN)
            reader = Reader(fleet.own[0])
            await reader.call.write(
                make_request(1, targets=DENSE, max_new_tokens=100, samples=number_samples(8))
            )
            paused = await asyncio.to_thread(wait_paused, fleet, before)
            assert paused - before < 8 * 100, "it has written what nobody reads"
            assert fleet.rss_nbytes(0) - before_nbytes < GROWTH_NBYTES
            assert fleet.gauge(0, "teacher_answer_bytes") < 64 << 20
            # The only token of this one is its last; it waits to be read when it is given up.
            await reader.call.write(make_request(2, max_new_tokens=1))
            await asyncio.to_thread(wait_until, lambda: fleet.gauge(0, WRITTEN) > paused, "written")
            await asyncio.sleep(0.5)
            await reader.call.write(make_cancel(2))
            await asyncio.sleep(0.5)
            await reader.call.done_writing()
            ends = await reader.read_all()
            await reader.close()
            return ends

        assert asyncio.run(stop_reading()) == {(1, "last"): 1, (2, "last"): 1}
        assert_no_text_left(fleet)


def impatient() -> None:
    """Runs in the service: a stream that is not read makes place for others of its team soon."""
    from teacher_server.rpc import answer_budget

    answer_budget.PATIENCE_S, answer_budget.STOPPED_S = 0.01, 1.0


async def end_unread(fleet: Fleet, method: str, requests: Sequence[Any]) -> tuple[Any, str]:
    """Sends requests on a stream that is not read and on one that is; returns how the first one ends."""
    stopped, other = Reader(fleet.own[0], method), Reader(fleet.own[0], method)
    writing = asyncio.create_task(stopped.write_all(requests))
    await asyncio.sleep(3.0)  # more than STOPPED_S after it has filled what lies between
    other_writing = asyncio.create_task(other.write_all(requests))
    assert sum((await other.read_all()).values()) == len(requests)
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        async with asyncio.timeout(30):
            await stopped.read_all()
    await asyncio.gather(writing, other_writing)
    await stopped.close()
    await other.close()
    return ended.value.code(), ended.value.details() or ""


@pytest.mark.parametrize("method", ["Score", "Generate"])
def test_a_stream_that_is_ended_for_others_says_so(serve, model_folder, method: str):
    flags = ("--admission.max-answers-mib", "32")
    requests = {
        "Score": [
            teacher_pb2.ScoreRequest(
                request_id=number, token_ids=bytes(4 * 60), lengths=[60], targets=DENSE
            )
            for number in range(8)
        ],
        "Generate": [make_request(1, targets=DENSE, max_new_tokens=100, samples=number_samples(8))],
    }[method]
    with Fleet(serve, model_folder("Llama", WIDE), 1, flags=flags, hook=impatient) as fleet:
        code, details = asyncio.run(end_unread(fleet, method, requests))
        assert code == grpc.StatusCode.UNAVAILABLE
        assert "was not read" in details
        assert_no_text_left(fleet)


# Teams, and what they are billed.

LIMIT = 1000
"""Tokens of a team per day."""


class Shared(Fleet):
    """Two replicas with a ledger, and a team that writes."""

    def __init__(self, serve: Serve, folder: Path, home: Path) -> None:
        teams = home / "teams.toml"
        operator = add_team(teams, "operator", "--scopes", "admin")
        tokens = {"scorer": add_team(teams, "scorer", "--scopes", "score")}
        tokens["writer"] = add_team(teams, "writer", "--scopes", "generate")
        teams.write_text(teams.read_text() + f"limits = {{ max_tokens_per_day = {LIMIT} }}\n")
        flags = ("--teams", str(teams), "--ledger", str(home / "ledger"), *make_certs(home))
        ca = home / "ca.pem"
        super().__init__(serve, folder, flags=flags, token=operator, ca=ca)
        self._connections = {
            name: Connection.to(self.own, token=token, ca=ca) for name, token in tokens.items()
        }

    @contextmanager
    def stub(self, index: int, team: str = "writer") -> Iterator[tuple[Any, Any]]:
        connection = self._connections[team]
        with connection.blocking_channel(self.own[index]) as channel:
            yield teacher_pb2_grpc.TeacherStub(channel), connection.metadata

    def ask(
        self,
        index: int,
        *requests: teacher_pb2.GenerateRequest,
        team: str = "writer",
        until: Callable[[teacher_pb2.GenerateResponse], bool] = lambda _: False,
    ) -> list[teacher_pb2.GenerateResponse]:
        """Returns what comes, up to a message after which the stream is cancelled."""
        found = []
        held = threading.Event()

        def send() -> Iterator[teacher_pb2.GenerateRequest]:
            yield from requests
            held.wait()

        with self.stub(index, team) as (stub, metadata):
            call = stub.Generate(send(), metadata=metadata)
            for response in call:
                found.append(response)
                if until(response):
                    call.cancel()
                    held.set()
                    return found
                if sum(bool(end_of(one)) for one in found) == len(requests):
                    held.set()
        return found

    def row(self) -> teacher_pb2.UsageRow:
        """Usage of the team that writes."""
        return next(row for row in self.usage() if row.team == "writer")

    def left(self) -> int:
        """What the team may still use today, as a replica without any of it in flight knows."""
        with self.stub(0) as (stub, metadata):
            info = stub.Describe(teacher_pb2.DescribeRequest(), metadata=metadata)
        return info.caller.tokens_left_today


def test_teams_their_scopes_their_quota_and_a_bill_without_anything_twice(
    serve, model_folder, tmp_path: Path
):
    fleet = Shared(serve, model_folder("Llama", NARROW), tmp_path)
    with fleet:
        fleet.wait_known()
        with pytest.raises(grpc.RpcError) as refused:
            fleet.ask(0, make_request(1), team="scorer")
        assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED
        (answer,) = fleet.ask(0, make_request(1, targets=DENSE))
        assert (answer.error.reason, answer.error.field) == ("SCOPE_MISSING", "targets")

        # A text of 200 tokens, whose first replica is left in the middle.
        names = {"session_id": bytes(range(16)), "item_id": 8, "max_new_tokens": 200, "seed": 3}
        begun = fleet.ask(
            0,
            make_request(1, **names),
            until=lambda one: one.part.first + len(one.part.token_ids) // 4 > 5 + 70,
        )
        ids = b"".join(one.part.token_ids for one in begun)
        assert 70 < len(ids) // 4 < 200
        wait_until(lambda: fleet.gauge(0, "teacher_texts_running") == 0, "it is written no longer")
        first = fleet.row()
        # What was computed: whole blocks were delivered, of which the next replica counts none again.
        assert PROMPT_TOKENS + len(ids) // 4 <= first.tokens < PROMPT_TOKENS + 200
        assert first.delivered_rows % 64 == 0
        rest = fleet.ask(1, make_request(2, samples=[{"received_ids": ids}], **names))
        assert end_of(rest[-1]) == "last"
        ids += b"".join(one.part.token_ids for one in rest)
        assert len(ids) == 4 * 200
        both = fleet.row()
        assert both.delivered_rows == 200
        assert both.tokens - first.tokens == PROMPT_TOKENS + 200
        assert both.sequences == 2
        assert both.rejected == 1

        # Reserved with the most that it may become: what does not fit is refused, what fits is not.
        samples = (LIMIT - both.tokens) // (PROMPT_TOKENS + 200) + 1
        too_much = make_request(3, max_new_tokens=200, samples=number_samples(samples))
        (answer,) = fleet.ask(1, too_much)
        assert answer.error.reason == "QUOTA_USED_UP"
        assert answer.error.retry_after_ms > 0
        fits = make_request(4, max_new_tokens=64)
        assert end_of(fleet.ask(1, fits)[-1]) == "last"
        last = fleet.row()
        assert last.tokens - both.tokens == PROMPT_TOKENS + 64
        assert last.delivered_rows - both.delivered_rows == 64
        assert last.rejected == 2
        assert fleet.left() == LIMIT - last.tokens
        assert_no_text_left(fleet)
