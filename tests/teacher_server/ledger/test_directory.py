import os
import random
import signal
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from teacher_server.ledger.directory import FILE_NAME, LEASE_S, Directory, read_usage
from teacher_server.ledger.journal import Kind, Record, to_bytes
from teacher_server.ledger.lease import LeaseRequest, UsageRow
from tests.conftest import FORKSERVER

DAY = 20_000
NOON = DAY * 86400.0 + 43200


class Clock:
    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def segment(*records: Record) -> bytes:
    return b"".join(map(to_bytes, records))


def charge(tokens: int, team: str = "search", day: int = DAY) -> Record:
    return Record(Kind.DISPATCHED, team, day, 1, tokens)


def deliver(key: int, rows: int = 10, team: str = "search", day: int = DAY) -> Record:
    return Record(Kind.DELIVERED, team, day, rows, 100, key.to_bytes(16, "big"))


def request(
    *, held: int = 0, need: int = 0, more: int = 0, quota: int = 1000, day: int = DAY
) -> LeaseRequest:
    return LeaseRequest(quota, day, held, need, more, active=True)


def test_usage_is_summed_by_day_and_team(tmp_path: Path, clock: Clock):
    directory = Directory(tmp_path, clock=clock)
    directory.sync("a", (1, segment(charge(32), charge(64), charge(8, "ranking"))), {})
    directory.sync("b", (1, segment(charge(1, day=DAY - 1), deliver(1, 7))), {})
    directory.sync("b", (2, segment(Record(Kind.REJECTED, "ranking", DAY, 5))), {})
    yesterday = UsageRow(DAY - 1, "search", 1, 1, 0, 0, 0)
    ranking = UsageRow(DAY, "ranking", 1, 8, 0, 0, 5)
    search = UsageRow(DAY, "search", 2, 96, 7, 100, 0)
    assert directory.usage(None, 0) == [yesterday, ranking, search]
    assert directory.usage("search", 0) == [yesterday, search]
    assert directory.usage(None, DAY) == [ranking, search]
    assert read_usage(tmp_path / FILE_NAME, "search", DAY) == [search]
    directory.close()
    again = Directory(tmp_path, clock=clock)
    assert again.usage(None, 0) == [yesterday, ranking, search]
    again.close()


def test_a_segment_counts_once_however_often_it_comes(clock: Clock):
    directory = Directory(None, clock=clock)
    for _ in range(3):
        directory.sync("a", (1, segment(charge(10))), {})
    directory.sync("a", (2, segment(charge(10))), {})
    directory.sync("a", (1, segment(charge(10))), {})
    assert directory.usage(None, 0)[0].tokens == 20
    directory.close()


def test_a_delivery_counts_once_per_key_also_from_other_journals_and_days(clock: Clock):
    directory = Directory(None, clock=clock)
    directory.sync("a", (1, segment(deliver(1), deliver(2), deliver(1))), {})
    directory.sync("b", (1, segment(deliver(2), deliver(3))), {})
    clock.now += 86400
    directory.sync("a", (2, segment(deliver(3), deliver(4), deliver(4))), {})
    assert sum(row.delivered_rows for row in directory.usage(None, 0)) == 40
    directory.close()


def test_keys_are_forgotten_after_the_next_day(clock: Clock):
    directory = Directory(None, clock=clock)
    directory.sync("a", (1, segment(*map(deliver, range(50)))), {})
    for number in (2, 3):
        clock.now += 86400
        directory.sync("a", (number, segment(charge(1))), {})
    assert directory._base.execute("SELECT count(*) FROM delivered").fetchone() == (0,)
    directory.close()


def test_leases_and_charges_never_exceed_the_quota(clock: Clock):
    """Replicas that take, spend, report late, lose answers and die."""
    chance = random.Random(3)
    directory = Directory(None, clock=clock)
    quota, charged = 10_000, 0
    held = {name: 0 for name in "abc"}
    numbers = dict.fromkeys(held, 0)
    unreported: dict[str, list[Record]] = {name: [] for name in held}
    for _ in range(2000):
        name = chance.choice("abc")
        if chance.random() < 0.6 and held[name]:
            tokens = chance.randint(1, min(40, held[name]))
            held[name] -= tokens
            charged += tokens
            unreported[name].append(charge(tokens))
            continue
        numbers[name] += 1
        part = numbers[name], segment(*unreported[name])
        unreported[name] = []
        asked = {"search": request(held=held[name], need=chance.randint(0, 60), quota=quota)}
        granted = directory.sync(name, part, asked)["search"]
        if chance.random() < 0.2:  # the answer was lost: the same again
            granted = directory.sync(name, part, asked)["search"]
        held[name] += granted.tokens
        assert charged + sum(held.values()) <= quota
        clock.now += 0.01
    assert charged > 0.9 * quota
    for name in held:  # in the end everything is used, by whoever asks
        numbers[name] += 1
        directory.sync(name, (numbers[name], segment(*unreported[name])), {}, ended=True)
    left = directory.sync("d", None, {"search": request(need=1 << 40, quota=quota)})["search"]
    assert (left.left_today, left.tokens) == (quota - charged, quota - charged)
    directory.close()


