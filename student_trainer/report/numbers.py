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

from student_trainer.disk import put
from student_trainer.report import page, pictures
from student_trainer.training.results import FILE_NAME, Results, Scores, StudentResults

NOT_A_SETTING = {
    *("teacher", "record", "draws", "student", "output", "ahead", "control", "shuffled_control"),
    *("device", "log_every", "tensorboard", "checkpoint_every", "keep_checkpoints", "start_over"),
    *("ca", "cert", "key", "workers", "ray_address", "max_failures"),
    *("data", "held_out", "held_out_sequences", "seed"),
}
"""What two runs may set differently and still repeat each other; texts are compared by digest."""
ERRORS = 2.0
"""Standard errors of a difference on the held-out text that it must exceed to count."""
WORTH_GAP = 0.05
"""Share of the distance between control and teacher that must be closed for an effect to be worth a
teacher. A certain effect can be tiny: enough held-out text resolves any. A twentieth is about what a
slightly better learning rate or a few percent more steps give, which cost no teacher."""
WORTH_NATS = 0.02
"""The same in nats, where there is no such distance or it is not known: 2 % of perplexity."""
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
GAINS = {"helped": "Distillation helped", "barely helped": "Distillation barely helped"}
"""Verdicts of a certain gain, and how their sentences begin."""
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


def _verdict(
    numbers: list[dict[str, Any]], stats: Mapping[str, dict[str, Any] | None]
) -> tuple[str, list[str]]:
    """One word, and sentences; numbers: one run per seed."""
    if any(one["distilled_loss"] is None for one in numbers):
        return "diverged", [
            "The distilled student diverged: its loss on held-out text is not a number. A lower "
            "learning rate or more warm-up steps may help."
        ]
    distilled, gain = stats["distilled_loss"], stats["gain"]
    assert distilled is not None
    if gain is None:
        sentences = [
            f"Whether distillation helped is not known: the student reached {distilled['mean']:.3f} "
            "nats on held-out text, and there is no control to compare it with. Train with "
            "--control to see what it gained."
        ]
        verdict = "no control"
    else:
        verdict, sentences = _gained(numbers, gain, stats)
    sentences += _beside_the_teacher(numbers, stats)
    shuffled = _shuffled(numbers, verdict)
    if shuffled is not None:
        is_wrong, sentence = shuffled
        if is_wrong:
            for said in GAINS.values():
                sentences[0] = sentences[0].replace(
                    said, f"Without that control one would say: {said}"
                )
            verdict, sentences = "something is wrong", [sentence, *sentences]
        else:
            sentences.append(sentence)
    took, control_took = stats["distilled_seconds"], stats["control_seconds"]
    if took is not None and control_took is not None:
        ratio = took["mean"] / max(control_took["mean"], 1e-9)
        if ratio > 1.25:
            sentences.append(
                f"The comparison is at equal steps, not at equal time: the distilled student took "
                f"{ratio:.1f} times as long as the control ({took['mean']:,.0f} s against "
                f"{control_took['mean']:,.0f} s)."
            )
    waiting = stats["waiting_fraction"]
    if waiting is not None and waiting["mean"] > 0.1:
        sentences.append(
            f"The student spent {waiting['mean']:.0%} of its time waiting for the teacher: with "
            "more replicas, recorded targets or a larger look-ahead it would be done sooner, and "
            "would learn the same."
        )
    return verdict, sentences


