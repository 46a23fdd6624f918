import asyncio
from contextlib import ExitStack

from teacher_server.room import ProcessRoom, StreamRoom

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


def test_a_stream_may_always_have_one_answer() -> None:
    async def run() -> None:
        process = ProcessRoom(10)
        with process.stream(5) as first, process.stream(5) as second:
            assert await fits(first, 100, "a")
            assert not await fits(first, 1, "a")
            assert await fits(second, 100, "a")
            first.give(100, "a")
            second.give(100, "a")
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


def test_a_stream_that_waits_goes_on_when_its_own_answers_end() -> None:
    async def run() -> None:
        process = ProcessRoom(10)
        with process.stream(1000) as hog, process.stream(1000) as room:
            await hog.take(100, "a")
            await room.take(3, "a")
            taking = asyncio.create_task(room.take(8, "a"))
            await settle()
            assert not taking.done()
            room.give(3, "a")
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
