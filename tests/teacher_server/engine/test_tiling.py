"""Tiles: which rows of a pack are in which, and that attention finds the rows of a sequence."""

import random

import pytest
import torch

from teacher_server.engine.attention import NO_WINDOW, attend_on_cpu
from teacher_server.engine.products import Tiling

LARGE, SMALL = 16, 8


def make_lengths(seed: int) -> list[int]:
    """Lengths of a few sequences, and padding to whole small tiles."""
    lengths = [random.Random(seed + number).randint(1, 50) for number in range(6)]
    return [*lengths, -sum(lengths) % SMALL]


@pytest.mark.parametrize("seed", range(5))
def test_as_many_rows_of_a_sequence_as_fill_large_tiles_come_first(seed: int):
    lengths = make_lengths(seed)
    tiling = Tiling.of(lengths, LARGE, SMALL)
    owners = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    owner_T = tiling.to_tiles(owners)
    at_T = tiling.to_tiles(torch.cat([torch.arange(length) for length in lengths]))
    for number, length in enumerate(lengths):
        large = slice(*tiling.large_seqlens[number : number + 2].tolist())
        small = slice(*tiling.small_seqlens[number : number + 2].tolist())
        assert (large.stop - large.start) == length // LARGE * LARGE
        places = [*range(large.start, large.stop), *range(small.start, small.stop)]
        assert owner_T[places].tolist() == [number] * length
        assert at_T[places].tolist() == list(range(length))
        assert large.stop <= tiling.num_large <= small.start
    assert torch.equal(tiling.from_tiles(owner_T), owners)


def test_short_sequences_stay_where_they_are():
    rows = torch.arange(3 * SMALL)
    assert Tiling.of([SMALL, SMALL - 1, SMALL + 1], LARGE, SMALL).to_tiles(rows) is rows


def test_rows_that_do_not_fill_whole_tiles_are_refused():
    with pytest.raises(ValueError, match="9 rows"):
        Tiling.of([9], LARGE, SMALL)


@pytest.mark.parametrize(("window", "softcap"), [(NO_WINDOW, 0.0), (7, 0.0), (NO_WINDOW, 5.0)])
def test_attention_finds_the_rows_of_a_sequence_in_both_places(window: int, softcap: float):
    lengths = make_lengths(1)
    tiling = Tiling.of(lengths, LARGE, SMALL)
    assert tiling.order is not None
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, sum(lengths), 8) for heads in (4, 2, 2))
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    expected = attend_on_cpu(query, key, value, starts, None, window, softcap, 0.3, None)
    found = attend_on_cpu(
        *(x.index_select(2, tiling.order) for x in (query, key, value)),
        tiling.large_seqlens,
        tiling.small_seqlens,
        window,
        softcap,
        0.3,
        None,
    )
    torch.testing.assert_close(tiling.from_tiles(found[0]), expected[0])
