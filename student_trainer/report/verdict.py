"""Judges whether distillation helped, in one word and in sentences."""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from student_trainer.report.numbers import ERRORS

WORTH_GAP = 0.05
"""Share of the distance between control and teacher that must be closed for an effect to be worth a
teacher. A certain effect can be tiny: enough held-out text resolves any. A twentieth is about what a
slightly better learning rate or a few percent more steps give, which cost no teacher."""
WORTH_NATS = 0.02
"""The same in nats, where that distance is zero or not known: 2% of perplexity."""
WORTH_WAITING = 0.1
"""Share of the time spent waiting from which on it is worth a sentence."""
WORTH_SECONDS = 1.25
"""The same of the time that the distilled student took, in times of the control's."""
NO_TARGETS = "none"
"""Of a run that learnt from its text alone."""
GAINS = {"helped": "Distillation helped", "barely helped": "Distillation barely helped"}
"""Verdicts of a certain gain, and how their sentences begin."""

Numbers = list[dict[str, Any]]
"""The numbers of one run per seed."""
Stats = Mapping[str, dict[str, Any] | None]
"""Mean, spread and so on of a number over the seeds; None where no run has it."""


def judge(numbers: Numbers, stats: Stats) -> tuple[str, list[str]]:
    """Returns the verdict of one setting, and the sentences that explain it."""
    if any(run["distilled_loss"] is None for run in numbers):
        return "diverged", [
            "The distilled student diverged: its loss on held-out text is not a number. A lower "
            "learning rate or more warm-up steps may help."
        ]
    distilled, gain = stats["distilled_loss"], stats["gain"]
    assert distilled is not None
    if gain is None:
        verdict = "no control"
        sentences = [
            f"The student learnt from the text alone, without targets, and reached "
            f"{distilled['mean']:.3f} nats per token on held-out text. To see what targets add on the "
            "same text, compare it with a run that has them: student-trainer report A B."
            if numbers[0]["targets"] == NO_TARGETS
            else "It is not known whether distillation helped: the student reached "
            f"{distilled['mean']:.3f} nats per token on held-out text, but there is no control to "
            "compare it with. Train with --control to measure the gain."
        ]
    elif gain["num"] == 1:
        verdict, sentences = _judge_one_seed(numbers, gain, stats)
    else:
        verdict, sentences = _judge_seeds(numbers, gain, stats)
    sentences += _compare_with_teacher(numbers, stats)
    verdict, sentences = _consider_shuffled(numbers, verdict, sentences)
    return verdict, sentences + _describe_text(numbers[0]) + _describe_time(stats)


def _judge_one_seed(numbers: Numbers, gain: Mapping[str, Any], stats: Stats) -> tuple[str, list]:
    mean = gain["mean"]
    error = next(run["gain_error"] for run in numbers if run["gain"] is not None)
    one_seed = (
        "This is a single seed. Other initial weights and another order of the data would give "
        "another gain, and one seed cannot show how different: repeat the run with two more seeds "
        "before relying on it."
    )
    if error is not None and abs(mean) <= ERRORS * error:
        return "unclear", [
            f"Cannot tell whether distillation helped: {_compare_losses(mean, stats, numbers)}. The "
            f"difference of {mean:+.3f} is within what this much held-out text can resolve "
            f"(± {ERRORS * error:.3f}).",
            one_seed,
        ]
    verdict, sentence = _judge_certain(numbers, mean, stats)
    return verdict, [sentence, one_seed]


def _judge_seeds(numbers: Numbers, gain: Mapping[str, Any], stats: Stats) -> tuple[str, list]:
    mean, num = gain["mean"], gain["num"]
    losses = _compare_losses(mean, stats, numbers)
    positive = sum(run["gain"] > 0 for run in numbers if run["gain"] is not None)
    spread = (
        f"Over {num} seeds the mean gain is {mean:.3f}, with a standard deviation of "
        f"{gain['spread']:.3f} ({gain['min']:.3f} to {gain['max']:.3f}; 95% interval of the mean "
        f"{gain['low']:.3f} to {gain['high']:.3f}); it is positive in {positive} of {num}."
    )
    if abs(mean) <= gain["spread"]:
        return "unclear", [
            f"Cannot tell whether distillation helped: {losses}. The difference is smaller than its "
            "own spread over the seeds, as it would be by chance alone.",
            spread,
        ]
    if gain["low"] <= 0 <= gain["high"]:
        return "unclear", [
            f"It is not certain yet that distillation {'helped' if mean > 0 else 'hurt'}: {losses}. "
            f"{num} seeds are too few to rule out chance: the 95% interval still includes no gain "
            "at all.",
            spread,
        ]
    verdict, sentence = _judge_certain(numbers, mean, stats)
    return verdict, [sentence, spread]


