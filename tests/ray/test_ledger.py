"""The ledger of a service on Ray, whose directory is an actor. These are the first to use the service,
so that all it has used is what they received."""

import os
import signal
from collections.abc import Callable

import grpc
import pytest
import torch

from protos import teacher_pb2, teacher_pb2_grpc
from student_trainer import connect
from tests.ray.conftest import Launched, members, wait_for

pytestmark = pytest.mark.ray


def delivered_rows(address: str) -> int:
    """What the service's ledger says; -1 while it cannot."""
    try:
        with grpc.insecure_channel(address) as channel:
            stub = teacher_pb2_grpc.TeacherStub(channel)
            rows = stub.Usage(teacher_pb2.UsageRequest(), timeout=10).rows
    except grpc.RpcError:
        return -1
    return sum(row.delivered_rows for row in rows)


def directory_pid(pair: Launched) -> int:
    (pid,) = (p for p, command in pair.processes().items() if command.startswith("ray::Directory"))
    return pid


def assert_exact(pair: Launched, sequences: int, kills: dict[int, Callable[[], int]]) -> None:
    """Streams while processes are killed, at these sequences: every row is in the ledger, once."""
    before, received = delivered_rows(pair.address), 0
    lengths = [20 + number % 50 for number in range(sequences)]
    with connect(pair.address) as teacher:
        work = (torch.arange(length) for length in lengths)
        for number, (_, targets) in enumerate(teacher.stream(work, ahead=32)):
            received += targets.num_rows
            if number in kills:
                os.kill(kills[number](), signal.SIGKILL)
    assert received == sum(lengths) - len(lengths)
    wait_for(lambda: delivered_rows(pair.address) == before + received, 60, step_s=0.2)


def test_the_ledger_is_exact_after_its_directory_was_killed(pair: Launched) -> None:
    killed = directory_pid(pair)
    assert_exact(pair, 1000, {300: lambda: killed})
    assert directory_pid(pair) != killed


@pytest.mark.slow
def test_the_ledger_is_exact_after_everything_was_killed_in_turn(pair: Launched) -> None:
    kills = {
        300: lambda: directory_pid(pair),
        900: lambda: pair.replica_pids()[0],
        905: lambda: directory_pid(pair),
    }
    assert_exact(pair, 3000, kills)
    # What the killed replica had not told is told by another one of this machine, once.
    wait_for(lambda: len(members(pair.address)) == 2, 60)
    assert_exact(pair, 100, {})
