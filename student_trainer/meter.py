"""What the rows of the steps say about student and teacher: sums, read only when they are logged.

Letters: R trained rows, C rows of one chunk, V vocabulary, E kept entries of all rows.
"""

import torch
from torch import Tensor, nn

from logit_codec import DenseTargets, SampledTargets, Targets, TopKTargets

CHUNK_ROWS = 1024
"""Rows whose logits are looked at together."""
SUMS = (
    *("rows", "kd_loss", "ce_loss", "top1_agreement"),
    *("teacher_rows", "teacher_ce", "tail_rows", "tail_mass"),
)
MEANS = {
    "kd_loss": "rows",
    "ce_loss": "rows",
    "top1_agreement": "rows",
    "teacher_ce": "teacher_rows",
    "tail_mass": "tail_rows",
}
"""What is logged, and the rows that its sum is divided by."""


class Meter:
    """Sums over the rows of some steps; on the device, so that no step waits for them."""

    def __init__(self, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = {name: torch.zeros((), dtype=dtype, device=device) for name in SUMS}

    @torch.no_grad()
    def add(
        self,
        logits: Tensor,
        targets: Targets,
        labels: Tensor,
        *,
        kd_sum: Tensor,
        ce_sum: Tensor | None,
    ) -> None:
        """One batch: (R, V) logits, its targets and (R,) labels, all on the device.

        kd_sum and ce_sum: divergence and cross-entropy summed over the rows; the latter is computed
        here if the loss had no use for it.
        """
        sums, num_rows = self._sums, targets.num_rows
        sums["rows"] += num_rows
        sums["kd_loss"] += kd_sum
        if ce_sum is not None:
            sums["ce_loss"] += ce_sum
        best_R = most_likely(targets)
        for first in range(0, num_rows, CHUNK_ROWS):
            rows = slice(first, first + CHUNK_ROWS)
            logits_CV = logits[rows]
            sums["top1_agreement"] += (logits_CV.argmax(1) == best_R[rows]).sum()
            if ce_sum is None:
                sums["ce_loss"] += nn.functional.cross_entropy(
                    logits_CV.float(), labels[rows], reduction="sum"
                )
        if targets.realized_logprob is not None:
            sums["teacher_rows"] += num_rows
            sums["teacher_ce"] -= targets.realized_logprob.sum()
        if isinstance(targets, TopKTargets):
            sums["tail_rows"] += num_rows
            sums["tail_mass"] += targets.tail_logprob.exp().sum()

    def take(self) -> dict[str, float]:
        """Means over the rows since the last time, of what they could tell; begins anew."""
        values = torch.stack([self._sums[name] for name in SUMS]).tolist()
        for value in self._sums.values():
            value.zero_()
        sums = dict(zip(SUMS, values, strict=True))
        return {name: sums[name] / sums[rows] for name, rows in MEANS.items() if sums[rows]}


def most_likely(targets: Targets) -> Tensor:
    """(R,) int64: the teacher's likeliest id of each row, the lowest of equals, as far as the
    targets tell."""
    if isinstance(targets, DenseTargets):
        return targets.logprobs.argmax(1)
    assert isinstance(targets, SampledTargets | TopKTargets)
    rows_E = targets.entry_rows()
    values_E = targets.counts if isinstance(targets, SampledTargets) else targets.logprobs
    values_E = values_E.float()
    best_R = values_E.new_full((targets.num_rows,), -torch.inf)
    best_R = best_R.scatter_reduce(0, rows_E, values_E, "amax")
    is_best_E = values_E == best_R[rows_E]
    ids_R = torch.full_like(best_R, targets.vocab_size, dtype=torch.int64)
    return ids_R.scatter_reduce(0, rows_E[is_best_E], targets.token_ids[is_best_E], "amin")
