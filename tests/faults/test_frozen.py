"""Replicas that are there and say nothing: frozen processes, forwards without end (row 2)."""

import signal
import time
from pathlib import Path

import pytest

from student_trainer import connect
from student_trainer.client import discovery, links, stalls
from tests.support import tiny
from tests.support.fleet import SMALL_BATCHES, Fleet, wait_until
from tests.support.oracle import (
    VOCAB,
    Plan,
    Training,
    assert_billed_once,
    assert_same,
    digest,
    within,
)

NOTICED_S = 15.0
"""The limit for a replica that fell silent."""
STALL_S = stalls.STALL_S


@pytest.mark.slow
def test_a_frozen_replica_is_noticed_and_its_late_answers_are_dropped(
    serve, folder, fault_free, tmp_path: Path
):
    plan = Plan()
    flags = (*SMALL_BATCHES, "--ledger", str(tmp_path / "ledger"))
    with Fleet(serve, folder, flags=flags, batch_s=0.15) as fleet:
        fleet.wait_known()
        training = Training(fleet.addresses, plan, tmp_path / "run")
        training.wait_steps(5)
        fleet.freeze(0)
        within(5 * NOTICED_S, lambda: training.wait_steps(25))
        fleet.thaw(0)
        fleet.hurry()
        left = training.wait()
        assert_same(left, fault_free(plan))
        assert all(one.counters["reconnects"] == 1 for one in left)
        assert all(one.longest_wait_s < NOTICED_S for one in left), "O6"
        fleet.assert_nothing_left()
        assert_billed_once(fleet.usage(), left)


def test_a_frozen_replica_is_left_and_taken_back_when_it_thaws(
    serve, folder, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(links, "PROBE_AFTER_S", 1.0)
    monkeypatch.setattr(links, "PROBE_S", 1.0)
    sequences = tiny.random_sequences(100, VOCAB, seed=5)
    with Fleet(serve, folder, flags=SMALL_BATCHES) as fleet, connect(fleet.addresses) as teacher:
        fleet.wait_known()
        wanted = [digest(targets) for _, targets in teacher.stream(sequences)]
        wait_until(lambda: bool(list(teacher.stream([[1, 2]]))) and len(teacher.replicas) == 2, "2")
        pairs = teacher.stream(sequences, ahead=100)
        got = [digest(next(pairs)[1])]
        fleet.freeze(0)
        assert got + within(NOTICED_S, lambda: [digest(targets) for _, targets in pairs]) == wanted
        assert teacher.counters.reconnects == 1
        fleet.thaw(0)  # what it had read is answered now, to nobody
        wait_until(lambda: bool(list(teacher.stream([[1, 2]]))) and len(teacher.replicas) == 2, "2")
        assert [digest(targets) for _, targets in teacher.stream(sequences)] == wanted


def test_connect_passes_over_a_frozen_replica(serve, folder):
    with Fleet(serve, folder) as fleet:
        fleet.freeze(0)
        began = time.monotonic()
        with connect(fleet.addresses) as teacher:
            assert len(list(teacher.stream([[1, 2, 3]]))) == 1
            assert teacher.replicas == fleet.addresses[1:]
        assert time.monotonic() - began < 5 * discovery.TRY_S[0]
        fleet.thaw(0)


@pytest.mark.parametrize(
    ("stall_s", "probe_after_s"),
    [
        pytest.param(1.0, 1.0, id="shortened"),
        pytest.param(STALL_S, links.PROBE_AFTER_S, id="whole", marks=pytest.mark.slow),
    ],
)
def test_a_forward_without_end_is_left_and_its_late_answer_dropped(
    serve, folder, monkeypatch: pytest.MonkeyPatch, stall_s: float, probe_after_s: float
):
    monkeypatch.setattr(stalls, "STALL_S", stall_s)
    monkeypatch.setattr(links, "PROBE_AFTER_S", probe_after_s)
    sequences = tiny.random_sequences(200, VOCAB, seed=4)
    with Fleet(serve, folder, flags=SMALL_BATCHES) as fleet, connect(fleet.addresses) as teacher:
        fleet.wait_known()
        wanted = [digest(targets) for _, targets in teacher.stream(sequences)]
        pairs = teacher.stream([*sequences, *sequences], ahead=200)
        got = [digest(next(pairs)[1]) for _ in range(20)]
        fleet.hang()
        hung_s = time.monotonic()
        got += within(NOTICED_S + 5 * stall_s, lambda: [digest(next(pairs)[1]) for _ in range(250)])
        assert time.monotonic() - hung_s > stall_s  # it was waited for
        time.sleep(2 * stall_s)  # while it hangs nobody asks it anything again
        assert within(30, lambda: len(list(teacher.stream(sequences[:20])))) == 20
        assert teacher.counters.stalled == 1
        assert len(teacher.replicas) == 1
        fleet.unhang()
        got += within(30, lambda: [digest(targets) for _, targets in pairs])
        assert got == wanted * 2


@pytest.mark.slow
def test_the_watchdog_ends_a_replica_whose_forward_is_stuck(
    serve, folder, fault_free, tmp_path: Path
):
    plan = Plan()
    flags = (*SMALL_BATCHES, "--stuck-after-s", "2")
    with Fleet(serve, folder, flags=flags, batch_s=0.05) as fleet:
        fleet.wait_known()
        training = Training(fleet.addresses, plan, tmp_path / "run")
        training.wait_steps(5)
        fleet.hang()
        wait_until(lambda: len(fleet.live()) == 1, "a stuck replica ends", 2 + 2 + NOTICED_S)
        (ended,) = {0, 1} - set(fleet.live())
        assert fleet.replicas[ended].stop(signal.SIGKILL) == 1  # it had ended by itself
        assert "a forward is stuck" in fleet.replicas[ended].output()
        fleet.unhang()
        fleet.start(ended)
        fleet.hurry()
        left = training.wait()
        assert_same(left, fault_free(plan))
        assert all(one.longest_wait_s < NOTICED_S for one in left), "O6"
        fleet.assert_nothing_left()
