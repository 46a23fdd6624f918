"""Says of a run what its student wrote itself and trained on: the averages over all logged steps."""

from collections.abc import Mapping
from typing import Any

from student_trainer.report.formats import format_value, keep_finite
from student_trainer.training.results import Results

COLUMNS = {
    "on_policy_length": ("Tokens per text", ""),
    "on_policy_repetition": ("Repeated", "%"),
    "on_policy_entropy": ("Entropy", "nats"),
    "on_policy_staleness": ("Staleness, steps", ""),
    "on_policy_max_staleness": ("At most", ""),
    "writing_tokens_per_s": ("Student writes, tokens/s", ""),
    "scoring_tokens_per_s": ("Teacher scores, tokens/s", ""),
}
"""Numbers of a run, with the title and unit of each: None in a run without such texts."""
WEIGHTS = {"on_policy_staleness": "on_policy_batches", "on_policy_entropy": "on_policy_tokens"}
"""What an average is over, where it is not the number of texts."""
RATES = ("writing_tokens_per_s", "scoring_tokens_per_s")


def measure_own_texts(results: Results) -> dict[str, float | None]:
    """Returns COLUMNS of the distilled student, from what was logged."""
    entries = [
        entry
        for entry in results.students["distilled"].history
        if entry.get("on_policy_tokens") and entry.get("on_policy_length")
    ]
    found: dict[str, float | None] = dict.fromkeys(COLUMNS)
    if not entries:
        return found
    texts = [entry["on_policy_tokens"] / entry["on_policy_length"] for entry in entries]
    for name in found:
        if name in RATES:
            found[name] = _average_rate(entries, name)
        elif name == "on_policy_max_staleness":
            found[name] = max(entry.get(name, 0.0) for entry in entries)
        else:
            weight = WEIGHTS.get(name)
            weights = [entry.get(weight, 0.0) for entry in entries] if weight else texts
            total = sum(w * entry.get(name, 0.0) for w, entry in zip(weights, entries, strict=True))
            found[name] = total / sum(weights) if sum(weights) else None
    return {name: keep_finite(value) for name, value in found.items()}


def describe_own_texts(share: float | None, numbers: Mapping[str, Any]) -> str:
    """Returns the same as a sentence for a model card; "" if there were none."""
    if not share or numbers["on_policy_length"] is None:
        return ""
    shown = {name: format_value(numbers[name], unit) for name, (_, unit) in COLUMNS.items()}
    return (
        f"{share:.0%} of the batches, {shown['on_policy_length']} tokens per text, "
        f"{shown['on_policy_repetition']} of their runs of 4 tokens repeated, entropy "
        f"{shown['on_policy_entropy']} nats; trained {shown['on_policy_staleness']} optimizer steps "
        f"after they were written (at most {shown['on_policy_max_staleness']})"
    )


def _average_rate(entries: list[dict[str, float]], name: str) -> float | None:
    """Returns tokens in a second over all entries: those of each, by the time that they took."""
    known = [entry for entry in entries if entry.get(name)]
    tokens = sum(entry["on_policy_tokens"] for entry in known)
    seconds = sum(entry["on_policy_tokens"] / entry[name] for entry in known)
    return tokens / seconds if seconds else None
