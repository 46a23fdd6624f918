"""Draws the pictures of a report with matplotlib: as SVG for the page, as PNG for loss.png."""

import io
import math
import re
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, FuncFormatter, MaxNLocator, PercentFormatter

from student_trainer.report.formats import format_value

WIDTH = 520.0
"""Of a picture, in points; its text is 12 points high."""
PALETTE = {
    **{"ink": "#1c2330", "soft": "#5b6472", "line": "#dfe3e8"},
    **{"distilled": "#1f6feb", "control": "#6e7781", "shuffled": "#c4372b", "teacher": "#b26a00"},
}
"""The light colours of page.css. An SVG refers to them by name, so that they follow the page."""
DASHES = {"control": (4.0, 1.4), "shuffled": (1.4, 1.4), "level": (4.0, 2.7)}
"""Dash and gap, in widths of the line."""
STYLE: dict[Any, Any] = {
    **{"svg.fonttype": "none", "path.simplify": False, "text.parse_math": False},
    **{"font.family": "DejaVu Sans", "font.size": 12.0, "legend.fontsize": 11.0},
    **{"text.color": PALETTE["ink"], "axes.labelcolor": PALETTE["ink"]},
    **{"axes.edgecolor": PALETTE["soft"], "grid.color": PALETTE["line"]},
    **{"xtick.color": PALETTE["soft"], "ytick.color": PALETTE["soft"], "ytick.left": False},
    **dict.fromkeys(("axes.spines.left", "axes.spines.right", "axes.spines.top"), False),
    **{"axes.axisbelow": True, "legend.frameon": False, "legend.handlelength": 2.5},
    "lines.solid_capstyle": "round",
}
"""Settings of matplotlib."""
LARGEST = 1e12
"""A value beyond this is drawn here: near the limits of a float no axis can be divided."""
MARKED_POINTS = 30
"""A line with more points has no markers."""

Tooltips = dict[str, list[str]]
"""What the shapes of an artist, by its gid, show under the pointer."""


