"""prefetch: order, bound, errors and an early end."""

import itertools
import threading
import time

import pytest
import torch

from logit_codec import parse_targets, select
from student_trainer import prefetch


def test_items_come_in_order_and_all_of_them():
    assert list(prefetch(range(100), ahead=3)) == list(range(100))
    assert list(prefetch([], ahead=1)) == []


def test_the_source_runs_at_most_ahead_items_early():
    made = itertools.count()
    newest = [0]

    def source():
        while True:
            newest[0] = next(made)
            yield newest[0]

    items = prefetch(source(), ahead=4)
    for expected in range(10):
        assert next(items) == expected
        time.sleep(0.005)
        # 4 wait in the queue, one is in the hand of the thread, one is with the caller.
        assert newest[0] <= expected + 6
    items.close()


def test_an_error_of_the_source_is_raised_in_its_place():
    def source():
        yield 1
        raise OSError("broken")

    items = prefetch(source(), ahead=2)
    assert next(items) == 1
    with pytest.raises(OSError, match="broken"):
        next(items)


def test_leaving_early_ends_the_thread_and_closes_the_source():
    closed = threading.Event()

    def source():
        try:
            yield from itertools.count()
        finally:
            closed.set()

    items = prefetch(source(), ahead=2)
    next(items)
    items.close()
    assert closed.wait(5)


def test_tensors_and_targets_are_moved_wherever_they_are():
    targets = select(torch.randn(2, 9), parse_targets("top_k:2,realized=0"))
    pair = ({"input_ids": torch.arange(3), "name": "x"}, targets)
    ((batch, moved),) = prefetch([pair], device="meta")
    assert batch["input_ids"].is_meta
    assert batch["name"] == "x"
    assert moved.token_ids.is_meta


def test_ahead_must_be_positive():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        prefetch([], ahead=0)
