"""Judges whether distillation helped, and says so in sentences."""

import math
import statistics
from collections.abc import Mapping
from typing import Any

ERRORS = 2.0
"""Standard errors of a difference on the held-out text that it must exceed to count."""


WORTH_GAP = 0.05
"""Share of the distance between control and teacher that must be closed for an effect to be worth a
teacher. A certain effect can be tiny: enough held-out text resolves any. A twentieth is about what a
slightly better learning rate or a few percent more steps give, which cost no teacher."""


WORTH_NATS = 0.02
"""The same in nats, where there is no such distance or it is not known: 2 % of perplexity."""


GAINS = {"helped": "Distillation helped", "barely helped": "Distillation barely helped"}
"""Verdicts of a certain gain, and how their sentences begin."""


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
