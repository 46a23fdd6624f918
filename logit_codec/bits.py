"""Whole numbers of a fixed width, packed into 32-bit words, least significant bit first.

32 numbers of w bits fill exactly w words, so the work is done on (groups, 32) tensors whose word
and shift depend on the column alone: no loop over numbers, on any device.
"""

import torch
from torch import Tensor

GROUP = 32


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
