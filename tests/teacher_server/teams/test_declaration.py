"""The teams file: what it may say, and how the team command edits it."""

import hashlib
import json
import os
import stat
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import pytest

from teacher_server import cli
from teacher_server.admission import access
from teacher_server.errors import TeamsError
from teacher_server.teams.declaration import TeamLimits, TeamsFile, parse_teams, read_teams
from tests.conftest import FORKSERVER
from tests.support.teams import add_team, command

A, B = "a" * 64, "b" * 64


def test_a_file_declares_everything_about_a_team():
    text = f"""
        [teams.search]
        weight = 3
        scopes = ["score", "dense"]
        tokens = [{{ sha256 = "{A}", expires = 2027-01-01 }}, {{ sha256 = "{B}" }}]
        certificates = ["search.lab"]
        limits = {{ max_tokens_per_day = 5, max_request_tokens = 6 }}
        [teams.other]
        disabled = true
        [teams.other.limits]
        max_tokens_in_flight = 7
    """
    teams = parse_teams(text, "x")
    search, other = teams.declared["search"], teams.declared["other"]
    assert (search.team.weight, search.team.scopes) == (3.0, {"score", "dense"})
    assert search.team.limits == TeamLimits(max_tokens_per_day=5, max_request_tokens=6)
    assert search.tokens[0].expires == datetime(2027, 1, 1, tzinfo=UTC)
    assert teams.by_digest[bytes.fromhex(B)] == (search, search.tokens[1])
    assert teams.by_certificate == {"search.lab": search}
    assert other.disabled
    assert (other.team.weight, other.team.scopes) == (1.0, {"score"})
    assert other.team.limits.max_tokens_in_flight == 7


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["no team"]),
        ("[teams]", ["no team"]),
        ("[teams", ["not TOML"]),
        ("a = " + "[" * 5000, ["not TOML"]),
        ("[team.a]", ["'team'", "teams"]),
        ("[teams.'a b']", ["a b", "letters"]),
        ('[teams."a\\nb"]', ["letters"]),
        (f"[teams.{'a' * 65}]", ["64"]),
        ("teams.a = 1", ["team a", "table"]),
        ("[teams.a]\nwieght = 1", ["team a", "wieght", "weight"]),
        ("[teams.a]\nweight = 0", ["team a", "weight", "above 0"]),
        ("[teams.a]\nweight = -1", ["weight"]),
        ("[teams.a]\nweight = nan", ["weight"]),
        ("[teams.a]\nweight = inf", ["weight"]),
        ("[teams.a]\nweight = true", ["weight", "True"]),
        ("[teams.a]\nweight = '3'", ["weight", "'3'"]),
        ("[teams.a]\nscopes = 'score'", ["scopes", "list"]),
        ("[teams.a]\nscopes = ['scoer']", ["scopes", "scoer", "score"]),
        ("[teams.a]\ndisabled = 1", ["disabled", "true or false"]),
        ("[teams.a]\ntokens = 'abc'", ["tokens", "list"]),
        (
            "[teams.a]\ntokens = [{ sha256 = 'lst_abc' }]",
            ["tokens[0].sha256", "64", "not the token"],
        ),
        (f"[teams.a]\ntokens = [{{ sha256 = '{A.upper()}' }}]", ["lower-case"]),
        ("[teams.a]\ntokens = [{}]", ["tokens[0].sha256"]),
        (f"[teams.a]\ntokens = [{{ sha256 = '{A}', expires = '2027-01-01' }}]", ["without quotes"]),
        (f"[teams.a]\ntokens = [{{ sha256 = '{A}', expire = 2027-01-01 }}]", ["expire", "expires"]),
        (
            f"[teams.a]\ntokens = [{{ sha256 = '{A}' }}, {{ sha256 = '{A}' }}]",
            ["tokens[1]", "there"],
        ),
        (
            f"[teams.a]\ntokens = [{{ sha256 = '{A}' }}]\n[teams.b]\ntokens = [{{ sha256 = '{A}' }}]",
            ["team b", "in team a"],
        ),
        ("[teams.a]\ncertificates = ['x']\n[teams.b]\ncertificates = ['x']", ["team b", "team a"]),
        ("[teams.a]\ncertificates = ['']", ["certificates", "string", "not empty"]),
        ("[teams.a]\nlimits = { max_tokens = 1 }", ["max_tokens", "max_request_tokens"]),
        (
            "[teams.a]\nlimits = { max_request_tokens = 0 }",
            ["limits.max_request_tokens", "above 0"],
        ),
        ("[teams.a]\nlimits = { max_request_tokens = 1.5 }", ["whole number"]),
        ("[teams.a]\nlimits = 3", ["limits", "table"]),
        ("[teams.a]\nweight = 0x" + "f" * 5000, ["team a", "weight", "far too large"]),
        ("[teams.a]\nlimits.max_request_tokens = 0x" + "f" * 5000, ["max_request_tokens"]),
        ("[teams.a]\nweight = " + "9" * 5000, ["not TOML"]),
        ("[teams.a]\nweight = 1e999", ["weight"]),
        (f"[teams.a.weight.{'a.' * 3000}a]", ["team a", "weight", "far too large"]),
        (
            f"[teams.a]\ntokens = [{{ sha256 = '{A}', expires = 0001-01-01T00:00:00+10:00 }}]",
            ["tokens[0].expires", "1 to 9999"],
        ),
    ],
)
def test_mistakes_are_told_with_the_file_the_team_and_the_key(text: str, words: list[str]):
    with pytest.raises(TeamsError) as caught:
        parse_teams(text, "some/teams.toml")
    for word in ("some/teams.toml", *words):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_token_in_the_place_of_its_hash_is_not_repeated():
    for text in (
        "tokens = ['lst_secret']",
        "tokens = [{ sha256 = 'lst_secret' }]",
        "tokens = { lst_secret = 1 }",
        "certificates = 'lst_secret'",
        "lst_secret = 1",
    ):
        with pytest.raises(TeamsError) as caught:
            parse_teams(f"[teams.a]\n{text}", "x")
        assert "lst_secret" not in str(caught.value)


