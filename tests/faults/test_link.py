"""The network between a trainer and its replicas: cut, slow, reset, silent, damaged (rows 6 to 9)."""

import logging
import random
import resource
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from student_trainer import TeacherUnavailable, connect
from student_trainer.client import answers, discovery, links, refusals, stalls
from tests.support import tiny
from tests.support.fleet import Fleet, wait_until
from tests.support.oracle import VOCAB, digest, left_in_this_process, within
from tests.support.proxy import Direction, flips, losses, repeats

SPARE_S = 2.0
"""The limit of a recovery with a spare replica; tests allow five times as much."""


@pytest.fixture(scope="module")
def fleet(serve, folder) -> Iterator[Fleet]:
    with Fleet(serve, folder, proxied=True) as fleet:
        fleet.wait_known()
        yield fleet


@pytest.fixture
def one(fleet: Fleet) -> Iterator[Fleet]:
    """The fleet with only the first replica within reach."""
    fleet.proxies[1].refuse()
    yield fleet
    fleet.proxies[1].accept()


@pytest.fixture(autouse=True)
def _calm_and_empty(fleet: Fleet) -> Iterator[None]:
    yield
    for proxy in fleet.proxies:
        proxy.calm()
    assert left_in_this_process() == []
    fleet.assert_nothing_left(40.0)  # a connection that died in silence is noticed by keepalive


@pytest.fixture(scope="module")
def sequences() -> list[torch.Tensor]:
    return tiny.random_sequences(150, VOCAB, seed=6)


@pytest.fixture(scope="module")
def wanted(fleet: Fleet, sequences: list[torch.Tensor]) -> list[str]:
    """The digests of a stream that nothing happens to."""
    with connect(fleet.own[0]) as teacher:
        return [digest(targets) for _, targets in teacher.stream(sequences)]


def rest(pairs, seconds: float = 40.0) -> list[str]:
    """The digests of what is left of a stream; fails if that takes longer."""
    return within(seconds, lambda: [digest(targets) for _, targets in pairs])


def both(fleet: Fleet, teacher) -> None:
    """Until the teacher has links to both replicas."""

    def linked() -> bool:
        list(teacher.stream([[1, 2]]))
        return len(teacher.replicas) == 2

    wait_until(linked, "links to both replicas")


@pytest.mark.parametrize(
    "seconds",
    [pytest.param(5.0, id="5s"), pytest.param(60.0, id="60s", marks=pytest.mark.slow)],
)
def test_a_cut_is_survived(one: Fleet, sequences, wanted, seconds: float):
    with connect(one.addresses[0]) as teacher:
        pairs = teacher.stream(sequences, ahead=30)
        got = [digest(next(pairs)[1]) for _ in range(20)]
        one.proxies[0].hold()
        threading.Timer(seconds, one.proxies[0].release).start()
        began = time.monotonic()
        got += rest(pairs, seconds + 30)
        assert got == wanted
        # After a long cut the link is tried anew, at most every 6 s.
        assert time.monotonic() - began < seconds + 5 * SPARE_S


@pytest.mark.slow
def test_a_cut_of_one_replica_is_bridged_by_the_other(fleet: Fleet, sequences, wanted):
    with connect(fleet.addresses) as teacher:
        both(fleet, teacher)
        pairs = teacher.stream(sequences, ahead=30)
        got = [digest(next(pairs)[1]) for _ in range(20)]
        fleet.proxies[0].hold()
        assert got + rest(pairs, 5 * 15.0) == wanted
        assert teacher.counters.reconnects == 1


