"""Says what the pictures of a report show, as plain data: lines, levels, bars and captions.

A line is the mean of the runs that differ in nothing but their seed; its `seeds` has each of them.
drawing.py draws the pictures.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from student_trainer.training.results import Results, StudentResults

LABELS = {
    "distilled": "distilled",
    "control": "control: labels alone",
    "shuffled": "control: shuffled targets",
}
POINTS = 200
"""A line with more is averaged over neighbours: the eye cannot tell them apart."""

Point = tuple[float, float]


def make_pictures(runs: Sequence[Results], numbers: Sequence[dict[str, Any]]) -> list[dict]:
    """Returns the pictures of one setting; numbers: from `compute_numbers`, one run per seed."""
    seeds = [run["seed"] for run in numbers]
    runs = [next(run for run in runs if run.settings["seed"] == seed) for seed in seeds]
    shown = [
        _show_losses(runs, numbers, "step", "optimizer steps"),
        _show_losses(runs, numbers, "seconds", "seconds of training"),
        _show_gap(runs, numbers),
        _show_agreement(runs, numbers),
        _show_calibration(runs, numbers),
        _show_waiting(runs),
        _show_bytes(numbers),
    ]
    return [picture for picture in shown if picture is not None]


def _show_losses(
    runs: Sequence[Results], numbers: Sequence[dict[str, Any]], x: str, x_label: str
) -> dict[str, Any]:
    lines = _make_lines(runs, lambda student: _get_points(student, x, "held_out_loss"))
    levels = [
        {"student": "teacher", "label": "teacher", "value": value}
        for value in [_average([run["teacher_loss"] for run in numbers])]
        if value is not None
    ]
    final = ", ".join(f"{line['label']} {line['points'][-1][1]:.3f}" for line in lines)
    teacher = f"; the teacher is at {levels[0]['value']:.3f}" if levels else ""
    of_tokens = {}
    if x == "step":
        rows = runs[0].settings["batch_size"] * (runs[0].settings["sequence_length"] - 1)
        of_tokens = {"above": {"label": "tokens trained on", "per_x": rows}}
        title = "Held-out loss against steps and tokens"
        caption = (
            "Lower is better; the level dashed line is the teacher itself. What to look for: does the "
            "distilled student end clearly below the control, and was it below all the way, or do "
            "the lines cross? The axis above counts the tokens that were trained on."
        )
    else:
        title = "Held-out loss against time"
        caption = (
            "The same points against the seconds that the steps took, including the time spent "
            "waiting for the teacher. What to look for: a distilled student that takes longer per "
            "step has to gain more per step; this shows whether it does."
        )
    return {
        "name": f"loss_by_{x}",
        "kind": "lines",
        "title": title,
        "caption": caption,
        "alt": f"Held-out loss in nats per token, at the end: {final}{teacher}.",
        "x": x_label,
        "y": "held-out loss, nats per token",
        "unit": "nats",
        "lines": lines,
        "levels": levels,
        **of_tokens,
    }


def _show_gap(runs: Sequence[Results], numbers: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Shows how much of the way from the control to the teacher was gained at each measurement."""
    by_seed = []
    for run, of_run in zip(runs, numbers, strict=True):
        control, teacher = run.students.get("control"), of_run["teacher_loss"]
        if control is None or teacher is None or of_run["gap_closed"] is None:
            continue
        at_step = dict(_get_points(control, "step", "held_out_loss"))
        points = [
            (step, (at_step[step] - loss) / (at_step[step] - teacher))
            for step, loss in _get_points(run.students["distilled"], "step", "held_out_loss")
            if at_step.get(step, -math.inf) > teacher
        ]
        if points:
            by_seed.append((of_run["seed"], points))
    if not by_seed:
        return None
    line = _make_line("distilled", by_seed)
    return {
        "name": "gap_closed",
        "kind": "lines",
        "title": "Share of the gap that was closed",
        "caption": (
            "(control - distilled) / (control - teacher) at the same step: 0% is no better than "
            "labels alone, 100% is as good as the teacher. What to look for: a line that stays "
            "high to the end. A falling line means that labels catch up, and that distillation "
            "mostly saved time."
        ),
        "alt": f"Share of the gap closed, at the end {line['points'][-1][1]:.0%}.",
        "x": "optimizer steps",
        "y": "gap closed",
        "unit": "%",
        "lines": [line],
        "levels": [{"student": "teacher", "label": "as good as the teacher", "value": 1.0}],
    }


def _show_agreement(
    runs: Sequence[Results], numbers: Sequence[dict[str, Any]]
) -> dict[str, Any] | None:
    lines = _make_lines(
        runs, lambda student: _get_points(student, "step", "held_out_top1_agreement")
    )
    if not lines:
        return None
    final = ", ".join(f"{line['label']} {line['points'][-1][1]:.1%}" for line in lines)
    return {
        "name": "top1_agreement",
        "kind": "lines",
        "title": "How often student and teacher would pick the same token",
        "caption": (
            "Share of held-out positions at which the student's most likely next token is the "
            "teacher's. What to look for: a distilled student should agree more often than a "
            "control that never saw the teacher; two good models agree often in any case."
        ),
        "alt": f"Top-1 agreement with the teacher on held-out text, at the end: {final}.",
        "x": "optimizer steps",
        "y": "top-1 agreement",
        "unit": "%",
        "lines": lines,
        "levels": [],
    }


