"""What the planes of a container hold, beside ids: logprob codes, counts, numbers per row.

Letters: R rows, E entries of all rows together, N draws per row, S counts that are stated.
"""

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from logit_codec import bits as bitpack
from logit_codec.errors import CodecError
from logit_codec.ids import Entries
from logit_codec.spec import LEVEL_BITS, RANGE_BITS

CODES_PER_NAT = 2048
"""Scale of the 16-bit codes of realized logprob and entropy: steps of 1/2048 up to 31.9995."""
RANGES_PER_OCTAVE, RANGE_OF_1_NAT = 16, 127
"""Range r > 0 of a row's logprobs is 2^((r - 127) / 16) nats: 0.0043 to 256, in steps of 4.4 %."""
LEVELS = (1 << LEVEL_BITS) - 1
"""Of a code's upper bits, which are written as flags: most entries are near the low end."""


def quantise(
    logprobs: Tensor, rows: Tensor, num_rows: int, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(R,) ranges and (E,) codes of `bits` bits; see `dequantise` for what they mean.

    And the (R,) numbers of the best entries: the first of the largest of each row.
    """
    logprobs = logprobs.double()
    empty_R = logprobs.new_empty(num_rows)
    high_R = empty_R.scatter_reduce(0, rows, logprobs, "amax", include_self=False)
    low_R = empty_R.scatter_reduce(0, rows, logprobs, "amin", include_self=False)
    ranges = (high_R - low_R).log2_().mul_(RANGES_PER_OCTAVE).add_(RANGE_OF_1_NAT)
    ranges = ranges.ceil_().clamp_(1, (1 << RANGE_BITS) - 1)
    ranges = ranges.masked_fill_(high_R == low_R, 0).long()
    # A row whose entries are all equal has no range; 1 stands in, for a division.
    below = (high_R[rows] - logprobs).div_(_range_nats(ranges).masked_fill_(ranges == 0, 1.0)[rows])
    most = (1 << bits) - 1
    codes = below.sub_(1).neg_().exp_().sub_(1).mul_(most / (math.e - 1))
    codes = codes.round_().clamp_(0, most).masked_fill_(ranges[rows] == 0, 0.0)
    largest = (logprobs == high_R[rows]).nonzero()[:, 0]
    best = ranges.scatter_reduce(0, rows[largest], largest, "amin", include_self=False)
    return ranges, codes.long(), best


def dequantise(
    codes: np.ndarray, ranges: np.ndarray, entries: Entries, tail: np.ndarray, bits: int
) -> Tensor:
    """(E,) codes -> (E,) logprobs.

    A code says how far above the low end of its row's range an entry is, in steps that are e times
    finer at the top, where an error costs more. How high the best one stands follows from the tail:
    the entries of a row hold exactly 1 - tail.
    """
    below = _shares_below(bits).take(codes)
    below *= np.repeat(_nats_of_ranges().take(ranges), entries.counts)
    # The functions are torch's, as in the writer; numpy's may differ in the last bit.
    weights = torch.from_numpy(below).neg().exp_().numpy()
    mass_R = np.bincount(entries.rows, weights, len(ranges))  # added up in the order of the entries
    high_R = torch.log(-torch.expm1(torch.from_numpy(tail).double()))
    high_R -= torch.from_numpy(mass_R).double().log_()  # (without entries it is of whole numbers)
    logprobs = np.repeat(high_R.numpy(), entries.counts)
    logprobs -= below
    return torch.from_numpy(logprobs.astype(np.float32))


@cache
def _shares_below(bits: int) -> np.ndarray:
    """(2**bits,) float64: how far below the best entry each code is, of the row's range."""
    codes = torch.arange(1 << bits, dtype=torch.float64)
    above = codes.mul_((math.e - 1) / ((1 << bits) - 1)).log1p_()
    return above.neg_().add_(1).numpy()


@cache
def _nats_of_ranges() -> np.ndarray:
    """(256,) float64: the nats of each range."""
    return _range_nats(torch.arange(1 << RANGE_BITS)).numpy()


def _range_nats(ranges: Tensor) -> Tensor:
    nats = torch.exp2((ranges.double() - RANGE_OF_1_NAT) / RANGES_PER_OCTAVE)
    return nats.masked_fill_(ranges == 0, 0.0)


def pack_codes(codes: Tensor, best: Tensor, counts: Tensor, bits: int, id_words: int) -> Tensor:
    """(E,) codes of `bits` bits, (R,) best entries and counts of entries -> the words of the plane.

    The place of each row's best entry, whose code is then known; of the others the upper LEVEL_BITS
    in unary, level by level, and then the lower bits. A Golomb-Rice code: most of a row's entries
    are near its low end. It is as long as `_least_words` says at least.
    """
    num_entries = len(codes)
    others = torch.ones_like(codes, dtype=torch.bool)
    others[best] = False
    codes = codes[others]
    low_bits = bits - LEVEL_BITS
    level = codes >> low_bits
    values, widths = [best - _first_entries(counts)], [_place_bits(counts)]
    for number in range(1, LEVELS + 1):
        flags = level >= number
        values.append(flags.long())
        widths.append(torch.ones_like(level))
        level = level[flags]
    values.append(codes & ((1 << low_bits) - 1))
    widths.append(torch.full_like(codes, low_bits))
    words = bitpack.pack_varying(torch.cat(values), torch.cat(widths))
    return _filled(words, _least_words(num_entries, id_words))


def unpack_codes(
    string: bitpack.BitString, entries: Entries, bits: int, id_words: int
) -> np.ndarray:
    """(E,) int64: the inverse of `pack_codes`. Raises CodecError unless it would write just these
    words."""
    counts, first_entries = entries.counts, entries.splits[:-1]
    num_entries = len(entries.ids)
    num_others = num_entries - len(counts)
    places = string.varying(np.frexp(counts - 1)[1].astype(np.int64))
    if (places >= counts).any():
        raise CodecError("the best entry of a row is beyond its last")
    alive = np.flatnonzero(string.flags(num_others))
    level = np.zeros(num_others, np.int64)
    level[alive] = 1
    for number in range(2, LEVELS + 1):
        alive = alive.compress(string.flags(len(alive)))
        level[alive] = number
    low_bits = bits - LEVEL_BITS
    level <<= low_bits
    level |= string.numbers(num_others, low_bits)
    string.end(_least_words(num_entries, id_words))
    is_other = np.ones(num_entries, np.bool_)
    is_other[places + first_entries] = False
    codes = np.full(num_entries, (1 << bits) - 1)
    codes[is_other] = level
    return codes


def _first_entries(counts: Tensor) -> Tensor:
    return counts.cumsum(0).sub_(counts)


def _place_bits(counts: Tensor) -> Tensor:
    """(R,) bits that tell the entries of a row apart: of count - 1, written in binary."""
    return torch.frexp((counts - 1).double()).exponent.long()


def pack_draws(counts: Tensor, rows: Tensor, num_draws: int, id_words: int) -> Tensor:
    """(E,) counts of the draws of each row, which add up to N -> the words of the draws plane.

    Elias gamma codes, level by level instead of count by count: whether each count is at least 2;
    of those, whether it is at least 4, 8 and so on; then the bits below the leading one. The first
    count of a row that is not 1 is left out after its first level: it follows from N. It is as long
    as `_least_words` says at least.
    """
    several = counts > 1
    values, widths = [several.long()], [torch.ones_like(counts)]
    stated = counts[_stated(several, rows)]
    log2 = torch.ones_like(stated)
    alive = stated
    for level in range(2, num_draws.bit_length()):
        higher = alive >= 1 << level
        values.append(higher.long())
        widths.append(torch.ones_like(alive))
        log2 += stated >= 1 << level
        alive = alive[higher]
    values.append(stated - (1 << log2))
    widths.append(log2)
    words = bitpack.pack_varying(torch.cat(values), torch.cat(widths))
    return _filled(words, _least_words(len(rows), id_words))


def unpack_draws(
    string: bitpack.BitString, entries: Entries, num_draws: int, id_words: int
) -> np.ndarray:
    """(E,) int64: the inverse of `pack_draws`. Raises CodecError unless it would write just these
    words."""
    rows, num_entries = entries.rows, len(entries.ids)
    several = np.flatnonzero(string.flags(num_entries))
    rows_of_several = rows.take(several)
    is_first = np.ones(len(several), np.bool_)
    np.not_equal(rows_of_several[1:], rows_of_several[:-1], out=is_first[1:])
    implied, rows_of_implied = several.compress(is_first), rows_of_several.compress(is_first)
    stated = several.compress(~is_first)
    log2 = np.ones(len(stated), np.int64)
    alive = np.arange(len(stated))
    for level in range(2, num_draws.bit_length()):
        alive = alive.compress(string.flags(len(alive)))
        log2[alive] = level
    low = string.varying(log2)
    string.end(_least_words(num_entries, id_words))
    counts = np.ones(num_entries, np.int64)
    counts[stated] = low + (1 << log2)
    draws_R = np.add.reduceat(counts, entries.splits[:-1]) if num_entries else counts
    missing = num_draws - draws_R.take(rows_of_implied)  # beside the 1 that they count as
    if (missing < 1).any():
        raise CodecError(f"the counts of a row add up to more than its {num_draws} draws")
    counts[implied] += missing
    draws_R[rows_of_implied] = num_draws
    refuse_rows(draws_R != num_draws, f"its counts do not add up to the {num_draws} draws")
    return counts


def _least_words(num_entries: int, id_words: int) -> int:
    """What `id_words` words of ids leave of a byte per entry. (Only tiny vocabularies need it.)

    It bounds a reader's memory by a multiple of what it is sent.
    """
    return (num_entries + 3) // 4 - id_words


def _filled(words: Tensor, least_words: int) -> Tensor:
    return torch.nn.functional.pad(words, (0, max(0, least_words - len(words))))


def _stated(several: Tensor, rows: Tensor) -> Tensor:
    """(E,) bool: which counts are written in full: above 1 and not the first such of their row."""
    index = several.nonzero()[:, 0]
    first = torch.ones_like(index, dtype=torch.bool)
    torch.ne(rows[index[1:]], rows[index[:-1]], out=first[1:])
    stated = several.clone()
    stated[index[first]] = False
    return stated


def pack_codes16(nats: Tensor) -> Tensor:
    """(R,) nats >= 0, +inf allowed -> packed 16-bit codes; the largest code means 'or more'."""
    codes = (nats.double() * CODES_PER_NAT).round_().clamp_(0, 0xFFFF)
    return bitpack.pack(codes.long(), 16)


def unpack_codes16(string: bitpack.BitString, count: int) -> Tensor:
    """The inverse of `pack_codes16`: (count,) float32."""
    nats = string.numbers(count, 16).astype(np.float32)
    string.end()
    nats /= CODES_PER_NAT
    return torch.from_numpy(nats)


def refuse_rows(
    bad: np.ndarray, why: str, rows: np.ndarray | None = None, first_row: int = 0
) -> None:
    """Raises CodecError for the first row that is bad; `rows` says which row each element is of."""
    if bad.any():
        index = int(bad.argmax())
        row = first_row + (index if rows is None else int(rows[index]))
        raise CodecError(f"row {row} cannot be a target: {why}", row)


def raw_words(values: Tensor) -> Tensor:
    """A contiguous float tensor as int32 words, padded with zero bytes."""
    raw = values.contiguous().view(torch.uint8)
    return torch.nn.functional.pad(raw, (0, -len(raw) % 4)).view(torch.int32)
