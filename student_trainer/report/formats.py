"""Formats the numbers of a report for people."""

import math
from collections.abc import Mapping
from typing import Any

ARROWS = {True: " ↑", False: " ↓", None: ""}
"""By whether a higher score is better, as lm-eval shows it."""


def keep_finite(value: float | None) -> float | None:
    """Returns None for what JSON cannot hold: NaN and infinities."""
    return value if value is not None and math.isfinite(value) else None


def format_score(score: Mapping[str, Any] | None) -> str:
    """Formats the score of one model on a task, with its standard error."""
    if score is None or score["value"] is None:
        return "-"
    error = "" if score["stderr"] is None else f" ± {format_value(score['stderr'])}"
    return format_value(score["value"]) + error


def format_value(value: Any, unit: str = "") -> str:
    """Formats a number of the report; unit: %, nats or none."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if unit == "%":
        return f"{100 * value:.1f}%"
    if unit == "nats":
        return f"{value:.3f}"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
