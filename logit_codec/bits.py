"""Whole numbers of a fixed width, packed into 32-bit words, least significant bit first.

32 numbers of w bits fill exactly w words, so the work is done on (groups, 32) tensors whose word
and shift depend on the column alone: no loop over numbers, on any device.
"""

import torch
from torch import Tensor

GROUP = 32
WHOLE = {8: torch.uint8, 16: torch.int16, 32: torch.int32}
"""Widths that a dtype has: their numbers lie in the words as they are."""
PIECE = 1 << 18
"""Numbers of `unpack_varying` and bytes of `find_ones` that are worked on at a time."""


def num_words(count: int, width: int) -> int:
    """Words of 32 bits that `count` numbers of `width` bits take."""
    return (count * width + 31) // 32


def pack(values: Tensor, width: int) -> Tensor:
    """(n,) int64 in [0, 2**width), width 1 to 32 -> (num_words(n, width),) int32."""
    count = len(values)
    word, shift = _columns(width, values.device)
    grouped = torch.nn.functional.pad(values, (0, -count % GROUP)).view(-1, GROUP) << shift
    words = values.new_zeros(len(grouped), width + 1)
    # Each bit is set by one number only, so adding is the same as or-ing.
    words.index_add_(1, word, grouped & 0xFFFFFFFF)
    words.index_add_(1, word + 1, grouped >> 32)
    return words[:, :width].reshape(-1)[: num_words(count, width)].to(torch.int32)


def unpack(words: Tensor, count: int, width: int) -> Tensor:
    """The inverse of `pack`: (num_words(count, width),) int32 -> (count,) int64."""
    if width in WHOLE:
        return words.view(WHOLE[width])[:count].to(torch.int64).bitwise_and_((1 << width) - 1)
    word, shift = _columns(width, words.device)
    groups = (count + GROUP - 1) // GROUP
    wide = torch.zeros(groups * width, dtype=torch.int64, device=words.device)
    wide[: len(words)] = words.to(torch.int64) & 0xFFFFFFFF
    grouped = torch.nn.functional.pad(wide.view(groups, width), (0, 1))
    values = (grouped[:, word] >> shift) | (grouped[:, word + 1] << (32 - shift))
    return (values & ((1 << width) - 1)).reshape(-1)[:count]


def _columns(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Word and bit of each of the 32 numbers of a group."""
    if not 1 <= width <= 32:
        raise ValueError(f"width must be 1 to 32, got {width}")
    bit = torch.arange(GROUP, device=device) * width
    return bit >> 5, bit & 31


def pack_varying(values: Tensor, widths: Tensor) -> Tensor:
    """(n,) int64 values, each of its own of the (n,) int64 widths, 0 to 32 -> int32 words.

    Values must be below 2**width.
    """
    ends = widths.cumsum(0)
    first = ends - widths
    words = values.new_zeros((int(ends[-1:].sum()) + 31) // 32 + 1)
    shifted = values << (first & 31)
    # Each bit is set by one number only, so adding is the same as or-ing.
    words.index_add_(0, first >> 5, shifted & 0xFFFFFFFF)
    words.index_add_(0, ((first >> 5) + 1).clamp_(max=len(words) - 1), shifted >> 32)
    return words[:-1].to(torch.int32)


def unpack_varying(words: Tensor, first: Tensor, widths: Tensor) -> Tensor:
    """The numbers of (n,) int64 widths, 0 to 32 bits each, that begin at the (n,) bits `first`.

    Bits beyond the last word are 0.
    """
    wide = torch.zeros(len(words) + 2, dtype=torch.int64, device=words.device)
    wide[: len(words)] = words
    wide.bitwise_and_(0xFFFFFFFF)
    pairs = (wide[1:] << 32).bitwise_or_(wide[:-1])  # every word with the one behind it
    values = torch.empty_like(first)
    pieces = zip(first.split(PIECE), widths.split(PIECE), values.split(PIECE), strict=True)
    for piece, width, value in pieces:  # in pieces, so that a large plane takes little memory
        found = pairs[(piece >> 5).clamp_(max=len(words))].bitwise_right_shift_(piece & 31)
        torch.bitwise_and(found, (1 << width).sub_(1), out=value)
    return values


def unpack_bits(words: Tensor, first: int, count: int) -> Tensor:
    """(count,) bool: the bits from number `first` on, all of which must be there."""
    masks = 1 << torch.arange(8, dtype=torch.uint8, device=words.device)
    some = words.view(torch.uint8)[first >> 3 : (first + count + 7) >> 3]
    return (some[:, None] & masks).bool().flatten()[first & 7 :][:count]


def pack_ones(positions: Tensor, num_bits: int) -> Tensor:
    """A string of `num_bits` bits with ones at (n,) distinct positions -> int32 words."""
    words = positions.new_zeros((num_bits + 31) // 32)
    words.index_add_(0, positions >> 5, 1 << (positions & 31))
    return words.to(torch.int32)


def find_ones(words: Tensor) -> Tensor:
    """(n,) int64, ascending: where the ones of a string of bits are; the inverse of `pack_ones`."""
    masks = 1 << torch.arange(8, dtype=torch.uint8, device=words.device)
    found = [
        (piece[:, None] & masks).flatten().nonzero()[:, 0].add_(8 * PIECE * number)
        for number, piece in enumerate(words.view(torch.uint8).split(PIECE))
    ]
    return found[0] if len(found) == 1 else torch.cat(found)
