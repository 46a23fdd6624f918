"""Builds the report of finished runs as one dict, and writes it: as JSON, as a page, as a table."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from student_trainer.disk import put
from student_trainer.report import page
from student_trainer.report.drawing import draw_png
from student_trainer.report.formats import ARROWS, format_score, format_value
from student_trainer.report.groups import group_runs
from student_trainer.report.numbers import MODELS, compute_curves
from student_trainer.report.verdict import rank_settings
from student_trainer.training.results import FILE_NAME, Results


def make_report(runs: Mapping[str, Results]) -> dict[str, Any]:
    """Returns everything that the page shows, from the results of runs by name (their folder).

    Runs that differ in nothing but their seed are one group. The numbers of a single run are at the
    top level too. Raises ValueError if there is no run.
    """
    if not runs:
        raise ValueError("a report needs at least one run")
    groups = group_runs(runs)
    single: dict[str, Any] = {}
    if len(runs) == 1:
        (results,) = runs.values()
        single = {**groups[0]["runs"][0], "curves": compute_curves(results)}
    return {
        **single,
        "num_runs": len(runs),
        "verdict": groups[0]["verdict"] if len(groups) == 1 else "several",
        "sentences": groups[0]["sentences"] if len(groups) == 1 else rank_settings(groups),
        "groups": groups,
    }


def write_report(path: Path, report: dict[str, Any]) -> tuple[Path, Path]:
    """Writes the page to `path` and the numbers beside it; returns both paths.

    Raises NotWritten, and ValueError for a path that is not one of a page, or whose numbers would
    replace the results of a run.
    """
    if path.suffix not in (".html", ".htm") or path.stem == Path(FILE_NAME).stem:
        raise ValueError(f"the page must be named like report.html, got {path}")
    beside = path.with_suffix(".json")
    # allow_nan: NaN is not JSON; compute_numbers has left None in its place.
    numbers, html = json.dumps(report, indent=2, allow_nan=False), page.render(report)
    put(beside, numbers + "\n")
    put(path, html)
    return path, beside


def draw_losses(path: Path, report: dict[str, Any]) -> None:
    """Draws the first picture of the page as a PNG, for where a page is too much."""
    put(path, draw_png(report["groups"][0]["pictures"][0]))


def format_table(report: dict[str, Any]) -> str:
    """Formats the numbers of each run as lines of text, aligned."""
    lines = []
    for group in report["groups"]:
        for numbers in group["runs"]:
            known = {name: value for name, value in numbers.items() if value is not None}
            tasks = known.pop("tasks")
            width = max(map(len, known))
            for name, value in known.items():
                text = format_value(value) if isinstance(value, float) else str(value)
                lines.append(f"{name:{width}}  {text}")
            lines += ["", *_format_tasks(tasks)]
    return "\n".join(lines).rstrip("\n")


def _format_tasks(tasks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Formats the scores on tasks as lines, aligned, with a column for each model that has any."""
    if not tasks:
        return []
    models = [model for model in MODELS if any(row[model] for row in tasks)]
    table = [["task", "metric", *models]]
    for row in tasks:
        metric = row["metric"] + ARROWS[row["higher_is_better"]]
        table.append([row["task"], metric, *(format_score(row[model]) for model in models)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table]
    return [*lines, ""]
