"""What the planes of a container hold, beside ids: logprob codes, counts, numbers per row.

Letters: R rows, E entries of all rows together, N draws per row, S counts that are stated.
"""

import math

import torch
from torch import Tensor

from logit_codec import bits as bitpack
from logit_codec.errors import CodecError
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


def dequantise(codes: Tensor, ranges: Tensor, rows: Tensor, tail: Tensor, bits: int) -> Tensor:
    """(E,) codes -> (E,) logprobs.

    A code says how far above the low end of its row's range an entry is, in steps that are e times
    finer at the top, where an error costs more. How high the best one stands follows from the tail:
    the entries of a row hold exactly 1 - tail.
    """
    above = codes.double().mul_((math.e - 1) / ((1 << bits) - 1)).log1p_()
    below = above.neg_().add_(1).mul_(_range_nats(ranges)[rows])
    mass_R = torch.zeros(len(ranges), dtype=torch.float64)
    mass_R.index_add_(0, rows, below.neg().exp_())
    high_R = torch.log(-torch.expm1(tail.double())) - mass_R.log_()
    return high_R[rows].sub_(below).to(torch.float32)


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


def unpack_codes(words: Tensor, counts: Tensor, bits: int, id_words: int) -> Tensor:
    """The inverse of `pack_codes`. Raises CodecError unless it would write just these words."""
    num_rows, num_entries = len(counts), int(counts.sum())
    string = _BitString(words, "codes")
    places = string.numbers(_place_bits(counts))
    if bool((places >= counts).any()):
        raise CodecError("the best entry of a row is beyond its last")
    best = places.add_(_first_entries(counts))
    alive = torch.arange(num_entries - num_rows)
    level = torch.zeros_like(alive)
    for number in range(1, LEVELS + 1):
        alive = alive[string.flags(len(alive))]
        level.index_fill_(0, alive, number)
    low_bits = bits - LEVEL_BITS
    low = string.numbers(torch.full_like(level, low_bits))
    string.end(_least_words(num_entries, id_words))
    others = torch.ones(num_entries, dtype=torch.bool)
    others[best] = False
    codes = torch.full((num_entries,), (1 << bits) - 1)
    return codes.masked_scatter_(others, level.bitwise_left_shift_(low_bits).bitwise_or_(low))


def _first_entries(counts: Tensor) -> Tensor:
    return counts.cumsum(0).sub_(counts)


def _place_bits(counts: Tensor) -> Tensor:
    """(R,) bits that tell the entries of a row apart: of count - 1, written in binary."""
    return torch.frexp((counts - 1).double()).exponent.long()


class _BitString:
    """Reads a plane of bits from its start. Raises CodecError at its end."""

    def __init__(self, words: Tensor, name: str) -> None:
        self._words, self._name = words, name
        self._at = 0

    def _advance(self, num_bits: int) -> int:
        """Where the next bits begin."""
        first = self._at
        self._at += num_bits
        if self._at > 32 * len(self._words):
            raise CodecError(f"the container ends in its {self._name} plane")
        return first

    def flags(self, count: int) -> Tensor:
        """(count,) bool."""
        return bitpack.unpack_bits(self._words, self._advance(count), count)

    def numbers(self, widths: Tensor) -> Tensor:
        """(n,) numbers of the (n,) widths."""
        ends = widths.cumsum(0)
        first = self._advance(int(ends[-1]) if len(ends) else 0)
        return bitpack.unpack_varying(self._words, ends.sub_(widths).add_(first), widths)

    def end(self, least_words: int) -> None:
        """Nothing may follow, beside what fills the plane up."""
        if len(self._words) != max((self._at + 31) // 32, least_words):
            raise CodecError(
                f"the {self._name} plane has {len(self._words)} words, its content takes "
                f"{self._at} bits"
            )
        check_padding(self._words, self._at, self._name)


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
    words: Tensor, rows: Tensor, num_rows: int, num_draws: int, id_words: int
) -> Tensor:
    """The inverse of `pack_draws`. Raises CodecError unless it would write just these words."""
    string = _BitString(words, "draws")
    several = string.flags(len(rows))
    stated = _stated(several, rows)
    log2 = torch.ones(int(stated.sum()), dtype=torch.int64)
    alive = torch.arange(len(log2))
    for _ in range(2, num_draws.bit_length()):
        alive = alive[string.flags(len(alive))]
        log2[alive] += 1
    counts = torch.ones(len(rows), dtype=torch.int64)
    counts[stated] = string.numbers(log2).add_(1 << log2)
    string.end(_least_words(len(rows), id_words))
    implied = several & ~stated
    counts[implied] = 0
    others = torch.zeros(num_rows, dtype=torch.int64).index_add_(0, rows, counts)
    counts[implied] = num_draws - others[rows[implied]]
    if bool((counts[implied] < 2).any()):
        raise CodecError(f"the counts of a row add up to more than its {num_draws} draws")
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


def unpack_codes16(words: Tensor, count: int) -> Tensor:
    codes = unpack_plane(words, count, 16, "16-bit codes")
    return codes.to(torch.float32) / CODES_PER_NAT


def unpack_plane(words: Tensor, count: int, width: int, name: str) -> Tensor:
    """`count` numbers of `width` bits. Raises CodecError if the bits after them are not 0."""
    check_padding(words, count * width, name)
    return bitpack.unpack(words, count, width)


def check_padding(words: Tensor, num_bits: int, name: str) -> None:
    """Raises CodecError if a bit after the first `num_bits` is set."""
    words = words[num_bits // 32 :]
    used = num_bits % 32  # bits in use of the first of these
    if (len(words) and (int(words[0]) & 0xFFFFFFFF) >> used) or bool(words[1:].any()):
        raise CodecError(f"the padding of the {name} plane is not zero")


def raw_words(values: Tensor) -> Tensor:
    """A contiguous float tensor as int32 words, padded with zero bytes."""
    raw = values.contiguous().view(torch.uint8)
    return torch.nn.functional.pad(raw, (0, -len(raw) % 4)).view(torch.int32)