def _gained(
    numbers: list[dict[str, Any]],
    gain: Mapping[str, Any],
    stats: Mapping[str, dict[str, Any] | None],
) -> tuple[str, list[str]]:
    distilled, control = stats["distilled_loss"], stats["control_loss"]
    assert distilled is not None
    assert control is not None
    mean, num = gain["mean"], gain["num"]
    reached = (
        f"{distilled['mean']:.3f} nats per token on held-out text against {control['mean']:.3f} "
        f"for the same student trained on labels alone, after the same {numbers[0]['steps']:,} "
        "steps on the same text"
    )
    lower = f"{abs(mean):.3f} {'lower' if mean >= 0 else 'higher'}"
    little = _too_little(numbers, mean, stats)
    verdict = "barely helped" if little else "helped"
    helped = f"{GAINS[verdict]}: {reached}, {lower}{little}."
    did_not = f"Distillation did not help: {reached}, {lower}."
    if num == 1:
        error = next(one["gain_error"] for one in numbers if one["gain"] is not None)
        one_seed = (
            "This is one seed. Other starting weights and another order of the data give another "
            "difference, and a single seed cannot say how far another would be off: repeat it with "
            "two more seeds before relying on it."
        )
        if error is not None and abs(mean) <= ERRORS * error:
            return "unclear", [
                f"Whether distillation helped cannot be told: {reached}. The difference of "
                f"{mean:+.3f} is within what this much held-out text can resolve "
                f"(± {ERRORS * error:.3f}).",
                one_seed,
            ]
        return (verdict, [helped, one_seed]) if mean > 0 else ("did not help", [did_not, one_seed])
    positive = sum(one["gain"] > 0 for one in numbers if one["gain"] is not None)
    spread = (
        f"Over {num} seeds the gain is {mean:.3f} on average, with a standard deviation of "
        f"{gain['spread']:.3f} ({gain['min']:.3f} to {gain['max']:.3f}; 95 % interval of the mean "
        f"{gain['low']:.3f} to {gain['high']:.3f}); it is positive in {positive} of {num}."
    )
    if abs(mean) <= gain["spread"]:
        return "unclear", [
            f"Whether distillation helped cannot be told: {reached}. The difference is smaller than "
            "its own spread over the seeds, which is what noise looks like.",
            spread,
        ]
    if gain["low"] <= 0 <= gain["high"]:
        return "unclear", [
            f"Whether distillation {'helped' if mean > 0 else 'hurt'} is not certain yet: {reached}, "
            f"{lower}. {num} seeds are too few to tell this from chance: the 95 % interval still "
            "includes no gain at all.",
            spread,
        ]
    return (verdict, [helped, spread]) if mean > 0 else ("did not help", [did_not, spread])


def _too_little(
    numbers: list[dict[str, Any]], gain: float, stats: Mapping[str, dict[str, Any] | None]
) -> str:
    """Why a gain that is certain is not worth a teacher, as the end of a sentence; "" if it is.

    It closes less than WORTH_GAP of what there was to gain (WORTH_NATS where that is not known), or
    the student agrees with the teacher's likeliest token less often than labels alone make it, by
    more than ERRORS standard errors: then it learnt something else than the teacher.
    """
    found = []
    closed = stats["gap_closed"]
    if closed is not None and closed["mean"] < WORTH_GAP:
        found.append(
            f"it closed {closed['mean']:.1%} of the distance to the teacher, and less than "
            f"{WORTH_GAP:.0%} is not worth one"
        )
    elif closed is None and gain < WORTH_NATS:
        found.append(f"less than {WORTH_NATS:g} nats are not worth a teacher")
    pairs = [
        (one["distilled_top1_agreement"], one["control_top1_agreement"], one["agreement_rows"])
        for one in numbers
        if one["distilled_top1_agreement"] is not None and one["control_top1_agreement"] is not None
    ]
    if pairs:
        ours, theirs = (statistics.fmean(one[which] for one in pairs) for which in (0, 1))
        rows = min(max(1, sum(one[2] for one in pairs)), 1 << 53)
        # A file may say anything.
        error = math.sqrt(max(0.0, ours * (1 - ours) + theirs * (1 - theirs)) / rows)
        if theirs - ours > ERRORS * error:
            found.append(
                f"it agrees with the teacher on {ours:.1%} of the tokens, the control on {theirs:.1%}"
            )
    return f"; but {', and '.join(found)}" if found else ""


def _beside_the_teacher(
    numbers: list[dict[str, Any]], stats: Mapping[str, dict[str, Any] | None]
) -> list[str]:
    teacher, distilled, control, closed = (
        stats[name] for name in ("teacher_loss", "distilled_loss", "control_loss", "gap_closed")
    )
    assert distilled is not None
    why = next((one["teacher_unknown"] for one in numbers if one["teacher_unknown"]), "")
    if teacher is None:
        return [f"The teacher's own loss is not known{f': {why}' if why else ''}."]
    sentences = []
    if why:
        sentences.append(
            "How often the student agrees with the teacher, and whether the teacher's probabilities "
            f"can be believed, is not known: {why}."
        )
    if closed is not None and closed["mean"] < 0:
        sentences.append(
            f"The teacher itself reaches {teacher['mean']:.3f} nats: there was something to learn from "
            "it, and the student ended further away from it than labels alone did."
        )
    elif closed is not None:
        sentences.append(
            f"The teacher itself reaches {teacher['mean']:.3f} nats: {closed['mean']:.0%} of the "
            "distance between the control and the teacher was closed."
        )
    elif control is not None:
        sentences.append(
            f"The teacher itself reaches {teacher['mean']:.3f} nats, which is no better than the "
            "control: there was no gap that distillation could close. Is it the right teacher for "
            "this text?"
        )
    if distilled["mean"] < teacher["mean"]:
        sentences.append(
            "The student is better than its teacher on this text. That can be true (it is trained "
            "on such text, the teacher may not be), but make sure that the held-out text is not in "
            "the training data."
        )
    return sentences


