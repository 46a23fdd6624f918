"""What the pictures of a report show, as plain data: lines, levels, bars, and words beside them.

Of several runs that differ in their seed, a line is their mean, and `seeds` has each.
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
"""A line of more is averaged over neighbours: nobody can see them."""

Point = tuple[float, float]


def make_pictures(runs: Sequence[Results], numbers: Sequence[dict[str, Any]]) -> list[dict]:
    """The pictures of one setting; numbers: of `report.numbers_of`, one run per seed."""
    seeds = [one["seed"] for one in numbers]
    runs = [next(run for run in runs if run.settings["seed"] == seed) for seed in seeds]
    found = [
        _losses(runs, numbers, "step", "optimizer steps"),
        _losses(runs, numbers, "seconds", "seconds of training"),
        _gap(runs, numbers),
        _agreement(runs, numbers),
        _calibration(runs, numbers),
        _waiting(runs),
        _bytes(numbers),
    ]
    return [picture for picture in found if picture is not None]


def _losses(
    runs: Sequence[Results], numbers: Sequence[dict[str, Any]], x: str, x_label: str
) -> dict[str, Any]:
    lines = _lines(runs, lambda student: _measured(student, x, "held_out_loss"))
    levels = [
        {"student": "teacher", "label": "teacher", "value": value}
        for value in [_mean([one["teacher_loss"] for one in numbers])]
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
            "Lower is better; the dashed line is the teacher itself. What to look for: does the "
            "distilled student end clearly below the control, and was it below it all the way, or "
            "do the lines cross? The axis above counts the tokens that were trained on."
        )
    else:
        title = "Held-out loss against time"
        caption = (
            "The same points, against the seconds that the steps took, waiting for the teacher "
            "included. What to look for: a distilled student that needs longer per step has to "
            "gain more per step; here is whether it does."
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


def _gap(runs: Sequence[Results], numbers: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """At each measurement, how much of the way from the control to the teacher was gained."""
    found = []
    for run, of_run in zip(runs, numbers, strict=True):
        control, teacher = run.students.get("control"), of_run["teacher_loss"]
        if control is None or teacher is None or of_run["gap_closed"] is None:
            continue
        at_step = dict(_measured(control, "step", "held_out_loss"))
        points = [
            (step, (at_step[step] - loss) / (at_step[step] - teacher))
            for step, loss in _measured(run.students["distilled"], "step", "held_out_loss")
            if at_step.get(step, -math.inf) > teacher
        ]
        if points:
            found.append((of_run["seed"], points))
    if not found:
        return None
    line = _line("distilled", found)
    return {
        "name": "gap_closed",
        "kind": "lines",
        "title": "Share of the gap that was closed",
        "caption": (
            "(control - distilled) / (control - teacher) at the same step: 0 % is no better than "
            "labels alone, 100 % is as good as the teacher. What to look for: a line that stays "
            "high to the end. One that falls says that labels catch up, and that distillation "
            "mostly saved time."
        ),
        "alt": f"Share of the gap closed, at the end {line['points'][-1][1]:.0%}.",
        "x": "optimizer steps",
        "y": "gap closed",
        "unit": "%",
        "lines": [line],
        "levels": [{"student": "teacher", "label": "as good as the teacher", "value": 1.0}],
    }


def _agreement(runs: Sequence[Results], numbers: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    lines = _lines(runs, lambda student: _measured(student, "step", "held_out_top1_agreement"))
    if not lines:
        return None
    final = ", ".join(f"{line['label']} {line['points'][-1][1]:.1%}" for line in lines)
    return {
        "name": "top1_agreement",
        "kind": "lines",
        "title": "How often student and teacher would pick the same token",
        "caption": (
            "Share of held-out positions whose likeliest next token is the teacher's likeliest. "
            "What to look for: a distilled student should agree more often than a control that "
            "never saw the teacher; two good models agree often anyway."
        ),
        "alt": f"Top-1 agreement with the teacher on held-out text, at the end: {final}.",
        "x": "optimizer steps",
        "y": "top-1 agreement",
        "unit": "%",
        "lines": lines,
        "levels": [],
    }


def _calibration(
    runs: Sequence[Results], numbers: Sequence[dict[str, Any]]
) -> dict[str, Any] | None:
    """Reliability of the first seed: bins of several cannot be averaged."""
    run, of_run = runs[0], numbers[0]
    bins = {
        "teacher": run.teacher.scores.bins,
        **{name: run.students[name].scores.bins for name in LABELS if name in run.students},
    }
    lines = []
    for name, of_student in bins.items():
        error = of_run[f"{name}_calibration_error"]
        of_student = [one for one in of_student if math.isfinite(one.confidence + one.accuracy)]
        if not of_student or error is None:
            continue
        points = [(one.confidence, one.accuracy) for one in of_student]
        line = _line(name, [(of_run["seed"], points)])
        line["label"] += f" (error {error:.1%})"
        line["counts"] = [one.count for one in of_student]
        lines.append(line)
    if not lines:
        return None
    of_seed = f" Seed {of_run['seed']} is shown." if len(runs) > 1 else ""
    return {
        "name": "calibration",
        "kind": "reliability",
        "title": "Can its probabilities be believed?",
        "caption": (
            "Positions are put into ten bins by how sure the model was of its likeliest token; each "
            "point says how often it was right there. On the diagonal it is as sure as it should "
            "be, below it is too sure. The error in the legend is the mean distance from the "
            "diagonal (expected calibration error); large points stand for many positions. A model that "
            "is never sure can be on the diagonal and know nothing: read it beside the loss."
            + of_seed
        ),
        "alt": "Accuracy against confidence; "
        + ", ".join(line["label"] for line in lines)
        + "; the diagonal is perfect calibration.",
        "x": "probability of the likeliest token",
        "y": "how often it was right",
        "unit": "%",
        "lines": lines,
        "levels": [],
    }


def _waiting(runs: Sequence[Results]) -> dict[str, Any]:
    lines = _lines(
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
            "Share of the time of each few steps in which the student had nothing to do because "
            "targets (or, for the control, text) were not there yet. What to look for: near zero "
            "is as fast as training without a teacher; a few percent at the start are normal; "
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


def _bytes(numbers: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    sent = _mean([one["bytes_per_token"] for one in numbers])
    if sent is None:
        return None
    whole = numbers[0]["whole_bytes_per_token"]
    return {
        "name": "bytes",
        "kind": "bars",
        "title": "Bytes per token",
        "caption": (
            f"What came from the teacher for each token, as {numbers[0]['targets']}, beside what the "
            "whole distribution over the vocabulary would be as 16-bit numbers. What to look for: "
            "how much of the network, or of the disk, the same training would otherwise need."
        ),
        "alt": f"{sent:.1f} bytes per token were received; the whole distribution has {whole:,}.",
        "unit": "bytes",
        "bars": [
            {"student": "distilled", "label": f"{numbers[0]['targets']}, received", "value": sent},
            {"student": "teacher", "label": "whole distribution, 16 bit", "value": whole},
        ],
    }


# Lines.


def _lines(
    runs: Sequence[Results],
    points: Callable[[StudentResults], list[Point]],
    of: Sequence[str] = tuple(LABELS),
) -> list[dict[str, Any]]:
    """One line per kind of student, if any run has points of it."""
    found = []
    for name in of:
        of_seeds = [
            (run.settings["seed"], points(run.students[name]))
            for run in runs
            if name in run.students
        ]
        of_seeds = [(seed, _thinned(some)) for seed, some in of_seeds if some]
        if of_seeds:
            found.append(_line(name, of_seeds))
    return found


def _line(student: str, of_seeds: Sequence[tuple[int, list[Point]]]) -> dict[str, Any]:
    """points: the mean over the seeds, of as many points as all of them have."""
    length = min(len(points) for _, points in of_seeds)
    columns = [[points[i] for _, points in of_seeds] for i in range(length)]
    return {
        "student": student,
        "label": LABELS.get(student, student),
        "points": [
            (sum(x for x, _ in column) / len(column), sum(y for _, y in column) / len(column))
            for column in columns
        ],
        "seeds": [{"seed": seed, "points": points} for seed, points in of_seeds]
        if len(of_seeds) > 1
        else [],
    }


def _measured(student: StudentResults, x: str, y: str) -> list[Point]:
    return [
        (entry[x], entry[y])
        for entry in student.measurements
        if y in entry and math.isfinite(entry[y])
    ]


def _thinned(points: list[Point]) -> list[Point]:
    width = math.ceil(len(points) / POINTS)
    parts = [points[i : i + width] for i in range(0, len(points), width)]
    return [
        (part[-1][0], sum(y for _, y in part) / len(part)) if width > 1 else part[0]
        for part in parts
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
