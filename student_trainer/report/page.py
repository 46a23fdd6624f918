"""Renders a report as one page: no script, no font, no picture from anywhere else.

The layout is in page.html. Every number on it is looked up in the report by a key, which the page has
as `data-key`.
"""

from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

import jinja2
from markupsafe import Markup

from student_trainer.report.drawing import draw_svg
from student_trainer.report.formats import ARROWS, format_value
from student_trainer.report.own_texts import COLUMNS as WRITTEN_COLUMNS
from student_trainer.report.verdict import NO_TARGETS

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
"""By verdict: the class in page.css, and the words."""
STUDENTS = {
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
"""Columns of the table of one setting: title and unit."""
SEED_COLUMNS = {
    "control_loss": ("Labels alone", "nats"),
    "distilled_loss": ("Distilled", "nats"),
    "shuffled_loss": ("Shuffled", "nats"),
    "gain": ("Gain", "nats"),
    "gap_closed": ("Gap closed", "%"),
    "distilled_top1_agreement": ("Agrees with teacher", "%"),
    "waiting_fraction": ("Waiting", "%"),
    "tokens_per_s": ("Tokens/s", ""),
}
"""Columns of the table of seeds."""
SETTING_COLUMNS = {
    **{name: column for name, column in SEED_COLUMNS.items() if name != "tokens_per_s"},
    "bytes_per_token": ("Bytes/token", ""),
}
"""Columns of the table of settings."""
UNITS = {
    **dict.fromkeys(("waiting_fraction", "gap_closed"), "%"),
    **{name: unit for name, (_, unit) in WRITTEN_COLUMNS.items() if unit},
    **{f"{who}_{name}": unit for who in STUDENTS for name, (_, unit) in SCORES.items()},
    **dict.fromkeys(("written_stopped", "written_repetition"), "%"),
    **dict.fromkeys(("written_entropy", "written_nats"), "nats"),
    **dict.fromkeys(("gain", "gain_error", "shuffled_excess", "shuffled_excess_error"), "nats"),
}
"""Units of the numbers of a run that have one."""


def render(report: Mapping[str, Any]) -> str:
    """Returns the page of a report of `make_report` as HTML."""
    page = _make_environment().get_template("page.html")
    return page.render(report=report, look_up=partial(look_up, report))


@cache
def _make_environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("student_trainer.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        badges=BADGES,
        students=STUDENTS,
        name_student=_name_student,
        scores=SCORES,
        seed_columns=SEED_COLUMNS,
        setting_columns=SETTING_COLUMNS,
        written_columns=WRITTEN_COLUMNS,
        units=UNITS,
        arrows=ARROWS,
        measured_students=_find_measured_students,
        measured_columns=_find_measured_columns,
        format_value=format_value,
        draw=lambda picture, key: Markup(draw_svg(picture, key)),
    )
    return environment


def _name_student(student: str, group: Mapping[str, Any]) -> str:
    """Names a student of a group; without targets, the main one is trained on labels alone too."""
    is_untaught = student == "distilled" and group["runs"][0]["targets"] == NO_TARGETS
    return "student, labels alone" if is_untaught else STUDENTS[student]


def _find_measured_students(group: Mapping[str, Any]) -> list[str]:
    return [
        who for who in STUDENTS if any(group["statistics"].get(f"{who}_{name}") for name in SCORES)
    ]


def _find_measured_columns(
    columns: Mapping[str, tuple[str, str]], groups: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[str, str]]:
    """Returns the columns that at least one group has a number for."""
    return {
        name: column
        for name, column in columns.items()
        if any(group["statistics"][name] is not None for group in groups)
    }


def look_up(report: Mapping[str, Any], key: str) -> Any:
    """Returns what is at a key such as groups.0.statistics.gain.mean; None if a part of it is None."""
    value: Any = report
    for part in key.split("."):
        if value is None:
            return None
        value = value[int(part)] if isinstance(value, Sequence) else value[part]
    return value
