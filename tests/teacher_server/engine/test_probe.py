"""What is tried before a teacher serves: exactness, a known answer, and the warm-up."""

import functools
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from teacher_server.engine import generate
from teacher_server.engine.device import Device
from teacher_server.engine.engine import Engine
from teacher_server.engine.loading import prepare
from teacher_server.engine.model import TeacherModel
from teacher_server.engine.probe import (
    KnownAnswer,
    is_exact,
    keeps_bytes,
    make_requests,
    warm_up,
    writes_same_bytes,
)
from teacher_server.errors import ModelError
from tests.conftest import one_torch_thread
from tests.support import tiny

one_thread = pytest.fixture(autouse=True)(one_torch_thread)

VOCAB = 1001
CONTEXT = 1024
CPU = torch.device("cpu")


@functools.cache
def teacher(name: str = "Llama", hidden_size: int = 64) -> TeacherModel:
    dtype = torch.bfloat16 if hidden_size > 64 else torch.float32
    model = tiny.make_model(name, VOCAB, hidden_size=hidden_size, context=CONTEXT)
    return prepare(model.to(dtype), weights_fingerprint="")


class Hook:
    """Changes what a layer of a model gives, while it is set."""

    def __init__(self, model: TeacherModel) -> None:
        self._norm = model.causal_lm.base_model.norm

    def change(self, change: Any) -> AbstractContextManager[object]:
        return self._norm.register_forward_hook(lambda _module, _args, output: change(output))


# Exactness.


@pytest.mark.parametrize("name", tiny.DENSE_ARCHITECTURES)
def test_an_engine_that_tiles_its_products_is_exact(name: str) -> None:
    assert is_exact(Engine(teacher(name)))


@pytest.mark.parametrize("name", tiny.DENSE_ARCHITECTURES)
def test_texts_have_the_same_bytes_in_any_company(name: str) -> None:
    ours = Engine(teacher(name))
    generator = ours.open_generation(8 << 20)
    assert is_exact(ours, generator)
    assert generator.pool.num_free == generator.pool.num_pages


def test_texts_that_depend_on_their_place_are_no_bytes() -> None:
    ours = Engine(teacher())
    generator = ours.open_generation(8 << 20)

    def shift(output: Tensor) -> Tensor:  # of the launches that draw: by the place of the row
        is_step = output.shape[1] <= generator.decode_rows
        return output + is_step * 1e-3 * torch.arange(output.shape[1])[:, None]

    with Hook(ours.model).change(shift):
        assert keeps_bytes(ours), "packs have another size"
        assert not writes_same_bytes(ours, generator)
        assert not is_exact(ours, generator)
    assert is_exact(ours, generator)


def test_a_small_pool_is_served_without_a_probe_of_texts() -> None:
    ours = Engine(teacher())
    generator = ours.open_generation(3 * 64 * 2 * 2 * 2 * 16 * 4)
    assert generator.pool.num_pages == 3
    assert writes_same_bytes(ours, generator)
    assert generator.pool.num_free == 3


@pytest.mark.parametrize("name", ["CHUNK_TOKENS", "PAGE_TOKENS", "DRAWN_BLOCK", "DECODE_ROWS"])
def test_the_fingerprint_covers_what_the_bytes_of_a_text_depend_on(name, monkeypatch) -> None:
    before = Engine(teacher()).model.teacher_fingerprint
    assert Engine(teacher()).model.teacher_fingerprint == before
    value = {"cpu": 16, "cuda": 64} if name == "DECODE_ROWS" else 128
    monkeypatch.setattr(generate, name, value)
    assert Engine(teacher()).model.teacher_fingerprint != before


