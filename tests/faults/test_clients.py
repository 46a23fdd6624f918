"""Clients that stop reading, die or freeze, and what that costs the others (rows 10 and 11)."""

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch

from student_trainer import connect
from tests.conftest import ENDLESS_CLIENT
from tests.support.fleet import SMALL_BATCHES, Fleet, wait_until
from tests.support.stalled import StalledReader, tokens_per_s

GROWTH_NBYTES = 32 << 20
FREED_S = 1.0
FROZEN_S = 40.0


@pytest.fixture
def busy(serve, folder) -> Iterator[tuple[Fleet, subprocess.Popen[str]]]:
    """A replica with one client that has 256 sequences queued there."""
    with Fleet(serve, folder, 1, flags=SMALL_BATCHES, batch_s=0.1) as fleet:
        client = subprocess.Popen(
            [sys.executable, "-c", ENDLESS_CLIENT, fleet.own[0]], stdout=subprocess.PIPE, text=True
        )
        assert client.stdout is not None
        assert client.stdout.readline().strip() == "streaming"
        yield fleet, client
        client.kill()
        client.wait()
        client.stdout.close()


def test_the_work_of_a_killed_client_is_dropped(busy):
    fleet, client = busy
    assert fleet.gauge(0, "teacher_queued_tokens") > 0
    os.kill(client.pid, signal.SIGKILL)
    fleet.assert_nothing_left(5 * FREED_S)
    fleet.hurry()
    with connect(fleet.own[0]) as teacher:
        assert len(list(teacher.stream([[1, 2, 3]]))) == 1


@pytest.mark.slow
def test_the_work_of_a_frozen_client_is_dropped(busy):
    fleet, client = busy
    os.kill(client.pid, signal.SIGSTOP)
    fleet.assert_nothing_left(FROZEN_S)
    os.kill(client.pid, signal.SIGCONT)
    wait_until(lambda: fleet.gauge(0, "teacher_streams") == 1, "it goes on when it is thawed")


def test_a_reader_that_stops_grows_nothing_and_slows_nobody(serve, model_folder):
    with Fleet(serve, model_folder("Llama", 32003), 1) as fleet:
        with StalledReader(fleet.own[0], 16):
            pass  # buffers, pages and threads that a first large answer leaves behind
        with connect(fleet.own[0]) as teacher:
            alone = [tokens_per_s(teacher, 12, torch.arange(64)) for _ in range(4)][1:]
            fleet.wait_streams(1)
            before = fleet.rss_nbytes(0)
            with StalledReader(fleet.own[0], 800) as reader:
                beside = [tokens_per_s(teacher, 12, torch.arange(64)) for _ in range(4)][1:]
                time.sleep(1.0)
                grown = fleet.rss_nbytes(0) - before
                held = fleet.gauge(0, "teacher_answer_bytes")
                assert reader.parts == 1
                print(f"grown {grown / 2**20:.1f} MiB, held {held / 2**20:.1f} MiB")
        assert grown < GROWTH_NBYTES
        assert statistics.median(beside) > 0.4 * statistics.median(alone)
        fleet.assert_nothing_left()
