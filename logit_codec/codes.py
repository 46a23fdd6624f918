"""Writes logprobs as codes of a few bits, and reads them: the ranges and the codes plane of top_k.

Letters: R rows, E entries of all rows together.
"""

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from logit_codec import bits as bitpack
from logit_codec.errors import CodecError
from logit_codec.ids import Entries
from logit_codec.planes import least_words, pad_words

CODE_BITS = (5, 6, 7, 8, 16)
"""Bits per logprob that can be asked for."""
RANGE_BITS = 8
"""Bits of the range of a row's logprobs."""
LEVEL_BITS = 3
"""Bits of a logprob's code that are written in unary."""
LEVELS = (1 << LEVEL_BITS) - 1
"""Of a code's upper bits, which are written as flags: most entries are near the low end."""
RANGES_PER_OCTAVE, RANGE_OF_1_NAT = 16, 127
"""Range r > 0 of a row's logprobs is 2^((r - 127) / 16) nats: 0.0043 to 256, in steps of 4.4 %."""


def quantise(
    logprobs: Tensor, rows: Tensor, num_rows: int, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (R,) ranges and (E,) codes of `bits` bits; `dequantise` says what they mean.

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
    """Turns (E,) codes into (E,) logprobs.

    A code says how far above the low end of its row's range an entry is, in steps that are e times
    finer at the top, where an error costs more. The height of the best one follows from the tail:
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
    """Returns (2**bits,) float64: how far below the best entry each code is, of the row's range."""
    codes = torch.arange(1 << bits, dtype=torch.float64)
    above = codes.mul_((math.e - 1) / ((1 << bits) - 1)).log1p_()
    return above.neg_().add_(1).numpy()


@cache
def _nats_of_ranges() -> np.ndarray:
    """Returns (256,) float64: the nats of each range."""
    return _range_nats(torch.arange(1 << RANGE_BITS)).numpy()


def _range_nats(ranges: Tensor) -> Tensor:
    nats = torch.exp2((ranges.double() - RANGE_OF_1_NAT) / RANGES_PER_OCTAVE)
    return nats.masked_fill_(ranges == 0, 0.0)


def pack_codes(codes: Tensor, best: Tensor, counts: Tensor, bits: int, id_words: int) -> Tensor:
    """Packs the codes plane: (E,) codes of `bits` bits, (R,) best entries and counts of entries.

    The place of each row's best entry, whose code is then known; of the others the upper LEVEL_BITS
    in unary, level by level, and then the lower bits. A Golomb-Rice code: most of a row's entries
    are near its low end. `least_words` may make the plane longer.
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
    return pad_words(words, least_words(num_entries, id_words))


def unpack_codes(
    string: bitpack.BitString, entries: Entries, bits: int, id_words: int
) -> np.ndarray:
    """Inverts `pack_codes`: reads (E,) int64 codes.

    Raises CodecError for words that `pack_codes` would not write.
    """
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
    string.end(least_words(num_entries, id_words))
    is_other = np.ones(num_entries, np.bool_)
    is_other[places + first_entries] = False
    codes = np.full(num_entries, (1 << bits) - 1)
    codes[is_other] = level
    return codes


def _first_entries(counts: Tensor) -> Tensor:
    return counts.cumsum(0).sub_(counts)


def _place_bits(counts: Tensor) -> Tensor:
    """Returns (R,) bits that tell the entries of a row apart: of count - 1, written in binary."""
    return torch.frexp((counts - 1).double()).exponent.long()
