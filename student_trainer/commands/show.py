"""Prints numbers as a table or as JSON."""

import json
from collections.abc import Mapping
from typing import Any


def show(numbers: Mapping[str, Any], *, as_json: bool) -> None:
    """Prints what a command found: readable for people, or complete for scripts."""
    if as_json:
        print(json.dumps(numbers, indent=2))
        return
    for name, value in numbers.items():
        if name.endswith("_gib"):
            print(f"{name.removesuffix('_gib'):20} {format_size(value)}")
        elif value is not None and name != "bytes":  # not measured; the same as disk
            print(f"{name:20} {format_value(value)}")


def format_size(gib: float) -> str:
    """Formats GiB in a unit that leaves a few digits."""
    for unit, size in (("TiB", 2.0**10), ("GiB", 1.0)):
        if gib >= size:
            return f"{gib / size:,.1f} {unit}"
    return f"{gib * 2**10:,.1f} MiB"


def format_value(value: Any) -> str:
    """Formats a value for people, with separated thousands."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.1f}" if value >= 1 or not value else f"{value:.2g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {number:,.2f}" for key, number in value.items())
    return str(value)
