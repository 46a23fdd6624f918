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


def waits(backlog: EncodeBacklog) -> threading.Thread:
    thread = threading.Thread(target=backlog.wait, daemon=True)
    thread.start()
    return thread


def test_computing_waits_while_too_much_is_not_encoded():
    backlog = EncodeBacklog(100)
    first, second = answer(60), answer(60)
    fill(backlog, [first])
    backlog.wait()  # below the bound: at once
    fill(backlog, [second])
    thread = waits(backlog)
    thread.join(0.1)
    assert thread.is_alive()
    backlog.forget(first)
    thread.join(5)
    assert not thread.is_alive()
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
    thread = waits(backlog)
    backlog.forget(large)
    thread.join(5)
    assert not thread.is_alive()


def test_only_what_goes_ahead_may_be_computed_above_the_bound():
    backlog = EncodeBacklog(100)
    assert backlog.wait(lambda: True)
    fill(backlog, [answer(150)])
    assert not backlog.wait(lambda: True)
    backlog.close()
    assert backlog.wait(lambda: True)


def test_a_look_ends_the_wait_of_what_goes_ahead():
    backlog = EncodeBacklog(100)
    fill(backlog, [answer(120)])
    ahead: list[str] = []
    results: list[bool] = []
    thread = threading.Thread(
        target=lambda: results.append(backlog.wait(lambda: bool(ahead))), daemon=True
    )
    thread.start()
    thread.join(0.1)
    assert thread.is_alive()
    ahead.append("a job")
    backlog.look()
    thread.join(5)
    assert results == [False]


def test_closing_ends_the_wait():
    backlog = EncodeBacklog(100)
    fill(backlog, [answer(101)])
    thread = waits(backlog)
    backlog.close()
    thread.join(5)
    assert not thread.is_alive()


def test_two_packs_wait_to_be_encoded_at_most_and_a_third_that_goes_ahead():
    backlog = EncodeBacklog(1000)
    first, second, third = [answer(1), answer(1)], [answer(1)], [answer(1)]
    fill(backlog, first)
    assert backlog.has_room()
    fill(backlog, second)
    assert not backlog.has_room()
    assert not backlog.wait(lambda: True), "only what goes ahead"
    fill(backlog, third)
    thread = waits(backlog)
    thread.join(0.1)
    backlog.forget(second[0])
    assert thread.is_alive()
    backlog.forget(first[0])
    assert not backlog.has_room(), "half of a pack waits"
    backlog.forget(first[1])
    thread.join(5)
    assert not thread.is_alive()


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
