"""Pictures as inline SVG: plain shapes and text, coloured by the page's style, in light and dark."""

import html
import math
from collections.abc import Sequence
from typing import Any

WIDTH, HEIGHT = 520.0, 290.0
LEFT, RIGHT, TOP, BOTTOM = 62.0, 20.0, 14.0, 46.0
ABOVE = 40.0
"""Room for a second axis above."""


def draw(picture: dict[str, Any], key: str) -> str:
    """The SVG of one of `pictures.make_pictures`; key: where it is in the report."""
    if picture["kind"] == "bars":
        return _bars(picture, key)
    return _lines(picture, key)


def ticks(low: float, high: float, num: int = 5) -> list[float]:
    """Round numbers between low and high, about `num` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / num
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(one * magnitude for one in (1, 2, 2.5, 5, 10) if one * magnitude >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def format_number(value: float, unit: str, step: float = 0.0) -> str:
    """As axes, legends and tables show it; step: between two ticks, to tell them apart."""
    if unit == "%":
        return f"{100 * value:.{0 if step >= 0.01 else 1}f} %"
    if unit == "nats":
        return f"{value:.{max(1, -math.floor(math.log10(step)))}f}" if step else f"{value:.3f}"
    if abs(value) >= 1e9:
        return f"{value / 1e9:g}B"
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1e4 or (abs(value) >= 1e3 and value == round(value)):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _lines(picture: dict[str, Any], key: str) -> str:
    is_reliability = picture["kind"] == "reliability"
    top = ABOVE if "above" in picture else TOP
    xs, ys = _ranges(picture)
    plot_w, plot_h = WIDTH - LEFT - RIGHT, HEIGHT - top - BOTTOM

    def at_x(value: float) -> float:
        return LEFT + (value - xs[0]) / (xs[1] - xs[0]) * plot_w

    def at_y(value: float) -> float:
        return top + (ys[1] - value) / (ys[1] - ys[0]) * plot_h

    parts = [_axes(picture, xs, ys, at_x, at_y, (LEFT, top, plot_w, plot_h))]
    if is_reliability:
        parts.append(
            f'<line class="level" x1="{at_x(0):.1f}" y1="{at_y(0):.1f}" x2="{at_x(1):.1f}" '
            f'y2="{at_y(1):.1f}"/>'
        )
    for number, level in enumerate(picture["levels"]):
        y = at_y(level["value"])
        parts.append(
            f'<line class="line {level["student"]} level" x1="{LEFT}" x2="{LEFT + plot_w:.1f}" '
            f'y1="{y:.2f}" y2="{y:.2f}" data-key="{key}.levels.{number}.value">'
            f"<title>{_label(level['label'], level['value'], picture['unit'])}</title></line>"
        )
    for number, line in enumerate(picture["lines"]):
        for index, one in enumerate(line["seeds"]):
            parts.append(
                f'<polyline class="line seed {line["student"]}" '
                f'data-key="{key}.lines.{number}.seeds.{index}.points" '
                f'points="{_points(one["points"], at_x, at_y)}"/>'
            )
        parts.append(
            f'<polyline class="line {line["student"]}" data-key="{key}.lines.{number}.points" '
            f'points="{_points(line["points"], at_x, at_y)}"/>'
        )
        counts = line.get("counts")
        if counts is None and len(line["points"]) > 30:
            continue
        for index, (x, y) in enumerate(line["points"]):
            # The area of a point of calibration says how many positions it stands for.
            radius = 3.0 if counts is None else 2 + 8 * math.sqrt(counts[index] / sum(counts))
            of = "" if counts is None else f", {counts[index]:,} positions"
            x_unit = "%" if is_reliability else ""
            parts.append(
                f'<circle class="{line["student"]}" cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" '
                f'r="{radius:.1f}"><title>{_label(line["label"], y, picture["unit"])} at '
                f"{format_number(x, x_unit)}{of}</title></circle>"
            )
    return _svg(picture, HEIGHT, parts)


def _ranges(picture: dict[str, Any]) -> tuple[tuple[float, float], tuple[float, float]]:
    if picture["kind"] == "reliability":
        return (0.0, 1.0), (0.0, 1.0)
    every = [point for line in picture["lines"] for point in line["points"]]
    every += [
        point for line in picture["lines"] for one in line["seeds"] for point in one["points"]
    ]
    values = [y for _, y in every] + [level["value"] for level in picture["levels"]]
    low, high = min(values, default=0.0), max(values, default=1.0)
    if picture.get("from_zero"):
        low, high = 0.0, max(high, 0.05)
    elif picture["unit"] == "%":
        low, high = min(low, 0.0), high
    margin = 0.06 * (high - low or 1.0)
    x_high = max((x for x, _ in every), default=1.0)
    low = low if picture["unit"] == "%" and low == 0 else low - margin
    return (0.0, x_high or 1.0), (low, high + margin)


def _axes(
    picture: dict[str, Any],
    xs: tuple[float, float],
    ys: tuple[float, float],
    at_x: Any,
    at_y: Any,
    box: tuple[float, float, float, float],
) -> str:
    left, top, plot_w, plot_h = box
    bottom = top + plot_h
    x_unit = "%" if picture["kind"] == "reliability" else ""
    parts = []
    y_ticks, x_ticks = ticks(*ys), ticks(*xs)
    y_step = y_ticks[1] - y_ticks[0] if len(y_ticks) > 1 else 0.0
    for value in y_ticks:
        y = at_y(value)
        parts.append(
            f'<line class="grid" x1="{left}" x2="{left + plot_w:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">'
            f"{format_number(value, picture['unit'], y_step)}</text>"
        )
    for value in x_ticks:
        parts.append(
            f'<text x="{at_x(value):.1f}" y="{bottom + 18:.1f}" text-anchor="middle">'
            f"{format_number(value, x_unit, 1)}</text>"
        )
        parts.append(
            f'<line class="tick" x1="{at_x(value):.1f}" x2="{at_x(value):.1f}" '
            f'y1="{bottom:.1f}" y2="{bottom + 4:.1f}"/>'
        )
    middle = left + plot_w / 2
    parts.append(
        f'<line class="axis" x1="{left}" x2="{left + plot_w:.1f}" y1="{bottom:.1f}" y2="{bottom:.1f}"/>'
    )
    parts.append(
        f'<text class="name" x="{middle:.1f}" y="{bottom + 38:.1f}" text-anchor="middle">'
        f"{html.escape(picture['x'])}</text>"
    )
    parts.append(
        f'<text class="name" transform="translate(14 {top + plot_h / 2:.1f}) rotate(-90)" '
        f'text-anchor="middle">{html.escape(picture["y"])}</text>'
    )
    if "above" in picture:
        per_x = picture["above"]["per_x"]
        for value in ticks(xs[0] * per_x, xs[1] * per_x):
            x = at_x(value / per_x)
            parts.append(
                f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 4:.1f}" y2="{top:.1f}"/>'
                f'<text x="{x:.1f}" y="{top - 8:.1f}" text-anchor="middle">'
                f"{format_number(value, '')}</text>"
            )
        parts.append(
            f'<line class="axis" x1="{left}" x2="{left + plot_w:.1f}" y1="{top}" y2="{top}"/>'
            f'<text class="name" x="{middle:.1f}" y="12" text-anchor="middle">'
            f"{html.escape(picture['above']['label'])}</text>"
        )
    return "".join(parts)


def _bars(picture: dict[str, Any], key: str) -> str:
    bars = picture["bars"]
    left, right = 190.0, 110.0
    height = 44.0 * len(bars) + 8
    largest = max(bar["value"] for bar in bars) or 1.0
    parts = []
    for number, bar in enumerate(bars):
        y = 8 + 44.0 * number
        width = (WIDTH - left - right) * bar["value"] / largest
        parts.append(
            f'<text x="{left - 10}" y="{y + 19:.1f}" text-anchor="end">'
            f"{html.escape(bar['label'])}</text>"
            f'<rect class="{bar["student"]}" x="{left}" y="{y}" width="{max(1.0, width):.2f}" '
            f'height="28" rx="3" data-key="{key}.bars.{number}.value"/>'
            f'<text class="value" x="{left + max(1.0, width) + 8:.1f}" y="{y + 19:.1f}">'
            f"{bar['value']:,{'.1f' if bar['value'] % 1 else '.0f'}} {picture['unit']}</text>"
        )
    return _svg(picture, height, parts)


def _points(points: Sequence[tuple[float, float]], at_x: Any, at_y: Any) -> str:
    return " ".join(f"{at_x(x):.2f},{at_y(y):.2f}" for x, y in points)


def _label(label: str, value: float, unit: str) -> str:
    return html.escape(f"{label}: {format_number(value, unit)}{' nats' if unit == 'nats' else ''}")


def _svg(picture: dict[str, Any], height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" '
        f'aria-label="{html.escape(picture["alt"], quote=True)}">' + "".join(parts) + "</svg>"
    )
