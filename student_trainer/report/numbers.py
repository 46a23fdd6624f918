"""Computes the numbers of one run from what it measured: the keys of a run in report.json."""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from student_trainer.report.formats import keep_finite
from student_trainer.report.own_texts import measure_own_texts
from student_trainer.training.results import Results, Scores, StudentResults

ERRORS = 2.0
"""Standard errors that a difference of losses on held-out text must exceed to count."""
SETTINGS = (
    *("steps", "seed", "targets", "temperature", "kd_weight", "ce_weight", "learning_rate"),
    *("optimizer", "batch_size", "sequence_length"),
)
"""Settings of a run that are among its numbers."""

MODELS = ("teacher", "distilled", "control", "shuffled")

AllScores = Mapping[str, Scores | None]
"""Scores by model: teacher, control, distilled, shuffled."""


def compute_numbers(name: str, results: Results) -> dict[str, Any]:
    """Computes the flat numbers of one run; None for what was not measured or is not finite."""
    distilled, settings = results.students["distilled"], results.settings
    scores = {"teacher": results.teacher.scores} | {
        student: results.students[student].scores if student in results.students else None
        for student in ("control", "distilled", "shuffled")
    }
    rows = sum(one.count for one in distilled.scores.bins)
    return {
        "run": name,
        **_collect(scores, "loss"),
        **_compare(scores),
        **{name: settings[name] for name in SETTINGS},
        "on_policy": _read_share(settings.get("on_policy")),
        **measure_own_texts(results),
        "trained_tokens": distilled.tokens,
        "held_out_tokens": rows + results.held_out_sequences,
        "held_out_rows": rows,
        **_collect(scores, "accuracy"),
        **_collect(scores, "top1_agreement", leave_out="teacher"),
        "agreement_rows": distilled.scores.agreement_rows,
        **_collect(scores, "calibration_error"),
        **_measure_speed(results),
        **_describe(results),
        **_describe_written(results),
        "tasks": _list_tasks(results),
    }


def compute_curves(results: Results) -> dict[str, list[tuple[int, float | None]] | None]:
    """Returns the held-out loss of each student against steps."""

    def curve(student: StudentResults) -> list[tuple[int, float | None]]:
        return [
            (int(entry["step"]), keep_finite(entry["held_out_loss"]))
            for entry in student.measurements
        ]

    return {
        name: curve(results.students[name]) if name in results.students else None
        for name in ("distilled", "control", "shuffled")
    }


def _collect(scores: AllScores, name: str, leave_out: str = "") -> dict[str, float | None]:
    """Returns one score of every model."""
    return {
        f"{model}_{name}": keep_finite(getattr(of_model, name)) if of_model else None
        for model, of_model in scores.items()
        if model != leave_out
    }


def _compare(scores: AllScores) -> dict[str, float | None]:
    gain, gain_error = _subtract(scores["control"], scores["distilled"])
    gap, gap_error = _subtract(scores["control"], scores["teacher"])
    excess, excess_error = _subtract(scores["shuffled"], scores["distilled"])
    # A gap within its own error may be none at all: a share of it would be any number.
    has_gap = gap is not None and gap > ERRORS * (gap_error or 0.0)
    return {
        "gain": gain,
        "gain_error": gain_error,
        "gap_closed": gain / gap if gain is not None and gap is not None and has_gap else None,
        "shuffled_excess": excess,
        "shuffled_excess_error": excess_error,
    }


def _subtract(more: Scores | None, less: Scores | None) -> tuple[float | None, float | None]:
    """Returns how much lower the second loss is, and the standard error of that over the sequences.

    Both were measured on the same text, so that what is hard about the text cancels out.
    """
    if more is None or less is None or keep_finite(more.loss) is None:
        return None, None
    if more.loss is None or less.loss is None or not math.isfinite(less.loss):
        return None, None
    pairs = zip(more.sequence_losses, less.sequence_losses, strict=True)
    differences = [first - second for first, second in pairs]
    if len(differences) < 2 or not all(map(math.isfinite, differences)):
        return more.loss - less.loss, None
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return more.loss - less.loss, error


def _measure_speed(results: Results) -> dict[str, Any]:
    distilled = results.students["distilled"]
    bytes_per_token = keep_finite(results.bytes_per_token)
    received = None if bytes_per_token is None else round(bytes_per_token * distilled.tokens)
    return {
        "waiting_fraction": _divide(distilled.waiting_s, distilled.seconds),
        "tokens_per_s": _divide(distilled.tokens, distilled.seconds),
        "bytes_per_token": bytes_per_token,
        "whole_bytes_per_token": 2 * results.teacher.vocab_size,
        "received_bytes": received,
        **{
            f"{name}_seconds": results.students[name].seconds if name in results.students else None
            for name in ("distilled", "control", "shuffled")
        },
    }


def _describe(results: Results) -> dict[str, Any]:
    """Says what student, teacher, text and software the numbers are of."""
    teacher = results.teacher
    return {
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
        "versions": ", ".join(f"{name} {version}" for name, version in results.versions.items()),
        "finished": results.finished,
    }


def _read_share(share: Any) -> float | None:
    """Returns the share of a run's batches that the student wrote, if the run says one."""
    is_share = isinstance(share, int | float) and 0 < share <= 1
    return float(share) if is_share else None


def _describe_written(results: Results) -> dict[str, Any]:
    """Says what the texts are like that a teacher wrote; None where the data has none, or not all."""
    parts = results.written
    texts, tokens = sum(one.texts for one in parts), sum(one.tokens for one in parts)

    def average(values: list[float | None], weights: list[int]) -> float | None:
        known = [value for value in values if value is not None]
        if not parts or len(known) < len(values):
            return None
        pairs = zip(known, weights, strict=True)
        return keep_finite(_divide(sum(value * weight for value, weight in pairs), sum(weights)))

    of_tokens, of_texts = [one.tokens for one in parts], [one.texts for one in parts]
    speeds = [one.tokens_per_s for one in parts]
    return {
        "written_by": ", ".join(dict.fromkeys(one.teacher for one in parts)) or None,
        "written_texts": texts if parts else None,
        "written_tokens": tokens if parts else None,
        "written_mean_tokens": _divide(tokens, texts),
        "written_stopped": _divide(sum(one.finish.get("stop", 0) for one in parts), texts),
        "written_repetition": average([one.repetition for one in parts], of_texts),
        "written_entropy": average([one.entropy for one in parts], of_tokens),
        "written_nats": average([one.nats for one in parts], of_tokens),
        "written_tokens_per_s": average(speeds, of_tokens),
        "written_bytes_per_token": average([one.bytes_per_token for one in parts], of_tokens),
    }


def _list_tasks(results: Results) -> list[dict[str, Any]]:
    """Returns a row for each metric of each task: the score of every model, None if it has none."""
    found = {"teacher": results.teacher.tasks} | {
        name: student.tasks for name, student in results.students.items()
    }
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for model, tasks in found.items():
        for task, scores in tasks.items():
            for metric, score in scores.items():
                new = {"task": task, "metric": metric, "higher_is_better": score.higher_is_better}
                row = rows.setdefault((task, metric), new | dict.fromkeys(MODELS))
                row[model] = {
                    "value": keep_finite(score.value),
                    "stderr": keep_finite(score.stderr),
                }
    return [*rows.values()]


def _divide(part: float, whole: float) -> float | None:
    return part / whole if whole else None
