"""Selects targets from logits: what a spec asks for of each row, on the logits' own device.

Letters: R rows, V columns of the logits.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from logit_codec.blocks import RowMasses
from logit_codec.parsing import parse_targets
from logit_codec.spec import TargetSpec
from logit_codec.targets import Targets

ARITHMETIC = "shares-3"
"""Names how shares are added up: another order rounds otherwise, and may draw another id. Part of a
teacher's fingerprint."""


def select(
    logits: Tensor,
    spec: str | TargetSpec,
    *,
    temperature: float = 1.0,
    uniforms: Tensor | None = None,
    realized_ids: Tensor | None = None,
    overwrite: bool = False,
) -> Targets:
    """Selects from softmax(logits / temperature) what `spec` asks for.

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
    if spec.needs_uniforms:
        uniforms = _check_uniforms(spec, uniforms, num_rows)
    if num_rows == 0:  # reductions over no rows are not defined on every device
        row = logits.new_zeros(1, vocab_size)
        ids = None if realized_ids is None else realized_ids.new_zeros(1)
        draws = None if uniforms is None else uniforms.new_zeros(1)
        return select(row, spec, temperature=temperature, uniforms=draws, realized_ids=ids)[:0]
    realized_R1 = None
    if spec.realized:  # read now: dense may overwrite the logits
        assert realized_ids is not None
        realized_R1 = logits.gather(1, realized_ids.long()[:, None]).double()

    masses, entropy_R = RowMasses.of(logits, temperature, entropy=spec.entropy)
    targets = spec.select(masses, uniforms, overwrite=overwrite)
    per_row = {}
    if spec.log_z:
        per_row["log_z"] = masses.log_z_R.float()
    if realized_R1 is not None:
        logprob_R = realized_R1[:, 0] / temperature - masses.log_z_R
        per_row["realized_logprob"] = logprob_R.float()
    if entropy_R is not None:
        per_row["entropy"] = entropy_R.float()
    return replace(targets, **per_row)


def _check_uniforms(spec: TargetSpec, uniforms: Tensor | None, num_rows: int) -> Tensor:
    """Raises ValueError unless there is one uniform number for each row."""
    wanted = f"{spec.kind} targets need uniforms, ({num_rows},) float64 in [0, 1)"
    if uniforms is None:
        raise ValueError(f"{wanted}, got none; logit_codec.uniforms makes them")
    if uniforms.shape != (num_rows,) or uniforms.dtype != torch.float64:
        raise ValueError(f"{wanted}, got {uniforms.dtype} of shape {tuple(uniforms.shape)}")
    if not bool(((uniforms >= 0) & (uniforms < 1)).all()):
        raise ValueError(f"{wanted}, got values outside")
    return uniforms
