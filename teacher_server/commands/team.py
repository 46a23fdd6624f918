"""`teacher-server team add|list|rotate|disable`: edits the teams file, shows a new token once."""

import json
import secrets
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from tomlkit import TOMLDocument

from logitstream.files import write_atomically
from teacher_server.config import (
    TeamAction,
    TeamAdd,
    TeamDisable,
    TeamList,
    TeamRotate,
)
from teacher_server.errors import TeacherServerError, TeamsError
from teacher_server.teams.declaration import (
    NAME,
    TOKEN_PREFIX,
    Declared,
    Team,
    Teams,
    Token,
    read_teams,
    token_digest,
)
from teacher_server.teams.edit import (
    add_team,
    edit_file,
    set_disabled,
    set_tokens,
)

TOKEN_NBYTES = 32


def run(action: TeamAction) -> None:
    """Does what the command says and prints what came of it. Raises TeamsError."""
    if isinstance(action, TeamAdd):
        _add(action)
    elif isinstance(action, TeamList):
        _list(action)
    elif isinstance(action, TeamRotate):
        _rotate(action)
    else:
        _disable(action)


def new_token() -> str:
    """256 random bits."""
    return TOKEN_PREFIX + secrets.token_urlsafe(TOKEN_NBYTES)


def _add(config: TeamAdd) -> None:
    if not NAME.fullmatch(config.name):
        raise TeamsError(
            f"a team's name is 1 to 64 letters, digits, - and _, and begins with a letter or digit; "
            f"got {config.name!r}"
        )
    connection = _connection(config)  # before anything is written: a wrong --ca changes nothing
    token = None if config.certificates else new_token()
    tokens = () if token is None else (_token(token, config.days),)
    team = Team(config.name, config.weight, frozenset(config.scopes))
    declared = Declared(team, tokens, config.certificates)

    def edit(document: TOMLDocument, teams: Teams | None) -> None:
        if teams is not None and config.name in teams.declared:
            raise TeamsError(
                f"{config.teams} has a team {config.name} already. `teacher-server team rotate "
                f"{config.name}` makes it a new token."
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
    added = _token(token, config.days)
    now = datetime.now(UTC)
    last_day = (now + timedelta(days=config.overlap)).replace(microsecond=0)

    def edit(document: TOMLDocument, teams: Teams | None) -> None:
        declared = _find(teams, config.name, config.teams)
        kept = [one for one in declared.tokens if one.expires is None or one.expires > now]
        if config.overlap == 0:
            kept = []
        old = [
            one
            if one.expires is not None and one.expires < last_day
            else replace(one, expires=last_day)
            for one in kept
        ]
        set_tokens(document, declared, (added, *old))

    edit_file(config.teams, edit)
    old = "no old token is let in any more"
    if config.overlap:
        old = f"old ones are let in until {last_day:%Y-%m-%d %H:%M} UTC"
    _show(f"team {config.name} has a new token; {old}", config.name, token, (added,), config, None)


def _disable(config: TeamDisable) -> None:
    def edit(document: TOMLDocument, teams: Teams | None) -> None:
        set_disabled(document, _find(teams, config.name, config.teams).team.name, not config.undo)

    edit_file(config.teams, edit)
    print(f"team {config.name} is {'let in again' if config.undo else 'disabled'}")


def _list(config: TeamList) -> None:
    now = datetime.now(UTC)
    rows = []
    for one in read_teams(config.teams).declared.values():
        valid = [t for t in one.tokens if t.expires is None or t.expires > now]
        ends = [t.expires for t in valid if t.expires is not None]
        limits = one.team.limits
        rows.append(
            {
                "team": one.team.name,
                "weight": one.team.weight,
                "scopes": sorted(one.team.scopes),
                "tokens": len(valid),
                "expired_tokens": len(one.tokens) - len(valid),
                "next_expiry": min(ends).isoformat() if ends else None,
                "certificates": list(one.certificates),
                "limits": {
                    name: getattr(limits, name)
                    for name in limits.__slots__
                    if getattr(limits, name) is not None
                },
                "disabled": one.disabled,
            }
        )
    if config.as_json:
        print(json.dumps(rows, indent=2))
        return
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
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    for line in (head, *lines):
        print("  ".join(map(str.ljust, line, widths)).rstrip())


def _find(teams: Teams | None, name: str, path: Path) -> Declared:
    declared = teams.declared if teams is not None else {}
    if name not in declared:
        raise TeamsError(f"{path} has no team {name}; it has {', '.join(declared) or 'none'}")
    return declared[name]


def _token(token: str, days: int) -> Token:
    expires = None
    if days:
        midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        expires = midnight + timedelta(days=days + 1)
    return Token(token_digest(token), expires)


def _connection(config: TeamAdd) -> str | None:
    """The text of the connection file, if an address is known."""
    if not config.address:
        return None
    lines = [
        f"# How team {config.name} reaches its teacher. The token is not in here: it belongs into the",
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
            raise TeamsError(f"--ca {config.ca} is not a certificate in PEM alone")
        lines.append(f'ca = """\n{ca.strip()}\n"""')
    return "\n".join(lines) + "\n"


def _show(
    what: str,
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
    print(f"{what}.")
    if token is not None:
        until = "without an end" if expires is None else f"until {expires:%Y-%m-%d}"
        print(
            f"Its token, valid {until}, is shown this once; only its SHA-256 is kept:\n\n  {token}\n"
        )
        print("The team puts it into the environment variable TEACHER_TOKEN.")
    if connection is not None:
        print(
            f"{connection} has the rest of what it needs:\n"
            f"  student-trainer check {connection}\n"
            f"  connect({str(connection)!r})"
        )


def team(action: TeamAction) -> int:
    """Edits a teams file; returns the exit code."""
    from teacher_server.commands import team as team_commands

    try:
        team_commands.run(action)
    except TeacherServerError as error:
        print(f"teacher-server: {error}", file=sys.stderr)
        return 1
    return 0
