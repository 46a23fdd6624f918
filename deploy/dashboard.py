"""Writes what is made from the list of metrics: the Grafana dashboard and the table in the docs.

python -m deploy.dashboard
"""

import json
from pathlib import Path
from typing import Any

from teacher_server.monitoring.metrics import METRICS, MetricSpec

ROOT = Path(__file__).parents[1]
DASHBOARD = ROOT / "deploy" / "grafana.json"
PAGE = ROOT / "docs" / "operations.md"
BEGIN, END = "<!-- metrics: python -m deploy.dashboard -->\n", "<!-- end of metrics -->\n"
UNITS = {"seconds": "s", "bytes": "bytes", "ratio": "percentunit"}
"""Grafana's, by a word of the name."""
COLUMNS, WIDTH, HEIGHT = 3, 8, 7
INSTANCES = 'instance=~"$instance"'
COST = "teacher_team_cost_total"
SOURCE = {"type": "prometheus", "uid": "${source}"}


def dashboard() -> dict[str, Any]:
    """One panel for each metric, in a row for each group."""
    panels: list[dict[str, Any]] = []
    top = 0
    for group in dict.fromkeys(one.group for one in METRICS):
        where = {"h": 1, "w": COLUMNS * WIDTH, "x": 0, "y": top}
        panels.append({"type": "row", "title": group, "gridPos": where, "panels": []})
        top += 1
        members = [one for one in METRICS if one.group == group]
        for index, one in enumerate(members):
            place = {"x": index % COLUMNS * WIDTH, "y": top + index // COLUMNS * HEIGHT}
            panels.append(_panel(one, {"h": HEIGHT, "w": WIDTH, **place}))
        top += -(-len(members) // COLUMNS) * HEIGHT
    for number, panel in enumerate(panels, 1):
        panel["id"] = number
    return {
        "uid": "logitstream",
        "title": "Teachers (logitstream)",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "source", "type": "datasource", "query": "prometheus"},
                {
                    "name": "instance",
                    "type": "query",
                    "datasource": SOURCE,
                    "query": {"query": "label_values(teacher_queued_tokens, instance)"},
                    "refresh": 2,
                    "multi": True,
                    "includeAll": True,
                    "allValue": ".*",
                    "current": {"text": "All", "value": "$__all"},
                },
            ]
        },
        "panels": panels,
    }


def table() -> str:
    """All metrics for people, in Markdown."""
    lines = ["| name | kind | is |", "|---|---|---|"]
    for one in METRICS:
        labels = f"{{{','.join(one.labels)}}}" if one.labels else ""
        lines.append(f"| `{one.name}{labels}` | {one.kind} | {one.text} |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """A page with the table as it is now between its two marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table()}{END}{after}"


def as_json() -> str:
    """The content of the dashboard's file."""
    return json.dumps(dashboard(), indent=1) + "\n"


def _panel(one: MetricSpec, place: dict[str, int]) -> dict[str, Any]:
    stem = one.name.removesuffix("_total")
    unit = next((unit for word, unit in UNITS.items() if word in stem.split("_")), "short")
    by = list(one.labels) or ["instance"]
    title = stem.removeprefix("teacher_").replace("_", " ")
    if one.kind == "counter":
        title += " per second"
        # Seconds per second are a part of the time.
        unit = {"s": "percentunit", "bytes": "Bps"}.get(unit, unit)
    if "timestamp" in stem:
        title += ", time left"
    if one.name == COST:
        title, unit = "team share of the cost, all replicas", "percentunit"
    return {
        "type": "timeseries",
        "title": title,
        "description": f"{one.name}: {one.text}",
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "datasource": SOURCE,
                "expr": query,
                "legendFormat": " ".join([*(f"{{{{{label}}}}}" for label in by), name]).strip(),
            }
            for number, (name, query) in enumerate(_queries(one, by))
        ],
    }


def _queries(one: MetricSpec, by: list[str]) -> list[tuple[str, str]]:
    """What a panel asks, each with the end of its legend."""
    groups = ", ".join(by)
    if one.kind == "counter":
        rate = f"(rate({one.name}{{{INSTANCES}}}[$__rate_interval]))"
        query = f"sum by ({groups}) {rate}"
        if one.name == COST:  # the number itself says little
            query += f" / ignoring ({groups}) group_left () sum {rate}"
        return [("", query)]
    if one.kind == "histogram":
        rate = f"sum by (le, {groups}) (rate({one.name}_bucket{{{INSTANCES}}}[$__rate_interval]))"
        return [(f"p{100 * q:.0f}", f"histogram_quantile({q}, {rate})") for q in (0.5, 0.95)]
    how = "sum"
    if one.name.endswith("_ratio"):
        how = "avg"
    if "quota_left" in one.name:
        how = "min"  # all replicas speak of one number
    query = f"{how} by ({groups}) ({one.name}{{{INSTANCES}}})"
    return [("", f"{query} - time()" if "timestamp" in one.name else query)]


def main() -> None:
    DASHBOARD.write_text(as_json())
    PAGE.write_text(with_table(PAGE.read_text()))


if __name__ == "__main__":
    main()