def test_the_lease_of_a_silent_replica_is_free_after_a_while(clock: Clock):
    directory = Directory(None, clock=clock)
    assert directory.sync("a", None, {"search": request(need=900)})["search"].tokens == 900
    second = directory.sync("b", None, {"search": request(need=500)})["search"]
    assert (second.tokens, second.elsewhere, second.left_today) == (100, 900, 1000)
    assert second.replicas == 2
    clock.now += LEASE_S + 1
    third = directory.sync("b", None, {"search": request(held=100, need=400)})["search"]
    assert (third.tokens, third.elsewhere, third.replicas) == (400, 0, 1)
    directory.close()


def test_a_new_day_has_a_new_quota(clock: Clock):
    directory = Directory(None, clock=clock)
    directory.sync("a", (1, segment(charge(1000))), {})
    assert directory.sync("a", None, {"search": request(need=10)})["search"].tokens == 0
    clock.now += 86400
    late = directory.sync("a", None, {"search": request(need=10)})["search"]  # its clock is behind
    assert (late.tokens, late.left_today) == (0, 1000)
    assert (
        directory.sync("a", None, {"search": request(need=10, day=DAY + 1)})["search"].tokens == 10
    )
    directory.close()


def test_nobody_takes_for_later_what_others_need_now(clock: Clock):
    directory = Directory(None, clock=clock)
    directory.sync("a", None, {"search": request(need=10)})
    granted = directory.sync("b", None, {"search": request(need=100, more=10_000)})["search"]
    assert 100 < granted.tokens <= 100 + 990 // 2
    directory.close()


def test_a_ledger_of_a_newer_version_is_refused(tmp_path: Path):
    base = sqlite3.connect(tmp_path / FILE_NAME)
    base.execute("PRAGMA user_version = 9")
    base.close()
    with pytest.raises(sqlite3.DatabaseError, match="version 9"):
        Directory(tmp_path)


def test_replicas_may_open_a_new_ledger_at_the_same_moment(tmp_path: Path):
    """SQLite refused one of two in a few of a hundred cases, and that replica did not start."""
    barrier = threading.Barrier(4)

    def open_and_close(folder: Path) -> None:
        barrier.wait()
        Directory(folder).close()

    with ThreadPoolExecutor(4) as pool:
        for number in range(100):
            list(pool.map(open_and_close, [tmp_path / str(number)] * 4))


def _sync_until_killed(folder: str, name: str, end: Connection) -> None:
    """Reports one charge and one delivery per segment; each also says what was acknowledged."""
    directory = Directory(Path(folder))
    today = int(time.time() // 86400)
    for number in range(1, 1 << 40):
        data = segment(charge(number, day=today), deliver(number, 1, day=today))
        while True:
            try:
                directory.sync(name, (number, data), {})
                break
            except sqlite3.OperationalError:
                # The other one writes without a pause, and SQLite has no queue: replicas ask again.
                pass
        end.send(number)


def test_the_ledger_is_right_after_its_processes_were_killed(tmp_path: Path):
    """Three at once over one file, killed at any moment; what was not acknowledged comes again."""
    acknowledged: dict[str, int] = {}
    for turn in range(3):
        started = []
        for index in range(2):
            mine, theirs = FORKSERVER.Pipe(duplex=False)
            name = f"{turn}-{index}"
            process = FORKSERVER.Process(
                target=_sync_until_killed, args=(str(tmp_path), name, theirs)
            )
            process.start()
            theirs.close()
            started.append((name, process, mine))
        for name, process, mine in started:
            for _ in range(5 + turn):
                acknowledged[name] = mine.recv()
            os.kill(process.pid, signal.SIGKILL)
        for name, process, mine in started:
            process.join()
            try:
                while True:
                    acknowledged[name] = mine.recv()
            except EOFError:
                mine.close()
    directory = Directory(tmp_path)
    today = int(time.time() // 86400)
    for name, number in acknowledged.items():  # the one after may have been applied or not
        for one in (number, number + 1):
            data = segment(charge(one, day=today), deliver(one, 1, day=today))
            directory.sync(name, (one, data), {})
    (row,) = directory.usage("search", today)
    assert row.tokens == sum((n + 1) * (n + 2) // 2 for n in acknowledged.values())
    assert row.sequences == sum(n + 1 for n in acknowledged.values())
    assert row.delivered_rows == max(acknowledged.values()) + 1  # the keys are the same numbers
    directory.close()
