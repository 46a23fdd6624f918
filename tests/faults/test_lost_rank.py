"""A rank of a divided teacher is killed or frozen, or the replica is: nothing is lost, nobody stays."""

import os
import signal
from pathlib import Path

import pytest
import torch

from student_trainer import connect
from tests.support.fleet import SMALL_BATCHES, Fleet, wait_until
from tests.support.oracle import VOCAB, Left, Plan, Training, assert_same
from tests.support.tiny import random_sequences

DIVIDED = (*SMALL_BATCHES, "--tensor-parallel-size", "2")
PLAN = Plan(sequences=96, epochs=1)


def find_rank(fleet: Fleet, index: int) -> int:
    """The process of the second rank of a replica."""
    parent = fleet.replicas[index].process.pid
    for task in Path(f"/proc/{parent}/task").iterdir():
        for child in (task / "children").read_text().split():
            if b"teacher_server.ranks" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
    raise AssertionError(f"the replica {parent} has no second rank")


def is_there(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.fixture(scope="module")
def undisturbed(serve, folder, tmp_path_factory) -> list[Left]:
    with Fleet(serve, folder, 1, flags=DIVIDED) as fleet:
        return Training(
            fleet.addresses, PLAN, tmp_path_factory.mktemp("undisturbed") / "run"
        ).wait()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda one: one.name)
def test_a_lost_rank_ends_its_replica_and_the_student_is_the_same(
    serve, folder, undisturbed, tmp_path, number
):
    with Fleet(serve, folder, flags=DIVIDED, batch_s=0.05) as fleet:
        fleet.wait_known()
        ranks = [find_rank(fleet, index) for index in (0, 1)]
        run = Training(fleet.addresses, PLAN, tmp_path / "run")
        run.wait_steps(2)
        assert run.steps < PLAN.steps, "the run ended before the rank was lost"
        os.kill(ranks[0], number)
        fleet.hurry()
        assert_same(run.wait(), undisturbed)
        fleet.replicas[0].process.join(30)
        assert fleet.replicas[0].process.exitcode == 1
        log = fleet.replicas[0].output()
        why = "was ended by SIGKILL" if number == signal.SIGKILL else "has not been heard of for"
        assert f"rank 1 of 2 {why}" in log or "the device is broken error=LostStep" in log
        wait_until(lambda: not is_there(ranks[0]), "the rank is gone", 10)
        fleet.start(0)  # as Ray or an init system does
        assert is_there(find_rank(fleet, 0))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda one: one.name)
def test_ranks_end_with_their_replica(serve, folder, number):
    with Fleet(serve, folder, 1, flags=DIVIDED) as fleet:
        rank = find_rank(fleet, 0)
        os.kill(rank, signal.SIGINT)  # a terminal sends Ctrl-C to every process; only one decides
        with connect(fleet.addresses) as teacher:
            found = list(teacher.stream(random_sequences(3, VOCAB), targets="top_k:4"))
        assert len(found) == 3
        assert all(torch.isfinite(one[-1].logprobs).all() for one in found)
        code = fleet.replicas[0].stop(number)
        assert code == (0 if number == signal.SIGTERM else -9)
        wait_until(lambda: not is_there(rank), "the rank is gone", 10)
