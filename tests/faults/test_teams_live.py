"""Teams that share two replicas, live (row 22): weights, a team that joins, and a hostile one."""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Sequence

import grpc
import pytest
import torch

from protos import teacher_pb2, teacher_pb2_grpc
from tests.faults.fleet import Fleet

LENGTH = 64
WINDOW = 40
"""Requests in flight of a team at each replica: five batches."""
BATCHES = ("--batch.max-tokens", str(8 * LENGTH))
BATCH_S = 0.05
IDS = torch.arange(LENGTH, dtype=torch.int32).numpy().tobytes()
TARGETS = teacher_pb2.TargetSpec(top_k=teacher_pb2.TopK(k=1, bits=8))


def callers_by_metadata() -> None:
    """Runs in the service: who calls is whom the call's metadata says, as "name:weight"."""
    from teacher_server import access
    from teacher_server.service import TeacherService
    from teacher_server.teams import Team

    score = TeacherService.Score

    class Named(access.Caller):
        def __init__(self, team: Team) -> None:
            self._team = team

        def team(self) -> Team:
            return self._team

    async def named(self, request_iterator, context) -> None:
        said = dict(context.invocation_metadata() or ()).get("team", "default:1")
        name, _, weight = str(said).partition(":")
        access.CURRENT.set(Named(Team(name, weight=float(weight))))
        await score(self, request_iterator, context)

    TeacherService.Score = named  # type: ignore[method-assign]


class Load:
    """Teams that ask replicas for as much as they can get, and what they get."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses
        self._tasks: list[asyncio.Task[None]] = []
        self.answers: list[tuple[float, str]] = []
        """When an answer came, and to whom."""

    def join(
        self, name: str, weight: float, *, streams: int = 1, lengths: Sequence[int] = (LENGTH,)
    ) -> None:
        """One more team, with so many streams to every replica, which share its window."""
        for address, _ in itertools.product(self._addresses, range(streams)):
            window = -(-WINDOW // streams)
            running = self._stream(address, name, f"{name}:{weight}", window, lengths)
            self._tasks.append(asyncio.create_task(running))

    async def storm(self, name: str) -> None:
        """A team that opens streams, asks, and goes away before the answers, until cancelled."""
        numbers = itertools.count()
        async with grpc.aio.insecure_channel(self._addresses[0]) as channel:
            stub = teacher_pb2_grpc.TeacherStub(channel)
            while True:
                call = stub.Score(metadata=(("team", f"{name}:1"),))
                for _ in range(WINDOW):
                    await call.write(_request(next(numbers), LENGTH))
                await asyncio.sleep(BATCH_S / 2)
                call.cancel()

    async def _stream(
        self, address: str, name: str, said: str, window: int, lengths: Sequence[int]
    ) -> None:
        requests = (_request(n, length) for n, length in enumerate(itertools.cycle(lengths)))
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            call = teacher_pb2_grpc.TeacherStub(channel).Score(metadata=(("team", said),))
            for _ in range(window):
                await call.write(next(requests))
            async for response in call:
                assert response.HasField("part"), response.error
                self.answers.append((time.monotonic(), name))
                await call.write(next(requests))

    def counts(self, since: float, until: float) -> Counter[str]:
        return Counter(name for when, name in self.answers if since <= when < until)

    async def end(self) -> None:
        """Ends the streams; raises what went wrong on one."""
        for task in self._tasks:
            task.cancel()
        for ended in await asyncio.gather(*self._tasks, return_exceptions=True):
            if not isinstance(ended, asyncio.CancelledError):
                assert ended is None, ended


def _request(number: int, length: int) -> teacher_pb2.ScoreRequest:
    return teacher_pb2.ScoreRequest(
        request_id=number,
        token_ids=IDS[: 4 * length],
        lengths=[length],
        first_rows=[length - 2],
        targets=TARGETS,
    )


async def weights_and_a_guest(
    addresses: Sequence[str], seconds: float
) -> tuple[float, float, float]:
    """Teams of weight 1 and 3 for so long; then one of weight 4 joins. The ratio, the guest's share
    afterwards, and how long it took until a second of its answers was its share within 10 %."""
    load = Load(addresses)
    load.join("one", 1.0)
    load.join("three", 3.0)
    await asyncio.sleep(1.0)
    began = time.monotonic()
    await asyncio.sleep(seconds)
    counts = load.counts(began, time.monotonic())
    joined = time.monotonic()
    load.join("guest", 4.0, streams=4)
    joining_s = float("inf")
    while time.monotonic() < joined + 6.0:
        await asyncio.sleep(0.05)
        now = time.monotonic()
        last = load.counts(now - 1.0, now)
        if last.total() and last["guest"] / last.total() >= 0.45:
            joining_s = now - joined
            break
    await asyncio.sleep(1.5)
    now = time.monotonic()
    last = load.counts(now - 1.5, now)
    await load.end()
    return counts["three"] / counts["one"], last["guest"] / last.total(), joining_s


@pytest.mark.parametrize("seconds", [3.0, pytest.param(60.0, marks=pytest.mark.slow)])
def test_weights_are_kept_and_a_team_that_joins_gets_its_share(serve, folder, seconds) -> None:
    with Fleet(serve, folder, flags=BATCHES, batch_s=BATCH_S, hook=callers_by_metadata) as fleet:
        ratio, guest, joining_s = asyncio.run(weights_and_a_guest(fleet.addresses, seconds))
        print(
            f"\n{seconds:.0f} s: ratio {ratio:.3f}, guest's share {guest:.3f} in {joining_s:.2f} s"
        )
        assert ratio == pytest.approx(3.0, rel=0.05)
        assert joining_s <= 5.0
        assert guest == pytest.approx(0.5, rel=0.1)
        fleet.assert_nothing_left()


def test_a_hostile_team_costs_another_no_more_than_its_share(serve, folder) -> None:
    async def run(fleet: Fleet) -> tuple[int, float]:
        load = Load(fleet.own)
        load.join("good", 1.0)
        load.join("hostile", 1.0, streams=20, lengths=(2, 10, LENGTH))
        storm = asyncio.create_task(load.storm("hostile"))
        await asyncio.sleep(1.0)
        before = fleet.gauge(0, "teacher_batch_tokens_sum")
        began = time.monotonic()
        await asyncio.sleep(2.5)
        counts = load.counts(began, time.monotonic())
        computed = fleet.gauge(0, "teacher_batch_tokens_sum") - before
        storm.cancel()
        await asyncio.gather(storm, return_exceptions=True)
        await load.end()
        return counts["good"] * LENGTH, computed

    with Fleet(serve, folder, 1, flags=BATCHES, batch_s=BATCH_S, hook=callers_by_metadata) as fleet:
        good, computed = asyncio.run(run(fleet))
        print(f"\n{good / computed:.1%} of {computed:.0f} tokens")
        assert good / computed > 0.5 * 0.85
        fleet.assert_nothing_left()
