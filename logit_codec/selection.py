"""Logits to targets: what a spec keeps of each row, on the logits' own device.

Letters: R rows, V columns of the logits, B blocks of columns, K kept entries per row at most,
E kept entries of all rows. Ties go to the lowest id, so that the same logits give the same targets
on every device.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from logit_codec.blocks import BLOCK, block_logits, block_masses, log_partition
from logit_codec.sampling import systematic_counts
from logit_codec.spec import DenseSpec, SampledSpec, TargetSpec, TopKSpec, parse_targets
from logit_codec.targets import DenseTargets, SampledTargets, Targets, TopKTargets, _splits

ARITHMETIC = "shares-3"
"""Names how shares are added up: another order rounds otherwise, and may draw another id. Part of a
teacher's fingerprint."""
SMALLEST_MIN_P = 1 / 1024
"""From here up, the blocks that can hold an entry of min_p are few: at most 1 / min_p of a row."""
SMALLEST_SHARE = 1e-30
"""Float32 keeps smaller probabilities with fewer digits, or not at all."""


def select(
    logits: Tensor,
    spec: str | TargetSpec,
    *,
    temperature: float = 1.0,
    uniforms: Tensor | None = None,
    realized_ids: Tensor | None = None,
    overwrite: bool = False,
) -> Targets:
    """What `spec` keeps of softmax(logits / temperature).

    logits: (R, V) of a floating dtype; -inf gives an id probability 0. uniforms: (R,) float64 in
    [0, 1), needed for sampled; `logit_codec.uniforms` makes them. realized_ids: (R,) int64, the
    tokens that really came next; needed if `spec.realized`. overwrite: dense targets may take over
    the memory of float32 logits; without it the logits are not changed.

    Extra memory in a large vocabulary is a small part of the logits for sampled and for top_k with
    a min_p of 1/1024 or more; at most one (R, V) float32 buffer for other top_k; for dense its
    result. A row that is not finite comes back so that `encode` refuses it, and leaves the others
    alone. Raises ValueError for a k above V and for uniforms or realized_ids that are missing, have
    another shape or are out of range.
    """
    spec = parse_targets(spec)
    num_rows, vocab_size = logits.shape
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if spec.realized and (realized_ids is None or realized_ids.shape != (num_rows,)):
        got = "none" if realized_ids is None else f"shape {tuple(realized_ids.shape)}"
        raise ValueError(
            f"realized_ids must have shape ({num_rows},) unless the spec says realized=0, got {got}"
        )
    if isinstance(spec, SampledSpec):
        uniforms = _checked_uniforms(uniforms, num_rows)
    if num_rows == 0:  # reductions over no rows are not defined on every device
        row = logits.new_zeros(1, vocab_size)
        ids = None if realized_ids is None else realized_ids.new_zeros(1)
        draws = None if uniforms is None else uniforms.new_zeros(1)
        return select(row, spec, temperature=temperature, uniforms=draws, realized_ids=ids)[:0]
    realized_R1 = None
    if spec.realized:
        assert realized_ids is not None
        realized_R1 = logits.gather(1, realized_ids.long()[:, None]).double()

    shares_RB, entropy_R = block_masses(logits, temperature, entropy=spec.entropy)
    log_z_R = log_partition(logits, shares_RB, temperature)
    common = {"vocab_size": vocab_size, "temperature": temperature}
    if isinstance(spec, SampledSpec):
        assert uniforms is not None
        splits, ids_E, counts_E = systematic_counts(
            logits, shares_RB, uniforms, spec.n, temperature
        )
        targets: Targets = SampledTargets(
            row_splits=splits, token_ids=ids_E, counts=counts_E, num_draws=spec.n, **common
        )
    elif isinstance(spec, TopKSpec):
        if not spec.min_p and spec.k > vocab_size:
            raise ValueError(
                f"top_k must be at most the {vocab_size} ids of the vocabulary, got {spec.k}"
            )
        most = min(spec.k, vocab_size)
        counts_R, ids_E, logprobs_E = _top(logits, shares_RB, log_z_R, spec, temperature)
        tail_R = _tail_logprob(logits, shares_RB, counts_R, ids_E, logprobs_E, most, temperature)
        targets = TopKTargets(
            row_splits=_splits(counts_R),
            token_ids=ids_E,
            logprobs=logprobs_E.float(),
            tail_logprob=tail_R,
            **common,
        )
    elif isinstance(spec, DenseSpec):
        best_R1 = logits.amax(1, keepdim=True).float()
        own = overwrite and logits.dtype == torch.float32
        logprobs_RV = torch.sub(logits, best_R1, out=logits) if own else logits.float() - best_R1
        logprobs_RV.div_(temperature).add_(best_R1 / temperature - log_z_R[:, None])
        dtype = torch.float32 if spec.bits == 32 else torch.bfloat16
        targets = DenseTargets(logprobs=logprobs_RV.to(dtype), **common)
    else:
        raise ValueError(f"no selection for {type(spec).__name__}")

    per_row = {}
    if spec.log_z:
        per_row["log_z"] = log_z_R.float()
    if realized_R1 is not None:
        per_row["realized_logprob"] = (realized_R1[:, 0] / temperature - log_z_R).float()
    if entropy_R is not None:
        per_row["entropy"] = entropy_R.float()
    return replace(targets, **per_row)


