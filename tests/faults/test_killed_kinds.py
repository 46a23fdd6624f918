"""Replicas that are killed while they answer requests of every kind of target (row 1 of the faults)."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from student_trainer import connect
from student_trainer.client.remote import RemoteTeacher
from tests.support import tiny
from tests.support.fleet import SMALL_BATCHES, Fleet, wait_until
from tests.support.oracle import VOCAB, digest, left_in_this_process

KINDS = ("given_ids:ranks=1", "realized", "hidden:int8", "hidden:bf16", "features:layers=0+1+2")
SEQUENCES = tiny.random_sequences(30, VOCAB, seed=23)
GIVEN = [
    torch.randint(VOCAB, (len(ids) - 1, 1 + number % 9), generator=torch.Generator().manual_seed(1))
    for number, ids in enumerate(SEQUENCES)
]


def read(teacher: RemoteTeacher, kind: str, done: list[str]) -> list[str]:
    """The digests of the targets of all sequences; those that have come are in `done`."""
    given = {"given_ids": GIVEN} if kind.startswith("given") else {}
    for _, targets in teacher.stream(SEQUENCES, targets=kind, ahead=8, **given):
        done.append(digest(targets))
    return done


def test_a_killed_replica_leaves_no_trace_in_targets_of_any_kind(
    serve, folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LOGITSTREAM_CACHE", str(tmp_path))
    with Fleet(serve, folder, flags=SMALL_BATCHES, batch_s=0.05) as fleet:
        fleet.wait_known()
        with connect(fleet.addresses) as teacher, ThreadPoolExecutor(len(KINDS)) as pool:
            done: dict[str, list[str]] = {kind: [] for kind in KINDS}
            reading = {kind: pool.submit(read, teacher, kind, done[kind]) for kind in KINDS}
            wait_until(
                lambda: all(done.values()) and len(teacher.replicas) == 2, "answers come", 60
            )
            fleet.kill(0)
            assert sum(map(len, done.values())) < len(KINDS) * len(SEQUENCES), "the kill came late"
            fleet.hurry()
            found = {kind: future.result(60) for kind, future in reading.items()}
            assert teacher.counters.reconnects == 1
            assert found == {kind: read(teacher, kind, []) for kind in KINDS}
        assert left_in_this_process() == []
        fleet.assert_nothing_left()
