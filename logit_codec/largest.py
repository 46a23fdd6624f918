"""Finds the likeliest ids of rows of logits, without sorting whole vocabularies.

Letters: R rows, V columns of the logits, B blocks of columns, H blocks picked from all rows,
K entries per row at most, E entries of all rows. Ties go to the lowest id, so that the same logits
give the same ids on every device.
"""

import math

import torch
from torch import Tensor

from logit_codec.blocks import BLOCK, RowMasses, block_logits

SMALLEST_SHARE = 1e-30
"""Float32 keeps smaller probabilities with fewer digits, or not at all."""


def ids_from(masses: RowMasses, min_p: float) -> tuple[Tensor, Tensor]:
    """Finds rows and ids (E,), ascending: every id of probability min_p or more, and a few below.

    Such an id is in a block whose share is at least min_p too.
    """
    logits, shares_RB, log_z_R = masses.logits, masses.shares_RB, masses.log_z_R
    floor = 0.999 * min_p  # what float32 rounds off is less
    rows_H, blocks_H = (shares_RB >= floor).nonzero(as_tuple=True)
    least_R = (log_z_R + math.log(floor)) * masses.temperature
    least_R = (least_R - 1e-6 * least_R.abs()).float()
    likely_HW = block_logits(logits, rows_H, blocks_H) >= least_R[rows_H, None]
    hit_E, column_E = likely_HW.nonzero(as_tuple=True)
    return rows_H[hit_E], blocks_H[hit_E] * BLOCK + column_E


def likeliest_ids(masses: RowMasses, k: int) -> tuple[Tensor, Tensor]:
    """Finds rows and ids (E,), ascending: the k largest logits of each row, ties to the lowest id.

    There may be a few more. Each of the k blocks of largest shares holds a logit that is no smaller
    than the least of their maxima, so no smaller one is among the k largest of the row, and a block
    that holds one of those has at least the share of the least. Where that leaves too many blocks,
    as in flat rows, `_likeliest_by_maxima` looks at all logits once more.
    """
    logits, shares_RB = masses.logits, masses.shares_RB
    num_rows, num_blocks = shares_RB.shape
    if 4 * k <= num_blocks:
        heavy_RK = shares_RB.topk(k, sorted=False).indices
        rows_RK = torch.arange(num_rows, device=logits.device)[:, None].expand_as(heavy_RK)
        heavy_HW = block_logits(logits, rows_RK.flatten(), heavy_RK.flatten())
        least_R = heavy_HW.amax(1).view(num_rows, k).amin(1)
        floor_R = 0.999 * (least_R.double() / masses.temperature - masses.log_z_R).exp()
        hit_RB = shares_RB >= floor_R[:, None]
        # Shares below that are rounded by more than the 0.001.
        sound = not bool((floor_R < SMALLEST_SHARE).any())
        if sound and int(hit_RB.sum()) <= 4 * k * num_rows:
            rows_H, blocks_H = hit_RB.nonzero(as_tuple=True)
            values_HW = block_logits(logits, rows_H, blocks_H)
            hit_E, column_E = (values_HW >= least_R[rows_H, None]).nonzero(as_tuple=True)
            return rows_H[hit_E], blocks_H[hit_E] * BLOCK + column_E
    return _likeliest_by_maxima(logits, k)


def _likeliest_by_maxima(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Finds what `likeliest_ids` returns from the logits alone.

    At least k logits are no smaller than the k-th largest maximum of a block, so no smaller one is
    among the k largest.
    """
    num_rows, num_columns = logits.shape
    block = 1 << max(4, round(math.log2(math.sqrt(num_columns / k))))
    if 2 * k * block < num_columns:
        whole = num_columns // block * block
        maxima = logits[:, :whole].unflatten(1, (-1, block)).amax(2)
        if whole < num_columns:
            maxima = torch.cat([maxima, logits[:, whole:].amax(1, keepdim=True)], 1)
        least_R1 = maxima.topk(k).values[:, -1:]
        rows_H, blocks_H = (maxima >= least_R1).nonzero(as_tuple=True)
        # With many equal logits that would be most of the vocabulary.
        if len(rows_H) <= 2 * k * num_rows:
            values_HW = block_logits(logits, rows_H, blocks_H, block)
            hit_E, column_E = (values_HW >= least_R1.float()[rows_H]).nonzero(as_tuple=True)
            return rows_H[hit_E], blocks_H[hit_E] * block + column_E
    ids_RK = top_ids(logits.float(), k).sort(1).values
    return torch.arange(num_rows, device=logits.device).repeat_interleave(k), ids_RK.flatten()


def rank_in_row(rows_E: Tensor, values_E: Tensor) -> Tensor:
    """Counts (E,) how many entries of its row precede each by value, then id; rows are adjacent."""
    # + 0.0 makes -0.0 equal to 0.0.
    by_value = (values_E + 0.0).sort(descending=True, stable=True).indices
    order = by_value[rows_E[by_value].sort(stable=True).indices]
    first_E = torch.searchsorted(rows_E, rows_E)
    rank_E = torch.empty_like(rows_E)
    rank_E[order] = torch.arange(len(rows_E), device=rows_E.device) - first_E
    return rank_E


def top_ids(logits_RV: Tensor, k: int) -> Tensor:
    """Finds (R, k) ids of the k largest logits of each row, equal ones by lowest id; in any order.

    In a large vocabulary only the k blocks with the largest maxima can hold a top-k entry, so the
    selection runs over the block maxima and then over those blocks (exact; docs/log.md has the
    measurement).
    """
    num_rows, num_columns = logits_RV.shape
    block = 1 << max(4, round(math.log2(math.sqrt(num_columns / k))))
    num_blocks = num_columns // block
    if 2 * k * block >= num_columns:
        return _top_by_key(logits_RV, None, k)
    whole = num_blocks * block
    maxima = logits_RV[:, :whole].unflatten(1, (num_blocks, block)).amax(2)
    best_blocks = _top_by_key(maxima, None, k)
    within = torch.arange(block, device=logits_RV.device)
    candidates = (best_blocks[:, :, None] * block + within).flatten(1)
    # The columns after the last whole block are candidates in any case.
    rest = torch.arange(whole, num_columns, device=logits_RV.device).expand(num_rows, -1)
    candidates = torch.cat([candidates, rest], 1)
    return _top_by_key(logits_RV.gather(1, candidates), candidates, k)


def _top_by_key(values: Tensor, ids: Tensor | None, k: int) -> Tensor:
    """Finds the ids of the k largest values of each row; `ids` None means the column numbers.

    Value and id are joined into one integer (the value's bits in an order-preserving form above
    the negated id), so that no two keys are equal and topk has no tie to break its own way.
    """
    bits = (values + 0.0).view(torch.int32).long()  # + 0.0 makes -0.0 equal to 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    columns = torch.arange(values.shape[1], device=values.device) if ids is None else ids
    keys = (ordered << 32) | (0x7FFFFFFF - columns)
    return 0x7FFFFFFF - (keys.topk(k, dim=1, sorted=False).values & 0x7FFFFFFF)
