"""Teams that share two replicas, live (row 22): weights, a team that joins, and a hostile one."""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from logitstream.connection import Connection
from protos import teacher_pb2, teacher_pb2_grpc
from tests.conftest import Serve
from tests.support.fleet import Fleet
from tests.support.teams import add_team, make_certs

LENGTH = 64
WINDOW = 160
"""Requests in flight of a team at each replica: twenty batches, so that it always has some there, also
where this process has to wait for its turn."""
STORM = 40
BATCHES = ("--batch.max-tokens", str(8 * LENGTH))
BATCH_S = 0.05
IDS = torch.arange(LENGTH, dtype=torch.int32).numpy().tobytes()
TARGETS = teacher_pb2.TargetSpec(top_k=teacher_pb2.TopK(k=1, bits=8))
ENOUGH = 640
"""Answers: one batch more or less of these is no difference."""
DENSE = teacher_pb2.TargetSpec(dense=teacher_pb2.Dense(bits=32))


class Shared(Fleet):
    """Replicas with TLS and a teams file, and the connection of each team."""

    def __init__(
        self, serve: Serve, folder: Path, home: Path, weights: dict[str, float], **options
    ):
        teams = home / "teams.toml"
        replicas = add_team(teams, "replicas", "--scopes", "generate")
        scopes = ("--scopes", "score", "dense")
        tokens = {
            name: add_team(teams, name, "--weight", weights[name], *scopes) for name in weights
        }
        flags = (*BATCHES, "--teams", str(teams), *make_certs(home))
        ca = home / "ca.pem"
        super().__init__(
            serve, folder, flags=flags, batch_s=BATCH_S, token=replicas, ca=ca, **options
        )
        self.connections = {
            name: Connection.to(self.own, token=token, ca=ca) for name, token in tokens.items()
        }


class Load:
    """Teams that ask replicas for as much as they can get, and what they get."""

    def __init__(self, fleet: Shared) -> None:
        self._fleet = fleet
        self._tasks: list[asyncio.Task[None]] = []
        self.answers: list[tuple[float, str]] = []
        """When an answer came, and to whom."""

    def join(self, name: str, *, streams: int = 1, lengths: Sequence[int] = (LENGTH,)) -> None:
        """One more team, with so many streams to every replica, which share its window."""
        for address, _ in itertools.product(self._fleet.own, range(streams)):
            running = self._stream(address, name, -(-WINDOW // streams), lengths)
            self._tasks.append(asyncio.create_task(running))

    def flood(self, name: str, *, streams: int, window: int) -> None:
        """A team that asks for dense targets on so many streams, each with a window of its own."""
        for address, _ in itertools.product(self._fleet.own, range(streams)):
            running = self._stream(address, name, window, (LENGTH,), DENSE)
            self._tasks.append(asyncio.create_task(running))

    async def storm(self, name: str) -> None:
        """A team that opens streams, asks, and goes away before the answers, until cancelled."""
        numbers = itertools.count()
        connection = self._fleet.connections[name]
        async with connection.channel(self._fleet.own[0]) as channel:
            stub = teacher_pb2_grpc.TeacherStub(channel)
            while True:
                call = stub.Score(metadata=connection.metadata)
                for _ in range(STORM):
                    await call.write(_request(next(numbers), LENGTH))
                await asyncio.sleep(BATCH_S / 2)
                call.cancel()

    async def _stream(
        self,
        address: str,
        name: str,
        window: int,
        lengths: Sequence[int],
        targets: teacher_pb2.TargetSpec | None = None,
    ) -> None:
        requests = (_request(n, one, targets) for n, one in enumerate(itertools.cycle(lengths)))
        options = [("grpc.use_local_subchannel_pool", 1)]
        connection = self._fleet.connections[name]
        async with connection.channel(address, options) as channel:
            call = teacher_pb2_grpc.TeacherStub(channel).Score(metadata=connection.metadata)
            for _ in range(window):
                await call.write(next(requests))
            async for response in call:
                assert response.HasField("part"), response.error
                if response.part.last:
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


def _request(
    number: int, length: int, targets: teacher_pb2.TargetSpec | None = None
) -> teacher_pb2.ScoreRequest:
    """Of the last row only, or of all rows if the targets are given."""
    return teacher_pb2.ScoreRequest(
        request_id=number,
        token_ids=IDS[: 4 * length],
        lengths=[length],
        first_rows=[0 if targets else length - 2],
        targets=targets or TARGETS,
    )


async def weights_and_a_guest(fleet: Shared, seconds: float) -> tuple[float, float, float]:
    """Teams of weight 1 and 3 for so long; then one of weight 4 joins. The ratio, the guest's share
    afterwards, and how long it took until a second of its answers was its share within 10 %."""
    load = Load(fleet)
    load.join("one")
    load.join("three")
    await asyncio.sleep(1.0)
    began = time.monotonic()
    counts = Counter[str]()
    while counts.total() < ENOUGH:
        await asyncio.sleep(seconds)
        counts = load.counts(began, time.monotonic())
    joined = time.monotonic()
    load.join("guest", streams=4)
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
def test_weights_are_kept_and_a_team_that_joins_gets_its_share(
    serve, folder, tmp_path: Path, seconds
) -> None:
    weights = {"one": 1.0, "three": 3.0, "guest": 4.0}
    with Shared(serve, folder, tmp_path, weights) as fleet:
        ratio, guest, joining_s = asyncio.run(weights_and_a_guest(fleet, seconds))
        print(
            f"\n{seconds:.0f} s: ratio {ratio:.3f}, guest's share {guest:.3f} in {joining_s:.2f} s"
        )
        assert ratio == pytest.approx(3.0, rel=0.05)
        assert joining_s <= 5.0
        assert guest == pytest.approx(0.5, rel=0.1)
        fleet.assert_nothing_left()


def test_a_hostile_team_costs_another_no_more_than_its_share(serve, folder, tmp_path: Path) -> None:
    async def run(fleet: Shared) -> tuple[int, float]:
        load = Load(fleet)
        load.join("good")
        load.join("hostile", streams=20, lengths=(2, 10, LENGTH))
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

    with Shared(serve, folder, tmp_path, {"good": 1.0, "hostile": 1.0}, count=1) as fleet:
        good, computed = asyncio.run(run(fleet))
        print(f"\n{good / computed:.1%} of {computed:.0f} tokens")
        assert good / computed > 0.5 * 0.85
        fleet.assert_nothing_left()
