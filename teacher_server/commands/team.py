"""Edits the teams file (`teacher-server team`) and shows each new token once."""

import json
import secrets
import sys
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tomlkit import TOMLDocument

from logitstream.files import write_atomically
from teacher_server.commands.columns import format_columns
from teacher_server.config import TeamAction, TeamAdd, TeamDisable, TeamList, TeamRotate
from teacher_server.errors import TeacherServerError, TeamsError
from teacher_server.teams.declaration import (
    ALLOWED,
    NAME,
    TOKEN_PREFIX,
    Declared,
    Team,
    Teams,
    Token,
    read_teams,
    token_digest,
)
from teacher_server.teams.edit import add_team, edit_file, set_disabled, set_tokens

TOKEN_NBYTES = 32


def team(action: TeamAction) -> int:
    """Runs one of the team commands; returns the exit code."""
    try:
        if isinstance(action, TeamAdd):
            _add(action)
        elif isinstance(action, TeamList):
            _list(action)
        elif isinstance(action, TeamRotate):
            _rotate(action)
        else:
            _disable(action)
    except TeacherServerError as error:
        print(f"teacher-server: {error}", file=sys.stderr)
        return 1
    return 0


def new_token() -> str:
    """Makes a token of 256 random bits."""
    return TOKEN_PREFIX + secrets.token_urlsafe(TOKEN_NBYTES)


def _add(config: TeamAdd) -> None:
    if not NAME.fullmatch(config.name):
        raise TeamsError(f"a team's name must be {ALLOWED['name']}, got {config.name!r}")
    connection = _connection_file(config)  # first: a wrong --ca must change nothing
    token = None if config.certificates else new_token()
    tokens = () if token is None else (_hash(token, config.days),)
    declared = Declared(
        Team(config.name, config.weight, frozenset(config.scopes)), tokens, config.certificates
    )

    def edit(document: TOMLDocument, teams: Teams | None) -> None:
        if teams is not None and config.name in teams.declared:
            raise TeamsError(
                f"{config.teams} has a team {config.name} already. `teacher-server team rotate "
                f"{config.name}` gives it a new token."
            )
        add_team(document, declared)

    edit_file(config.teams, edit, create=True)
    path = None
    if connection is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        path = config.out / f"{config.name}-connection.toml"
        write_atomically(path, connection.encode(), 0o644)
    _show(f"team {config.name} is in {config.teams}", config.name, token, tokens, config, path)


def _rotate(config: TeamRotate) -> None:
    token = new_token()
    added = _hash(token, config.days)
    now = datetime.now(UTC)
    last_day = (now + timedelta(days=config.overlap)).replace(microsecond=0)

    def edit(document: TOMLDocument, teams: Teams | None) -> None:
        declared = _find(teams, config.name, config.teams)
        valid = [old for old in declared.tokens if old.expires is None or old.expires > now]
        kept = [replace(old, expires=min(old.expires or last_day, last_day)) for old in valid]
        set_tokens(document, declared, (added, *(kept if config.overlap else ())))

    edit_file(config.teams, edit)
    old = "the old ones are refused"
    if config.overlap:
        old = f"the old ones are accepted until {last_day:%Y-%m-%d %H:%M} UTC"
    _show(f"team {config.name} has a new token; {old}", config.name, token, (added,), config, None)


def _disable(config: TeamDisable) -> None:
    def edit(document: TOMLDocument, teams: Teams | None) -> None:
        set_disabled(document, _find(teams, config.name, config.teams).team.name, not config.undo)

    edit_file(config.teams, edit)
    print(f"team {config.name} is {'enabled again' if config.undo else 'disabled'}")


def _list(config: TeamList) -> None:
    now = datetime.now(UTC)
    rows = []
    for entry in read_teams(config.teams).declared.values():
        valid = [t for t in entry.tokens if t.expires is None or t.expires > now]
        ends = [t.expires for t in valid if t.expires is not None]
        rows.append(
            {
                "team": entry.team.name,
                "weight": entry.team.weight,
                "scopes": sorted(entry.team.scopes),
                "tokens": len(valid),
                "expired_tokens": len(entry.tokens) - len(valid),
                "next_expiry": min(ends).isoformat() if ends else None,
                "certificates": list(entry.certificates),
                "limits": {k: v for k, v in asdict(entry.team.limits).items() if v is not None},
                "disabled": entry.disabled,
            }
        )
    if config.as_json:
        print(json.dumps(rows, indent=2))
    else:
        _print_table(rows)


def _print_table(rows: list[dict[str, Any]]) -> None:
    head = ("team", "weight", "scopes", "tokens", "next expiry", "certificates", "")
    lines = [
        (
            row["team"],
            f"{row['weight']:g}",
            " ".join(row["scopes"]),
            str(row["tokens"]),
            (row["next_expiry"] or "-")[:16].replace("T", " "),
            " ".join(row["certificates"]) or "-",
            "disabled" if row["disabled"] else "",
        )
        for row in rows
    ]
    print(format_columns(head, lines, num_left=len(head)))


def _find(teams: Teams | None, name: str, path: Path) -> Declared:
    declared = teams.declared if teams is not None else {}
    if name not in declared:
        raise TeamsError(f"{path} has no team {name}; it has {', '.join(declared) or 'none'}")
    return declared[name]


def _hash(token: str, days: int) -> Token:
    """Returns what the file keeps of a token; it expires after `days` whole days, or never (0)."""
    expires = None
    if days:
        midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        expires = midnight + timedelta(days=days + 1)
    return Token(token_digest(token), expires)


def _connection_file(config: TeamAdd) -> str | None:
    """Returns the text of the team's connection file, if an address is given."""
    if not config.address:
        return None
    lines = [
        f"# How team {config.name} reaches its teacher. The token is not in this file: put it into the",
        "# environment variable that token_env names.",
        f"address = {json.dumps(config.address)}",
        'token_env = "TEACHER_TOKEN"',
    ]
    if config.ca is not None:
        try:
            ca = config.ca.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise TeamsError(f"cannot read --ca {config.ca}: {error}") from None
        if "PRIVATE KEY" in ca or "-----BEGIN CERTIFICATE" not in ca:
            raise TeamsError(
                f"--ca {config.ca} must be a certificate in PEM, without a private key"
            )
        lines.append(f'ca = """\n{ca.strip()}\n"""')
    return "\n".join(lines) + "\n"


def _show(
    summary: str,
    name: str,
    token: str | None,
    tokens: tuple[Token, ...],
    config: TeamAdd | TeamRotate,
    connection: Path | None,
) -> None:
    expires = tokens[0].expires if tokens else None
    if config.as_json:
        content = {
            "team": name,
            "token": token,
            "expires": None if expires is None else expires.isoformat(),
            "connection": None if connection is None else str(connection),
        }
        print(json.dumps(content, indent=2))
        return
    print(f"{summary}.")
    if token is not None:
        until = "without expiry" if expires is None else f"until {expires:%Y-%m-%d}"
        print(
            f"Its token, valid {until}, is shown only now; the file keeps its SHA-256:\n\n  {token}\n"
        )
        print("The team sets the environment variable TEACHER_TOKEN to it.")
    if connection is not None:
        print(
            f"The rest of what it needs is in {connection}:\n"
            f"  student-trainer check {connection}\n"
            f"  connect({str(connection)!r})"
        )
