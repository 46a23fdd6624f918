"""Did distillation help: the numbers of one run or several, and what they say in plain words.

One dict holds everything that is shown; it is written as JSON, and `page.py` writes it as a page.
"""

import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from student_trainer.config import MayChange, MayDiffer, marked
from student_trainer.disk import put
from student_trainer.report import page, pictures
from student_trainer.report.verdict import ERRORS, _compared, _verdict
from student_trainer.training.results import FILE_NAME, Results, Scores, StudentResults

NOT_A_SETTING = marked(MayChange, MayDiffer)
"""What two runs may set differently and still repeat each other; texts are compared by digest."""
DIGESTS = ("teacher", "data", "held_out")
"""Settings of which a label shows the beginning."""
STATISTICS = (
    *("teacher_loss", "control_loss", "distilled_loss", "shuffled_loss", "gain", "gap_closed"),
    *("teacher_accuracy", "control_accuracy", "distilled_accuracy", "shuffled_accuracy"),
    *("control_top1_agreement", "distilled_top1_agreement", "shuffled_top1_agreement"),
    *("teacher_calibration_error", "control_calibration_error", "distilled_calibration_error"),
    *("shuffled_calibration_error", "waiting_fraction", "tokens_per_s", "bytes_per_token"),
    *("distilled_seconds", "control_seconds"),
)
"""Numbers of runs that are averaged over seeds."""
T_95 = {
    **{1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262},
    **{10: 2.228, 12: 2.179, 15: 2.131, 20: 2.086, 30: 2.042},
}
"""Quantiles of Student's t for a two-sided 95 % interval, by degrees of freedom."""


def make_report(runs: Mapping[str, Results]) -> dict[str, Any]:
    """Everything that the page shows, from the results of runs by name (their folder).

    Runs that differ in nothing but their seed are one group. With a single run its numbers are at
    the top too. Raises ValueError if there is none.
    """
    if not runs:
        raise ValueError("a report needs at least one run")
    numbers = {name: numbers_of(name, results) for name, results in runs.items()}
    grouped: dict[str, dict[str, Results]] = {}
    for name, results in runs.items():
        grouped.setdefault(_setting_of(results), {})[name] = results
    differing = _differing(list(grouped.values()))
    groups = [
        _group(members, [numbers[name] for name in members], different)
        for members, different in zip(grouped.values(), differing, strict=True)
    ]
    single = next(iter(numbers.values())) if len(runs) == 1 else {}
    return {
        **single,
        **({"curves": _curves(next(iter(runs.values())))} if single else {}),
        "num_runs": len(runs),
        "verdict": groups[0]["verdict"] if len(groups) == 1 else "several",
        "sentences": groups[0]["sentences"] if len(groups) == 1 else _compared(groups),
        "groups": groups,
    }


def write_report(path: Path, report: dict[str, Any]) -> tuple[Path, Path]:
    """Writes the page to `path` and the numbers beside it; returns both paths.

    Raises ValueError for a path that is no page's, or whose numbers would replace a run's results, and
    NotWritten.
    """
    if path.suffix not in (".html", ".htm") or path.stem == Path(FILE_NAME).stem:
        raise ValueError(f"the page must be named like report.html, got {path}")
    beside = path.with_suffix(".json")
    # Numbers that are none are null in it: every reader of JSON takes the file.
    numbers, shown = json.dumps(report, indent=2, allow_nan=False), page.render(report)
    put(beside, numbers + "\n")
    put(path, shown)
    return path, beside


