"""Groups runs that differ in nothing but their seed, and computes statistics over the seeds."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from student_trainer.config import MayChange, MayDiffer, find_deciding, marked
from student_trainer.report import pictures
from student_trainer.report.numbers import MODELS, compute_numbers
from student_trainer.report.own_texts import COLUMNS
from student_trainer.report.verdict import judge
from student_trainer.training.results import Results

NOT_A_SETTING = marked(MayChange, MayDiffer)
"""What two runs may set differently and still repeat each other; texts are compared by digest."""
DIGESTS = ("teacher", "data", "held_out")
"""Settings of which a label shows only the beginning."""
STATISTICS = (
    *("teacher_loss", "control_loss", "distilled_loss", "shuffled_loss", "gain", "gap_closed"),
    *("teacher_accuracy", "control_accuracy", "distilled_accuracy", "shuffled_accuracy"),
    *("control_top1_agreement", "distilled_top1_agreement", "shuffled_top1_agreement"),
    *("teacher_calibration_error", "control_calibration_error", "distilled_calibration_error"),
    *("shuffled_calibration_error", "waiting_fraction", "tokens_per_s", "bytes_per_token"),
    *("distilled_seconds", "control_seconds"),
    *COLUMNS,
)
"""Numbers of runs that are averaged over seeds."""
T_95 = {
    **{1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262},
    **{10: 2.228, 12: 2.179, 15: 2.131, 20: 2.086, 30: 2.042},
}
"""Quantiles of Student's t for a two-sided 95% interval, by degrees of freedom."""


def group_runs(runs: Mapping[str, Results]) -> list[dict[str, Any]]:
    """Returns a group for each setting: its label, verdict, statistics, pictures and runs."""
    grouped: dict[str, dict[str, Results]] = {}
    for name, results in runs.items():
        key = json.dumps(_get_settings(results), sort_keys=True)
        grouped.setdefault(key, {})[name] = results
    settings = [_get_settings(next(iter(members.values()))) for members in grouped.values()]
    differing = _keep_differing(settings)
    return [
        _make_group(members, differs)
        for members, differs in zip(grouped.values(), differing, strict=True)
    ]


def _get_settings(results: Results) -> dict[str, Any]:
    """Returns what decides the result of a run, apart from the seed."""
    return {
        **{
            name: value
            for name, value in find_deciding(results.settings).items()
            if name not in NOT_A_SETTING
        },
        "teacher": results.teacher.teacher_fingerprint,
        "student": f"{results.student_architecture}, {results.student_parameters:,} parameters"
        + (", from weights" if results.starts_from_weights else ""),
        "data": results.data_digest,
        "held_out": results.held_out_digest,
    }


def _keep_differing(settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns, for each group, only the settings that are not the same in all groups."""
    names = dict.fromkeys(name for of_group in settings for name in of_group)
    differing = [
        name for name in names if len({str(of_group.get(name)) for of_group in settings}) > 1
    ]
    return [{name: of_group.get(name) for name in differing} for of_group in settings]


def _make_group(members: Mapping[str, Results], differs: Mapping[str, Any]) -> dict[str, Any]:
    numbers = [compute_numbers(name, results) for name, results in members.items()]
    seeds = [run["seed"] for run in numbers]
    # The same seed again is the same experiment: it says nothing about the spread.
    first_of_seed = [run for i, run in enumerate(numbers) if seeds.index(run["seed"]) == i]
    stats = {name: _summarize([run[name] for run in first_of_seed]) for name in STATISTICS}
    verdict, sentences = judge(first_of_seed, stats)
    if len(first_of_seed) < len(numbers):
        sentences.append(
            f"The {len(numbers)} runs have only {len(first_of_seed)} different seeds: a seed that "
            "occurs more than once is counted once."
        )
    label = ", ".join(
        f"{name} {str(value)[:8] if name in DIGESTS else value}" for name, value in differs.items()
    )
    return {
        "label": label or "these settings",
        "differs": differs,
        "seeds": list(dict.fromkeys(seeds)),
        "verdict": verdict,
        "sentences": sentences,
        "statistics": stats,
        "tasks": _summarize_tasks([run["tasks"] for run in first_of_seed]),
        "pictures": pictures.make_pictures(list(members.values()), first_of_seed),
        "runs": numbers,
    }


def _summarize_tasks(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Returns the rows of tasks of all runs, with statistics instead of scores.

    Those of a single run have its standard error.
    """
    rows: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in (row for run in runs for row in run):
        rows.setdefault((row["task"], row["metric"]), []).append(row)
    summarized = []
    for found in rows.values():
        summary = dict(found[0])
        for model in MODELS:
            scores = [row[model] for row in found if row[model] is not None]
            of_model = _summarize([score["value"] for score in scores])
            if of_model is not None:
                of_model["stderr"] = scores[0]["stderr"] if len(scores) == 1 else None
            summary[model] = of_model
        summarized.append(summary)
    return summarized


def _summarize(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Returns mean, spread and 95% interval of the mean; None if no run has the number."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    mean = statistics.fmean(known)
    summary: dict[str, Any] = {
        "num": len(known),
        "mean": mean,
        "min": min(known),
        "max": max(known),
        **dict.fromkeys(("spread", "low", "high")),
    }
    if len(known) > 1:
        spread = statistics.stdev(known)
        freedom = max(degrees for degrees in T_95 if degrees <= len(known) - 1)
        half = T_95[freedom] * spread / math.sqrt(len(known))
        summary |= {"spread": spread, "low": mean - half, "high": mean + half}
    return summary
