"""Packs whole numbers into 32-bit words, least significant bit first, and reads them.

Packing is done in torch, on the device that the numbers are on. 32 numbers of w bits fill exactly w
words, so a fixed width is packed on (groups, 32) tensors whose word and shift depend on the column
alone: no loop over numbers, on any device.

Reading is done in numpy: bytes are on the CPU, and of the few thousand numbers of a container torch
takes longer for the calls than for the work.
"""

import numpy as np
import torch
from torch import Tensor

from logit_codec.errors import CodecError

GROUP = 32
WHOLE = (8, 16, 32)
"""Widths that a dtype has: their numbers lie in the words as they are."""
SPARE_NBYTES = 8
"""A `BitString` may read this many bytes after its end; it ignores what they hold."""


def num_words(count: int, width: int) -> int:
    """Returns how many words of 32 bits `count` numbers of `width` bits take."""
    return (count * width + 31) // 32


def pack(values: Tensor, width: int) -> Tensor:
    """Packs (n,) int64 in [0, 2**width), width 1 to 32, into (num_words(n, width),) int32."""
    count = len(values)
    word, shift = _columns(width, values.device)
    grouped = torch.nn.functional.pad(values, (0, -count % GROUP)).view(-1, GROUP) << shift
    words = values.new_zeros(len(grouped), width + 1)
    # Each bit is set by one number only, so adding is the same as or-ing.
    words.index_add_(1, word, grouped & 0xFFFFFFFF)
    words.index_add_(1, word + 1, grouped >> 32)
    return words[:, :width].reshape(-1)[: num_words(count, width)].to(torch.int32)


def _columns(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns word and bit of each of the 32 numbers of a group."""
    if not 1 <= width <= 32:
        raise ValueError(f"width must be 1 to 32, got {width}")
    bit = torch.arange(GROUP, device=device) * width
    return bit >> 5, bit & 31


def pack_varying(values: Tensor, widths: Tensor) -> Tensor:
    """Packs (n,) int64 values, each with its own width of the (n,) int64 `widths`, 0 to 32.

    Returns int32 words. Values must be below 2**width.
    """
    ends = widths.cumsum(0)
    first = ends - widths
    words = values.new_zeros((int(ends[-1:].sum()) + 31) // 32 + 1)
    shifted = values << (first & 31)
    # Each bit is set by one number only, so adding is the same as or-ing.
    words.index_add_(0, first >> 5, shifted & 0xFFFFFFFF)
    words.index_add_(0, ((first >> 5) + 1).clamp_(max=len(words) - 1), shifted >> 32)
    return words[:-1].to(torch.int32)


def pack_ones(positions: Tensor, num_bits: int) -> Tensor:
    """Packs a string of `num_bits` bits with ones at (n,) distinct positions into int32 words."""
    words = positions.new_zeros((num_bits + 31) // 32)
    words.index_add_(0, positions >> 5, 1 << (positions & 31))
    return words.to(torch.int32)


class BitString:
    """Reads a plane of bits from its start. Raises CodecError at its end.

    raw: uint8, of which the plane is the bytes from number `first` to `stop`; SPARE_NBYTES or more
    follow them.
    """

    def __init__(self, raw: np.ndarray, first: int, stop: int, name: str) -> None:
        assert stop + SPARE_NBYTES <= len(raw)
        self._raw, self._name = raw, name
        self._first, self._at, self._stop = 8 * first, 8 * first, 8 * stop

    @property
    def num_bits(self) -> int:
        """Bits of the whole plane."""
        return self._stop - self._first

    def flags(self, count: int) -> np.ndarray:
        """Reads (count,) bool."""
        first = self._advance(count)
        some = self._raw[first >> 3 : (first + count + 7) >> 3]
        bits = np.unpackbits(some, bitorder="little")
        return bits[first & 7 :][:count].view(np.bool_)

    def numbers(self, count: int, width: int) -> np.ndarray:
        """Reads (count,) int64 of one width, 0 to 32."""
        first = self._advance(count * width)
        if width in WHOLE and first % 8 == 0:
            whole = np.ndarray((count,), f"<u{width // 8}", self._raw, first >> 3)
            return whole.astype(np.int64)
        # 8 numbers fill `width` bytes: every eighth begins at the same bit of a byte.
        window = np.dtype("<u4" if width <= 32 - 7 else "<u8")
        columns = np.empty(((count + 7) // 8, 8), window)
        for column in range(min(count, 8)):
            at = first + column * width
            rows = (count - column + 7) // 8
            every_eighth = np.ndarray((rows,), window, self._raw, at >> 3, (width,))
            np.right_shift(every_eighth, at & 7, out=columns[:rows, column])
        columns &= window.type((1 << width) - 1)
        return columns.reshape(-1)[:count].astype(np.int64)

    def varying(self, widths: np.ndarray) -> np.ndarray:
        """Reads (n,) int64, each with its own width of the (n,) int64 `widths`, 0 to 32."""
        starts = widths.cumsum()
        num_bits = int(starts[-1]) if len(starts) else 0
        first = self._advance(num_bits)
        starts -= widths
        starts += first & 31
        # Each word with the next one: every number is in one of these pairs.
        num_windows = ((first & 31) + num_bits >> 5) + 1
        windows = np.ndarray((num_windows,), "<i8", self._raw, first >> 5 << 2, (4,))
        values = windows.take(starts >> 5)
        starts &= 31
        values >>= starts
        np.left_shift(1, widths, out=starts)
        starts -= 1
        values &= starts
        return values

    def raw_bytes(self) -> np.ndarray:
        """Copies the whole plane as (n,) uint8."""
        return self._raw[self._first >> 3 : self._stop >> 3].copy()

    def end(self, least_words: int = 0) -> None:
        """Raises CodecError unless zeros follow, up to the end of a word or `least_words`."""
        used = self._at - self._first
        words = max((used + 31) // 32, least_words)
        if self.num_bits != 32 * words:
            raise CodecError(
                f"the {self._name} plane has {self.num_bits // 32} words, its content takes "
                f"{used} bits"
            )
        rest = self._raw[self._at >> 3 : self._stop >> 3].tobytes()
        if int.from_bytes(rest, "little") >> (self._at & 7):
            raise CodecError(f"the padding of the {self._name} plane is not zero")

    def _advance(self, num_bits: int) -> int:
        """Moves on by `num_bits`; returns where they begin."""
        first = self._at
        if num_bits > self._stop - first:
            raise CodecError(f"the container ends in its {self._name} plane")
        self._at += num_bits
        return first