def draw_losses(path: Path, report: dict[str, Any]) -> None:
    """The first picture of the page as a PNG, for where a page is too much."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = report["groups"][0]["pictures"][0]
    colours = {"distilled": "tab:blue", "control": "tab:gray", "shuffled": "tab:red"}
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for line in drawn["lines"]:
        xs, ys = zip(*line["points"], strict=True)
        axes.plot(xs, ys, marker="o", color=colours[line["student"]], label=line["label"])
    for level in drawn["levels"]:
        axes.axhline(level["value"], color="tab:orange", linestyle="--", label=level["label"])
    axes.set_xlabel(drawn["x"])
    axes.set_ylabel(drawn["y"])
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    pyplot.close(figure)
    put(path, picture.getvalue())


def table(report: dict[str, Any]) -> str:
    """The numbers of each run as lines of text, aligned."""
    lines = []
    for group in report["groups"]:
        for numbers in group["runs"]:
            shown = {name: value for name, value in numbers.items() if value is not None}
            width = max(map(len, shown))
            lines += [f"{name:{width}}  {_shown(value)}" for name, value in shown.items()] + [""]
    return "\n".join(lines[:-1])


# The numbers of one run.


def numbers_of(name: str, results: Results) -> dict[str, Any]:
    """The flat numbers of one run; None where something was not measured or is no number."""
    settings, teacher, distilled = results.settings, results.teacher, results.students["distilled"]
    control, shuffled = results.students.get("control"), results.students.get("shuffled")
    scores = {
        "teacher": teacher.scores,
        "control": control.scores if control else None,
        "distilled": distilled.scores,
        "shuffled": shuffled.scores if shuffled else None,
    }
    losses = {who: _finite(of_one.loss) if of_one else None for who, of_one in scores.items()}
    gain, gain_error = _difference(scores["control"], scores["distilled"])
    gap, gap_error = _difference(scores["control"], scores["teacher"])
    shuffled_excess, shuffled_error = _difference(scores["shuffled"], scores["distilled"])
    has_gap = gain is not None and gap is not None and gap > ERRORS * (gap_error or 0.0)
    rows = results.held_out_sequences * (settings["sequence_length"] - 1)
    bytes_per_token = _finite(results.bytes_per_token)
    return {
        "run": name,
        "teacher_loss": losses["teacher"],
        "control_loss": losses["control"],
        "distilled_loss": losses["distilled"],
        "shuffled_loss": losses["shuffled"],
        "gain": gain,
        "gain_error": gain_error,
        "gap_closed": gain / gap if has_gap and gain is not None and gap is not None else None,
        "shuffled_excess": shuffled_excess,
        "shuffled_excess_error": shuffled_error,
        "steps": settings["steps"],
        "seed": settings["seed"],
        "targets": settings["targets"],
        "temperature": settings["temperature"],
        "kd_weight": settings["kd_weight"],
        "ce_weight": settings["ce_weight"],
        "learning_rate": settings["learning_rate"],
        "optimizer": settings["optimizer"],
        "batch_size": settings["batch_size"],
        "sequence_length": settings["sequence_length"],
        "trained_tokens": distilled.tokens,
        "held_out_tokens": results.held_out_sequences * settings["sequence_length"],
        "held_out_rows": rows,
        **_by_student(scores, "accuracy"),
        **{
            f"{who}_top1_agreement": _finite(of_one.top1_agreement) if of_one else None
            for who, of_one in scores.items()
            if who != "teacher"
        },
        "agreement_rows": distilled.scores.agreement_rows,
        **_by_student(scores, "calibration_error"),
        "waiting_fraction": _ratio(distilled.waiting_s, distilled.seconds),
        "tokens_per_s": _ratio(distilled.tokens, distilled.seconds),
        "bytes_per_token": bytes_per_token,
        "whole_bytes_per_token": 2 * teacher.vocab_size,
        "received_bytes": None
        if bytes_per_token is None
        else round(bytes_per_token * distilled.tokens),
        "distilled_seconds": distilled.seconds,
        "control_seconds": control.seconds if control else None,
        "shuffled_seconds": shuffled.seconds if shuffled else None,
        "student_parameters": results.student_parameters,
        "student_architecture": results.student_architecture,
        "starts_from_weights": results.starts_from_weights,
        "teacher": teacher.model,
        "teacher_revision": teacher.revision or None,
        "teacher_license": teacher.license,
        "teacher_fingerprint": teacher.teacher_fingerprint,
        "teacher_unknown": teacher.unknown or None,
        "data_digest": results.data_digest,
        "held_out_digest": results.held_out_digest,
        "versions": ", ".join(f"{name} {number}" for name, number in results.versions.items()),
        "finished": results.finished,
    }


def _by_student(scores: Mapping[str, Scores | None], name: str) -> dict[str, float | None]:
    return {
        f"{who}_{name}": _finite(getattr(of_one, name)) if of_one else None
        for who, of_one in scores.items()
    }


def _difference(more: Scores | None, less: Scores | None) -> tuple[float | None, float | None]:
    """How much lower the second loss is, and the standard error of that over the sequences.

    Both are measured on the same text, so that what is hard about it cancels.
    """
    if more is None or less is None or _finite(more.loss) is None or _finite(less.loss) is None:
        return None, None
    assert more.loss is not None
    assert less.loss is not None
    pairs = zip(more.sequence_losses, less.sequence_losses, strict=True)
    differences = [one - other for one, other in pairs]
    if len(differences) < 2 or not all(map(math.isfinite, differences)):
        return more.loss - less.loss, None
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return more.loss - less.loss, error


def _curves(results: Results) -> dict[str, list[tuple[int, float | None]] | None]:
    """The held-out loss of each student against steps."""

    def curve(student: StudentResults | None) -> list[tuple[int, float | None]] | None:
        if student is None:
            return None
        return [(int(one["step"]), _finite(one["held_out_loss"])) for one in student.measurements]

    return {
        name: curve(results.students.get(name)) for name in ("distilled", "control", "shuffled")
    }


# Several runs.


def _setting_of(results: Results) -> str:
    return json.dumps(_settings(results), sort_keys=True)


def _settings(results: Results) -> dict[str, Any]:
    """What decides the result, beside the seed."""
    return {
        **{name: one for name, one in results.settings.items() if name not in NOT_A_SETTING},
        "teacher": results.teacher.teacher_fingerprint,
        "student": f"{results.student_architecture}, {results.student_parameters:,} parameters"
        + (", from weights" if results.starts_from_weights else ""),
        "data": results.data_digest,
        "held_out": results.held_out_digest,
    }


def _differing(groups: list[dict[str, Results]]) -> list[dict[str, Any]]:
    """Of each group, the settings that are not the same in all groups."""
    settings = [_settings(next(iter(members.values()))) for members in groups]
    names = list(dict.fromkeys(name for one in settings for name in one))
    differing = [name for name in names if len({str(one.get(name)) for one in settings}) > 1]
    return [{name: one.get(name) for name in differing} for one in settings]


def _group(
    members: Mapping[str, Results], numbers: list[dict[str, Any]], different: dict[str, Any]
) -> dict[str, Any]:
    seeds = [one["seed"] for one in numbers]
    # The same seed again is the same experiment: it says nothing about the spread.
    first_of_seed = [one for i, one in enumerate(numbers) if seeds.index(one["seed"]) == i]
    stats = {name: _statistics([one[name] for one in first_of_seed]) for name in STATISTICS}
    verdict, sentences = _verdict(first_of_seed, stats)
    if len(first_of_seed) < len(numbers):
        sentences.append(
            f"{len(numbers)} runs have only {len(first_of_seed)} different seeds: a seed that comes "
            "again is counted once."
        )
    label = ", ".join(
        f"{name} {str(value)[:8] if name in DIGESTS else value}"
        for name, value in different.items()
    )
    return {
        "label": label or "these settings",
        "differs": different,
        "seeds": list(dict.fromkeys(seeds)),
        "verdict": verdict,
        "sentences": sentences,
        "statistics": stats,
        "pictures": pictures.make_pictures(list(members.values()), first_of_seed),
        "runs": numbers,
    }


def _statistics(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Mean, spread and 95 % interval of the mean; None if no run has the number."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    mean = statistics.fmean(known)
    found: dict[str, Any] = {"num": len(known), "mean": mean, "min": min(known), "max": max(known)}
    if len(known) == 1:
        return {**found, "spread": None, "low": None, "high": None}
    spread = statistics.stdev(known)
    freedom = max(one for one in T_95 if one <= len(known) - 1)
    half = T_95[freedom] * spread / math.sqrt(len(known))
    return {**found, "spread": spread, "low": mean - half, "high": mean + half}


# What the numbers say.


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