def _shuffled(numbers: list[dict[str, Any]], verdict: str) -> tuple[bool, str] | None:
    """Whether the shuffled control shows that something is wrong, and what it shows."""
    known = [one for one in numbers if one["shuffled_excess"] is not None]
    if not known:
        if any(one["shuffled_seconds"] is not None for one in numbers):
            return False, "The student of shuffled targets diverged, so it is no control."
        return None
    excess = statistics.fmean(one["shuffled_excess"] for one in known)
    error = statistics.fmean(one["shuffled_excess_error"] or 0.0 for one in known)
    shuffled = statistics.fmean(one["shuffled_loss"] for one in known)
    if excess <= ERRORS * error:
        cause = (
            "so the gain does not come from what the teacher knows about this text. Is the control "
            "at its best learning rate?"
            if verdict in GAINS
            else "so the student learnt nothing from where the targets are. Do the targets belong to "
            "the tokens (student-trainer check), and does kd_weight count beside ce_weight?"
        )
        return True, (
            f"Something is wrong: targets in the wrong places teach as well as the right ones "
            f"({shuffled:.3f} nats with shuffled targets), {cause}"
        )
    controls = [one["control_loss"] for one in known if one["control_loss"] is not None]
    if controls and shuffled < statistics.fmean(controls) - ERRORS * error:
        return False, (
            f"Shuffled targets too beat labels alone ({shuffled:.3f} nats): a part of the gain is "
            "not the teacher's knowledge. Softer targets of any kind help here, or the control's "
            "learning rate is not at its best."
        )
    return False, (
        f"With the targets shuffled into wrong places the student reaches only {shuffled:.3f} nats, "
        "as it must be: what helped is what the teacher knows at each place."
        if verdict in GAINS
        else f"With the targets shuffled into wrong places the student reaches {shuffled:.3f} nats, "
        f"{excess:.3f} worse than with the right ones, as it must be."
    )


def _compared(groups: list[dict[str, Any]]) -> list[str]:
    """Of several settings: which did best, and whether that is more than noise."""
    best, *others = sorted(groups, key=_mean_loss)
    if _mean_loss(best) == math.inf:
        return ["All settings diverged."]
    held_out = {group["runs"][0]["held_out_digest"] for group in groups}
    if len(held_out) > 1:
        return [
            f"{len(groups)} settings were measured on different held-out texts, so their losses "
            "cannot be compared; each gain over its own control can."
        ]
    sentences = [
        f"{len(groups)} settings were compared. Lowest loss on held-out text: "
        f"{best['label']}, {_mean_loss(best):.3f} nats."
    ]
    spreads = [group["statistics"]["distilled_loss"] for group in (best, others[0])]
    ahead = _mean_loss(others[0]) - _mean_loss(best)
    known = [one["spread"] for one in spreads if one is not None and one["spread"] is not None]
    if ahead != math.inf and len(known) < 2:
        sentences.append(
            f"It is {ahead:.3f} nats ahead of the next, with a single seed: the order may be chance."
        )
    elif ahead != math.inf:
        is_noise = ahead <= max(known)
        sentences.append(
            f"It is {ahead:.3f} nats ahead of the next, "
            + ("less than the spread over seeds: they are equally good." if is_noise else "more")
            + ("" if is_noise else " than the spread over seeds.")
        )
    return sentences


def _mean_loss(group: Mapping[str, Any]) -> float:
    found = group["statistics"]["distilled_loss"]
    return math.inf if found is None or group["verdict"] == "diverged" else found["mean"]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
