"""Makes the uniform numbers that random selections draw with, from what was asked.

The same request gives the same numbers, and so the same draws.
"""

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def uniforms(seed: int, epoch: int, ids_digest: bytes, positions: Tensor) -> Tensor:
    """Makes (R,) float64 in [0, 1), one for each of the (R,) int64 `positions` of a sequence.

    A counter-based hash in 64-bit arithmetic that wraps, the same on every device:

        mix(x): x ^= x >> 30; x *= 0xBF58476D1CE4E5B9; x ^= x >> 27; x *= 0x94D049BB133111EB;
                x ^= x >> 31                      (the output function of SplitMix64)
        key = 0; for word in (seed, epoch, digest[0:8], digest[8:16]): key = mix((key ^ word) + G)
        u(position) = (mix(key + (position + 1) * G) >> 11) / 2**53,  G = 0x9E3779B97F4A7C15

    with logical shifts and the halves of the digest read as little-endian numbers. ids_digest: the
    16 bytes of XXH3-128 (canonical form) over the sequence's ids as little-endian int32. positions:
    the row numbers in the sequence, so that a part of a sequence draws what the whole would.
    Raises ValueError for a seed or epoch outside 0 to 2**64 - 1 and for a digest of another length.
    """
    if not (0 <= seed <= _MASK and 0 <= epoch <= _MASK):
        raise ValueError(f"seed and epoch must be 0 to 2**64 - 1, got {seed} and {epoch}")
    if len(ids_digest) != 16:
        raise ValueError(f"ids_digest must have 16 bytes, got {len(ids_digest)}")
    halves = (int.from_bytes(half, "little") for half in (ids_digest[:8], ids_digest[8:]))
    key = torch.tensor(make_key(seed, epoch, *halves))
    return shift_right(hash_counters(key, positions.long()), 11).double() * 2.0**-53


def make_key(*words: int) -> int:
    """Makes the key of a sequence of random numbers from words of 64 bits, as a signed number."""
    key = 0
    for word in words:
        key = _mix_number((key ^ word) + _GOLDEN & _MASK)
    return _signed(key)


def hash_counters(keys: Tensor, counters: Tensor) -> Tensor:
    """Makes random int64 words, mix(key + (counter + 1) * G) above; the shapes are broadcast."""
    return _mix((counters + 1) * _signed(_GOLDEN) + keys)


def _mix(values: Tensor) -> Tensor:
    """Applies SplitMix64's output function to int64 words, which wrap."""
    values = (values ^ shift_right(values, 30)) * _signed(0xBF58476D1CE4E5B9)
    values = (values ^ shift_right(values, 27)) * _signed(0x94D049BB133111EB)
    return values ^ shift_right(values, 31)


def _mix_number(value: int) -> int:
    """Applies `_mix` to one number of 64 bits."""
    return int(_mix(torch.tensor(_signed(value)))) & _MASK


def shift_right(values: Tensor, by: int) -> Tensor:
    """Shifts right logically; the shift of int64 would copy the sign."""
    return (values >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    """Returns the int64 with the same bits as a number of 64 bits."""
    return value - (1 << 64) if value >> 63 else value
