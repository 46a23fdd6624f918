"""A random mix of faults for minutes, beside a trainer that must notice none of them (row 24)."""

import contextlib
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from student_trainer import connect
from tests.faults.test_crowds import crowd
from tests.support import tiny
from tests.support.crowd import KINDS
from tests.support.fleet import Fleet, wait_until
from tests.support.http2 import Peer
from tests.support.oracle import VOCAB, digest, left_in_this_process, within
from tests.support.proxy import flips, losses

SEED = random.SystemRandom().randrange(1 << 32)
SEQUENCES = tiny.random_sequences(48, VOCAB, seed=71)
REPLICAS = 3
WARM_S = 30.0
"""What a process takes in its first time is not counted."""
GROWTH_NBYTES, GROWTH_NBYTES_PER_MIN = 128 << 20, 4 << 20
FILES = 40
ROUND_S = 60.0
"""Within which one pass over the sequences must come, whatever happens."""


class Mix:
    """Breaks things at random. Replica 0 is never killed, so that what it holds can be watched."""

    def __init__(self, fleet: Fleet, chance: random.Random) -> None:
        self.fleet = fleet
        self.chance = chance
        self.done: dict[str, int] = {}
        self.crowds = contextlib.ExitStack()

    def step(self) -> None:
        """One fault, or the end of some."""
        chance = self.chance
        # Somebody has to be there: faults of replicas are those of one at a time.
        replicas = [self.kill, self.stop, self.freeze, self.bad_path]
        links = [self.reset, self.damage, self.slow, self.calm]
        clients = [self.crowd, self.crowd, self.leave, self.hang_up]
        action = chance.choice(chance.choice([replicas, links, clients]))
        self.done[action.__name__] = self.done.get(action.__name__, 0) + 1
        action()

    def kill(self) -> None:
        index = self.chance.randrange(1, REPLICAS)
        self.fleet.kill(index)
        self.fleet.start(index)

    def stop(self) -> None:
        index = self.chance.randrange(1, REPLICAS)
        assert self.fleet.replicas[index].stop(signal.SIGTERM) == 0
        self.fleet.start(index)

    def freeze(self) -> None:
        index = self.chance.randrange(REPLICAS)
        self.fleet.freeze(index)
        time.sleep(self.chance.uniform(0.1, 6.0))
        self.fleet.thaw(index)

    def reset(self) -> None:
        self.chance.choice(self.fleet.proxies).reset()

    def damage(self) -> None:
        proxy = self.chance.choice(self.fleet.proxies)
        kind = self.chance.choice([flips, losses])
        for way in (proxy.up, proxy.down):
            way.damage = kind(self.chance.randrange(1 << 30), every_nbytes=200_000)

    def slow(self) -> None:
        way = self.chance.choice(self.fleet.proxies).down
        way.delay_s = self.chance.uniform(0.0, 0.3)

    def calm(self) -> None:
        for proxy in self.fleet.proxies:
            proxy.calm()

    def crowd(self) -> None:
        kind, address = self.chance.choice(list(KINDS)), self.chance.choice(self.fleet.own)
        with contextlib.suppress(OSError, AssertionError):  # the replica may be down just now
            self.crowds.enter_context(crowd(kind, self.chance.randint(1, 30), address))

    def leave(self) -> None:
        self.crowds.close()

    def bad_path(self) -> None:
        for address in self.fleet.own:
            with contextlib.suppress(OSError), Peer(address) as peer:
                peer.call(b"/\xe5")

    def hang_up(self) -> None:
        """A client that asks and goes at once."""
        with contextlib.suppress(Exception), connect(self.fleet.addresses, patience_s=5) as teacher:
            next(teacher.stream(SEQUENCES, ahead=32))

    def end(self) -> None:
        self.calm()
        self.crowds.close()


class Watched:
    """What replica 0 holds, over time."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.files = Path(f"/proc/{fleet.replicas[0].process.pid}/fd")
        self.began_s = time.monotonic()
        self.first = self.now()

    def now(self) -> tuple[int, int]:
        """Bytes and open files."""
        return self.fleet.rss_nbytes(0), len(list(self.files.iterdir()))

    def check(self) -> None:
        """When nobody is there any more."""
        minutes = (time.monotonic() - self.began_s) / 60
        nbytes, _ = self.now()
        limit = GROWTH_NBYTES + minutes * GROWTH_NBYTES_PER_MIN
        assert nbytes - self.first[0] < limit, f"from {self.first[0]} to {nbytes} bytes"
        wait_until(lambda: self.now()[1] <= self.first[1] + FILES, lambda: f"files {self.now()}")


@contextlib.contextmanager
def training(fleet: Fleet, wanted: list[str]) -> Iterator[dict[str, int]]:
    """A trainer that goes over the sequences again and again meanwhile, and checks each target."""
    over = threading.Event()
    errors: list[BaseException] = []
    counts = {"rounds": 0, "rows": 0}

    def train() -> None:
        try:
            with connect(fleet.addresses) as teacher:
                while not over.is_set():
                    ahead = random.choice((1, 8, 48))
                    pairs = teacher.stream(SEQUENCES, ahead=ahead)
                    got = within(
                        ROUND_S, lambda pairs=pairs: [digest(targets) for _, targets in pairs]
                    )
                    assert got == wanted, "O2: other targets"
                    counts["rounds"] += 1
                counts["rows"] = teacher.counters.rows
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        yield counts
    finally:
        over.set()
        thread.join(2 * ROUND_S)
    assert not thread.is_alive()
    if errors:
        raise errors[0]


@pytest.mark.parametrize(
    "minutes", [pytest.param(2, id="short"), pytest.param(30, id="long", marks=pytest.mark.slow)]
)
def test_a_trainer_notices_nothing_of_a_random_mix_of_faults(serve, folder, tmp_path, minutes):
    print(f"seed {SEED}")
    flags = ("--ledger", str(tmp_path / "ledger"))
    with Fleet(serve, folder, REPLICAS, flags=flags, proxied=True) as fleet:
        with connect(fleet.own) as teacher:
            wanted = [digest(targets) for _, targets in teacher.stream(SEQUENCES)]
            rows = teacher.counters.rows
        mix = Mix(fleet, random.Random(SEED))
        began, watched = time.monotonic(), None
        try:
            with training(fleet, wanted) as counts:
                while time.monotonic() - began < 60 * minutes:
                    mix.step()
                    time.sleep(mix.chance.uniform(0.1, 1.5))
                    if watched is None and time.monotonic() - began > WARM_S:
                        watched = Watched(fleet)
                mix.end()
        finally:
            mix.end()
            print(f"seed {SEED}", mix.done, counts)
        assert counts["rounds"] > minutes
        fleet.wait_known(REPLICAS, 30.0)
        fleet.assert_nothing_left(30.0)
        assert watched is not None
        watched.check()
        delivered = {}

        def billed() -> bool:
            delivered["rows"] = sum(row.delivered_rows for row in fleet.usage())
            return delivered["rows"] >= rows + counts["rows"]

        # Journals of killed replicas are found by others after a while.
        wait_until(billed, lambda: f"O4: {delivered} of {rows} + {counts}", 60.0)
        once = sum(len(sequence) - 1 for sequence in SEQUENCES)
        most = rows + counts["rows"] + mix.done.get("hang_up", 0) * once
        assert delivered["rows"] <= most, "O4: something was billed twice"
        assert "Traceback" not in fleet.replicas[0].output()
    assert left_in_this_process() == [], "O5"
