"""Defines what the engine is asked for, the shape it computes in, and how long its stages took."""

from dataclasses import dataclass

from torch import Tensor

from logit_codec import TargetSpec

MIN_BUCKET = 32
"""Shortest padded length: products of fewer rows round differently."""


def bucket_length(num_tokens: int, max_tokens: int) -> int:
    """Returns the canonical padded length of a sequence: at most 1/8 longer from 256 tokens on.

    Multiples of 32 up to 256, then eighths of a power of two; never above `max_tokens`.
    """
    step = max(MIN_BUCKET, 1 << max(0, (num_tokens - 1).bit_length() - 4))
    return min(-(-num_tokens // step) * step, max_tokens)


@dataclass(frozen=True, slots=True, eq=False)
class RowRequest:
    """Asks the engine for the targets of some rows of one sequence."""

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
