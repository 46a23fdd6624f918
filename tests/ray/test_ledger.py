"""The ledger of a service on Ray, whose directory is an actor. The first to use the service: all that
it has used is what this trainer received."""

import os
import signal

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


def test_the_ledger_is_exact_after_its_directory_and_a_replica_were_killed(pair: Launched) -> None:
    received, killed = 0, directory_pid(pair)
    lengths = [20 + number % 50 for number in range(3000)]
    with connect(pair.address) as teacher:
        sequences = (torch.arange(length) for length in lengths)
        for number, (_, targets) in enumerate(teacher.stream(sequences, ahead=32)):
            received += targets.num_rows
            if number == 300:
                os.kill(killed, signal.SIGKILL)
            if number == 900:
                os.kill(pair.replica_pids()[0], signal.SIGKILL)
    assert received == sum(lengths) - len(lengths)
    # What the killed replica had not told is told by another one of this machine.
    wait_for(lambda: delivered_rows(pair.address) == received, 60, step_s=0.5)
    assert directory_pid(pair) != killed
    wait_for(lambda: len(members(pair.address)) == 2, 60)
    assert delivered_rows(pair.address) == received
