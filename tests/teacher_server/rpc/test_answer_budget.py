import asyncio
from contextlib import ExitStack
from functools import partial

import pytest

from teacher_server.rpc import answer_budget as room
from teacher_server.rpc.answer_budget import ProcessRoom, StreamRoom

STEPS = 20
"""Turns of the loop in which everything that can go on has gone on."""


async def settle() -> None:
    for _ in range(STEPS):
        await asyncio.sleep(0)


async def fits(room: StreamRoom, nbytes: int, team: str) -> bool:
    """Takes if that needs no waiting."""
    task = asyncio.create_task(room.take(nbytes, team))
    await settle()
    if not task.done():
        task.cancel()
        await settle()
        return False
    return True


def test_a_team_may_always_have_one_answer_and_its_streams_share_it() -> None:
    async def run() -> None:
        process = ProcessRoom(10)
        with process.stream(5) as first, process.stream(5) as second, process.stream(5) as other:
            assert await fits(first, 100, "a")
            assert not await fits(first, 1, "a")
            assert not await fits(second, 1, "a")
            assert await fits(other, 100, "b")
            first.give(100, "a")
            assert await fits(second, 100, "a"), "the team holds nothing now"
            second.give(100, "a")
            other.give(100, "b")
            assert process.taken_nbytes == 0
            assert not process._teams

    asyncio.run(run())


def test_many_streams_with_one_answer_each_stay_within_the_room() -> None:
    async def run() -> None:
        process = ProcessRoom(100)
        with ExitStack() as stack:
            for _ in range(200):
                await fits(stack.enter_context(process.stream(50)), 30, "a")
            assert process.taken_nbytes <= 100

    asyncio.run(run())


def test_a_stream_that_is_not_read_goes_when_others_of_its_team_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(room, "PATIENCE_S", 0.01)
    monkeypatch.setattr(room, "STOPPED_S", 0.0)

    async def run() -> None:
        process = ProcessRoom(10)
        with ExitStack() as stack:
            stopped, read, other, waiting = (
                stack.enter_context(process.stream(10)) for _ in range(4)
            )
            await stopped.take(5, "a")
            await read.take(5, "a")
            await other.take(5, "b")
            ended: asyncio.Queue[StreamRoom] = asyncio.Queue()
            for one in (stopped, read, other):
                one.end = partial(ended.put_nowait, one)
            stopped.blocked_s, other.blocked_s = 2.0, 1.0
            taking = asyncio.create_task(waiting.take(5, "a"))
            assert await ended.get() is stopped, "of the same team, and not read"
            stopped.give(5, "a")
            read.give(5, "a")
            await asyncio.wait_for(taking, 5)

    asyncio.run(run())


def test_copies_of_what_is_written_count_once_for_a_stream() -> None:
    async def run() -> None:
        process = ProcessRoom(100, copies_nbytes=10)
        with process.stream(100) as one, process.stream(100) as other:
            await one.take(3, "a")
            assert process.taken_nbytes == 3 + 6
            await one.take(20, "a")
            await other.take(50, "b")
            assert process.taken_nbytes == 3 + 20 + 10 + 50 + 10
            assert not await fits(one, 18, "a"), "more than an equal part"
            one.give(20, "a")
            other.give(50, "b")
            one.give(3, "a")
            assert process.taken_nbytes == 0
            assert not process._teams

    asyncio.run(run())


def test_streams_that_stopped_fill_the_room_for_their_own_team_only() -> None:
    async def run() -> None:
        process = ProcessRoom(100)
        with ExitStack() as stack:
            stalled = [stack.enter_context(process.stream(20)) for _ in range(30)]
            for room in stalled:
                await fits(room, 5, "stalled")
                await fits(room, 5, "stalled")
            assert process.taken_nbytes >= 100
            light = stack.enter_context(process.stream(1000))
            for _ in range(10):
                assert await fits(light, 5, "light")
            assert not await fits(light, 5, "light")  # half of the room is its equal part
            third = stack.enter_context(process.stream(1000))
            for _ in range(6):
                assert await fits(third, 5, "third")
            assert not await fits(third, 5, "third")

    asyncio.run(run())


def test_one_team_alone_has_all_the_room() -> None:
    async def run() -> None:
        process = ProcessRoom(100)
        with process.stream(1000) as room:
            assert await fits(room, 60, "a")
            assert await fits(room, 40, "a")
            assert not await fits(room, 1, "a")

    asyncio.run(run())


def test_what_is_given_back_goes_to_whoever_waits_in_order() -> None:
    async def run() -> None:
        process = ProcessRoom(100)
        with ExitStack() as stack:
            rooms = [stack.enter_context(process.stream(1000)) for _ in range(4)]
            for room in rooms:
                await room.take(25, "a")
            done: list[int] = []

            async def take(index: int) -> None:
                await rooms[index].take(10, "a")
                done.append(index)

            waiting = []
            for index in (2, 0, 3):
                waiting.append(asyncio.create_task(take(index)))
                await settle()
            assert done == []
            rooms[1].give(25, "a")
            await settle()
            assert done == [2, 0]
            waiting[2].cancel()
            await settle()
            assert process.taken_nbytes == 95
            for room, nbytes in zip(rooms, (35, 0, 35, 25), strict=True):
                room.give(nbytes, "a")
            assert process.taken_nbytes == 0
            assert not process._teams

    asyncio.run(run())


def test_a_stream_that_waits_goes_on_when_its_team_holds_nothing() -> None:
    async def run() -> None:
        process = ProcessRoom(10)
        with process.stream(1000) as hog, process.stream(1000) as one:
            await hog.take(100, "b")
            await one.take(3, "a")
            taking = asyncio.create_task(one.take(8, "a"))
            await settle()
            assert not taking.done()
            one.give(3, "a")
            await settle()
            assert taking.done()

    asyncio.run(run())


def test_a_full_stream_wakes_nobody_else() -> None:
    async def run() -> None:
        process = ProcessRoom(1000)
        with process.stream(10) as room, process.stream(10) as other:
            await room.take(8, "a")
            await other.take(8, "a")
            taking = asyncio.create_task(room.take(8, "a"))
            await settle()
            other.give(8, "a")
            await settle()
            assert not room._given.is_set()
            room.give(8, "a")
            await settle()
            assert taking.done()

    asyncio.run(run())
