"""prefetch and the streams below it: order, bound, errors, an early end, and where to go on."""

import itertools
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import DataLoader

from logit_codec import parse_targets, select
from student_trainer import InvalidRequest, LocalTeacher, TeacherError, prefetch
from tests.support import tiny


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


def count_until(closed: threading.Event) -> Iterator[int]:
    """Numbers without end; sets the event when it is closed."""
    try:
        yield from itertools.count()
    finally:
        closed.set()


def test_leaving_early_ends_the_thread_and_closes_the_source():
    closed = threading.Event()
    items = prefetch(count_until(closed), ahead=2)
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copies_on_the_side_stream_are_whole_and_not_reused_too_early():
    def items():
        for seed in range(40):
            generator = torch.Generator().manual_seed(seed)
            logits = torch.randn(256, 1000, generator=generator)
            yield (
                {"input_ids": torch.randint(1000, (8, 512), generator=generator)},
                select(logits, parse_targets("top_k:64,realized=0")),
            )

    work = torch.randn(4096, 4096, device="cuda")
    copies = []
    for batch, targets in prefetch(items(), ahead=4, device="cuda"):
        for _ in range(20):  # the trainer's stream is far behind when the next copy begins
            work = (work @ work).clamp(-1, 1)
        copies.append((batch["input_ids"] * 1, targets.logprobs * 1))
        del batch, targets
    for (ids, logprobs), (batch, targets) in zip(copies, items(), strict=True):
        assert torch.equal(ids.cpu(), batch["input_ids"])
        assert torch.equal(logprobs.cpu(), targets.logprobs)


def test_ahead_must_be_positive():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        prefetch([], ahead=0)


def test_dropping_it_ends_the_thread():
    closed = threading.Event()
    for item in prefetch(count_until(closed), ahead=2):
        if item == 3:
            break
    assert closed.wait(5)


@pytest.fixture(scope="module")
def teacher() -> LocalTeacher:
    return LocalTeacher(tiny.make_model("Llama", 101))


@pytest.fixture(scope="module")
def rows() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(101, (6,), generator=generator)} for _ in range(24)]


def taken(pairs: Iterator, count: int | None = None) -> list[list[list[int]]]:
    return [batch["input_ids"].tolist() for batch, _ in itertools.islice(pairs, count)]


@pytest.mark.parametrize("outer", ["stream", "prefetch", "prefetch twice"])
def test_the_position_counts_what_was_handed_out_wherever_it_is_read(teacher, rows, outer):
    pulled = itertools.count()

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for row in rows:
            next(pulled)
            yield row

    def pairs(ahead: int):
        found = teacher.stream_batches(batches(), ahead=ahead)
        if outer != "stream":
            found = prefetch(found, ahead=3)
        return prefetch(found, ahead=1) if outer == "prefetch twice" else found

    expected = taken(pairs(1))
    stream = pairs(4)
    assert taken(stream, 7) == expected[:7]
    state = stream.state_dict()
    assert state == {"handed_out": 7}
    assert next(pulled) - 24 >= 10  # asked for well ahead of the position
    stream.close()
    again = pairs(9)
    again.load_state_dict(state)
    assert again.state_dict() == {"handed_out": 7}
    assert taken(again) == expected[7:]


def test_a_prefetch_over_anything_else_goes_on_by_skipping():
    items = prefetch(range(20), ahead=4)
    assert [next(items) for _ in range(6)] == list(range(6))
    again = prefetch(range(20), ahead=2)
    again.load_state_dict(items.state_dict())
    assert list(again) == list(range(6, 20))
    with pytest.raises(TeacherError, match="before the first item"):
        again.load_state_dict({"handed_out": 0})
    with pytest.raises(InvalidRequest, match="handed_out"):
        prefetch(range(3)).load_state_dict({"step": 3})
    items.close()


class Seen(list):
    """A dataset that notes which of its items were made."""

    def __init__(self, rows) -> None:
        super().__init__(rows)
        self.made: list[int] = []

    def __getitem__(self, index):
        self.made.append(index)
        return super().__getitem__(index)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("outer", ["stream", "prefetch"])
def test_a_stateful_loader_is_put_back_and_not_read_again(teacher, rows, outer, num_workers):
    from torchdata.stateful_dataloader import StatefulDataLoader

    def pairs(ahead: int, data=rows):
        # Shuffled by the global generator: only the loader's own state knows the order.
        loader = StatefulDataLoader(data, batch_size=2, shuffle=True, num_workers=num_workers)
        found = teacher.stream_batches(loader, targets="sampled:4", ahead=ahead)
        return found if outer == "stream" else prefetch(found, ahead=2)

    torch.manual_seed(1)
    expected = taken(pairs(1))
    torch.manual_seed(1)
    stream = pairs(3)
    assert taken(stream, 5) == expected[:5]
    state = stream.state_dict()
    assert state["handed_out"] == 5
    stream.close()
    torch.manual_seed(2)
    seen = Seen(rows)
    again = pairs(1, seen)
    again.load_state_dict(state)
    assert taken(again) == expected[5:]
    if num_workers == 0:  # workers note it in their own memory
        assert len(seen.made) == 14


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
def test_a_stateful_position_is_of_use_to_a_plain_loader(teacher, rows):
    from torchdata.stateful_dataloader import StatefulDataLoader

    expected = taken(teacher.stream_batches(DataLoader(rows, batch_size=2)))
    stream = teacher.stream_batches(StatefulDataLoader(rows, batch_size=2), ahead=2)
    assert taken(stream, 4) == expected[:4]
    again = teacher.stream_batches(DataLoader(rows, batch_size=2), ahead=2)
    again.load_state_dict(stream.state_dict())
    assert taken(again) == expected[4:]


def test_a_damaged_position_is_refused(teacher, rows):
    for state in ({}, {"handed_out": -1}, {"handed_out": "7"}):
        with pytest.raises(InvalidRequest, match="number of items"):
            teacher.stream_batches(rows).load_state_dict(state)
