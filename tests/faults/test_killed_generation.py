"""Replicas that are killed, frozen or drained while they write texts (rows 1, 2 and 4 of the faults)."""

import signal
from collections.abc import Iterator

import pytest
import torch

from student_trainer import LocalTeacher, connect
from student_trainer.client.remote import RemoteTeacher
from student_trainer.teachers.generation import Generation
from tests.support import tiny
from tests.support.fleet import SMALL_BATCHES, Fleet, wait_until
from tests.support.oracle import VOCAB, digest, left_in_this_process

PROMPTS = [ids[: 5 + 7 * number] for number, ids in enumerate(tiny.random_sequences(12, VOCAB, 29))]
OPTIONS = {
    "targets": "sampled:16",
    "max_new_tokens": 120,
    "seed": 5,
    "num_samples": 2,
    "ignore_teacher_stop_ids": True,
}


def write(teacher: RemoteTeacher | LocalTeacher) -> Iterator[Generation]:
    return teacher.generate(PROMPTS, **OPTIONS)


def describe(texts: list[Generation]) -> list[tuple]:
    """All that a text is, to be compared."""
    return [
        (one.index, one.sample, one.token_ids.tolist(), one.finish, digest(one.targets))
        for one in texts
    ]


@pytest.mark.parametrize("how", ["killed", "frozen", "drained"])
def test_texts_go_on_at_another_replica_as_if_nothing_had_happened(serve, folder, how):
    with Fleet(serve, folder, flags=SMALL_BATCHES, batch_s=0.0) as fleet:
        fleet.wait_known()
        with connect(fleet.addresses) as teacher:
            undisturbed = describe(list(write(teacher)))
            assert len(undisturbed) == 24
            texts = write(teacher)
            found = [next(texts)]
            wait_until(lambda: len(teacher.replicas) == 2, "both replicas write", 30)
            if how == "killed":
                fleet.kill(0)
            elif how == "frozen":
                fleet.freeze(0)
            else:
                fleet.replicas[0].send_signal(signal.SIGTERM)
            found += texts
            assert describe(found) == undisturbed
            assert all(len(one.token_ids) == 120 for one in found)
        assert torch.is_tensor(found[0].token_ids)
        assert left_in_this_process() == []
        if how == "frozen":
            fleet.thaw(0)