def draw_svg(picture: Mapping[str, Any], key: str) -> str:
    """Draws one of `pictures.make_pictures` as an SVG element that is part of a page.

    Shapes that show a number of the report have its key as `data-key`; `key` is the picture's own.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": key}):
        figure, tooltips = _draw(picture, key)
        file = io.BytesIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing, transparent=True)
    return _make_inline(ElementTree.fromstring(file.getvalue()), picture["alt"], tooltips)


def draw_png(picture: Mapping[str, Any]) -> bytes:
    """Draws the same picture as a PNG on white."""
    with matplotlib.rc_context(STYLE):
        figure, _ = _draw(picture, "")
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def make_locator() -> MaxNLocator:
    """Returns what places about five ticks at round numbers."""
    return MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10])


def _draw(picture: Mapping[str, Any], key: str) -> tuple[Figure, Tooltips]:
    if picture["kind"] == "bars":
        return _draw_bars(picture, key), {}
    return _draw_lines(picture, key)


def _draw_lines(picture: Mapping[str, Any], key: str) -> tuple[Figure, Tooltips]:
    num_labels = len(picture["lines"]) + len(picture["levels"]) + 1
    above = picture.get("above")
    top = 10.0 + 17.0 * math.ceil(num_labels / 2) + (34.0 if above else 0.0)
    figure, axes = _make_axes(240.0 + top + 46.0, left=74.0, right=28.0, top=top, bottom=46.0)
    x_limits, y_limits = _find_limits(picture)
    axes.set(xlim=x_limits, ylim=y_limits, xlabel=picture["x"], ylabel=picture["y"])
    axes.grid(axis="y")
    axes.xaxis.set_major_formatter(_make_formatter("%" if _is_reliability(picture) else "count"))
    axes.yaxis.set_major_formatter(_make_formatter(picture["unit"]))
    if above and above["per_x"] > 0:
        upper = axes.twiny()
        upper.set(xlim=[x * above["per_x"] for x in x_limits], xlabel=above["label"])
        upper.xaxis.set_major_locator(make_locator())
        upper.xaxis.set_major_formatter(_make_formatter("count"))
        upper.spines["top"].set_visible(True)
    tooltips: Tooltips = {}
    for number, line in enumerate(picture["lines"]):
        _draw_line(axes, picture, line, f"{key}.lines.{number}", tooltips)
    if any(line["seeds"] for line in picture["lines"]):
        axes.plot([], [], color=PALETTE["distilled"], lw=1, alpha=0.45, label="thin: single seeds")
    for number, level in enumerate(picture["levels"]):
        gid = f"{key}.levels.{number}.value"
        style: dict[str, Any] = {"color": PALETTE[level["student"]], "ls": (0, DASHES["level"])}
        axes.axhline(_clamp(level["value"]), lw=1.5, label=level["label"], gid=gid, **style)
        tooltips[gid] = [_describe(level["label"], level["value"], picture["unit"])]
    if _is_reliability(picture):
        diagonal: dict[str, Any] = {"color": PALETTE["soft"], "ls": (0, DASHES["level"])}
        axes.plot([0, 1], [0, 1], lw=1.5, label="as sure as it should be", **diagonal)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="upper left", ncols=2, borderaxespad=0.2)
    return figure, tooltips


def _draw_line(
    axes: Axes, picture: Mapping[str, Any], line: Mapping[str, Any], key: str, tooltips: Tooltips
) -> None:
    """Draws the mean, the single seeds below it, and a marker on each point that is seen as one."""
    colour = PALETTE[line["student"]]
    for index, seed in enumerate(line["seeds"]):
        gid = f"{key}.seeds.{index}.points"
        axes.plot(
            *_to_columns(seed["points"]), color=colour, lw=1, alpha=0.45, gid=gid, clip_on=False
        )
    dashes = DASHES.get(line["student"])
    style: dict[str, Any] = {"color": colour, "ls": (0, dashes) if dashes else "-"}
    xs, ys = _to_columns(line["points"])
    axes.plot(xs, ys, lw=2.2, label=line["label"], gid=f"{key}.points", clip_on=False, **style)
    counts = line.get("counts")
    if counts is None and len(xs) > MARKED_POINTS:
        return
    radii, of_positions = [3.0] * len(xs), [""] * len(xs)
    if counts is not None:  # the area of a point shows how many positions it stands for
        radii = [2 + 8 * math.sqrt(count / (sum(counts) or 1)) for count in counts]
        of_positions = [f", {count:,} positions" for count in counts]
    gid = f"{key}.markers"
    areas = [(2 * radius) ** 2 for radius in radii]
    axes.scatter(xs, ys, s=areas, color=colour, linewidths=0, zorder=3, gid=gid, clip_on=False)
    x_unit = "%" if _is_reliability(picture) else ""
    tooltips[gid] = [
        _describe(line["label"], y, picture["unit"]) + f" at {format_value(x, x_unit)}{suffix}"
        for (x, y), suffix in zip(line["points"], of_positions, strict=True)
    ]


def _draw_bars(picture: Mapping[str, Any], key: str) -> Figure:
    bars = picture["bars"]
    height = 44.0 * len(bars) + 8.0
    figure, axes = _make_axes(height, left=210.0, right=100.0, top=4.0, bottom=4.0)
    values = [_clamp(max(0.0, bar["value"])) for bar in bars]
    largest = max(values, default=0.0) or 1.0
    labels = [re.sub("[^ -~]", "?", bar["label"]) for bar in bars]  # what the font surely has
    shown = [max(value, largest / 200) for value in values]  # a bar of nothing is one point wide
    drawn = axes.barh(
        range(len(bars)),
        shown,
        0.64,
        tick_label=labels,
        color=[PALETTE[bar["student"]] for bar in bars],
    )
    for number, shape in enumerate(drawn):
        shape.set_gid(f"{key}.bars.{number}.value")
    units = [f"{bar['value']:,{'.1f' if bar['value'] % 1 else '.0f'}}" for bar in bars]
    axes.bar_label(drawn, [f"{number} {picture['unit']}" for number in units], padding=8)
    axes.set(xlim=(0, largest), ylim=(len(bars) - 0.5, -0.5), xticks=[])
    axes.spines["bottom"].set_visible(False)
    return figure


def _make_axes(
    height: float, *, left: float, right: float, top: float, bottom: float
) -> tuple[Figure, Axes]:
    """Makes a figure with axes inside of these margins, in points: no text is measured for it."""
    figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
    width, inner = WIDTH - left - right, height - top - bottom
    axes = figure.add_axes((left / WIDTH, bottom / height, width / WIDTH, inner / height))
    axes.xaxis.set_major_locator(make_locator())
    axes.yaxis.set_major_locator(make_locator())
    return figure, axes


def _make_formatter(unit: str) -> Formatter:
    if unit == "%":
        return PercentFormatter(1.0)
    return FuncFormatter(lambda value, _: _format_tick(value))


def _format_tick(value: float) -> str:
    for size, suffix in ((1e9, "B"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:,g}"


def _find_limits(picture: Mapping[str, Any]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Returns the ends of both axes, with room around what is drawn; something if that is nothing."""
    if _is_reliability(picture):
        return (0.0, 1.0), (0.0, 1.0)
    lines = [line["points"] for line in picture["lines"]]
    lines += [seed["points"] for line in picture["lines"] for seed in line["seeds"]]
    xs = [_clamp(x) for points in lines for x, _ in points if math.isfinite(x)]
    ys = [y for points in lines for _, y in points]
    ys += [level["value"] for level in picture["levels"]]
    ys = [_clamp(y) for y in ys if math.isfinite(y)]
    low, high = min(ys, default=0.0), max(ys, default=1.0)
    if picture.get("from_zero"):
        low, high = 0.0, max(high, 0.05)
    elif picture["unit"] == "%":
        low = min(low, 0.0)
    margin = 0.06 * (max(high - low, 1e-6 * abs(high)) or 1.0)
    starts_at_zero = picture["unit"] == "%" and low == 0
    return (0.0, max(xs, default=1.0) or 1.0), (
        low if starts_at_zero else low - margin,
        high + margin,
    )


