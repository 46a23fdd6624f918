"""Logits to targets: what a spec keeps of each row, on the logits' own device.

Letters: R rows, V columns of the logits, K kept entries per row.
Ties go to the lowest id, so that the same logits give the same targets on every device.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from logit_codec.spec import DenseSpec, TargetSpec, TopKSpec, parse_targets
from logit_codec.targets import DenseTargets, Targets, TopKTargets, _splits


def select(
    logits: Tensor,
    spec: str | TargetSpec,
    *,
    temperature: float = 1.0,
    realized_ids: Tensor | None = None,
    overwrite: bool = False,
) -> Targets:
    """What `spec` keeps of softmax(logits / temperature).

    logits: (R, V) of a floating dtype; -inf gives an id probability 0. realized_ids: (R,) int64,
    the tokens that really came next; needed if `spec.realized`. overwrite: the logits may be used
    as scratch; without it they are not changed.

    Extra memory in a large vocabulary: one (R, V) float32 buffer, none with `overwrite` for top_k,
    one more if the logits are not float32, and about R * sqrt(K * V) candidates. A row that is not
    finite comes back as NaN; `encode` refuses it. Raises ValueError for a k above V and for
    realized_ids that are missing or have another shape.
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
    if num_rows == 0:  # reductions over no rows are not defined on every device
        ids = None if realized_ids is None else realized_ids.new_zeros(1)
        row = logits.new_zeros(1, vocab_size)
        return select(row, spec, temperature=temperature, realized_ids=ids)[:0]
    overwrite = overwrite or logits.dtype != torch.float32  # then the float32 copy is ours
    logits = logits.float()
    realized_R1 = None
    if spec.realized:
        assert realized_ids is not None
        realized_R1 = logits.gather(1, realized_ids[:, None].long())

    # The weights are probabilities but for the rounding of softmax's plain sum (1e-5 at V =
    # 262,144), so they are divided by `mass`, which torch.sum adds up pairwise.
    entropy_R = None
    if isinstance(spec, TopKSpec):
        top_RK = _top_ids(logits, _width(spec, vocab_size)).sort(1).values
        logits_RK = logits.gather(1, top_RK)
        weights_RV = _softmax(logits, temperature, overwrite)
        weights_RK = weights_RV.gather(1, top_RK)
        below_R = weights_RV.scatter_(1, top_RK, 0.0).sum(1)
        mass_R1 = (below_R + weights_RK.sum(1))[:, None]
        best_R1 = logits_RK.amax(1, keepdim=True)
        log_best_R1 = (weights_RK.amax(1, keepdim=True) / mass_R1).log()
        logprobs_RK = (logits_RK - best_R1) / temperature + log_best_R1
        keep_RK = _kept(logprobs_RK, spec)
        # Of 1 - kept and the sum of the rest, each is exact where the other one cancels.
        kept_R = (logprobs_RK.exp() * keep_RK).sum(1)
        rest_R = (below_R + weights_RK.masked_fill(keep_RK, 0.0).sum(1)) / mass_R1[:, 0]
        tail_R = torch.where(kept_R < 0.5, torch.log1p(-kept_R), rest_R.log()).clamp_(max=0.0)
        if spec.entropy:
            top_R = torch.special.entr(logprobs_RK.exp()).sum(1)
            entropy_R = top_R + _entropy(weights_RV, mass_R1)
        targets = TopKTargets(
            vocab_size=vocab_size,
            temperature=temperature,
            row_splits=_splits(keep_RK.sum(1)),
            token_ids=top_RK[keep_RK],
            logprobs=logprobs_RK[keep_RK],
            tail_logprob=tail_R,
        )
    elif isinstance(spec, DenseSpec):
        weights_RV = _softmax(logits, temperature, False)
        mass_R1 = weights_RV.sum(1, keepdim=True)
        best_R1 = logits.amax(1, keepdim=True)
        log_best_R1 = (weights_RV.amax(1, keepdim=True) / mass_R1).log()
        if spec.entropy:
            entropy_R = _entropy(weights_RV, mass_R1)
        logprobs_RV = torch.sub(logits, best_R1, out=weights_RV)
        if temperature != 1.0:
            logprobs_RV.div_(temperature)
        logprobs_RV.add_(log_best_R1)
        dtype = torch.float32 if spec.bits == 32 else torch.bfloat16
        targets = DenseTargets(
            vocab_size=vocab_size, temperature=temperature, logprobs=logprobs_RV.to(dtype)
        )
    else:
        raise ValueError(f"no selection for {type(spec).__name__}")

    per_row = {}
    if spec.log_z:
        per_row["log_z"] = (best_R1 / temperature - log_best_R1)[:, 0]
    if realized_R1 is not None:
        per_row["realized_logprob"] = ((realized_R1 - best_R1) / temperature + log_best_R1)[:, 0]
    if entropy_R is not None:
        per_row["entropy"] = entropy_R
    return replace(targets, **per_row)


def _softmax(logits: Tensor, temperature: float, overwrite: bool) -> Tensor:
    """softmax(logits / temperature), in the logits' own memory if that is allowed."""
    if overwrite:
        if temperature != 1.0:
            logits.div_(temperature)
        return torch.softmax(logits, 1, out=logits)
    if temperature == 1.0:
        return torch.softmax(logits, 1)
    weights = logits / temperature
    return torch.softmax(weights, 1, out=weights)


def _entropy(weights_RV: Tensor, mass_R1: Tensor) -> Tensor:
    """(R,) -sum p log p over p = weights / mass. Overwrites the weights."""
    share_R = weights_RV.sum(1) / mass_R1[:, 0]
    plain_R = torch.special.entr(weights_RV, out=weights_RV).sum(1) / mass_R1[:, 0]
    return plain_R + share_R * mass_R1[:, 0].log()


def _width(spec: TopKSpec, num_columns: int) -> int:
    if spec.min_p:
        return min(spec.k, num_columns)
    if spec.k > num_columns:
        raise ValueError(
            f"top_k must be at most the {num_columns} ids of the vocabulary, got {spec.k}"
        )
    return spec.k


def _kept(logprobs_RK: Tensor, spec: TopKSpec) -> Tensor:
    """(R, K) bool: which of the top entries stay; at least the best of each row."""
    floor = math.log(spec.min_p) if spec.min_p else torch.finfo(torch.float32).min
    keep_RK = logprobs_RK >= floor
    best_R1 = logprobs_RK.argmax(1, keepdim=True)
    return keep_RK.scatter_(1, best_R1, True)


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
