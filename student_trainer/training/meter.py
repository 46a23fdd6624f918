"""What the rows of the steps say about student and teacher: sums, read only when they are logged.

Letters: R trained rows, C rows of one chunk, V vocabulary, E kept entries of all rows.
"""

import torch
from torch import Tensor, nn

from logit_codec import Targets, TopKTargets

CHUNK_ROWS = 1024
"""Rows whose logits are copied together."""
MEANS = {
    "kd_loss": "kd_rows",
    "ce_loss": "rows",
    "top1_agreement": "rows",
    "teacher_ce": "teacher_rows",
    "tail_mass": "tail_rows",
}
"""What is logged, and the rows that its sum is divided by."""
SUMS = (*MEANS, *dict.fromkeys(MEANS.values()))


class Meter:
    """Sums over the rows of some steps; on the device, so that no step waits for them."""

    def __init__(self, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = {name: torch.zeros((), dtype=dtype, device=device) for name in SUMS}

    @torch.no_grad()
    def add(
        self, targets: Targets, *, kd_sum: Tensor | None, ce_sum: Tensor, best_R: Tensor
    ) -> None:
        """One batch, all on the device.

        kd_sum and ce_sum: divergence, if it is in the loss, and cross-entropy summed over the rows;
        best_R: (R,) the student's likeliest ids.
        """
        sums, num_rows = self._sums, targets.num_rows
        sums["rows"] += num_rows
        if kd_sum is not None:
            sums["kd_rows"] += num_rows
            sums["kd_loss"] += kd_sum
        sums["ce_loss"] += ce_sum
        sums["top1_agreement"] += (best_R == targets.most_likely()).sum()
        if targets.realized_logprob is not None:
            sums["teacher_rows"] += num_rows
            sums["teacher_ce"] -= targets.realized_logprob.sum()
        if isinstance(targets, TopKTargets):
            sums["tail_rows"] += num_rows
            sums["tail_mass"] += targets.tail_logprob.exp().sum()

    def take(self) -> Tensor:
        """(len(SUMS),) sums over the rows since the last time; begins anew."""
        found = torch.stack([self._sums[name] for name in SUMS])
        for value in self._sums.values():
            value.zero_()
        return found


def means(sums: Tensor) -> dict[str, float]:
    """What is logged, from what `take` returned, perhaps added up over ranks; without what no row
    could tell."""
    total = dict(zip(SUMS, sums.tolist(), strict=True))
    return {name: total[name] / total[rows] for name, rows in MEANS.items() if total[rows]}


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """(R, V), (R,) -> () sum over the rows; a few at a time are copied, to float32 or more."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    found = [
        nn.functional.cross_entropy(some_CV.to(dtype), labels_C, reduction="sum")
        for some_CV, labels_C in zip(
            logits.split(CHUNK_ROWS), labels.split(CHUNK_ROWS), strict=True
        )
    ]
    return torch.stack(found).sum()
