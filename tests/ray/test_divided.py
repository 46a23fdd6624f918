"""A divided teacher on Ray: its ranks are children of the replica, which Ray replaces with them."""

import os
import signal

import pytest

from tests.ray.conftest import VOCAB, Launched, describe, members, trainer, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def rank_pids(service: Launched) -> set[int]:
    return {
        pid for pid, command in service.processes().items() if "teacher_server.ranks" in command
    }


def test_a_rank_that_is_killed_is_replaced_with_its_replica(launch, model_folder) -> None:
    service = launch(
        model_folder("Gemma2", VOCAB),
        *("--replicas", "2", "--tensor-parallel-size", "2", "--device", "cpu", "--threads", "1"),
    )
    wait_for(lambda: len(members(service.address)) == 2, 60)
    before = rank_pids(service)
    assert len(before) == 2
    with trainer(service.address) as answered:
        wait_for(lambda: answered, 30)
        os.kill(min(before), signal.SIGKILL)
        wait_for(lambda: len(rank_pids(service) - before) == 1, 120)
        wait_for(lambda: len(members(service.address)) == 2, 120)
        count = len(answered)
        wait_for(lambda: len(answered) > count, 30)
    assert "was ended by SIGKILL" in service.log()
    assert describe(service.address).exactness == "bytes"
    ended = rank_pids(service)
    assert service.stop() == 0
    assert not any(os.path.exists(f"/proc/{pid}") for pid in ended)
