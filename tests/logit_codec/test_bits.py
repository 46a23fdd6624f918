import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logit_codec import CodecError, bits

COUNTS = (0, 1, 2, 31, 32, 33, 64, 97)


def one_long_number(values: list[int], width: int) -> int:
    """Bit j of number i is bit i * width + j: FORMAT.md, "Bit packing"."""
    return sum(value << (i * width) for i, value in enumerate(values))


def little_endian(words: torch.Tensor) -> int:
    return int.from_bytes(words.numpy().astype("<i4").tobytes(), "little")


def string_of(words: torch.Tensor, before: int = 0) -> bits.BitString:
    """The words as a plane with bytes of ones all around it, `before` of them in front."""
    plane = words.numpy().astype("<i4").tobytes()
    raw = b"\xff" * before + plane + b"\xff" * bits.SPARE_NBYTES
    return bits.BitString(np.frombuffer(raw, np.uint8), before, before + len(plane), "test")


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
def test_what_was_packed_is_read_at_the_extremes(width):
    largest = (1 << width) - 1
    for count in COUNTS:
        for values in ([0] * count, [largest] * count, [i % 2 * largest for i in range(count)]):
            string = string_of(bits.pack(torch.tensor(values, dtype=torch.int64), width))
            assert string.numbers(count, width).tolist() == values
            string.end()


@given(st.data(), st.integers(1, 32), st.integers(0, 5))
@settings(deadline=None, max_examples=100)
def test_numbers_are_the_inverse_of_pack(data, width, before):
    values = data.draw(st.lists(st.integers(0, (1 << width) - 1), max_size=100))
    packed = bits.pack(torch.tensor(values, dtype=torch.int64), width)
    assert little_endian(packed) == one_long_number(values, width)
    string = string_of(packed, 4 * before)
    first = data.draw(st.integers(0, len(values)))
    for some in (values[:first], values[first:]):  # the second begins at any bit
        found = string.numbers(len(some), width)
        assert found.dtype == np.int64
        assert found.tolist() == some
    string.end()


@pytest.mark.parametrize("width", [-1, 0, 33])
def test_a_width_outside_1_to_32_is_refused(width):
    with pytest.raises(ValueError, match=f"width must be 1 to 32, got {width}"):
        bits.pack(torch.tensor([1]), width)


@given(
    numbers=st.lists(
        st.integers(0, 32).flatmap(lambda w: st.tuples(st.just(w), st.integers(0, (1 << w) - 1))),
        max_size=80,
    ),
    first=st.integers(0, 80),
)
@settings(deadline=None, max_examples=150)
def test_numbers_of_any_widths_are_one_string_of_bits(numbers, first):
    widths = torch.tensor([width for width, _ in numbers], dtype=torch.int64)
    values = torch.tensor([value for _, value in numbers], dtype=torch.int64)
    words = bits.pack_varying(values, widths)
    string, at = 0, 0
    for width, value in numbers:
        string |= value << at
        at += width
    assert len(words) == -(-at // 32)
    assert little_endian(words) == string
    reader = string_of(words, 8)
    for some in (slice(0, first), slice(first, None)):  # the second begins at any bit
        assert reader.varying(widths[some].numpy()).tolist() == values[some].tolist()
    reader.end()


@given(st.lists(st.booleans(), max_size=200), st.data())
@settings(deadline=None, max_examples=100)
def test_ones_are_found_where_they_were_put(string, data):
    positions = torch.tensor([i for i, bit in enumerate(string) if bit], dtype=torch.int64)
    words = bits.pack_ones(positions, len(string))
    assert len(words) == -(-len(string) // 32)
    reader = string_of(words)
    first = data.draw(st.integers(0, len(string)))
    assert reader.flags(first).tolist() == string[:first]
    assert reader.flags(len(string) - first).tolist() == string[first:]
    reader.end()


def test_nothing_is_read_beyond_the_end_of_a_plane():
    """Whatever lies there: the next plane, or the digest."""
    words = torch.tensor([-1, 3], dtype=torch.int32)
    for read in (
        lambda string: string.flags(65),
        lambda string: string.numbers(13, 5),
        lambda string: string.varying(np.array([32, 0, 32, 1])),
    ):
        string = string_of(words)
        with pytest.raises(CodecError, match="the container ends in its test plane"):
            read(string)
        assert string.flags(64).sum() == 34


@pytest.mark.parametrize(
    ("used", "least_words", "why"),
    [
        (33, 0, "padding of the test plane is not zero"),
        (31, 2, "padding of the test plane is not zero"),
        (34, 0, None),
        (64, 0, None),
        (34, 2, None),
        (34, 3, "the test plane has 2 words, its content takes 34 bits"),
        (32, 1, "the test plane has 2 words, its content takes 32 bits"),
    ],
)
def test_what_follows_the_content_of_a_plane_is_zeros_up_to_its_end(used, least_words, why):
    string = string_of(torch.tensor([-1, 3], dtype=torch.int32))
    string.flags(used)
    if why is None:
        string.end(least_words)
    else:
        with pytest.raises(CodecError, match=why):
            string.end(least_words)


def test_whole_bytes_are_copied():
    words = torch.tensor([1, -2], dtype=torch.int32)
    found = string_of(words, 4).raw_bytes()
    assert found.view(np.int32).tolist() == [1, -2]
    assert found.flags.owndata
