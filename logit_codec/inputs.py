"""Holds what a selection may read of some rows beside their logits.

Letters: R rows, M given ids of a row, L layers, D hidden size.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RowInputs:
    """Holds tensors with R rows, on the device of the logits; None where the spec needs none."""

    realized_ids: Tensor | None = None
    """(R,) int64: the tokens that really came next."""
    uniforms: Tensor | None = None
    """(R,) float64 in [0, 1)."""
    given_ids: Tensor | None = None
    """(R, M) int64, ascending; a shorter row repeats its last id."""
    hidden: Tensor | None = None
    """(R, D): what the vocabulary head reads."""
    features: Tensor | None = None
    """(R, L, D): the states after the layers of the spec."""

    def __getitem__(self, rows: slice | Tensor) -> "RowInputs":
        return replace(self, **{name: value[rows] for name, value in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Returns those that are there, by name."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {name: value for name, value in values.items() if value is not None}

    def check(self, name: str, num_rows: int, dtype: torch.dtype | None, dims: int) -> None:
        """Raises ValueError unless this one is there, with this many rows and dimensions."""
        value = getattr(self, name)
        shape = f"({num_rows},{' ...' if dims > 1 else ''})"
        wanted = f"{name} must be {dtype or 'numbers'} of shape {shape}"
        if value is None:
            raise ValueError(f"{wanted}, got none")
        if len(value) != num_rows or value.dim() != dims or (dtype and value.dtype != dtype):
            raise ValueError(f"{wanted}, got {value.dtype} of shape {tuple(value.shape)}")
