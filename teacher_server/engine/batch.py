"""Defines what a forward pass is asked for, and how long its stages took."""

from dataclasses import dataclass

from torch import Tensor

from logit_codec import TargetSpec


@dataclass(frozen=True, slots=True, eq=False)
class WantedRows:
    """One sequence, the rows of it that are wanted, and what to keep of them."""

    token_ids: Tensor
    """(L,) int64."""
    rows: Tensor
    """(N,) int64, ascending, below L - 1: row i is the distribution of token i + 1."""
    spec: TargetSpec
    temperature: float = 1.0
    uniforms: Tensor | None = None
    """(N,) float64 in [0, 1), for a spec that draws."""


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds that one batch took in each stage."""

    forward_s: float
    head_s: float