def _show_calibration(
    runs: Sequence[Results], numbers: Sequence[dict[str, Any]]
) -> dict[str, Any] | None:
    """Shows the reliability of the first seed: the bins of several cannot be averaged."""
    run, of_run = runs[0], numbers[0]
    bins = {
        "teacher": run.teacher.scores.bins,
        **{name: run.students[name].scores.bins for name in LABELS if name in run.students},
    }
    lines = []
    for name, scored_bins in bins.items():
        error = of_run[f"{name}_calibration_error"]
        finite = [bin for bin in scored_bins if math.isfinite(bin.confidence + bin.accuracy)]
        if not finite or error is None:
            continue
        points = [(bin.confidence, bin.accuracy) for bin in finite]
        line = _make_line(name, [(of_run["seed"], points)])
        line["label"] += f" (error {error:.1%})"
        line["counts"] = [bin.count for bin in finite]
        lines.append(line)
    if not lines:
        return None
    of_seed = f" Seed {of_run['seed']} is shown." if len(runs) > 1 else ""
    return {
        "name": "calibration",
        "kind": "reliability",
        "title": "Can the probabilities be trusted?",
        "caption": (
            "Positions are put into ten bins by how sure the model was of its most likely token; "
            "each point shows how often it was right there. On the diagonal the model is as sure as "
            "it should be, below it is too sure. The error in the legend is the mean distance from "
            "the diagonal (expected calibration error); large points stand for many positions. A "
            "model that is never sure can be on the diagonal and know nothing: read this together "
            "with the loss." + of_seed
        ),
        "alt": "Accuracy against confidence; "
        + ", ".join(line["label"] for line in lines)
        + "; the diagonal is perfect calibration.",
        "x": "probability of the most likely token",
        "y": "how often it was right",
        "unit": "%",
        "lines": lines,
        "levels": [],
    }


def _show_waiting(runs: Sequence[Results]) -> dict[str, Any]:
    lines = _make_lines(
        runs,
        lambda student: [
            (entry["step"], entry["waiting_fraction"])
            for entry in student.history
            if math.isfinite(entry["waiting_fraction"])
        ],
        of=("distilled", "control"),
    )
    final = ", ".join(
        f"{line['label']} {sum(y for _, y in line['points']) / len(line['points']):.1%}"
        for line in lines
    )
    return {
        "name": "waiting_fraction",
        "kind": "lines",
        "title": "Time spent waiting for the next batch",
        "caption": (
            "Share of the time between two logged steps in which the student had nothing to do "
            "because targets (or, for the control, text) had not arrived. What to look for: near "
            "zero is as fast as training without a teacher; a few percent at the start are normal; "
            "steadily more means that the teacher is the slower of the two."
        ),
        "alt": f"Waiting fraction over the steps, on average: {final}.",
        "x": "optimizer steps",
        "y": "share of time waiting",
        "unit": "%",
        "lines": lines,
        "levels": [],
        "from_zero": True,
    }


def _show_bytes(numbers: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    sent = _average([run["bytes_per_token"] for run in numbers])
    if sent is None:
        return None
    whole = numbers[0]["whole_bytes_per_token"]
    return {
        "name": "bytes",
        "kind": "bars",
        "title": "Bytes per token",
        "caption": (
            f"What was received from the teacher for each token, as {numbers[0]['targets']}, beside "
            "what the whole distribution over the vocabulary would take as 16-bit numbers. What to "
            "look for: how much network or disk the same training would otherwise need."
        ),
        "alt": f"{sent:.1f} bytes per token were received; the whole distribution has {whole:,}.",
        "unit": "bytes",
        "bars": [
            {"student": "distilled", "label": f"{numbers[0]['targets']}, received", "value": sent},
            {"student": "teacher", "label": "whole distribution, 16 bit", "value": whole},
        ],
    }


# Lines.


def _make_lines(
    runs: Sequence[Results],
    points: Callable[[StudentResults], list[Point]],
    of: Sequence[str] = tuple(LABELS),
) -> list[dict[str, Any]]:
    """Returns one line per kind of student that any run has points of."""
    lines = []
    for name in of:
        by_seed = [
            (run.settings["seed"], points(run.students[name]))
            for run in runs
            if name in run.students
        ]
        by_seed = [(seed, _thin(of_seed)) for seed, of_seed in by_seed if of_seed]
        if by_seed:
            lines.append(_make_line(name, by_seed))
    return lines


def _make_line(student: str, by_seed: Sequence[tuple[int, list[Point]]]) -> dict[str, Any]:
    """Returns the mean over the seeds, with as many points as all of them have."""
    length = min(len(points) for _, points in by_seed)
    columns = [[points[i] for _, points in by_seed] for i in range(length)]
    return {
        "student": student,
        "label": LABELS.get(student, student),
        "points": [
            (sum(x for x, _ in column) / len(column), sum(y for _, y in column) / len(column))
            for column in columns
        ],
        "seeds": [{"seed": seed, "points": points} for seed, points in by_seed]
        if len(by_seed) > 1
        else [],
    }


def _get_points(student: StudentResults, x: str, y: str) -> list[Point]:
    return [
        (entry[x], entry[y])
        for entry in student.measurements
        if y in entry and math.isfinite(entry[y])
    ]


def _thin(points: list[Point]) -> list[Point]:
    width = math.ceil(len(points) / POINTS)
    parts = [points[i : i + width] for i in range(0, len(points), width)]
    return [
        (part[-1][0], sum(y for _, y in part) / len(part)) if width > 1 else part[0]
        for part in parts
    ]


def _average(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
