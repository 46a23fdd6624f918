import threading

import torch

from logit_codec import TopKSpec
from teacher_server.engine.batch import RowRequest
from teacher_server.pipeline.backlog import EncodeBacklog
from teacher_server.scheduling.job import SequenceJob


def answer(nbytes: int) -> SequenceJob:
    wanted = RowRequest(torch.arange(4), torch.arange(3), TopKSpec(k=2))
    return SequenceJob(wanted, num_tokens=32, reply_nbytes=nbytes)


def fill(backlog: EncodeBacklog, jobs: list[SequenceJob]) -> None:
    """A pack is launched and scored."""
    backlog.reserve(jobs)
    backlog.add(jobs)


def test_computing_waits_while_too_much_is_not_encoded():
    woken: list[bool] = []
    backlog = EncodeBacklog(100, on_room=lambda: woken.append(backlog.has_room()))
    first, second = answer(60), answer(60)
    fill(backlog, [first])
    assert backlog.has_room()
    fill(backlog, [second])
    assert not backlog.has_room()
    backlog.forget(first)
    assert woken == [True]
    assert backlog.nbytes == 60


def test_an_answer_is_forgotten_once_and_one_that_never_came_not_at_all():
    backlog = EncodeBacklog(100)
    one = answer(60)
    backlog.forget(one)
    fill(backlog, [one])
    backlog.forget(one)
    backlog.forget(one)
    assert backlog.nbytes == 0


def test_one_answer_larger_than_the_bound_holds_up_what_comes_after_it_only_until_it_is_encoded():
    backlog = EncodeBacklog(100)
    large = answer(1000)
    fill(backlog, [large])
    assert not backlog.has_room()
    backlog.forget(large)
    assert backlog.has_room()


def test_only_what_goes_ahead_may_be_computed_above_the_bound():
    backlog = EncodeBacklog(100)
    fill(backlog, [answer(150)])
    assert not backlog.has_room()
    assert backlog.has_room(1.5)
    fill(backlog, [answer(1)])
    assert not backlog.has_room(1.5)


def test_after_closing_nothing_waits_for_room():
    woken = threading.Event()
    backlog = EncodeBacklog(100, on_room=woken.set)
    fill(backlog, [answer(101)])
    backlog.close()
    assert backlog.has_room()
    assert woken.is_set()


def test_two_packs_wait_to_be_encoded_at_most_and_a_third_that_goes_ahead():
    backlog = EncodeBacklog(1000)
    first, second, third = [answer(1), answer(1)], [answer(1)], [answer(1)]
    fill(backlog, first)
    assert backlog.has_room()
    fill(backlog, second)
    assert not backlog.has_room()
    assert backlog.has_room(1.5), "for what goes ahead"
    fill(backlog, third)
    assert not backlog.has_room(1.5)
    backlog.forget(second[0])
    assert not backlog.has_room()
    backlog.forget(first[0])
    assert not backlog.has_room(), "half of a pack waits"
    backlog.forget(first[1])
    assert backlog.has_room()


def test_what_is_in_flight_counts_its_bytes_and_is_no_pack_yet():
    backlog = EncodeBacklog(100)
    packs = [[answer(10)] for _ in range(4)]
    for pack in packs:
        backlog.reserve(pack)
    assert backlog.nbytes == 40
    assert backlog.has_room()
    backlog.reserve([answer(70)])
    assert not backlog.has_room()


def test_a_pack_whose_clients_left_while_it_was_computed_is_none():
    backlog = EncodeBacklog(100)
    gone, kept = answer(10), answer(10)
    backlog.reserve([gone, kept])
    backlog.forget(gone)
    backlog.add([gone, kept])
    backlog.forget(gone)
    assert backlog.nbytes == 10
    backlog.forget(kept)
    assert backlog.nbytes == 0
    for _ in range(3):
        left = answer(1)
        backlog.reserve([left])
        backlog.forget(left)
        backlog.add([left])
    assert backlog.has_room()
    assert backlog.nbytes == 0
