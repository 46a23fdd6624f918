"""Counts what a student wrote and trained on: sums, which ranks add up, and what is logged of them.

Letters: L tokens of a text, G of its runs of four tokens.
"""

import torch
from torch import Tensor

from student_trainer.on_policy.writing import WrittenTexts

GRAM = 4
"""Tokens of a run: one that was in the text before is a repetition."""
SUMS = (
    *("batches", "texts", "tokens", "stopped", "runs", "repeated", "entropy", "staleness"),
    *("written_tokens", "writing_s", "scored_tokens", "scoring_s"),
)


def count_repetitions(ids_L: Tensor) -> tuple[int, int]:
    """Returns how many runs of four tokens a text has, and how many of them were in it before."""
    if len(ids_L) < GRAM:
        return 0, 0
    runs_G4 = ids_L.unfold(0, GRAM, 1)
    return len(runs_G4), len(runs_G4) - len(runs_G4.unique(dim=0))


class OnPolicyMeter:
    """Sums since the last log; the largest staleness since the training began."""

    def __init__(self) -> None:
        self._sums = dict.fromkeys(SUMS, 0.0)
        self.max_staleness = 0
        """Optimizer steps between writing a text and training on it, at most so far."""

    def add_writing(self, texts: WrittenTexts) -> None:
        """Counts a batch that was just written."""
        self._sums["written_tokens"] += texts.num_written
        self._sums["writing_s"] += texts.seconds

    def add_training(self, texts: WrittenTexts, staleness: int) -> None:
        """Counts a batch that is about to be trained."""
        sums = self._sums
        sums["batches"] += 1
        sums["texts"] += len(texts.token_ids)
        sums["tokens"] += texts.num_written
        sums["stopped"] += texts.num_stopped
        sums["entropy"] += float(texts.entropies.double().sum())
        sums["staleness"] += staleness
        self.max_staleness = max(self.max_staleness, staleness)
        for ids, start in zip(texts.token_ids, texts.prompt_lengths, strict=True):
            runs, repeated = count_repetitions(ids[start:])
            sums["runs"] += runs
            sums["repeated"] += repeated

    def add_scoring(self, num_tokens: int, seconds: float) -> None:
        """Counts what the teacher was asked for."""
        self._sums["scored_tokens"] += num_tokens
        self._sums["scoring_s"] += seconds

    def take(self) -> Tensor:
        """Returns (len(SUMS),) float64 sums and begins anew."""
        found = torch.tensor(list(self._sums.values()), dtype=torch.float64)
        self._sums = dict.fromkeys(SUMS, 0.0)
        return found


def compute_logs(sums: Tensor, max_staleness: int, num_ranks: int = 1) -> dict[str, float]:
    """Returns what is logged of sums that may be added up over ranks; nothing if no batch was trained."""
    total = dict(zip(SUMS, sums.tolist(), strict=True))
    logs: dict[str, float] = {}
    if total["batches"]:
        logs = {
            "on_policy_batches": total["batches"],
            "on_policy_tokens": total["tokens"],
            "on_policy_length": total["tokens"] / max(total["texts"], 1),
            "on_policy_stopped": total["stopped"] / max(total["texts"], 1),
            "on_policy_repetition": total["repeated"] / max(total["runs"], 1),
            "on_policy_entropy": total["entropy"] / max(total["tokens"], 1),
            "on_policy_staleness": total["staleness"] / total["batches"],
            "on_policy_max_staleness": float(max_staleness),
        }
    # Ranks write and ask at the same time, so that their seconds are not added up.
    for tokens, seconds, name in (
        ("written_tokens", "writing_s", "writing_tokens_per_s"),
        ("scored_tokens", "scoring_s", "scoring_tokens_per_s"),
    ):
        if total[tokens] and total[seconds]:
            logs[name] = total[tokens] / (total[seconds] / num_ranks)
    return logs