def _is_reliability(picture: Mapping[str, Any]) -> bool:
    return picture["kind"] == "reliability"


def _to_columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [_clamp(x) for x, _ in points], [_clamp(y) for _, y in points]


def _clamp(value: float) -> float:
    return min(max(value, -LARGEST), LARGEST)


def _describe(label: str, value: float, unit: str) -> str:
    return f"{label}: {format_value(value, unit)}{' nats' if unit == 'nats' else ''}"


# From a file of its own to an element of the page.


def _make_inline(root: ElementTree.Element, alt: str, tooltips: Tooltips) -> str:
    """Returns an element without names, fonts or fixed colours of its own, and with tooltips."""
    for definitions in root.findall("{*}defs"):
        root.remove(definitions)  # a style that would hold for the whole page, and clipping
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": alt}
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        if element.tag == "g":
            _annotate(element, element.attrib.pop("id", ""), tooltips)
    for element in root.iter():
        element.attrib = {
            name.rpartition("}")[2]: _shorten(value)
            for name, value in element.attrib.items()
            if name != "clip-path" and not value.startswith("rotate(-0 ")
        }
        if not (element.text or "").strip():
            element.text = None
        element.tail = None
    return ElementTree.tostring(root, encoding="unicode")


def _annotate(group: ElementTree.Element, gid: str, tooltips: Tooltips) -> None:
    """Gives the shapes of an artist the key of what they show, and their tooltips."""
    shapes = list(group.iterfind(".//{*}use")) or list(group.iterfind(".//{*}path"))
    if gid.endswith((".points", ".value")) and shapes:
        shapes[0].set("data-key", gid)
    for shape, text in zip(shapes, tooltips.get(gid, ()), strict=False):
        ElementTree.SubElement(shape, "title").text = text


def _shorten(value: str) -> str:
    """Names colours, leaves the font's family to the page, and drops digits that are not seen."""
    for name, colour in PALETTE.items():
        value = value.replace(colour, f"var(--{name})")
    value = re.sub(r"font(?:-size)?: (\S+px)[^;]*", r"font-size: \1", value)
    value = re.sub(r"font-family: [^;]*; ", "", value)
    value = re.sub(r"\d+\.\d{3,}", lambda digits: f"{float(digits[0]):.2f}", value)
    return " ".join(value.split())