@functools.cache
def products_round_alike() -> bool:
    """Whether products of any number of rows round alike here: it depends on the processor."""
    weights = torch.randn(1024, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows = torch.randn(700, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    whole = rows @ weights.t()
    return all(torch.equal(rows[:n] @ weights.t(), whole[:n]) for n in range(1, 300))


def test_an_engine_that_does_not_tile_is_found_out_where_products_round_differently() -> None:
    if products_round_alike():
        pytest.skip("products of any number of rows round alike on this processor")
    wide = teacher(hidden_size=512)
    assert is_exact(Engine(wide))
    assert not keeps_bytes(Engine(wide, exact=False))


def test_the_level_is_tolerance_where_that_was_asked_for() -> None:
    ours = Engine(teacher(), exact=False)
    assert keeps_bytes(ours), "float32 of this size does not need the tiles"
    assert not is_exact(ours)


def test_padded_sequences_are_found_out_where_products_round_differently() -> None:
    if products_round_alike():
        pytest.skip("products of any number of rows round alike on this processor")
    padded = replace(teacher(hidden_size=512), is_packed=False)
    assert not keeps_bytes(Engine(padded, exact=False))
    assert is_exact(Engine(padded)), "each runs alone"


def add_noise_by_place(hidden: Tensor) -> Tensor:
    """Adds what no sequence gets alone: a bit more in each row of a pack from the tenth on."""
    place = torch.arange(hidden.shape[1], dtype=hidden.dtype)
    return hidden + 1e-3 * (place.clamp(min=10) - 10)[:, None]


def test_an_answer_that_depends_on_the_place_in_a_pack_is_not_exact() -> None:
    ours = Engine(teacher())
    with Hook(teacher()).change(add_noise_by_place):
        assert not is_exact(ours)
    assert is_exact(ours)


def test_what_shows_only_in_long_sequences_is_found_too() -> None:
    ours = Engine(teacher())
    with Hook(teacher()).change(
        lambda hidden: add_noise_by_place(hidden) if hidden.shape[1] > 256 else hidden
    ):
        assert not is_exact(ours)


# A known answer.


def test_a_known_answer_repeats() -> None:
    known = KnownAnswer(Engine(teacher()))
    assert known.repeats()
    assert known.repeats()


@pytest.mark.parametrize(
    "damage",
    [
        lambda hidden: hidden * torch.nan,
        lambda hidden: hidden.fill_(torch.inf),
        torch.zeros_like,
        lambda hidden: torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)),
        lambda hidden: hidden.roll(1, 1),
    ],
    ids=["nan", "inf", "zeros", "garbage", "shifted"],
)
def test_a_known_answer_notices_a_device_that_computes_something_else(damage: Any) -> None:
    known = KnownAnswer(Engine(teacher()))
    with Hook(teacher()).change(damage):
        assert not known.repeats()
    assert known.repeats()


def test_a_known_answer_lets_a_few_bits_differ() -> None:
    known = KnownAnswer(Engine(teacher()))
    with Hook(teacher()).change(lambda hidden: hidden * (1 + 1e-5)):
        assert known.repeats()


class Lost(Exception):
    """Raised by a device."""


class BrokenDevice(Device):
    """Raises from the moment on when it is told to."""

    is_broken = False

    def queue(self) -> AbstractContextManager[object]:
        if self.is_broken:
            raise Lost
        return super().queue()


def test_a_known_answer_raises_what_computing_raises() -> None:
    device = BrokenDevice(CPU)
    known = KnownAnswer(Engine(teacher(), device=device))
    device.is_broken = True
    with pytest.raises(Lost):
        known.repeats()


# Warm-up.


class BlockingDevice(Device):
    """Never comes back from a launch until it is let go."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.let_go = threading.Event()

    def queue(self) -> AbstractContextManager[object]:
        self.let_go.wait()
        return super().queue()


@pytest.fixture
def blocking() -> Iterator[BlockingDevice]:
    device = BlockingDevice()
    yield device
    device.let_go.set()
    for thread in threading.enumerate():
        if thread.name == "warm-up":
            thread.join()


def test_a_warm_up_that_never_ends_is_an_error_after_its_limit(blocking: BlockingDevice) -> None:
    with pytest.raises(ModelError, match=r"longer than 0\.1 s"):
        warm_up(Engine(teacher(), device=blocking), limit_s=0.1)


def test_a_warm_up_raises_what_computing_raises() -> None:
    device = BrokenDevice(CPU)
    device.is_broken = True
    with pytest.raises(Lost):
        warm_up(Engine(teacher(), device=device), limit_s=60.0)


@pytest.mark.parametrize("packed", [True, False])
def test_a_warm_up_runs_products_of_every_size(
    packed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    ours = Engine(replace(teacher(), is_packed=packed))
    seen = []
    with Hook(teacher()).change(lambda hidden: seen.append(hidden.shape[:2])):
        warm_up(ours, limit_s=60.0)
    assert seen == [(1, 640)]  # a tile of either size
    assert "warmed up" in caplog.text


def test_the_sequences_of_a_probe_are_served_ones() -> None:
    ours = Engine(replace(teacher(), max_sequence_tokens=20, effective_vocab_size=7))
    lengths = [len(request.token_ids) for request in make_requests(ours, (1, 9, 4000))]
    assert lengths == [2, 9, 20]
    for request in make_requests(ours, (20, 20)):
        assert int(request.token_ids.max()) < 7
        assert torch.equal(request.rows, torch.arange(19))