def test_a_file_that_is_missing_or_no_text_is_told(tmp_path: Path):
    with pytest.raises(TeamsError, match=r"cannot read .*none\.toml: No such file"):
        read_teams(tmp_path / "none.toml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TeamsError, match="UTF-8"):
        read_teams(tmp_path / "binary")


def test_a_change_counts_once_it_has_settled_and_a_wrong_one_never(tmp_path: Path, caplog):
    path = tmp_path / "teams.toml"
    path.write_text("[teams.a]\n")
    file = TeamsFile(path)
    assert not file.look()
    path.write_text("[teams.a]\n[teams.b]\n")
    assert not file.look(), "it may still be growing"
    assert file.look()
    assert set(file.teams.declared) == {"a", "b"}
    assert not file.look()
    for _ in range(4):
        path.unlink(missing_ok=True)
        file.look()
    assert caplog.text.count("cannot read") == 1
    assert set(file.teams.declared) == {"a", "b"}
    path.write_text("[teams.c]\n")
    assert not file.look()
    assert file.look()
    assert set(file.teams.declared) == {"c"}


# The command.


def test_a_new_team_is_declared_and_its_token_is_not_kept(tmp_path: Path, capsys):
    path = tmp_path / "teams.toml"
    token = add_team(path, "search", "--weight", 3, "--scopes", "score", "dense")
    assert len(token) >= 43
    assert token not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    declared = read_teams(path).declared["search"]
    assert declared.tokens[0].digest == hashlib.sha256(token.encode()).digest()
    assert declared.tokens[0].expires is not None
    assert declared.team.scopes == {"score", "dense"}
    assert cli.main(["team", "add", "search", "--teams", str(path)]) == 1
    assert "rotate search" in capsys.readouterr().err
    other = add_team(path, "other", "--days", 0)
    assert other != token
    assert read_teams(path).declared["other"].tokens[0].expires is None
    assert len(list(tmp_path.iterdir())) == 1, "nothing is left beside the file"


def test_what_is_shown_to_people_has_the_token_once(tmp_path: Path):
    path = tmp_path / "teams.toml"
    command("certs", "--out", tmp_path / "certs", "--host", "teacher.lab")
    flags = ("--address", "teacher.lab:50051", "--ca", tmp_path / "certs" / "ca.pem")
    shown = command("team", "add", "search", "--teams", path, "--out", tmp_path, *flags)
    (token,) = [line.strip() for line in shown.splitlines() if line.startswith("  lst_")]
    assert shown.count(token) == 1
    assert hashlib.sha256(token.encode()).hexdigest() in path.read_text()
    connection = tmp_path / "search-connection.toml"
    content = tomllib.loads(connection.read_text())
    assert content["address"] == "teacher.lab:50051"
    assert content["token_env"] == "TEACHER_TOKEN"
    assert content["ca"].strip() == (tmp_path / "certs" / "ca.pem").read_text().strip()
    assert token not in connection.read_text()
    assert str(connection) in shown


COMMENTED = f"""# Ours.
[teams.search]   # the search team
weight = 3
# tokens of the night jobs
tokens = [
  {{ sha256 = "{A}" }},  # laptop of nobody
  {{ sha256 = "{B}", expires = 2126-01-01 }},  # cluster
]
limits = {{ max_request_tokens = 9 }}

[teams.other] # quiet
tokens = [{{ sha256 = "{"c" * 64}" }}]
"""


def test_an_edit_keeps_comments_and_everything_else(tmp_path: Path):
    path = tmp_path / "teams.toml"
    path.write_text(COMMENTED)
    path.chmod(0o640)
    command("team", "rotate", "search", "--teams", path)
    rotated = path.read_text()
    search = read_teams(path).declared["search"]
    assert len(search.tokens) == 3
    ends = {token.digest.hex()[0]: token.expires for token in search.tokens[1:]}
    assert ends["a"] == ends["b"] is not None
    for comment in ("# Ours.", "# the search team", "night jobs", "laptop", "# cluster", "# quiet"):
        assert comment in rotated
    command("team", "disable", "other", "--teams", path)
    assert read_teams(path).declared["other"].disabled
    command("team", "disable", "other", "--teams", path, "--undo")
    assert not read_teams(path).declared["other"].disabled
    command("team", "rotate", "other", "--overlap", 0, "--teams", path)
    (token,) = read_teams(path).declared["other"].tokens
    assert token.digest.hex() != "c" * 64
    command("team", "add", "third", "--teams", path)
    assert "# quiet" in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640, "as its owner wants it"
    listed = {
        row["team"]: row for row in json.loads(command("team", "list", "--teams", path, "--json"))
    }
    assert listed["search"]["tokens"] == 3
    assert listed["search"]["limits"] == {"max_request_tokens": 9}
    assert listed["other"]["disabled"] is False
    assert "search" in command("team", "list", "--teams", path)


def test_a_comment_above_the_next_team_stays_there(tmp_path: Path):
    path = tmp_path / "teams.toml"
    path.write_text("[teams.search]\nweight = 3\n\n# The other one.\n[teams.other]\n")
    command("team", "disable", "search", "--teams", path)
    command("team", "rotate", "search", "--teams", path)
    assert path.read_text().endswith("weight = 3\n\n# The other one.\n[teams.other]\n")


def test_rotating_with_no_overlap_drops_the_lines_of_old_tokens(tmp_path: Path):
    path = tmp_path / "teams.toml"
    path.write_text(COMMENTED)
    command("team", "rotate", "search", "--teams", path, "--overlap", 0)
    text = path.read_text()
    assert A not in text
    assert B not in text
    assert "laptop" not in text
    assert len(read_teams(path).declared["search"].tokens) == 1


@pytest.mark.parametrize(
    "text",
    [
        f"teams = {{ search = {{ tokens = [{{ sha256 = '{A}' }}] }} }}\n",
        f"teams.search.tokens = [{{ sha256 = '{A}' }}]\n",
        f"[teams]\nsearch.tokens = [{{ sha256 = '{A}' }}]\n",
        f"[teams.search]\n[[teams.search.tokens]]\nsha256 = '{A}'\n",
    ],
)
def test_a_file_of_an_unusual_shape_is_refused_and_stays(tmp_path: Path, text: str, capsys):
    path = tmp_path / "teams.toml"
    path.write_text(text)
    assert cli.main(["team", "rotate", "search", "--teams", str(path)]) == 1
    assert "Nothing was changed" in capsys.readouterr().err
    assert path.read_text() == text


def test_a_team_that_is_not_there_is_told(tmp_path: Path, capsys):
    path = tmp_path / "teams.toml"
    add_team(path, "search")
    assert cli.main(["team", "rotate", "serach", "--teams", str(path)]) == 1
    assert "has no team serach; it has search" in capsys.readouterr().err
    assert cli.main(["team", "list", "--teams", str(tmp_path / "none")]) == 1
    assert cli.main(["team", "add", "a b", "--teams", str(path)]) == 1
    assert (
        cli.main(["team", "add", "c", "--teams", str(path), "--address", "a:1", "--ca", "x"]) == 1
    )
    assert set(read_teams(path).declared) == {"search"}


def _add_some(path: str, first: int) -> None:
    for number in range(first, first + 5):
        add_team(Path(path), f"team-{number}")


def test_edits_at_the_same_time_lose_nothing(tmp_path: Path):
    path = tmp_path / "teams.toml"
    processes = [FORKSERVER.Process(target=_add_some, args=(str(path), 10 * i)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(read_teams(path).declared) == 20
    assert os.listdir(tmp_path) == ["teams.toml"]


def test_every_call_of_the_contract_has_a_rule():
    from grpc_health.v1 import health_pb2
    from grpc_reflection.v1alpha import reflection_pb2

    from protos import teacher_pb2

    methods = {
        f"/{service.full_name}/{method.name}"
        for module in (teacher_pb2, health_pb2, reflection_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert methods == set(access.RULES)
