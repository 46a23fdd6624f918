"""The report as one page: no script, no font, no picture from anywhere else.

Every number on it is looked up in the report by a key, which stands beside it as `data-key`.
"""

import html
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from student_trainer.report import charts

BADGES = {
    "helped": ("helped", "It helped"),
    "barely helped": ("unsure", "It barely helped"),
    "did not help": ("wrong", "It did not help"),
    "unclear": ("unsure", "Not clear"),
    "no control": ("unsure", "Nothing to compare with"),
    "something is wrong": ("wrong", "Something is wrong"),
    "diverged": ("wrong", "The training diverged"),
    "several": ("unsure", "Several settings"),
}
WHO = {
    "teacher": "teacher",
    "distilled": "student, distilled",
    "control": "student, labels alone (control)",
    "shuffled": "student, shuffled targets (control)",
}
SCORES = {
    "loss": ("Loss", "nats"),
    "accuracy": ("Next token right", "%"),
    "top1_agreement": ("Agrees with teacher", "%"),
    "calibration_error": ("Calibration error", "%"),
}
OF_SEEDS = {
    "control_loss": ("Labels alone", "nats"),
    "distilled_loss": ("Distilled", "nats"),
    "shuffled_loss": ("Shuffled", "nats"),
    "gain": ("Gain", "nats"),
    "gap_closed": ("Gap closed", "%"),
    "distilled_top1_agreement": ("Agrees with teacher", "%"),
    "waiting_fraction": ("Waiting", "%"),
    "tokens_per_s": ("Tokens/s", ""),
}
UNITS = {
    **dict.fromkeys(("waiting_fraction", "gap_closed"), "%"),
    **{f"{who}_{name}": unit for who in WHO for name, (_, unit) in SCORES.items()},
    **dict.fromkeys(("gain", "gain_error", "shuffled_excess", "shuffled_excess_error"), "nats"),
}
WORDS = {
    "Held-out text": "Text that no student was trained on. All losses here are measured on it.",
    "Loss, nats per token": (
        "How surprised a model is by the next token, on average. 0.1 nats less makes the real next "
        "token about 10 % more likely; exp(loss) is the perplexity."
    ),
    "Distilled": "The student that learnt from the teacher's probabilities of every next token.",
    "Control: labels alone": (
        "The same student (same first weights, same text in the same order, same number of steps, "
        "same learning rate) that saw only the text. Without it, nobody can say what the teacher "
        "added. If its learning rate is not a good one for it, the gain flatters."
    ),
    "Control: shuffled targets": (
        "A student that got the teacher's probabilities in the wrong places: same loss, same bytes, "
        "no knowledge. It has to be worse; where it is not, the gain has another cause."
    ),
    "Gain": "Loss of labels alone minus loss of distilled: positive means that it helped.",
    "Gap closed": (
        "The gain as a share of the distance between the control and the teacher: 100 % would be a "
        "student as good as its teacher."
    ),
    "Agrees with teacher": "How often both find the same next token the likeliest.",
    "Calibration error": (
        "How far a model's confidence in its likeliest token is from how often it is right, on "
        "average over ten bins."
    ),
    "Seed": (
        "Decides the student's first weights, the order of the text and the teacher's draws. What "
        "differs between seeds is chance."
    ),
}


