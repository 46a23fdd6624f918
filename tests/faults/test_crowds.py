"""Connections that do no work do not slow down those that do (row 20)."""

import asyncio
import contextlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from protos import teacher_pb2, teacher_pb2_grpc
from student_trainer import connect
from tests.support import tiny
from tests.support.fleet import Fleet, wait_until
from tests.support.oracle import VOCAB

SEQUENCES = tiny.random_sequences(16, VOCAB, seed=41)
FACTOR = 5
"""Of the promise: unchanged. The machine that runs the tests does other things as well."""
FLOOR_S = 0.1


@contextlib.contextmanager
def crowd(
    kind: str,
    count: int,
    address: str,
    own: str = "127.0.0.1",
    *,
    ca: Path | None = None,
    niceness: int = 19,
) -> Iterator[list[str]]:
    """`count` connections in a process of their own; what it says in the end is in the list."""
    process = subprocess.Popen(
        [
            *("nice", "-n", str(niceness)),
            *(sys.executable, "-m", "tests.support.crowd", kind, str(count), address, own),
            *([] if ca is None else [str(ca)]),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    said: list[str] = []
    try:
        assert process.stdout.readline() == f"here {count}\n"
        yield said
    finally:
        process.stdin.close()
        said.append(process.stdout.readline().strip())
        process.stdout.close()
        process.kill()  # it has said all; at the lowest priority its end may take long
        process.wait()


@contextlib.contextmanager
def quiet_streams(count: int, address: str) -> Iterator[None]:
    """Score streams, opened and left alone, over ten connections."""
    from student_trainer.client.io_thread import IoThread

    async def open_all() -> tuple[list, list]:
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(10)]
        stubs = [teacher_pb2_grpc.TeacherStub(channel) for channel in channels]
        for stub in stubs:  # as clients do; a stranger may not open so many
            await stub.Describe(teacher_pb2.DescribeRequest())
        calls = []
        # Not all in one moment: a server sheds some when more than 1,000 wait to be accepted.
        for _ in range(count // 100):
            some = [stubs[number % 10].Score() for number in range(100)]
            await asyncio.gather(*(call.initial_metadata() for call in some))
            calls += some
        assert not any(call.done() for call in calls)
        return channels, calls

    async def close_all(channels: list, calls: list) -> None:
        for call in calls:
            call.cancel()
        await asyncio.gather(*(channel.close() for channel in channels))

    io = IoThread.shared()
    channels, calls = io.run(open_all())
    try:
        yield
    finally:
        io.run(close_all(channels, calls))


def latencies(address: str, count: int) -> list[float]:
    """Seconds for one sequence after the other, on one stream."""
    found = []
    with connect(address) as teacher:
        for number in range(count):
            began = time.perf_counter()
            list(teacher.stream([SEQUENCES[number % len(SEQUENCES)]]))
            found.append(time.perf_counter() - began)
    return found[5:]


def assert_unchanged(fleet: Fleet, before: list[float], count: int, what: str) -> None:
    """Medians: the slowest of a few times are the machine's. `benchmarks.edge` shows the others."""
    then, now = statistics.median(before), statistics.median(latencies(fleet.own[0], count))
    assert now <= max(FACTOR * then, FLOOR_S), f"{what}: {now} s, before {then} s"


def test_a_service_may_have_as_many_files_open_as_it_can(fleet: Fleet):
    pid = fleet.replicas[0].process.pid
    assert pid is not None
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    assert soft == hard


def test_a_crowd_that_does_nothing_slows_nobody_down(fleet: Fleet):
    address = fleet.own[0]
    before = latencies(address, 60)
    with (
        crowd("idle", 300, address) as idle,
        crowd("silent", 50, address),
        crowd("slow", 50, address),
        crowd("flood", 10, address) as flood,
        quiet_streams(200, address),
    ):
        wait_until(lambda: fleet.gauge(0, "teacher_streams") == 200, "200 streams")
        assert_unchanged(fleet, before, 60, "a crowd of all kinds")
    assert idle == ["closed 0"], "who answers pings may stay"
    assert int(flood[0].split()[1]) > 0, "who floods is sent away"
    wait_until(lambda: fleet.gauge(0, "teacher_streams") == 0, "the streams are gone")


@pytest.mark.slow
def test_ten_thousand_idle_connections_and_two_thousand_streams(serve, folder):
    # By default about 4,000 strangers have room, and the oldest make it for others.
    with Fleet(serve, folder, 1, flags=("--admission.max-strangers-mib", "512")) as fleet:
        hold_a_large_crowd(fleet)


def hold_a_large_crowd(fleet: Fleet) -> None:
    address = fleet.own[0]
    before = latencies(address, 500)
    with contextlib.ExitStack() as crowds:
        idle = [
            crowds.enter_context(crowd("idle", 2500, address, f"127.0.0.{2 + number}"))
            for number in range(4)
        ]
        assert_unchanged(fleet, before, 500, "10,000 idle connections")
        crowds.enter_context(quiet_streams(2000, address))
        wait_until(lambda: fleet.gauge(0, "teacher_streams") == 2000, "2,000 streams", 60.0)
        assert_unchanged(fleet, before, 500, "and 2,000 quiet streams")
        crowds.enter_context(crowd("slow", 500, address))
        crowds.enter_context(crowd("flood", 50, address))
        assert_unchanged(fleet, before, 500, "and slow handshakes and floods of pings")
    assert idle == [["closed 0"]] * 4
    wait_until(lambda: fleet.gauge(0, "teacher_streams") == 0, "the streams are gone", 30.0)
