"""Systematic counts of N draws from each row: unbiased, and steadier than independent draws.

Letters: R rows, V columns of the logits, N draws per row, H blocks hit by draws, E entries.

One number u in [0, 1) decides all draws of a row: draw i is the id where the running sum of the
probabilities passes (i + u) / N. For u uniform the expected count of an id is exactly N * p, its
count is never further than 1 from that, and the counts of a row add up to N (systematic sampling,
Madow and Madow 1944). u is a hash of what was asked, so the same request gives the same draws.
"""

import torch
from torch import Tensor

from logit_codec.blocks import BLOCK, block_logits
from logit_codec.targets import _splits

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def uniforms(seed: int, epoch: int, ids_digest: bytes, positions: Tensor) -> Tensor:
    """(R,) float64 in [0, 1), one for each of the (R,) int64 `positions` of a sequence.

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
    key = 0
    for word in (seed, epoch, *halves):
        key = _mix_number((key ^ word) + _GOLDEN & _MASK)
    mixed = _mix((positions.long() + 1) * _signed(_GOLDEN) + _signed(key))
    return _shift(mixed, 11).double() * 2.0**-53


def systematic_counts(
    logits: Tensor, shares_RB: Tensor, uniforms_R: Tensor, num_draws: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Row splits (R+1,), ids (E,) and counts (E,) of num_draws draws from each row.

    shares_RB: the rows' `block_masses`. An id of probability 0 is never drawn. A row whose shares
    are NaN gets no entry, which `encode` refuses.
    """
    draws_N = torch.arange(num_draws, dtype=torch.float64, device=logits.device)
    ends_RB = shares_RB.cumsum(1)
    total_R1 = ends_RB[:, -1:]
    sound_R = torch.isfinite(total_R1[:, 0])
    at_RN = (draws_N + uniforms_R[:, None]) / num_draws * total_R1
    at_RN = torch.minimum(at_RN, _just_below(total_R1))
    # The first block whose running sum is above `at` has a share above 0, whatever was rounded.
    block_RN = torch.searchsorted(ends_RB, at_RN, right=True).clamp_(max=ends_RB.shape[1] - 1)

    new_RN = _changes(block_RN)
    rows_H, draw_H = new_RN.nonzero(as_tuple=True)
    block_H = block_RN[rows_H, draw_H]
    hit_RN = (new_RN.flatten().cumsum(0) - 1).view_as(block_RN)
    share_RN = shares_RB.gather(1, block_RN)
    into_RN = (at_RN - (ends_RB.gather(1, block_RN) - share_RN)) / share_RN  # of the block's mass

    weights_HW = block_logits(logits, rows_H, block_H)
    weights_HW.sub_(weights_HW.amax(1, keepdim=True)).div_(temperature).exp_()
    ends_HW = weights_HW.cumsum(1, dtype=torch.float64)
    total_RN = ends_HW[:, -1][hit_RN]
    at_RN = torch.minimum(into_RN.clamp_(min=0.0) * total_RN, _just_below(total_RN))
    within_RN = _first_above(ends_HW, hit_RN, at_RN)

    ids_RN = block_RN * BLOCK + within_RN
    new_RN = _changes(ids_RN) & sound_R[:, None]
    first_E = new_RN.flatten().nonzero()[:, 0]
    # A run of equal ids ends where the next one begins, or at the end of its row.
    row_end_E = (first_E // num_draws + 1) * num_draws
    next_E = torch.minimum(torch.cat([first_E[1:], row_end_E[-1:]]), row_end_E)
    return _splits(new_RN.sum(1)), ids_RN.flatten()[first_E], next_E - first_E


def _first_above(ends_HW: Tensor, hit_RN: Tensor, at_RN: Tensor) -> Tensor:
    """(R, N): the first column of row hit_RN of ends_HW that is above at_RN, by bisection."""
    column = torch.zeros_like(hit_RN)
    step = BLOCK // 2
    while step:
        passed = ends_HW[hit_RN, column + (step - 1)] <= at_RN
        column += passed * step
        step //= 2
    return column


def _changes(values_RN: Tensor) -> Tensor:
    """(R, N) bool: where a value differs from the one before it in its row."""
    new_RN = torch.ones_like(values_RN, dtype=torch.bool)
    torch.ne(values_RN[:, 1:], values_RN[:, :-1], out=new_RN[:, 1:])
    return new_RN


def _just_below(values: Tensor) -> Tensor:
    return torch.nextafter(values, torch.zeros_like(values))


def _mix(values: Tensor) -> Tensor:
    """SplitMix64's output function on int64 words, which wrap."""
    values = (values ^ _shift(values, 30)) * _signed(0xBF58476D1CE4E5B9)
    values = (values ^ _shift(values, 27)) * _signed(0x94D049BB133111EB)
    return values ^ _shift(values, 31)


def _mix_number(value: int) -> int:
    """`_mix` of one number of 64 bits."""
    return int(_mix(torch.tensor(_signed(value)))) & _MASK


def _shift(values: Tensor, by: int) -> Tensor:
    """A logical right shift; that of int64 would copy the sign."""
    return (values >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    """The int64 with the same bits as a number of 64 bits."""
    return value - (1 << 64) if value >> 63 else value