def render(report: Mapping[str, Any]) -> str:
    """The page of one of `report.make_report`."""
    style = files("student_trainer.report").joinpath("page.css").read_text(encoding="utf-8")
    groups = report["groups"]
    body = [_verdict(report, "h1", "Did distillation help?")]
    if len(groups) > 1:
        body.append(_comparison(report))
    for number, group in enumerate(groups):
        if len(groups) > 1:
            body.append(f'<section id="setting-{number}">')
            body.append(_verdict(group, "h2", group["label"]))
        body.append(_group(report, number))
        if len(groups) > 1:
            body.append("</section>")
    body.append(_words())
    body.append(_all_numbers(report))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Did distillation help? {html.escape(BADGES[report["verdict"]][1])}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
{"".join(body)}
<footer>Made by student-trainer report. The JSON file beside this page holds the same numbers.</footer>
</body>
</html>
"""


def _verdict(found: Mapping[str, Any], level: str, title: str) -> str:
    kind, badge = BADGES[found["verdict"]]
    sentences = "".join(f"<p>{html.escape(one)}</p>" for one in found["sentences"])
    return (
        f"<{level}>{html.escape(title)}</{level}>"
        f'<div class="verdict {kind}"><strong>{badge}</strong>{sentences}</div>'
    )


def _group(report: Mapping[str, Any], number: int) -> str:
    group, key = report["groups"][number], f"groups.{number}"
    parts = [_tiles(report, key), _scores(report, key)]
    if len(group["seeds"]) > 1:
        parts.append(_seeds(report, key))
    parts.append('<div class="pictures">')
    for index, picture in enumerate(group["pictures"]):
        parts.append(_figure(picture, f"{key}.pictures.{index}"))
    parts.append("</div>")
    return "".join(parts)


def _tiles(report: Mapping[str, Any], key: str) -> str:
    """The six numbers that a hurried reader needs."""
    group = look_up(report, key)
    tiles = [
        ("distilled_loss", "Distilled, loss", "nats", "nats per token, lower is better"),
        ("control_loss", "Labels alone, loss", "nats", "the same student without the teacher"),
        ("teacher_loss", "Teacher, loss", "nats", "what there was to reach"),
        ("gap_closed", "Gap closed", "%", "of the way from control to teacher"),
        ("waiting_fraction", "Waiting", "%", "of the time, for the teacher"),
        ("bytes_per_token", "Bytes per token", "", "received from the teacher"),
    ]
    shown = "".join(
        f"<div><dt>{title}</dt><dd>{_span(report, f'{key}.statistics.{name}.mean', unit)}</dd>"
        f"<small>{html.escape(words)}</small></div>"
        for name, title, unit, words in tiles
        if group["statistics"][name] is not None
    )
    return f'<dl class="tiles">{shown}</dl>'


def _scores(report: Mapping[str, Any], key: str) -> str:
    """Who did how well on held-out text."""
    group = look_up(report, key)
    stats = group["statistics"]
    shown = {
        who: words for who, words in WHO.items() if any(stats.get(f"{who}_{one}") for one in SCORES)
    }
    head = "".join(f'<th class="number" scope="col">{title}</th>' for title, _ in SCORES.values())
    rows = "".join(
        f'<tr><th scope="row">{words}</th>'
        + "".join(
            _spread_cell(report, f"{key}.statistics.{who}_{name}", unit)
            if f"{who}_{name}" in stats  # a teacher does not agree with itself
            else '<td class="number">-</td>'
            for name, (_, unit) in SCORES.items()
        )
        + "</tr>"
        for who, words in shown.items()
    )
    several = " Mean over the seeds ± standard deviation." if len(group["seeds"]) > 1 else ""
    rows_tested = _span(report, f"{key}.runs.0.held_out_rows", "")
    return (
        f'<div class="wide"><table><caption>On {rows_tested} positions of held-out text.{several}'
        f'</caption><thead><tr><th scope="col"></th>{head}</tr></thead><tbody>{rows}</tbody>'
        "</table></div>"
    )


def _seeds(report: Mapping[str, Any], key: str) -> str:
    """Each seed, and their mean."""
    group = look_up(report, key)
    columns = {
        name: title for name, title in OF_SEEDS.items() if group["statistics"][name] is not None
    }
    head = "".join(f'<th class="number" scope="col">{title}</th>' for title, _ in columns.values())
    rows = []
    for index, numbers in enumerate(group["runs"]):
        cells = "".join(
            _cell(report, f"{key}.runs.{index}.{name}", unit) for name, (_, unit) in columns.items()
        )
        seed = _span(report, f"{key}.runs.{index}.seed", "")
        rows.append(
            f'<tr><th scope="row">seed {seed}, {html.escape(numbers["run"])}</th>{cells}</tr>'
        )
    for which, words in (("mean", "mean"), ("spread", "standard deviation")):
        cells = "".join(
            _cell(report, f"{key}.statistics.{name}.{which}", unit)
            for name, (_, unit) in columns.items()
        )
        rows.append(f'<tr><th scope="row"><b>{words}</b></th>{cells}</tr>')
    return (
        '<div class="wide"><table><caption>Every seed. The standard deviation is what chance '
        "alone does; a gain has to be clearly larger.</caption><thead><tr>"
        f'<th scope="col"></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _comparison(report: Mapping[str, Any]) -> str:
    """The settings side by side."""
    shown = {
        name: title
        for name, title in {**OF_SEEDS, "bytes_per_token": ("Bytes/token", "")}.items()
        if name != "tokens_per_s"
        and any(group["statistics"][name] is not None for group in report["groups"])
    }
    head = "".join(f'<th class="number" scope="col">{title}</th>' for title, _ in shown.values())
    rows = []
    for number, group in enumerate(report["groups"]):
        key = f"groups.{number}"
        cells = "".join(
            _spread_cell(report, f"{key}.statistics.{name}", unit)
            for name, (_, unit) in shown.items()
        )
        seeds = ", ".join(map(str, group["seeds"]))
        rows.append(
            f'<tr><th scope="row"><a href="#setting-{number}">{html.escape(group["label"])}</a>'
            f'<br><span class="soft">seed {seeds}: {BADGES[group["verdict"]][1]}</span></th>'
            f"{cells}</tr>"
        )
    return (
        '<div class="wide"><table><caption>Settings side by side; ± is the standard deviation over '
        f'seeds, where there are several.</caption><thead><tr><th scope="col"></th>{head}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _figure(picture: Mapping[str, Any], key: str) -> str:
    return (
        f'<figure class="{picture["kind"]}"><h3>'
        f"{html.escape(picture['title'])}</h3>{_legend(picture)}"
        f"{charts.draw(dict(picture), key)}"
        f"<figcaption>{html.escape(picture['caption'])}</figcaption></figure>"
    )


def _legend(picture: Mapping[str, Any]) -> str:
    if picture["kind"] == "bars":
        return ""
    entries = [(line["student"], line["label"], "") for line in picture["lines"]]
    entries += [(level["student"], level["label"], " level") for level in picture["levels"]]
    if any(line["seeds"] for line in picture["lines"]):
        entries.append(("distilled seed", "thin: single seeds", ""))
    if picture["kind"] == "reliability":
        entries.append(("", "as sure as it should be", "level"))
    items = "".join(
        '<li><svg viewBox="0 0 36 12" aria-hidden="true">'
        f'<line class="line {who}{more}" x1="0" x2="36" y1="6" y2="6"/></svg>'
        f"{html.escape(label)}</li>"
        for who, label, more in entries
    )
    return f'<ul class="legend">{items}</ul>'


def _words() -> str:
    entries = "".join(f"<dt>{word}</dt><dd>{meaning}</dd>" for word, meaning in WORDS.items())
    return f'<h2>What the words mean</h2><dl class="words">{entries}</dl>'


def _all_numbers(report: Mapping[str, Any]) -> str:
    parts = ["<h2>How it was made, and all numbers</h2>"]
    for number, group in enumerate(report["groups"]):
        for index, numbers in enumerate(group["runs"]):
            key = f"groups.{number}.runs.{index}"
            rows = "".join(
                f'<tr><th scope="row">{name.replace("_", " ")}</th>'
                + _cell(report, f"{key}.{name}", UNITS.get(name, ""))
                + "</tr>"
                for name, value in numbers.items()
                if value is not None
            )
            parts.append(
                f"<details><summary>{html.escape(numbers['run'])}, seed {numbers['seed']}"
                f"</summary><table><tbody>{rows}</tbody></table></details>"
            )
    return "".join(parts)


# Numbers.


def look_up(report: Mapping[str, Any], key: str) -> Any:
    """What is at a key such as groups.0.statistics.gain.mean; None if a part of it is None."""
    found: Any = report
    for part in key.split("."):
        if found is None:
            return None
        found = found[int(part)] if isinstance(found, Sequence) else found[part]
    return found


def _span(report: Mapping[str, Any], key: str, unit: str) -> str:
    value = look_up(report, key)
    return f'<span data-key="{key}">{html.escape(_shown(value, unit))}</span>'


def _cell(report: Mapping[str, Any], key: str, unit: str) -> str:
    value = look_up(report, key)
    kind = "text" if isinstance(value, str) else "number"
    return f'<td class="{kind}">{_span(report, key, unit)}</td>'


def _spread_cell(report: Mapping[str, Any], key: str, unit: str) -> str:
    """Mean ± standard deviation, as far as there are several."""
    if look_up(report, key) is None:
        return '<td class="number">-</td>'
    shown = _span(report, f"{key}.mean", unit)
    if look_up(report, f"{key}.spread") is not None:
        shown += f' <span class="soft">± {_span(report, f"{key}.spread", unit)}</span>'
    return f'<td class="number">{shown}</td>'


def _shown(value: Any, unit: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if unit == "%":
        return f"{100 * value:.1f} %"
    if unit == "nats":
        return f"{value:.3f}"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