def _judge_certain(numbers: Numbers, mean: float, stats: Stats) -> tuple[str, str]:
    """Returns verdict and sentence of a difference that is more than noise."""
    losses = _compare_losses(mean, stats, numbers)
    if mean <= 0:
        return "did not help", f"Distillation did not help: {losses}."
    drawbacks = [*_find_small_gain(mean, stats), *_find_less_agreement(numbers)]
    verdict = "barely helped" if drawbacks else "helped"
    but = f"; but {', and '.join(drawbacks)}" if drawbacks else ""
    return verdict, f"{GAINS[verdict]}: {losses}{but}."


def _compare_losses(gain: float, stats: Stats, numbers: Numbers) -> str:
    distilled, control = stats["distilled_loss"], stats["control_loss"]
    assert distilled is not None
    assert control is not None
    return (
        f"the student reached {distilled['mean']:.3f} nats per token on held-out text, "
        f"{abs(gain):.3f} {'lower' if gain >= 0 else 'higher'} than the {control['mean']:.3f} of the "
        f"same student trained on labels alone, after the same {numbers[0]['steps']:,} steps on the "
        "same text"
    )


def _find_small_gain(gain: float, stats: Stats) -> list[str]:
    """Returns why a gain is too small to be worth a teacher, if it is."""
    closed = stats["gap_closed"]
    if closed is not None and closed["mean"] < WORTH_GAP:
        return [
            f"it closed {closed['mean']:.1%} of the distance to the teacher, and less than "
            f"{WORTH_GAP:.0%} is not worth one"
        ]
    if closed is None and gain < WORTH_NATS:
        return [f"less than {WORTH_NATS:g} nats is not worth a teacher"]
    return []


def _find_less_agreement(numbers: Numbers) -> list[str]:
    """Returns that the student agrees with the teacher less often than labels alone make it.

    Then it learnt something else than the teacher. The difference must be more than noise.
    """
    pairs = [
        (run["distilled_top1_agreement"], run["control_top1_agreement"], run["agreement_rows"])
        for run in numbers
        if run["distilled_top1_agreement"] is not None and run["control_top1_agreement"] is not None
    ]
    if not pairs:
        return []
    distilled, control = (statistics.fmean(pair[which] for pair in pairs) for which in (0, 1))
    # The bounds are for a damaged results.json: it may hold any number.
    rows = min(max(1, sum(pair[2] for pair in pairs)), 1 << 53)
    variance = max(0.0, distilled * (1 - distilled) + control * (1 - control))
    if control - distilled <= ERRORS * math.sqrt(variance / rows):
        return []
    return [
        f"it agrees with the teacher on {distilled:.1%} of the tokens, the control on {control:.1%}"
    ]


def _compare_with_teacher(numbers: Numbers, stats: Stats) -> list[str]:
    teacher, distilled = stats["teacher_loss"], stats["distilled_loss"]
    assert distilled is not None
    reason = next((run["teacher_unknown"] for run in numbers if run["teacher_unknown"]), "")
    if teacher is None:
        return [f"The teacher's own loss is not known{f': {reason}' if reason else ''}."]
    sentences = []
    if reason:
        sentences.append(
            "How often the student agrees with the teacher, and how well the teacher is calibrated, "
            f"is not known: {reason}."
        )
    closed = stats["gap_closed"]
    reached = f"The teacher itself reaches {teacher['mean']:.3f} nats"
    if closed is not None and closed["mean"] < 0:
        sentences.append(
            f"{reached}: there was something to learn from it, but the student ended further away "
            "from it than labels alone did."
        )
    elif closed is not None:
        sentences.append(
            f"{reached}: {closed['mean']:.0%} of the distance between the control and the teacher "
            "was closed."
        )
    elif stats["control_loss"] is not None:
        sentences.append(
            f"{reached}, which is no better than the control: there was no gap for distillation to "
            "close. Is it the right teacher for this text?"
        )
    if distilled["mean"] < teacher["mean"]:
        sentences.append(
            "The student is better than its teacher on this text. That can be true (the student is "
            "trained on such text, the teacher may not be), but make sure that the held-out text is "
            "not in the training data."
        )
    return sentences


