"""Replicas that are killed in the middle of their work (row 1 of the faults)."""

import random
import signal
import time
from pathlib import Path

import pytest

from tests.support.fleet import SMALL_BATCHES, Fleet
from tests.support.oracle import Plan, Training, assert_billed_once, assert_same

RECOVERY_S = 2.0
"""The limit with a spare replica; tests allow five times as much."""


@pytest.mark.parametrize(
    ("kills", "sequences"),
    [
        pytest.param(3, 320, id="few"),
        pytest.param(40, 2400, id="many", marks=pytest.mark.slow),
    ],
)
def test_killed_replicas_leave_no_trace_in_the_student(
    serve, folder, fault_free, tmp_path: Path, kills: int, sequences: int
):
    seed = 1
    print(f"seed {seed}")
    chance = random.Random(seed)
    plan = Plan(sequences=sequences)
    wanted = fault_free(plan)
    flags = (*SMALL_BATCHES, "--ledger", str(tmp_path / "ledger"))
    with Fleet(serve, folder, flags=flags, batch_s=0.15) as fleet:
        fleet.wait_known()
        training = Training(fleet.addresses[:1], plan, tmp_path / "run")
        training.wait_steps(3)
        for _ in range(kills):
            time.sleep(chance.uniform(0.0, 0.8))
            victim = chance.randrange(2)
            fleet.kill(victim)
            time.sleep(chance.uniform(0.0, 0.4))
            fleet.start(victim)
            fleet.wait_known()  # there is a spare again
        assert training.steps < plan.steps, "the run ended before the last kill"
        fleet.hurry()
        left = training.wait()
        assert_same(left, wanted)
        assert sum(one.counters["reconnects"] for one in left) >= kills / 2
        assert all(one.longest_wait_s < 5 * RECOVERY_S for one in left), "O6"
        fleet.assert_nothing_left()
        assert_billed_once(fleet.usage(), left)


@pytest.mark.slow
def test_a_run_outlives_a_moment_without_any_replica(serve, folder, fault_free, tmp_path: Path):
    plan = Plan()
    with Fleet(serve, folder, flags=SMALL_BATCHES, batch_s=0.15) as fleet:
        training = Training(fleet.addresses, plan, tmp_path / "run")
        training.wait_steps(10)
        for replica in fleet.replicas:
            replica.send_signal(signal.SIGKILL)
        for index in (1, 0):
            fleet.kill(index)
            fleet.start(index)
        fleet.hurry()
        assert_same(training.wait(), fault_free(plan))
        fleet.assert_nothing_left()
