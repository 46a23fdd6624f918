"""Holds the arguments of a loss that both losses share, and what follows from them.

Letters: R rows.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from logit_codec import Targets
from logit_codec.kinds.base import Cell
from student_trainer.losses.checks import check_divergence, check_rows
from student_trainer.losses.divergences import (
    compute_cells,
    compute_corrected_cells,
    compute_corrected_pulls,
    compute_pulls,
)
from student_trainer.transfer import copy_to

RowWeight = float | Tensor
"""Of a term of the loss: one number, or (R,) or (R, 1), one for each row."""


def counts(weight: RowWeight) -> bool:
    """Whether a term may count in any row; does not ask the device."""
    return isinstance(weight, Tensor) or weight != 0


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LossOptions:
    """Holds the arguments that say what the loss is; `distillation_loss` explains each."""

    divergence: str
    beta: float
    kd_weight: RowWeight
    ce_weight: RowWeight
    row_weights: Tensor | None
    temperature_scaling: bool
    renormalize: bool
    correction: bool
    reduction: str

    def check(self, targets: Targets, labels: Tensor | None, mask: Tensor | None) -> None:
        """Raises ValueError for what does not fit the targets."""
        check_divergence(
            targets.kind, self.divergence, self.beta, self.renormalize, self.correction
        )
        check_rows(
            targets.num_rows,
            self.reduction,
            labels=labels,
            mask=mask,
            row_weights=self.row_weights,
            kd_weight=self.kd_weight,
            ce_weight=self.ce_weight,
        )
        if self.uses_labels and labels is None:
            raise ValueError("ce_weight needs labels, (R,) int64 with -100 for rows without one")

    @property
    def distils(self) -> bool:
        """Whether the divergence may count in any row."""
        return counts(self.kd_weight)

    @property
    def uses_labels(self) -> bool:
        """Whether the cross-entropy may count in any row."""
        return counts(self.ce_weight)

    @property
    def cell(self) -> Cell:
        """What a cell adds to the divergence."""
        if self.correction:
            return compute_corrected_cells
        return partial(compute_cells, self.divergence, self.beta)

    @property
    def pull(self) -> Cell:
        """q * dD/dq of a cell."""
        if self.correction:
            return compute_corrected_pulls
        return partial(compute_pulls, self.divergence, self.beta)

    def weights(
        self, temperature: float, device: torch.device, dtype: torch.dtype
    ) -> tuple[RowWeight, RowWeight]:
        """Returns what divergence and cross-entropy are multiplied with: numbers, or (R,) tensors.

        T^2 is in the first one if temperature_scaling is on.
        """
        scale = temperature**2 if self.temperature_scaling else 1.0
        return (
            self._weigh(self.kd_weight, device, dtype) * scale,
            self._weigh(self.ce_weight, device, dtype),
        )

    def _weigh(self, weight: RowWeight, device: torch.device, dtype: torch.dtype) -> RowWeight:
        """Multiplies a weight by those of the rows, if there are any."""
        is_number = not isinstance(weight, Tensor)
        if is_number and (weight == 0 or self.row_weights is None):
            return weight
        product = weight if is_number else copy_to(weight, device).to(dtype)
        if self.row_weights is not None:
            product = product * copy_to(self.row_weights, device).to(dtype)
        return product

    def reduce(
        self, total: Tensor, num_rows: int, mask: Tensor | None, num_items: int | Tensor | None
    ) -> Tensor:
        """Divides the sum over rows as `reduction` and `num_items` ask for."""
        if self.reduction == "sum":
            return total
        return take_mean(total, num_rows, mask, num_items)


def take_mean(
    total: Tensor, num_rows: int, mask: Tensor | None, num_items: int | Tensor | None
) -> Tensor:
    """Divides a sum over rows by `num_items`, or by the rows that the mask counts."""
    if num_items is None:
        num_items = num_rows if mask is None else mask.sum()
    if isinstance(num_items, Tensor):
        # A number on the host becomes an argument of the division: nothing waits for a copy.
        if num_items.dim() or num_items.device.type != "cpu":
            num_items = copy_to(num_items, total.device)
        return total / num_items.clamp(min=1)
    return total / max(num_items, 1)
