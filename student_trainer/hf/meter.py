"""What the rows of the steps say about student and teacher: sums, read only when they are logged.

Letters: R trained rows, C rows of one chunk, V vocabulary, E kept entries of all rows.
"""

import time

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
    "feature_loss": "feature_rows",
}
"""What is logged, and the rows that its sum is divided by."""
SUMS = (*MEANS, *dict.fromkeys(MEANS.values()))
TRAINER_SUMS = ("tokens_without_target", "waiting_s", "busy_s", "target_rows")
"""What a Trainer adds up over ranks beside SUMS."""


class Meter:
    """Sums over the rows of some steps; on the device, so that no step waits for them."""

    def __init__(self, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = {name: torch.zeros((), dtype=dtype, device=device) for name in SUMS}

    @torch.no_grad()
    def add(
        self,
        targets: Targets,
        *,
        kd_sum: Tensor | None,
        ce_sum: Tensor,
        best_R: Tensor,
        teacher_best_R: Tensor | None = None,
    ) -> None:
        """One batch, all on the device.

        kd_sum and ce_sum: divergence, if it is in the loss, and cross-entropy summed over the rows;
        best_R and teacher_best_R: (R,) the likeliest ids of the student and, if known, the teacher.
        """
        sums, num_rows = self._sums, targets.num_rows
        sums["rows"] += num_rows
        if kd_sum is not None:
            sums["kd_rows"] += num_rows
            sums["kd_loss"] += kd_sum
        sums["ce_loss"] += ce_sum
        if teacher_best_R is None:
            teacher_best_R = targets.most_likely()
        sums["top1_agreement"] += (best_R == teacher_best_R).sum()
        if targets.realized_logprob is not None:
            sums["teacher_rows"] += num_rows
            sums["teacher_ce"] -= targets.realized_logprob.sum()
        if isinstance(targets, TopKTargets):
            sums["tail_rows"] += num_rows
            sums["tail_mass"] += targets.tail_logprob.exp().sum()

    @torch.no_grad()
    def add_features(self, loss_sum: Tensor, num_rows: int) -> None:
        """One batch's loss on features, summed over the rows."""
        self._sums["feature_rows"] += num_rows
        self._sums["feature_loss"] += loss_sum

    def take(self) -> Tensor:
        """(len(SUMS),) sums over the rows since the last time; begins anew."""
        found = torch.stack([self._sums[name] for name in SUMS])
        for value in self._sums.values():
            value.zero_()
        return found


class TrainerMeter:
    """Sums over the steps of a transformers.Trainer: of their rows, and of their time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.reset()

    def reset(self) -> None:
        """Starts at zero, for another training."""
        self._rows = Meter(self._device)
        self.rows_fetched = 0
        """Rows of targets that came from the teacher."""
        self.rows_in_loss = 0
        """Of these, the rows that reached the loss."""
        self.num_without = 0
        self._waiting_s = 0.0
        self._busy_s = 0.0
        self.total_waiting_s = 0.0
        """Seconds that this process has waited for targets since the training began."""
        self._began_s = time.perf_counter()

    def begin_step(self, began_s: float, waited_s: float) -> None:
        """Notes when a step began, and how long it waited for targets."""
        self._began_s = began_s
        self._waiting_s += waited_s
        self.total_waiting_s += waited_s

    def end_step(self) -> None:
        """Notes that the step has ended."""
        self._busy_s += time.perf_counter() - self._began_s

    def add(
        self,
        targets: Targets,
        kd: Tensor | None,
        ce: Tensor,
        best_R: Tensor,
        teacher_best_R: Tensor | None = None,
    ) -> None:
        """Adds one batch: sums over its rows, and the likeliest ids of student and teacher."""
        self.rows_in_loss += targets.num_rows
        self._rows.add(targets, kd_sum=kd, ce_sum=ce, best_R=best_R, teacher_best_R=teacher_best_R)

    def add_features(self, loss_sum: Tensor, num_rows: int) -> None:
        """Adds one batch's loss on features, summed over its rows."""
        self._rows.add_features(loss_sum, num_rows)

    def take_sums(self) -> Tensor:
        """Returns (len(SUMS) + len(TRAINER_SUMS),) and starts at zero, except for target_rows."""
        rows = self._rows.take()
        own = (self.num_without, self._waiting_s, self._busy_s, self.rows_in_loss)
        self.num_without, self._waiting_s, self._busy_s = 0, 0.0, 0.0
        return torch.cat([rows, rows.new_tensor(own)])

    @staticmethod
    def compute_logs(sums: Tensor) -> dict[str, float]:
        """Returns what is logged, from the sums of all ranks."""
        own = dict(zip(TRAINER_SUMS, sums[len(SUMS) :].tolist(), strict=True))
        return {
            **means(sums[: len(SUMS)]),
            "waiting_fraction": own["waiting_s"] / max(own["busy_s"], 1e-9),
            "tokens_without_target": own["tokens_without_target"],
            "target_rows": own["target_rows"],
        }


def means(sums: Tensor) -> dict[str, float]:
    """What is logged, from what `take` returned, perhaps added up over ranks; without what no row
    could tell."""
    total = dict(zip(SUMS, sums.tolist(), strict=True))
    return {name: total[name] / total[rows] for name, rows in MEANS.items() if total[rows]}


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """(R, V), (R,) -> (R,); a few rows at a time are copied, to float32 or more."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    found = [
        nn.functional.cross_entropy(some_CV.to(dtype), labels_C, reduction="none")
        for some_CV, labels_C in zip(
            logits.split(CHUNK_ROWS), labels.split(CHUNK_ROWS), strict=True
        )
    ]
    return torch.cat(found)
