"""What `teacher-server status` shows of a service that teams share.

What a replica counts, and what it knows of the others and of quotas, is there a moment after it is so:
the tests wait for it, and compare what stays the same from then on.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from logitstream.connection import Connection
from student_trainer import connect
from teacher_server.cli import main
from teacher_server.commands import status
from tests.conftest import Served
from tests.end_to_end.test_processes import free_port
from tests.support.fleet import wait_until
from tests.support.teams import add_team

LENGTHS = [5, 40, 33, 64]
QUOTA = 100_000


def be(token: str) -> None:
    """Runs in the service: it asks its peers with this token, and lists one that is slow, or frozen."""
    from teacher_server.cluster import peers

    os.environ["TEACHER_TOKEN"] = token
    peers.ASK_TIMEOUT_S = 60.0


class Shared:
    """Two replicas that teams share."""

    def __init__(self, serve, model: Path, folder: Path) -> None:
        teams = folder / "teams.toml"
        self.tokens = {
            "search": add_team(teams, "search", "--weight", 3),
            "ranking": add_team(teams, "ranking"),
            "ops": add_team(teams, "ops", "--scopes", "score", "admin"),
        }
        quota = f"[teams.search]\nlimits = {{ max_tokens_per_day = {QUOTA} }}\n"
        teams.write_text(teams.read_text().replace("[teams.search]\n", quota))
        ports = [free_port(), free_port()]
        peers = [f"127.0.0.1:{port}" for port in ports]
        self.replicas: list[Served] = [
            serve(
                model,
                *("--port", str(port), "--peers", *peers, "--service-id", "shared"),
                *("--teams", str(teams), "--threads", "1"),
                hook=partial(be, self.tokens["ops"]),
                ready=False,
            )
            for port in ports
        ]
        self.addresses = [replica.wait_ready() for replica in self.replicas]
        wait_until(self.know_each_other, "the replicas know each other")

    def look(self, address: str) -> status.ServiceStatus:
        """As a caller with the scope admin sees it."""
        return status.look(Connection.to(address, token=self.tokens["ops"]))

    def know_each_other(self) -> bool:
        found = [self.look(address) for address in self.addresses]
        return all(len(one.replicas) == 2 and not one.unreachable for one in found)

    def use(self, team: str, address: str, lengths: Sequence[int]) -> None:
        with connect([address], token=self.tokens[team]) as teacher:
            for _ in teacher.stream([torch.arange(n) for n in lengths]):
                pass


@pytest.fixture(scope="module")
def shared(serve, model_folder, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    return Shared(serve, model_folder("Gemma2", 1001), tmp_path_factory.mktemp("shared"))


def test_status_puts_the_replicas_together_and_shows_each_caller_its_own(
    shared: Shared, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    address, other = shared.addresses

    def shown(team: str, *flags: str) -> str:
        monkeypatch.setenv("TEACHER_TOKEN", shared.tokens[team])
        assert main(["status", address, *flags]) == 0
        return capsys.readouterr().out

    def numbers(team: str) -> dict[str, Any]:
        return json.loads(shown(team, "--json"))

    def left_today() -> int | None:
        (line,) = numbers("search")["teams"]
        return line["tokens_left_today"]

    assert "no team did anything" in shown("ops")
    wait_until(lambda: left_today() is not None, "the replicas know the quota")
    (idle,) = numbers("search")["teams"]
    assert (idle["weight"], idle["tokens_per_second"], idle["share"]) == (3.0, 0.0, 0.0)
    assert idle["tokens_left_today"] == QUOTA

    shared.use("search", address, LENGTHS)
    shared.use("ranking", other, LENGTHS)
    shared.use("ranking", other, LENGTHS)

    def settled() -> bool:
        """Whether the last answers are counted too."""
        seen = numbers("ops")
        return (
            len(seen["replicas"]) == 2
            and not any(team["tokens_in_flight"] for team in seen["teams"])
            and all(replica["numbers"]["busy"] for replica in seen["replicas"])
            and (left_today() or QUOTA) <= QUOTA - sum(LENGTHS)
        )

    wait_until(settled, lambda: f"all is counted: {shown('ops')}")
    seen = numbers("ops")
    ranking, search = seen["teams"]
    assert (ranking["team"], search["team"]) == ("ranking", "search")
    assert (ranking["tokens_in_flight"], ranking["queued_tokens"]) == (0, 0)
    for name in ("share", "entitled"):
        assert ranking[name] + search[name] == pytest.approx(1.0)
    assert ranking["share"] == pytest.approx(2 / 3)  # however long each replica has been there
    assert ranking["tokens_left_today"] is None
    assert {one["address"] for one in seen["replicas"]} == {address, other}
    for replica in seen["replicas"]:
        assert replica["state"] == "ready"
        for name in ("batch_fill", "forward_ms", "head_ms", "encode_ms", "busy", "memory_bytes"):
            assert replica["numbers"][name] > 0, name
        assert replica["numbers"]["batch_fill"] <= 1
        assert replica["numbers"]["busy"] <= 1
        assert replica["numbers"]["device_memory_bytes"] == 0

    (own,) = numbers("search")["teams"]
    guessed = dict.fromkeys(("tokens_per_second", "share", "entitled"), 0)
    assert {**own, **guessed} == {**search, **guessed}
    for name in ("share", "entitled"):  # what others use it is not told
        assert 0 < own[name] <= 1
    assert all(one["numbers"] is None for one in numbers("search")["replicas"])
    header, first, second, *_ = shown("ops").splitlines()
    assert " ".join(header.split()) == (
        "team in flight tokens/s share entitled waiting p95 rejected left today"
    )
    assert (first.split()[0], second.split()[0]) == ("ranking", "search")
    assert first.split()[-1] == "-"
    assert "GiB" in shown("ops")
    assert "GiB" not in shown("search")

    watch = subprocess.Popen(
        [sys.executable, "-m", "teacher_server", "status", address, "--watch"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watch.stdout is not None
    times = filter(lambda line: line.startswith(address), watch.stdout)
    assert next(times) != next(times)  # 2 s later
    watch.send_signal(signal.SIGINT)
    out, err = watch.communicate(timeout=20)
    assert watch.returncode == 130
    assert "\x1b" not in out
    assert err == ""


def test_a_replica_that_cannot_be_reached_is_named(
    shared: Shared, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    address, other = shared.addresses
    monkeypatch.setenv("TEACHER_TOKEN", shared.tokens["ops"])
    monkeypatch.setattr(status, "REPLICA_S", 0.5)
    shared.replicas[1].send_signal(signal.SIGSTOP)  # frozen: it is still listed
    try:
        assert main(["status", address]) == 0
        out = capsys.readouterr().out
        assert re.search(f"no answer from {other}.*DEADLINE_EXCEEDED", out)
    finally:
        shared.replicas[1].send_signal(signal.SIGCONT)


def test_status_says_why_a_service_does_not_answer(
    shared: Shared, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("TEACHER_TOKEN", "nobody's")
    assert main(["status", shared.addresses[0]]) == 1
    err = capsys.readouterr().err
    assert "belongs to no team" in err
    assert "nobody's" not in err
