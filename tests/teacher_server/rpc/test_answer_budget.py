import asyncio
from contextlib import ExitStack
from functools import partial

import pytest

from teacher_server.rpc import answer_budget
from teacher_server.rpc.answer_budget import ReplicaBudget, StreamBudget

STEPS = 20
"""Turns of the loop in which everything that can go on has gone on."""


async def settle() -> None:
    for _ in range(STEPS):
        await asyncio.sleep(0)


async def fits(stream: StreamBudget, nbytes: int, team: str) -> bool:
    """Takes if that needs no waiting."""
    task = asyncio.create_task(stream.acquire(nbytes, team))
    await settle()
    if not task.done():
        task.cancel()
        await settle()
        return False
    return True


def test_a_team_may_always_have_one_answer_and_its_streams_share_it() -> None:
    async def run() -> None:
        replica = ReplicaBudget(10)
        with replica.stream(5) as first, replica.stream(5) as second, replica.stream(5) as other:
            assert await fits(first, 100, "a")
            assert not await fits(first, 1, "a")
            assert not await fits(second, 1, "a")
            assert await fits(other, 100, "b")
            first.release(100, "a")
            assert await fits(second, 100, "a"), "the team holds nothing now"
            second.release(100, "a")
            other.release(100, "b")
            assert replica.taken_nbytes == 0
            assert not replica._teams

    asyncio.run(run())


def test_many_streams_with_one_answer_each_stay_within_the_room() -> None:
    async def run() -> None:
        replica = ReplicaBudget(100)
        with ExitStack() as stack:
            for _ in range(200):
                await fits(stack.enter_context(replica.stream(50)), 30, "a")
            assert replica.taken_nbytes <= 100

    asyncio.run(run())


def test_a_stream_that_is_not_read_goes_when_others_of_its_team_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(answer_budget, "PATIENCE_S", 0.01)
    monkeypatch.setattr(answer_budget, "STOPPED_S", 0.0)

    async def run() -> None:
        replica = ReplicaBudget(10)
        with ExitStack() as stack:
            stopped, read, other, waiting = (
                stack.enter_context(replica.stream(10)) for _ in range(4)
            )
            await stopped.acquire(5, "a")
            await read.acquire(5, "a")
            await other.acquire(5, "b")
            ended: asyncio.Queue[StreamBudget] = asyncio.Queue()
            for one in (stopped, read, other):
                one.end = partial(ended.put_nowait, one)
            stopped.blocked_s, other.blocked_s = 2.0, 1.0
            taking = asyncio.create_task(waiting.acquire(5, "a"))
            assert await ended.get() is stopped, "of the same team, and not read"
            stopped.release(5, "a")
            read.release(5, "a")
            await asyncio.wait_for(taking, 5)

    asyncio.run(run())


def test_copies_of_what_is_written_count_once_for_a_stream() -> None:
    async def run() -> None:
        replica = ReplicaBudget(100, copies_nbytes=10)
        with replica.stream(100) as one, replica.stream(100) as other:
            await one.acquire(3, "a")
            assert replica.taken_nbytes == 3 + 6
            await one.acquire(20, "a")
            await other.acquire(50, "b")
            assert replica.taken_nbytes == 3 + 20 + 10 + 50 + 10
            assert not await fits(one, 18, "a"), "more than an equal part"
            one.release(20, "a")
            other.release(50, "b")
            one.release(3, "a")
            assert replica.taken_nbytes == 0
            assert not replica._teams

    asyncio.run(run())


def test_streams_that_stopped_fill_the_room_for_their_own_team_only() -> None:
    async def run() -> None:
        replica = ReplicaBudget(100)
        with ExitStack() as stack:
            stalled = [stack.enter_context(replica.stream(20)) for _ in range(30)]
            for stream in stalled:
                await fits(stream, 5, "stalled")
                await fits(stream, 5, "stalled")
            assert replica.taken_nbytes >= 100
            light = stack.enter_context(replica.stream(1000))
            for _ in range(10):
                assert await fits(light, 5, "light")
            assert not await fits(light, 5, "light")  # half of the room is its equal part
            third = stack.enter_context(replica.stream(1000))
            for _ in range(6):
                assert await fits(third, 5, "third")
            assert not await fits(third, 5, "third")

    asyncio.run(run())


def test_one_team_alone_has_all_the_room() -> None:
    async def run() -> None:
        replica = ReplicaBudget(100)
        with replica.stream(1000) as stream:
            assert await fits(stream, 60, "a")
            assert await fits(stream, 40, "a")
            assert not await fits(stream, 1, "a")

    asyncio.run(run())


def test_what_is_released_back_goes_to_whoever_waits_in_order() -> None:
    async def run() -> None:
        replica = ReplicaBudget(100)
        with ExitStack() as stack:
            streams = [stack.enter_context(replica.stream(1000)) for _ in range(4)]
            for stream in streams:
                await stream.acquire(25, "a")
            done: list[int] = []

            async def take(index: int) -> None:
                await streams[index].acquire(10, "a")
                done.append(index)

            waiting = []
            for index in (2, 0, 3):
                waiting.append(asyncio.create_task(take(index)))
                await settle()
            assert done == []
            streams[1].release(25, "a")
            await settle()
            assert done == [2, 0]
            waiting[2].cancel()
            await settle()
            assert replica.taken_nbytes == 95
            for stream, nbytes in zip(streams, (35, 0, 35, 25), strict=True):
                stream.release(nbytes, "a")
            assert replica.taken_nbytes == 0
            assert not replica._teams

    asyncio.run(run())


def test_a_stream_that_waits_goes_on_when_its_team_holds_nothing() -> None:
    async def run() -> None:
        replica = ReplicaBudget(10)
        with replica.stream(1000) as hog, replica.stream(1000) as one:
            await hog.acquire(100, "b")
            await one.acquire(3, "a")
            taking = asyncio.create_task(one.acquire(8, "a"))
            await settle()
            assert not taking.done()
            one.release(3, "a")
            await settle()
            assert taking.done()

    asyncio.run(run())


def test_a_full_stream_wakes_nobody_else() -> None:
    async def run() -> None:
        replica = ReplicaBudget(1000)
        with replica.stream(10) as stream, replica.stream(10) as other:
            await stream.acquire(8, "a")
            await other.acquire(8, "a")
            taking = asyncio.create_task(stream.acquire(8, "a"))
            await settle()
            other.release(8, "a")
            await settle()
            assert not stream._released.is_set()
            stream.release(8, "a")
            await settle()
            assert taking.done()

    asyncio.run(run())
