import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logit_codec import bits

COUNTS = (0, 1, 2, 31, 32, 33, 64, 97)


def one_long_number(values: list[int], width: int) -> int:
    """Bit j of number i is bit i * width + j: FORMAT.md, "Bit packing"."""
    return sum(value << (i * width) for i, value in enumerate(values))


def little_endian(words: torch.Tensor) -> int:
    return int.from_bytes(words.numpy().astype("<i4").tobytes(), "little")


@pytest.mark.parametrize("width", range(1, 33))
def test_pack_makes_one_string_of_bits_with_zeros_at_its_end(width):
    draw = random.Random(width)
    for count in COUNTS:
        values = [draw.getrandbits(width) for _ in range(count)]
        words = bits.pack(torch.tensor(values, dtype=torch.int64), width)
        assert words.dtype == torch.int32
        assert len(words) == bits.num_words(count, width) == -(-count * width // 32)
        assert little_endian(words) == one_long_number(values, width)


@pytest.mark.parametrize("width", range(1, 33))
def test_unpack_returns_what_was_packed_at_the_extremes(width):
    largest = (1 << width) - 1
    for count in COUNTS:
        for values in ([0] * count, [largest] * count, [i % 2 * largest for i in range(count)]):
            packed = bits.pack(torch.tensor(values, dtype=torch.int64), width)
            assert bits.unpack(packed, count, width).tolist() == values


@given(st.data(), st.integers(1, 32))
@settings(deadline=None, max_examples=100)
def test_unpack_is_the_inverse_of_pack(data, width):
    values = data.draw(st.lists(st.integers(0, (1 << width) - 1), max_size=100))
    packed = bits.pack(torch.tensor(values, dtype=torch.int64), width)
    assert little_endian(packed) == one_long_number(values, width)
    unpacked = bits.unpack(packed, len(values), width)
    assert unpacked.dtype == torch.int64
    assert unpacked.tolist() == values


@pytest.mark.parametrize("width", [-1, 0, 33])
def test_a_width_outside_1_to_32_is_refused(width):
    with pytest.raises(ValueError, match=f"width must be 1 to 32, got {width}"):
        bits.pack(torch.tensor([1]), width)
    with pytest.raises(ValueError, match=f"width must be 1 to 32, got {width}"):
        bits.unpack(torch.zeros(2, dtype=torch.int32), 1, width)


@given(
    numbers=st.lists(
        st.integers(0, 32).flatmap(lambda w: st.tuples(st.just(w), st.integers(0, (1 << w) - 1))),
        max_size=80,
    )
)
@settings(deadline=None, max_examples=150)
def test_numbers_of_any_widths_are_one_string_of_bits(numbers):
    widths = torch.tensor([width for width, _ in numbers], dtype=torch.int64)
    values = torch.tensor([value for _, value in numbers], dtype=torch.int64)
    words = bits.pack_varying(values, widths)
    string, at = 0, 0
    for width, value in numbers:
        string |= value << at
        at += width
    assert len(words) == -(-at // 32)
    assert little_endian(words) == string
    first = widths.cumsum(0) - widths
    assert bits.unpack_varying(words, first, widths).tolist() == values.tolist()


@given(st.lists(st.booleans(), max_size=200), st.data())
@settings(deadline=None, max_examples=100)
def test_ones_are_found_where_they_were_put(string, data):
    positions = torch.tensor([i for i, bit in enumerate(string) if bit], dtype=torch.int64)
    words = bits.pack_ones(positions, len(string))
    assert len(words) == -(-len(string) // 32)
    assert bits.find_ones(words).tolist() == positions.tolist()
    first = data.draw(st.integers(0, len(string)))
    count = data.draw(st.integers(0, len(string) - first))
    assert bits.unpack_bits(words, first, count).tolist() == string[first : first + count]


def test_long_planes_are_read_in_pieces(monkeypatch):
    values = torch.arange(1000) % 17
    widths = torch.full((1000,), 5)
    words = bits.pack_varying(values, widths)
    ones = bits.pack_ones(values.cumsum(0) + torch.arange(1000), 10_000)
    whole = bits.find_ones(ones)
    monkeypatch.setattr(bits, "PIECE", 64)
    assert torch.equal(bits.unpack_varying(words, widths.cumsum(0) - widths, widths), values)
    assert torch.equal(bits.find_ones(ones), whole)
