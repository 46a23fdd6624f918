"""The metrics of a real service are those that are documented, and say nothing of anybody's work."""

import re
import signal
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import pytest
import torch

from deploy import dashboard
from protos import teacher_pb2, teacher_pb2_grpc
from student_trainer import connect
from teacher_server.monitoring.metrics import METRICS
from tests.end_to_end.test_processes import free_port
from tests.support.teams import add_team, make_certs

ROOT = Path(__file__).parents[2]
IDS = [731, 902, 644, 377, 815, 926]


def documented() -> dict[str, tuple[str, str]]:
    """Kind and labels of each name in the table of docs/operations.md."""
    text = (ROOT / "docs" / "operations.md").read_text()
    rows = re.findall(r"^\| `(teacher_\w+)(?:\{(.*?)\})?` \| (\w+) \|", text, re.MULTILINE)
    return {name: (kind, labels) for name, labels, kind in rows}


def test_a_scrape_has_every_documented_name_and_no_other(serve, model_folder, tmp_path: Path):
    teams, port = tmp_path / "teams.toml", free_port()
    token = add_team(teams, "search")
    quota = "[teams.search]\nlimits = { max_tokens_per_day = 10_000 }\n"
    teams.write_text(teams.read_text().replace("[teams.search]\n", quota))
    served = serve(
        model_folder("Gemma2", 1001),
        *("--teams", str(teams), "--metrics-port", str(port)),
        *make_certs(tmp_path),
    )
    ca = tmp_path / "ca.pem"

    def page() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            return answer.read().decode()

    def names(text: str) -> dict[str, str]:
        return dict(re.findall(r"^# TYPE (\S+) (\w+)$", text, re.MULTILINE))

    expected = {one.name: one.kind for one in METRICS}
    assert names(page()) == expected  # before anybody came
    with connect(served.address, token=token, ca=ca) as teacher:
        assert len(list(teacher.stream([torch.tensor(IDS)] * 3))) == 3
    with grpc.secure_channel(
        served.address, grpc.ssl_channel_credentials(ca.read_bytes())
    ) as channel:
        stub = teacher_pb2_grpc.TeacherStub(channel)
        with pytest.raises(grpc.RpcError, match="needs a token"):
            stub.Describe(teacher_pb2.DescribeRequest())
    text = page()
    assert names(text) == expected
    samples = re.findall(r"^(teacher_\w+)(?:\{(.*?)\})? (\S+)$", text, re.MULTILINE)
    assert all(one.startswith(("#", "teacher_")) for one in text.splitlines())
    values = {}
    for name, labels, value in samples:
        stem = re.sub(r"_(bucket|sum|count)$", "", name)
        keys = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        kind, its = documented()[name if name in expected else stem]
        assert set(keys) - {"le"} == set(filter(None, its.split(","))), name
        assert keys.get("team", "search") in ("search", ""), name
        assert kind == expected[name if name in expected else stem]
        values[name, keys.get("team")] = float(value)
    # The last answer is on its way when its gauges are still up: these are what stays.
    assert values["teacher_team_tokens_total", "search"] == 3 * len(IDS)
    assert values["teacher_team_cost_total", "search"] > 0
    assert values["teacher_team_waiting_seconds_count", "search"] == 3
    assert values["teacher_team_share_ratio", "search"] == 1.0
    assert 0 < values["teacher_team_quota_left_tokens", "search"] <= 10_000
    assert values["teacher_rejected_total", ""] == 1
    assert values["teacher_busy_seconds_total", None] > 0
    assert values["teacher_memory_bytes", None] > 1 << 20
    assert values["teacher_certificate_expires_timestamp_seconds", None] > 1.7e9
    assert values["teacher_ledger_sync_age_seconds", None] < 60
    log = served.output()
    for secret in (token, token[10:30], ", ".join(map(str, IDS)), " ".join(map(str, IDS))):
        assert secret not in text
        assert secret not in log


def test_the_port_of_the_metrics_says_whether_the_replica_serves(serve, model_folder):
    port = free_port()
    flags = "--metrics-port", str(port), "--drain-s", "30"
    served = serve(model_folder("Gemma2", 1001), *flags)

    def asked(path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    assert asked("/healthz") == (200, "serving\n")
    for path in ("/", "/health", "/healthz/x", "/metrics/x"):
        assert asked(path) == (404, "there are /metrics and /healthz\n")
    assert "teacher_streams" in asked("/metrics")[1]
    with connect(served.address) as teacher:
        pairs = teacher.stream(iter(lambda: torch.tensor(IDS), None), ahead=4)
        next(pairs)
        served.send_signal(signal.SIGTERM)  # it waits for the stream, which goes on
        while "draining" not in served.output():
            next(pairs)
        assert asked("/healthz") == (503, "the replica is draining\n")
    served.process.join(60)
    assert served.process.exitcode == 0


def test_the_docs_and_the_dashboard_are_made_from_the_list():
    page = dashboard.PAGE.read_text()
    assert dashboard.with_table(page) == page, "run python -m deploy.dashboard"
    assert dashboard.DASHBOARD.read_text() == dashboard.as_json(), "run python -m deploy.dashboard"
    assert documented() == {one.name: (one.kind, ",".join(one.labels)) for one in METRICS}
    made = dashboard.as_json()
    assert all(one.name in made for one in METRICS)
