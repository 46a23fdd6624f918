"""Formats the numbers of a report for people."""

from typing import Any


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