def _consider_shuffled(
    numbers: Numbers, verdict: str, sentences: list[str]
) -> tuple[str, list[str]]:
    """Adds what the shuffled control shows; it overrules the verdict if something is wrong."""
    known = [run for run in numbers if run["shuffled_excess"] is not None]
    if not known:
        if any(run["shuffled_seconds"] is not None for run in numbers):
            sentences.append("The student of shuffled targets diverged, so it is not a control.")
        return verdict, sentences
    excess = statistics.fmean(run["shuffled_excess"] for run in known)
    error = statistics.fmean(run["shuffled_excess_error"] or 0.0 for run in known)
    shuffled = statistics.fmean(run["shuffled_loss"] for run in known)
    if excess <= ERRORS * error:
        for gain in GAINS.values():
            sentences[0] = sentences[0].replace(
                gain, f"Without that control the verdict would be: {gain}"
            )
        return "something is wrong", [_explain_wrong(shuffled, verdict), *sentences]
    controls = [run["control_loss"] for run in known if run["control_loss"] is not None]
    if controls and shuffled < statistics.fmean(controls) - ERRORS * error:
        sentences.append(
            f"Shuffled targets too beat labels alone ({shuffled:.3f} nats): part of the gain is not "
            "the teacher's knowledge. Either softer targets of any kind help here, or the control's "
            "learning rate is not at its best."
        )
    elif verdict in GAINS:
        sentences.append(
            "With the targets shuffled into wrong places the student reaches only "
            f"{shuffled:.3f} nats, as it must be: what helped is what the teacher knows at each place."
        )
    else:
        sentences.append(
            f"With the targets shuffled into wrong places the student reaches {shuffled:.3f} nats, "
            f"{excess:.3f} worse than with the right ones, as it must be."
        )
    return verdict, sentences


def _explain_wrong(shuffled: float, verdict: str) -> str:
    cause = (
        "so the gain does not come from what the teacher knows about this text. Is the control's "
        "learning rate at its best?"
        if verdict in GAINS
        else "so the student did not learn from where the targets are. Do the targets belong to the "
        "tokens (student-trainer check), and does kd_weight count beside ce_weight?"
    )
    return (
        "Something is wrong: targets in the wrong places teach as well as the right ones "
        f"({shuffled:.3f} nats with shuffled targets), {cause}"
    )


def _describe_text(run: Mapping[str, Any]) -> list[str]:
    """Says who wrote the text, if a teacher did."""
    if run["written_by"] is None:
        return []
    sentence = (
        f"The text was written by {run['written_by']}: {run['written_texts']:,} texts of "
        f"{run['written_mean_tokens']:,.0f} tokens on average, {run['written_stopped']:.0%} of which "
        f"ended by themselves; {run['written_repetition']:.0%} of their runs of four tokens repeat "
        "earlier ones"
    )
    return [f"{sentence}."]


def _describe_time(stats: Stats) -> list[str]:
    sentences = []
    distilled, control = stats["distilled_seconds"], stats["control_seconds"]
    if distilled is not None and control is not None:
        ratio = distilled["mean"] / max(control["mean"], 1e-9)
        if ratio > WORTH_SECONDS:
            sentences.append(
                "The comparison is at equal steps, not at equal time: the distilled student took "
                f"{ratio:.1f} times as long as the control ({distilled['mean']:,.0f} s against "
                f"{control['mean']:,.0f} s)."
            )
    waiting = stats["waiting_fraction"]
    if waiting is not None and waiting["mean"] > WORTH_WAITING:
        sentences.append(
            f"The student spent {waiting['mean']:.0%} of its time waiting for the teacher: with "
            "more replicas, recorded targets or a larger look-ahead it would finish sooner, and "
            "learn the same."
        )
    return sentences


def rank_settings(groups: list[dict[str, Any]]) -> list[str]:
    """Says which of several settings did best, and whether that is more than noise."""
    best, second = sorted(groups, key=_get_loss)[:2]
    if _get_loss(best) == math.inf:
        return ["All settings diverged."]
    if len({group["runs"][0]["held_out_digest"] for group in groups}) > 1:
        return [
            f"{len(groups)} settings were measured on different held-out texts, so their losses "
            "cannot be compared; the gain of each over its own control can."
        ]
    sentences = [
        f"{len(groups)} settings were compared. Lowest loss on held-out text: "
        f"{best['label']}, {_get_loss(best):.3f} nats."
    ]
    ahead = _get_loss(second) - _get_loss(best)
    if ahead == math.inf:
        return sentences
    spreads = [group["statistics"]["distilled_loss"]["spread"] for group in (best, second)]
    known = [spread for spread in spreads if spread is not None]
    if len(known) < 2:
        note = "with a single seed: the order may be chance."
    elif ahead <= max(known):
        note = "less than the spread over seeds: they are equally good."
    else:
        note = "more than the spread over seeds."
    return [*sentences, f"It is {ahead:.3f} nats ahead of the next, {note}"]


def _get_loss(group: Mapping[str, Any]) -> float:
    loss = group["statistics"]["distilled_loss"]
    return math.inf if loss is None or group["verdict"] == "diverged" else loss["mean"]
