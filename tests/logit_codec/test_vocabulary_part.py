"""Several parts of a vocabulary select what one process selects."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from logit_codec import Selection, encode, parse_targets, select_rows
from logit_codec.vocabulary_part import VocabularyPart

SPECS = (
    "sampled:64",
    "sampled:300,log_z=1,entropy=1",
    "top_k:8",
    "top_k:64,log_z=1,entropy=1",
    "top_k:min_p=1/256,max_k=40",
    "top_k:top_p=0.9,max_k=40",
    "realized",
    "dense",
    "given_ids:ranks=1",
)
BOUNDS = ((0, 502, 1003), (0, 64, 128, 192), (0, 40, 80, 100), (0, 300, 600, 900, 901))


class ThreadPart(VocabularyPart):
    """Exchanges tensors with the threads that hold the other parts, through a barrier."""

    def __init__(self, index: int, bounds: tuple[int, ...], shared: list, barrier) -> None:
        super().__init__(index, bounds)
        self._shared = shared
        self._barrier = barrier

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        self._shared[self.index] = tensor.clone()
        self._barrier.wait(30)
        gathered = torch.stack(self._shared)
        self._barrier.wait(30)
        return gathered

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(self.gather(tensor).sum(0))


def select_in_parts(logits: torch.Tensor, bounds: tuple[int, ...], **asked) -> list[Selection]:
    count = len(bounds) - 1
    shared, barrier = [None] * count, threading.Barrier(count)

    def select_part(index: int) -> Selection:
        part = ThreadPart(index, bounds, shared, barrier)
        own = logits[:, bounds[index] : bounds[index + 1]].contiguous()
        return select_rows(own, part=part, **asked)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(select_part, range(count)))


def make_asked(text: str, num_rows: int, vocab_size: int) -> dict:
    generator = torch.Generator().manual_seed(1)
    spec = parse_targets(text)
    ids = torch.rand(num_rows, vocab_size, generator=generator).topk(9, 1).indices
    return {
        "spec": spec.for_rows(9) if spec.needs_given_ids else spec,
        "temperature": 0.8,
        "realized_ids": torch.randint(vocab_size, (num_rows,), generator=generator),
        "uniforms": torch.rand(num_rows, generator=generator, dtype=torch.float64),
        "given_ids": ids.sort(1).values,
    }


def make_logits(num_rows: int, vocab_size: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    scales = torch.tensor([0.1, 1.0, 4.0, 20.0]).repeat(num_rows)[:num_rows, None]
    return (torch.randn(num_rows, vocab_size, generator=generator) * scales).to(dtype)


def assert_same(found: Selection, expected: Selection, tolerance: float = 2e-6) -> None:
    assert found.vocab_size == expected.vocab_size
    assert found.columns.keys() == expected.columns.keys()
    for name, column in expected.columns.items():
        if not column.dtype.is_floating_point:
            assert torch.equal(found.columns[name], column), name
            continue
        own, other = found.columns[name].exp(), column.exp()
        if name == "logprobs" and "ids" in expected.columns:  # others only fill a row up
            is_kept = expected.columns["ids"] >= 0
            own, other = own.where(is_kept, 0.0), other.where(is_kept, 0.0)
        torch.testing.assert_close(own, other, rtol=tolerance, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("text", SPECS)
def test_parts_select_what_one_process_selects(text, bounds):
    num_rows, vocab_size = 21, bounds[-1]
    logits = make_logits(num_rows, vocab_size, torch.float32)
    logits[:, -7:] = -torch.inf  # as the padding of a vocabulary
    asked = make_asked(text.replace("64", str(min(64, vocab_size // 2))), num_rows, vocab_size)
    expected = select_rows(logits, **asked)
    first, *others = select_in_parts(logits, bounds, **asked)
    assert_same(first, expected)
    for other in others:  # all of them go on with the same numbers
        for name, column in first.columns.items():
            assert torch.equal(other.columns[name], column), name
    if text != "realized":
        assert len(encode(first.compact())) > 0


@pytest.mark.parametrize("text", ["sampled:16", "top_k:8", "given_ids", "realized"])
def test_parts_without_mass_and_bfloat16(text):
    bounds = (0, 128, 256, 384)
    logits = make_logits(9, 384, torch.bfloat16)
    logits[:, 128:] = -torch.inf
    asked = make_asked(text, 9, 384)
    expected = select_rows(logits, **asked)
    assert_same(select_in_parts(logits, bounds, **asked)[1], expected)


@pytest.mark.parametrize("text", ["sampled:16", "top_k:8"])
def test_a_row_that_is_not_finite_leaves_the_others_alone(text):
    bounds = (0, 100, 200)
    logits = make_logits(5, 200, torch.float32)
    asked = make_asked(text, 5, 200)
    clean = select_in_parts(logits, bounds, **asked)[0]
    logits[2, 150] = torch.nan
    marred = select_in_parts(logits, bounds, **asked)[0]
    for rows in (slice(0, 2), slice(3, 5)):
        assert_same(marred[rows], clean[rows], tolerance=0)
    with pytest.raises(ValueError, match="row 2"):
        encode(marred.compact())


def test_equal_logits_go_to_the_lowest_id_across_parts():
    logits = torch.zeros(3, 200)
    asked = make_asked("top_k:8", 3, 200)
    found = select_in_parts(logits, (0, 100, 200), **asked)[0]
    assert found.columns["ids"].sort(1).values.tolist() == [list(range(8))] * 3


@pytest.mark.parametrize("bounds", [(0,), (1, 2), (0, 5, 5), (0, 5, 3)])
def test_bounds_must_ascend(bounds):
    with pytest.raises(ValueError, match="ascend from 0"):
        ThreadPart(0, bounds, [], None)
