"""Did distillation help: the numbers, one picture, and a page that opens without a network."""

import base64
import html
import json
from pathlib import Path
from typing import Any

from student_trainer.trainer import Run


def write_report(
    folder: Path, numbers: dict[str, Any], distilled: Run, control: Run | None
) -> None:
    """Writes report.json, loss.png and report.html into `folder`."""
    picture = folder / "loss.png"
    _draw(picture, numbers["teacher_loss"], distilled, control)
    curves = {"distilled": distilled.curve, "control": control.curve if control else None}
    (folder / "report.json").write_text(json.dumps({**numbers, "curves": curves}, indent=2) + "\n")
    (folder / "report.html").write_text(_page(numbers, picture))


def table(numbers: dict[str, Any]) -> str:
    """The numbers as lines of text, aligned."""
    shown = {name: value for name, value in numbers.items() if not isinstance(value, dict)}
    width = max(map(len, shown))
    return "\n".join(f"{name:{width}}  {_format(value)}" for name, value in shown.items())


def verdict(numbers: dict[str, Any]) -> str:
    """One sentence on what came out, also when it did not help."""
    gain = numbers["gain"]
    if gain is None:
        return "There is no control to compare with: train with --control to see what it gained."
    loss = (
        f"{numbers['distilled_loss']:.3f} nats distilled, {numbers['control_loss']:.3f} on labels"
    )
    if gain > 0:
        return (
            f"Distillation helped: {loss}, {gain:.3f} lower on held-out text after the same "
            f"{numbers['steps']} steps."
        )
    return f"Distillation did not help: {loss} on held-out text, {-gain:.3f} higher."


def _draw(path: Path, teacher_loss: float, distilled: Run, control: Run | None) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    if control is not None:
        axes.plot(
            *zip(*control.curve, strict=True), marker="o", color="tab:gray", label="labels alone"
        )
    axes.plot(*zip(*distilled.curve, strict=True), marker="o", color="tab:blue", label="distilled")
    axes.axhline(teacher_loss, color="tab:orange", linestyle="--", label="teacher")
    axes.set_xlabel("step")
    axes.set_ylabel("held-out loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _page(numbers: dict[str, Any], picture: Path) -> str:
    rows = "\n".join(
        f"<tr><td>{html.escape(name.replace('_', ' '))}</td><td>{html.escape(_format(value))}</td></tr>"
        for name, value in numbers.items()
        if not isinstance(value, dict)
    )
    image = base64.b64encode(picture.read_bytes()).decode()
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Distillation report</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 44rem; margin: 2rem auto; padding: 0 1rem }}
img {{ max-width: 100% }} td {{ padding: .1rem 1.5rem .1rem 0; vertical-align: top }}
td:first-child {{ color: #666 }}
</style>
<h1>Did distillation help?</h1>
<p>{html.escape(verdict(numbers))}</p>
<img alt="held-out loss against steps" src="data:image/png;base64,{image}">
<table>{rows}</table>
</html>
"""


def _format(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)
