"""What the planes of a container hold, beside ids: logprob codes, counts, numbers per row.

Letters: R rows, E entries of all rows together, N draws per row, S counts that are stated.
"""

import torch
from torch import Tensor

from logit_codec import bits as bitpack
from logit_codec.errors import CodecError

CODES_PER_NAT = 2048
"""Scale of the 16-bit codes of realized logprob and entropy: steps of 1/2048 up to 31.9995."""
RANGES_PER_NAT = 256
"""Scale of the 16-bit range of a row's logprobs: steps of 1/256 up to 255.996."""


def quantise(logprobs: Tensor, rows: Tensor, num_rows: int, bits: int) -> tuple[Tensor, Tensor]:
    """(R,) ranges and (E,) codes of `bits` bits; see `dequantise` for what they mean."""
    logprobs = logprobs.double()
    empty_R = logprobs.new_empty(num_rows)
    high_R = empty_R.scatter_reduce(0, rows, logprobs, "amax", include_self=False)
    low_R = empty_R.scatter_reduce(0, rows, logprobs, "amin", include_self=False)
    ranges = ((high_R - low_R) * RANGES_PER_NAT).ceil_().clamp_(0, 0xFFFF)
    # A row whose entries are all equal has step 0; dividing by 1 gives it the codes 0.
    step_R = (ranges / (RANGES_PER_NAT * ((1 << bits) - 1))).masked_fill_(ranges == 0, 1.0)
    codes = ((high_R[rows] - logprobs) / step_R[rows]).round_().clamp_(0, (1 << bits) - 1)
    return ranges.long(), codes.long()


def dequantise(codes: Tensor, ranges: Tensor, rows: Tensor, tail: Tensor, bits: int) -> Tensor:
    """(E,) codes -> (E,) logprobs.

    A code counts the steps of its row below the row's best entry; how high that one stands follows
    from the tail: the entries of a row hold exactly 1 - tail.
    """
    step_R = ranges.double() / (RANGES_PER_NAT * ((1 << bits) - 1))
    below = codes.double().mul_(step_R[rows])
    mass_R = torch.zeros(len(ranges), dtype=torch.float64)
    mass_R.index_add_(0, rows, below.neg().exp_())
    high_R = torch.log(-torch.expm1(tail.double())) - mass_R.log_()
    return high_R[rows].sub_(below).to(torch.float32)


def pack_draws(counts: Tensor, rows: Tensor, num_draws: int, id_words: int) -> Tensor:
    """(E,) counts of the draws of each row, which add up to N -> the words of the draws plane.

    Elias gamma codes, level by level instead of count by count: whether each count is at least 2;
    of those, whether it is at least 4, 8 and so on; then the bits below the leading one. The first
    count of a row that is not 1 is left out after its first level: it follows from N. With the
    `id_words` words of the ids the plane takes at least a byte per entry (only tiny vocabularies
    need that), which bounds a reader's memory by a multiple of what it is sent.
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
    fill = max(0, _least_words(len(rows), id_words) - len(words))
    return torch.nn.functional.pad(words, (0, fill))


def unpack_draws(
    words: Tensor, rows: Tensor, num_rows: int, num_draws: int, id_words: int
) -> Tensor:
    """The inverse of `pack_draws`. Raises CodecError unless it would write just these words."""
    at = 0  # the next bit

    def flags(count: int) -> Tensor:
        nonlocal at
        at += count
        if at > 32 * len(words):
            raise CodecError("the container ends in its draws plane")
        return bitpack.unpack_bits(words, at - count, count)

    several = flags(len(rows))
    stated = _stated(several, rows)
    log2 = torch.ones(int(stated.sum()), dtype=torch.int64)
    alive = torch.arange(len(log2))
    for _ in range(2, num_draws.bit_length()):
        alive = alive[flags(len(alive))]
        log2[alive] += 1
    ends = log2.cumsum(0) + at
    num_bits = int(ends[-1]) if len(ends) else at
    if len(words) != max((num_bits + 31) // 32, _least_words(len(rows), id_words)):
        raise CodecError(f"the draws plane has {len(words)} words, its counts take {num_bits} bits")
    check_padding(words, num_bits, "draws")
    counts = torch.ones(len(rows), dtype=torch.int64)
    counts[stated] = bitpack.unpack_varying(words, ends.sub_(log2), log2).add_(1 << log2)
    implied = several & ~stated
    counts[implied] = 0
    others = torch.zeros(num_rows, dtype=torch.int64).index_add_(0, rows, counts)
    counts[implied] = num_draws - others[rows[implied]]
    if bool((counts[implied] < 2).any()):
        raise CodecError(f"the counts of a row add up to more than its {num_draws} draws")
    return counts


def _least_words(num_entries: int, id_words: int) -> int:
    return (num_entries + 3) // 4 - id_words


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
