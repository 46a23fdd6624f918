"""Finds the largest values of rows without sorting them, in shapes that follow from their shape.

Letters: R rows, N values of a row, K values to find. Of equal values the first counts as larger, so
that the same values give the same positions on every device.
"""

import math

import torch
from torch import Tensor


def largest(values_RN: Tensor, k: int, *, ordered: bool = False) -> Tensor:
    """Finds (R, K) int64 positions of the k largest of float32 values; ordered: the largest first.

    Only the k groups with the largest maxima can hold one of them. So the search runs over the
    maxima of groups, themselves in groups, and then over the k best groups.
    """
    num_rows, num_values = values_RN.shape
    group = 1 << round(math.log2(math.sqrt(num_values / k)))
    if 2 * k * group >= num_values:
        return _largest_by_key(values_RN, None, k, ordered)
    if num_values % group:
        values_RN = torch.nn.functional.pad(values_RN, (0, -num_values % group), value=-torch.inf)
    values_RGS = values_RN.unflatten(1, (-1, group))
    best_RK = largest(torch.nn.functional.max_pool1d(values_RN, group), k)
    row_R1 = torch.arange(num_rows, device=values_RN.device)[:, None] * values_RGS.shape[1]
    candidates = values_RGS.flatten(0, 1).index_select(0, (best_RK + row_R1).flatten())
    within_S = torch.arange(group, device=values_RN.device)
    positions = (best_RK[:, :, None] * group + within_S).flatten(1)
    return _largest_by_key(candidates.view_as(positions), positions, k, ordered)


def _largest_by_key(
    values_RN: Tensor, positions_RN: Tensor | None, k: int, ordered: bool
) -> Tensor:
    """Finds the positions of the k largest; `positions_RN` None means those in `values_RN`.

    Value and position are joined into one integer (the value's bits in an order-preserving form,
    above the negated position), so that no two keys are equal and topk has no tie to break its own
    way.
    """
    bits = (values_RN + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0
    bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF))
    if positions_RN is None:
        positions_RN = torch.arange(values_RN.shape[1], device=values_RN.device)
    keys = bits.long().bitwise_left_shift_(32).sub_(positions_RN)
    return keys.topk(k, dim=1, sorted=ordered).values.neg_() & 0xFFFFFFFF