def test_a_cut_for_ever_is_an_error_that_names_the_address_and_the_place(
    one: Fleet, sequences, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(links, "PROBE_AFTER_S", 1.0)
    monkeypatch.setattr(links, "PROBE_S", 1.0)
    with connect(one.addresses[0], patience_s=2.0) as teacher:
        pairs = teacher.stream(sequences, ahead=30)
        for _ in range(40):
            next(pairs)
        one.proxies[0].hold()
        with pytest.raises(TeacherUnavailable) as caught:
            rest(pairs, 5 * 15.0)
        assert one.addresses[0] in str(caught.value)
        assert "stream item " in str(caught.value)


def shaped(way: Direction, kind: str) -> None:
    if kind == "delay":
        way.delay_s = 0.3
    elif kind == "rate":
        way.bytes_per_s = 60_000.0
    else:
        way.chop_nbytes = 1


@pytest.mark.parametrize("kind", ["delay", "rate", "1-byte writes"])
def test_a_slow_link_is_no_error_while_there_is_progress(one: Fleet, sequences, wanted, kind):
    count = {"delay": 150, "rate": 12, "1-byte writes": 25}[kind]
    with connect(one.addresses[0]) as teacher:
        list(teacher.stream(sequences[:20]))
        shaped(one.proxies[0].up, kind)
        shaped(one.proxies[0].down, kind)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.monotonic()
        assert rest(teacher.stream(sequences[:count], ahead=30), 60) == wanted[:count]
        print(f"{kind}: {time.monotonic() - began:.1f} s")
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert after - before < 32 << 10  # KiB
        counters = teacher.counters
        assert (counters.reconnects, counters.stalled, counters.corrupt) == (0, 0, 0)
        # A connection that is made over the slow link works as well.
        with connect(one.addresses[0]) as second:
            assert rest(second.stream(sequences[:5]), 30) == wanted[:5]


@pytest.mark.slow
def test_a_slow_link_that_takes_longer_than_every_time_out_is_no_error(
    one: Fleet, sequences, wanted, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(links, "PROBE_AFTER_S", 0.2)
    with connect(one.addresses[0]) as teacher:
        one.proxies[0].down.bytes_per_s = 20_000.0
        assert rest(teacher.stream(sequences[:8], ahead=8), 60) == wanted[:8]
        assert teacher.counters.reconnects == 0


@pytest.mark.parametrize(
    "spare",
    [
        pytest.param(True, id="spare"),
        pytest.param(False, id="alone", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kind", ["reset", "half-close up", "half-close down"])
def test_a_message_that_is_cut_in_two_is_never_used(
    fleet: Fleet, sequences, wanted, kind: str, spare: bool
):
    chance = random.Random(f"{kind} {spare}")
    with connect(fleet.addresses if spare else fleet.addresses[0]) as teacher:
        both(fleet, teacher)
        broken = fleet.proxies[0]
        for _ in range(2):
            pairs = teacher.stream(sequences, ahead=30)
            got = [digest(next(pairs)[1]) for _ in range(10)]
            way = broken.up if kind == "half-close up" else broken.down
            place = way.nbytes + chance.randrange(1, 3_000 if way is broken.up else 30_000)
            if kind == "reset":
                way.reset_at = place
            else:
                way.end_at = place
            began = time.monotonic()
            got += rest(pairs, 30)
            assert got == wanted
            assert time.monotonic() - began < 5 * SPARE_S + 5
            both(fleet, teacher)


def test_a_black_hole_among_the_addresses_is_passed_over(fleet: Fleet, sequences, wanted):
    fleet.proxies[0].hold()
    began = time.monotonic()
    with connect(fleet.addresses) as teacher:
        assert time.monotonic() - began < 5 * discovery.TRY_S[0]
        assert rest(teacher.stream(sequences)) == wanted
        fleet.proxies[0].release()
        both(fleet, teacher)


DAMAGES = {"flips": flips, "losses": losses, "repeats": repeats}


@pytest.mark.parametrize(
    ("kind", "seeds"),
    [
        pytest.param("flips", range(2), id="flips"),
        pytest.param("losses", range(1), id="losses"),
        pytest.param("repeats", range(1), id="repeats"),
        pytest.param("flips", range(100, 160), id="many flips", marks=pytest.mark.slow),
        pytest.param("losses", range(100, 120), id="many losses", marks=pytest.mark.slow),
        pytest.param("repeats", range(100, 120), id="many repeats", marks=pytest.mark.slow),
    ],
)
def test_damaged_bytes_are_never_trained_on(
    fleet: Fleet, sequences, wanted, monkeypatch: pytest.MonkeyPatch, kind: str, seeds
):
    monkeypatch.setattr(stalls, "STALL_S", 2.0)
    monkeypatch.setattr(links, "PROBE_AFTER_S", 1.0)
    # There are more flips than a network has.
    monkeypatch.setattr(answers, "MAX_ATTEMPTS", 20)
    monkeypatch.setattr(refusals, "MAX_UNREADABLE", 20)
    # Its log records would keep the streams open for as long as pytest keeps the records.
    monkeypatch.setattr(logging.getLogger("grpc._common"), "disabled", True)
    with connect(fleet.addresses) as teacher:
        for seed in seeds:
            print(f"{kind} seed {seed}")
            for index, proxy in enumerate(fleet.proxies):
                for number, (way, size) in enumerate(((proxy.up, 20_000), (proxy.down, 150_000))):
                    way.damage = DAMAGES[kind](
                        1000 * seed + 10 * index + number, every_nbytes=size, first=way.nbytes
                    )
            assert rest(teacher.stream(sequences, ahead=30), 45) == wanted
            for proxy in fleet.proxies:
                proxy.calm()
        corrupt, reconnects = teacher.counters.corrupt, teacher.counters.reconnects
    print(f"corrupt {corrupt}, reconnects {reconnects}")
    assert corrupt + reconnects >= len(seeds)
    if kind == "flips":
        assert corrupt
    # A client that is lost in the middle of an answer is no failure of the service.
    assert not any("request failed" in replica.output() for replica in fleet.replicas)