def _checked_uniforms(uniforms: Tensor | None, num_rows: int) -> Tensor:
    wanted = f"sampled targets need uniforms, ({num_rows},) float64 in [0, 1)"
    if uniforms is None:
        raise ValueError(f"{wanted}, got none; logit_codec.uniforms makes them")
    if uniforms.shape != (num_rows,) or uniforms.dtype != torch.float64:
        raise ValueError(f"{wanted}, got {uniforms.dtype} of shape {tuple(uniforms.shape)}")
    if not bool(((uniforms >= 0) & (uniforms < 1)).all()):
        raise ValueError(f"{wanted}, got values outside")
    return uniforms


def _top(
    logits: Tensor, shares_RB: Tensor, log_z_R: Tensor, spec: TopKSpec, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What top_k keeps: entries per row (R,), ids (E,) ascending per row, float64 logprobs (E,)."""
    num_rows, vocab_size = logits.shape
    most = min(spec.k, vocab_size)
    if spec.min_p >= SMALLEST_MIN_P:
        rows_E, ids_E = _candidates(logits, shares_RB, log_z_R, spec.min_p, temperature)
    else:
        rows_E, ids_E = _likeliest(logits, shares_RB, log_z_R, most, temperature)
    logits_E = logits[rows_E, ids_E].float()
    logprobs_E = logits_E.double() / temperature - log_z_R[rows_E]
    # An id of probability 0 is no entry.
    floor = math.log(spec.min_p) if spec.min_p else torch.finfo(torch.float32).min
    keep_E = logprobs_E.float() >= floor
    counts_R = torch.zeros(num_rows, dtype=torch.int64, device=logits.device)
    counts_R.index_add_(0, rows_E, keep_E.long())
    over_R = counts_R > most
    if bool(over_R.any()):
        over_E = over_R[rows_E].nonzero()[:, 0]
        values_E = logits_E[over_E].where(keep_E[over_E], -torch.inf)
        keep_E[over_E] &= _rank_in_row(rows_E[over_E], values_E) < most
        counts_R.clamp_(max=most)
    empty = (counts_R == 0).nonzero()[:, 0]
    if len(empty) == 0:
        return counts_R, ids_E[keep_E], logprobs_E[keep_E]
    # Rows in which no id reaches min_p, or that are not finite, keep their best id.
    best_E = _top_ids(logits[empty].float(), 1)[:, 0]
    rows_E = torch.cat([rows_E[keep_E], empty])
    ids_E = torch.cat([ids_E[keep_E], best_E])
    best_logprobs = logits[empty, best_E].double() / temperature - log_z_R[empty]
    order = rows_E.sort(stable=True).indices
    logprobs_E = torch.cat([logprobs_E[keep_E], best_logprobs])
    return counts_R.clamp_(min=1), ids_E[order], logprobs_E[order]


def _candidates(
    logits: Tensor, shares_RB: Tensor, log_z_R: Tensor, min_p: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Rows and ids (E,), ascending: every id of probability min_p or more, and a few below.

    Such an id stands in a block whose share is at least min_p too.
    """
    floor = 0.999 * min_p  # what float32 rounds off is less
    rows_H, blocks_H = (shares_RB >= floor).nonzero(as_tuple=True)
    least_R = (log_z_R + math.log(floor)) * temperature
    least_R = (least_R - 1e-6 * least_R.abs()).float()
    likely_HW = block_logits(logits, rows_H, blocks_H) >= least_R[rows_H, None]
    hit_E, column_E = likely_HW.nonzero(as_tuple=True)
    return rows_H[hit_E], blocks_H[hit_E] * BLOCK + column_E


def _likeliest(
    logits: Tensor, shares_RB: Tensor, log_z_R: Tensor, k: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Rows and ids (E,), ascending: the k largest logits of each row, equal ones by lowest id.

    There may be a few more. Each of the k blocks of largest shares holds a logit that is no smaller
    than the least of their maxima, so no smaller one is among the k largest of the row, and a block
    that holds one of those has at least the share of the least. Where that leaves too many blocks,
    as in flat rows, `_likeliest_by_maxima` looks at all logits once more.
    """
    num_rows, num_blocks = shares_RB.shape
    if 4 * k <= num_blocks:
        heavy_RK = shares_RB.topk(k, sorted=False).indices
        rows_RK = torch.arange(num_rows, device=logits.device)[:, None].expand_as(heavy_RK)
        heavy_HW = block_logits(logits, rows_RK.flatten(), heavy_RK.flatten())
        least_R = heavy_HW.amax(1).view(num_rows, k).amin(1)
        floor_R = 0.999 * (least_R.double() / temperature - log_z_R).exp()
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
    """What `_likeliest` says, from the logits alone.

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
    ids_RK = _top_ids(logits.float(), k).sort(1).values
    return torch.arange(num_rows, device=logits.device).repeat_interleave(k), ids_RK.flatten()


def _rank_in_row(rows_E: Tensor, values_E: Tensor) -> Tensor:
    """(E,): how many entries of its row, which are together, stand before each by value, then id."""
    # + 0.0 makes -0.0 equal to 0.0.
    by_value = (values_E + 0.0).sort(descending=True, stable=True).indices
    order = by_value[rows_E[by_value].sort(stable=True).indices]
    first_E = torch.searchsorted(rows_E, rows_E)
    rank_E = torch.empty_like(rows_E)
    rank_E[order] = torch.arange(len(rows_E), device=rows_E.device) - first_E
    return rank_E


def _tail_logprob(
    logits: Tensor,
    shares_RB: Tensor,
    counts_R: Tensor,
    ids_E: Tensor,
    logprobs_E: Tensor,
    most: int,
    temperature: float,
) -> Tensor:
    """(R,) float32 log of what the kept entries leave. Overwrites the shares."""
    num_rows, num_blocks = shares_RB.shape
    rows_E = torch.repeat_interleave(
        torch.arange(num_rows, device=ids_E.device), counts_R, output_size=len(ids_E)
    )
    slot_E = torch.arange(len(ids_E), device=ids_E.device) - (counts_R.cumsum(0) - counts_R)[rows_E]
    kept_RK = shares_RB.new_zeros(num_rows, most)
    kept_RK[rows_E, slot_E] = logprobs_E.exp()
    kept_R = kept_RK.sum(1)

    # In the blocks that hold entries, only what is not kept counts.
    block_H, hit_E = (rows_E * num_blocks + ids_E // BLOCK).unique_consecutive(return_inverse=True)
    rows_H, block_H = block_H // num_blocks, block_H % num_blocks
    weights_HW = block_logits(logits, rows_H, block_H)
    weights_HW.sub_(weights_HW.amax(1, keepdim=True)).div_(temperature).exp_()
    total_H = weights_HW.sum(1)
    weights_HW[hit_E, ids_E % BLOCK] = 0.0
    shares_RB[rows_H, block_H] *= (weights_HW.sum(1) / total_H).double()
    # Of 1 - kept and the sum of the rest, each is exact where the other one cancels.
    tail_R = torch.where(kept_R < 0.5, torch.log1p(-kept_R), shares_RB.sum(1).log())
    return tail_R.clamp_(max=0.0).float()


def _top_ids(logits_RV: Tensor, k: int) -> Tensor:
    """(R, k) ids of the k largest logits of each row, equal logits by lowest id; in any order.

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
    """The ids of the k largest values of each row; `ids` None means the column numbers.

    Value and id are joined into one integer (the value's bits in an order-preserving form above
    the negated id), so that no two keys are equal and topk has no tie to break its own way.
    """
    bits = (values + 0.0).view(torch.int32).long()  # + 0.0 makes -0.0 equal to 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    columns = torch.arange(values.shape[1], device=values.device) if ids is None else ids
    keys = (ordered << 32) | (0x7FFFFFFF - columns)
    return 0x7FFFFFFF - (keys.topk(k, dim=1, sorted=False).values & 0x7FFFFFFF)
