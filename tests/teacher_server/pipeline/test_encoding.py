"""The encoders among teams: turns, order, errors, and what is left when it closes."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from logit_codec import TopKSpec
from teacher_server.engine.batch import RowRequest
from teacher_server.pipeline.encoding import Encoder, Encoding, Parts
from teacher_server.scheduling.job import INTERACTIVE, TRAINING, SequenceJob
from teacher_server.teams.declaration import Team
from tests.support.fleet import wait_until

NBYTES = 1000


class Desk:
    """An encoder of one thread that writes down what it does, and waits until it is let go."""

    def __init__(self, num_threads: int = 1) -> None:
        self.ended: list[SequenceJob] = []
        self.failures: list[str] = []
        self.encoder = Encoder(
            # What stands for the rows of a job makes its parts itself.
            lambda _, rows: rows(),  # type: ignore[operator]
            on_end=self.ended.append,
            on_failure=self.failures.append,
            num_threads=num_threads,
        )
        self.encoder.start()
        self.done: list[str] = []
        self.go = threading.Event()
        self._begun = threading.Event()

    def ask(
        self,
        team: str,
        parts: int,
        *,
        weight: float = 1.0,
        level: int = TRAINING,
        nbytes: int = NBYTES,
        error: Exception | None = None,
    ) -> Encoding:
        """An answer of so many parts; the thread writes down its team for each."""

        def make() -> Parts:
            for number in range(parts):
                self._begun.set()
                self.go.wait(30)
                self.done.append(team)
                yield number, 1, bytes(nbytes)
            if error is not None:
                raise error

        return self.encode(make, Team(team, weight=weight), level)

    def encode(self, make: Callable[[], Parts], team: Team, level: int = TRAINING) -> Encoding:
        wanted = RowRequest(torch.arange(4), torch.arange(3), TopKSpec(k=2))
        job = SequenceJob(wanted, 4, 0, level, team)
        waiting = self.encoder.expect(job, on_close=self.encoder.drop)
        self.encoder.encode(job, make)  # type: ignore[arg-type]
        return waiting

    async def hold(self) -> Encoding:
        """The thread has an answer of one part in hand, and everything else waits behind it."""
        first = self.ask("first", 1)
        await asyncio.to_thread(self._begun.wait, 30)
        return first


async def rows(encoding: Encoding) -> list[int]:
    return [part.first_row async for part in encoding]


def run(test: Callable[[Desk], Coroutine[Any, Any, None]]) -> Desk:
    """Runs a test with a desk, which is closed behind it."""

    async def closed() -> Desk:
        desk = Desk()
        try:
            async with asyncio.timeout(60):
                await test(desk)
        finally:
            desk.go.set()
            await asyncio.to_thread(desk.encoder.close)
        return desk

    return asyncio.run(closed())


def test_an_answer_waits_for_at_most_one_part_of_each_other_team() -> None:
    async def test(desk: Desk) -> None:
        await desk.hold()
        long = [desk.ask(team, 50) for team in ("dense", "denser") for _ in range(3)]
        light = desk.ask("light", 1)
        desk.go.set()
        assert await rows(light) == [0]
        await asyncio.gather(*map(rows, long))

    done = run(test).done
    assert done.index("light") <= 1 + 2
    assert len(done) == 1 + 300 + 1


def test_an_answer_that_comes_late_does_not_wait_for_the_rest_of_a_long_one() -> None:
    async def test(desk: Desk) -> None:
        desk.go.set()
        await rows(desk.ask("dense", 30))
        desk.go.clear()
        desk._begun.clear()
        long = desk.ask("dense", 30)  # the next part of this team, after many
        await asyncio.to_thread(desk._begun.wait, 30)
        light = desk.ask("light", 1)
        desk.go.set()
        await asyncio.gather(rows(light), rows(long))

    assert run(test).done.index("light") == 30 + 1


def test_bytes_are_shared_by_weight() -> None:
    async def test(desk: Desk) -> None:
        await desk.hold()
        answers = [desk.ask("one", 40), desk.ask("three", 40, weight=3.0)]
        desk.go.set()
        await asyncio.gather(*map(rows, answers))

    done = run(test).done
    assert done[1:41].count("three") == pytest.approx(30, abs=1)


def test_a_team_of_small_parts_gets_as_many_bytes_and_not_as_many_turns() -> None:
    async def test(desk: Desk) -> None:
        await desk.hold()
        answers = [desk.ask("small", 100, nbytes=NBYTES // 10), desk.ask("large", 10)]
        desk.go.set()
        await asyncio.gather(*map(rows, answers))

    done = run(test).done
    assert done[1:56].count("large") == pytest.approx(5, abs=1)


def test_a_team_that_was_away_has_saved_nothing_up() -> None:
    async def test(desk: Desk) -> None:
        desk.go.set()
        await rows(desk.ask("steady", 100))
        desk.go.clear()
        desk._begun.clear()
        await desk.hold()
        answers = [desk.ask("steady", 20), desk.ask("guest", 20)]
        desk.go.set()
        await asyncio.gather(*map(rows, answers))

    done = run(test).done[101:]
    assert done[:20].count("guest") == pytest.approx(10, abs=1)


def test_within_a_team_prompts_go_first_and_the_rest_is_finished_in_order() -> None:
    async def test(desk: Desk) -> None:
        await desk.hold()
        order: list[str] = []

        async def noted(name: str, encoding: Encoding) -> None:
            await rows(encoding)
            order.append(name)

        answers = [desk.ask("team", 3), desk.ask("team", 3), desk.ask("team", 3, level=INTERACTIVE)]
        desk.go.set()
        async with asyncio.TaskGroup() as tasks:
            for name, encoding in zip(("old", "young", "prompt"), answers, strict=True):
                tasks.create_task(noted(name, encoding))
        assert order == ["prompt", "old", "young"]

    run(test)


def test_parts_come_in_order_and_each_as_soon_as_it_is_encoded() -> None:
    async def test(desk: Desk) -> None:
        gate = threading.Semaphore(0)

        def make() -> Iterator[tuple[int, int, bytes]]:
            for number in range(3):
                gate.acquire()
                yield number, 1, bytes([number])

        encoding = desk.encode(make, Team("team"))
        for number in range(3):
            gate.release()  # the next part cannot be made before this one has come
            part = await anext(encoding)
            assert (part.first_row, part.payload) == (number, bytes([number]))
        with pytest.raises(StopAsyncIteration):
            await anext(encoding)

    run(test)


@pytest.mark.parametrize("parts", [0, 2])
def test_an_error_is_that_answers_own_and_the_thread_goes_on(parts: int) -> None:
    async def test(desk: Desk) -> None:
        await desk.hold()
        bad = desk.ask("team", parts, error=ValueError("row 3"))
        good = desk.ask("team", 2)
        desk.go.set()
        for number in range(parts):
            assert (await anext(bad)).first_row == number
        with pytest.raises(ValueError, match="row 3"):
            await anext(bad)
        assert await rows(good) == [0, 1]

    assert len(run(test).ended) == 3


def test_what_is_not_wanted_any_more_is_not_encoded() -> None:
    async def test(desk: Desk) -> None:
        first = await desk.hold()
        gone, kept = desk.ask("team", 5), desk.ask("team", 2)
        gone.close()
        first.close()  # it is in hand
        gone.close()
        desk.go.set()
        assert await rows(kept) == [0, 1]

    desk = run(test)
    assert desk.done == ["first", "team", "team"]
    assert len(desk.ended) == len(set(desk.ended)) == 3


def test_closing_leaves_nobody_waiting() -> None:
    async def test(desk: Desk) -> None:
        answers = [await desk.hold(), desk.ask("team", 2), desk.ask("other", 2)]
        waiting = [asyncio.create_task(rows(one)) for one in answers]
        closing = asyncio.create_task(asyncio.to_thread(desk.encoder.close))
        for one in waiting:
            with pytest.raises(RuntimeError, match="stopped"):
                await one
        desk.go.set()
        await closing
        with pytest.raises(RuntimeError, match="stopped"):
            await rows(desk.ask("late", 1))

    desk = run(test)
    assert len(desk.ended) == 4
    assert desk.done == ["first"]


def test_an_encoder_that_was_never_used_closes_at_once() -> None:
    async def test(desk: Desk) -> None:
        desk.encoder.close()

    run(test)


def test_teams_that_were_there_once_are_forgotten() -> None:
    async def test(desk: Desk) -> None:
        desk.go.set()
        for number in range(300):
            await rows(desk.ask(f"team{number}", 1))

    async def counted(desk: Desk) -> None:
        await test(desk)
        assert len(desk.encoder._teams) < 5

    run(counted)


def test_a_reader_that_stopped_holds_no_tensors() -> None:
    async def test(desk: Desk) -> None:
        desk.go.set()
        unread = desk.ask("slow", 20)
        await rows(desk.ask("slow", 1))  # the answers of a team are finished in order
        assert unread._parts is None
        assert unread._rows is None
        assert unread.job in desk.ended
        assert len(await rows(unread)) == 20

    run(test)


def test_two_threads_encode_two_answers_at_once_and_the_parts_of_each_in_order() -> None:
    async def test() -> None:
        desk = Desk(num_threads=2)
        both = threading.Barrier(2, timeout=30)

        def make(number: int) -> Iterator[tuple[int, int, bytes]]:
            for part in range(20):
                if part == 0:
                    both.wait()  # two threads must be here at once
                yield part, 1, bytes([number])

        try:
            async with asyncio.timeout(60):
                answers = [
                    desk.encode(partial(make, number), Team(f"team{number}")) for number in (1, 2)
                ]
                assert await asyncio.gather(*map(rows, answers)) == [list(range(20))] * 2
        finally:
            await asyncio.to_thread(desk.encoder.close)
        assert len(desk.ended) == 2

    asyncio.run(test())


def test_a_thread_that_ends_is_a_failure() -> None:
    class Death(BaseException):
        pass

    def make() -> Parts:
        raise Death

    async def test(desk: Desk) -> None:
        desk.encode(make, Team("team"))
        await asyncio.to_thread(wait_until, desk.encoder.has_died, "the thread has ended")
        assert "Death" in desk.failures[0]

    run(test)
