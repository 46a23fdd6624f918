"""Replicas whose compute thread, device, allocator or encoder breaks under load (row 2b).

The fault comes through the engine's own seam to its device. What is seen: the replica says that it
is stuck, refuses what it has with UNAVAILABLE, and ends; the trainer goes on at the other one, with
the same student to the bit.
"""

import time
from functools import partial
from pathlib import Path

import grpc
import pytest
import torch

from protos import teacher_pb2, teacher_pb2_grpc
from student_trainer import connect
from tests.support.faults import FITTING_TOKENS, install_faults
from tests.support.fleet import SMALL_BATCHES, Fleet, wait_until
from tests.support.oracle import VOCAB, Plan, Training, assert_billed_once, assert_same, digest

FATAL = {
    "thread": "a compute thread ended",
    "device": "the device is broken",
    "garbage": "a known answer does not come out any more",
    "encoder": "an encode thread ended",
}
EXIT_S = 2.0
"""The limit; tests allow five times as much."""


@pytest.mark.parametrize("fault", FATAL)
def test_a_replica_that_breaks_ends_and_the_student_is_the_same(
    serve, folder, fault_free, tmp_path: Path, fault: str
) -> None:
    plan = Plan(ahead=4)
    signs = tmp_path / "signs"
    signs.mkdir()
    flags = (*SMALL_BATCHES, "--ledger", str(tmp_path / "ledger"))
    hook = partial(install_faults, signs)
    with Fleet(serve, folder, flags=flags, batch_s=0.15, hook=hook) as fleet:
        fleet.wait_known()
        training = Training(fleet.addresses, plan, tmp_path / "run")
        training.wait_steps(3)
        victim = fleet.replicas[0]
        (signs / fleet.own[0].rpartition(":")[2]).write_text(fault)
        took_s = wait_until(lambda: not victim.process.is_alive(), "the broken replica has ended")
        print(f"{fault}: ended {took_s:.2f} s after it was broken")
        assert victim.process.exitcode == 1
        assert took_s < 5 * EXIT_S
        assert FATAL[fault] in victim.output()
        assert training.steps < plan.steps, "the run ended before"
        fleet.hurry()
        left = training.wait()
        assert_same(left, fault_free(plan))
        assert all(one.longest_wait_s < 5 * EXIT_S for one in left), "O6"
        signs.joinpath(fleet.own[0].rpartition(":")[2]).unlink()
        fleet.start(0)
        fleet.assert_nothing_left()
        assert_billed_once(fleet.usage(), left)


def test_a_broken_replica_says_that_it_is_stuck_and_refuses(serve, folder, tmp_path: Path) -> None:
    served = serve(folder, hook=partial(install_faults, tmp_path))
    port = served.address.rpartition(":")[2]
    with grpc.insecure_channel(served.address) as channel:
        stub = teacher_pb2_grpc.TeacherStub(channel)
        request = teacher_pb2.ScoreRequest(
            request_id=1,
            token_ids=torch.arange(20, dtype=torch.int32).numpy().tobytes(),
            lengths=[20],
            targets=teacher_pb2.TargetSpec(dense=teacher_pb2.Dense(bits=32)),
        )
        (answer,) = stub.Score(iter([request]))
        assert answer.HasField("part")
        (tmp_path / port).write_text("device")
        (answer,) = stub.Score(iter([request]))
        assert grpc.StatusCode.UNAVAILABLE.value[0] == answer.error.code
        assert answer.error.reason == "STOPPED"
        info = stub.Describe(teacher_pb2.DescribeRequest())
        assert [one.state for one in info.replicas] == ["stuck"]
        (answer,) = stub.Score(iter([request]))
        assert answer.error.reason == "STOPPED", "what comes later is refused too"
    wait_until(lambda: not served.process.is_alive(), "it has ended")
    assert served.process.exitcode == 1


def test_running_out_of_memory_makes_packs_smaller_and_loses_nothing(
    serve, folder, tmp_path: Path
) -> None:
    served = serve(folder, hook=partial(install_faults, tmp_path))
    sequences = [torch.randint(VOCAB, (60,)) for _ in range(40)]
    with connect(served.address) as teacher:
        wanted = [digest(targets) for _, targets in teacher.stream(sequences, ahead=40)]
        (tmp_path / served.address.rpartition(":")[2]).write_text("allocator")
        got = [digest(targets) for _, targets in teacher.stream(sequences, ahead=40)]
        assert got == wanted
        passes = served.output().count("halving it")
        assert passes > 0
        # The budget was lowered for good: nothing fails any more.
        for _ in range(3):
            assert wanted == [digest(t) for _, t in teacher.stream(sequences, ahead=40)]
        assert served.output().count("halving it") <= passes + 2
        assert sum(map(len, sequences)) > 4 * FITTING_TOKENS
    assert served.stop() == 0


@pytest.mark.slow
def test_a_launch_that_hangs_ends_the_replica(serve, folder, fault_free, tmp_path: Path) -> None:
    plan = Plan()
    signs = tmp_path / "signs"
    signs.mkdir()
    flags = (*SMALL_BATCHES, "--stuck-after-s", "3")
    with Fleet(
        serve, folder, flags=flags, batch_s=0.15, hook=partial(install_faults, signs)
    ) as fleet:
        fleet.wait_known()
        training = Training(fleet.addresses, plan, tmp_path / "run")
        training.wait_steps(3)
        (signs / fleet.own[0].rpartition(":")[2]).write_text("hang")
        began = time.monotonic()
        wait_until(lambda: not fleet.replicas[0].process.is_alive(), "it has ended", 30.0)
        print(f"ended after {time.monotonic() - began:.1f} s")
        fleet.hurry()
        assert_same(training.wait(), fault_free(plan))
