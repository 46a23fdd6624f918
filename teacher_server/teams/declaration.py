"""Teams: who shares a teacher, with which weight, for what, and up to which limits.

One TOML file declares them, docs/sharing.md shows it:

    [teams.search]
    weight = 3
    scopes = ["score"]
    tokens = [{ sha256 = "9f86d0...", expires = 2027-01-01 }]
    certificates = ["search.trainers.lab"]
    limits = { max_tokens_per_day = 2_000_000_000 }

Of a token only its SHA-256 is here. That is enough: a token is 256 random bits, there is nothing to
guess that a slow hash would protect.
"""

import hashlib
import logging
import math
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Any

from teacher_server.errors import TeamsError

logger = logging.getLogger(__name__)

SCOPES = ("score", "generate", "hidden", "dense", "admin")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_WEIGHT = 1e6
MAX_NBYTES = 16 << 20
"""Of the file: far above any real one, so that a wrong path does not fill the memory."""


@dataclass(frozen=True, slots=True)
class TeamLimits:
    """What one team may use of the whole service; None is no limit."""

    max_tokens_in_flight: int | None = None
    """Padded tokens that are admitted and not answered."""
    max_tokens_per_second: int | None = None
    """Padded tokens dispatched."""
    max_tokens_per_day: int | None = None
    """Padded tokens dispatched from midnight to midnight, UTC."""
    max_request_tokens: int | None = None
    """Tokens of one request."""


@dataclass(frozen=True, slots=True)
class Team:
    """One team as it is declared now."""

    name: str
    weight: float = 1.0
    scopes: frozenset[str] = frozenset({"score"})
    limits: TeamLimits = TeamLimits()


DEFAULT_TEAM = Team("default", scopes=frozenset(SCOPES))
"""Everybody, where no teams are declared."""


@dataclass(frozen=True, slots=True)
class Token:
    """What is kept of a token."""

    digest: bytes
    """SHA-256 of the token, 32 bytes."""
    expires: datetime | None = None
    """From here on it is refused; None: never."""


@dataclass(frozen=True, slots=True)
class Declared:
    """One team with the ways in which its members show who they are."""

    team: Team
    tokens: tuple[Token, ...] = ()
    certificates: tuple[str, ...] = ()
    """Names, common or subject alternative, of client certificates."""
    disabled: bool = False


class Teams:
    """All teams of one file."""

    def __init__(self, declared: Iterable[Declared]) -> None:
        self.declared = {one.team.name: one for one in declared}
        self.by_digest = {
            token.digest: (one, token) for one in self.declared.values() for token in one.tokens
        }
        self.by_certificate = {
            name: one for one in self.declared.values() for name in one.certificates
        }


def token_digest(token: str) -> bytes:
    """SHA-256 of a token."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def read_teams(path: Path) -> Teams:
    """The teams that a file declares. Raises TeamsError, which names the file, team and key."""
    return parse_teams(read_text(path), str(path))


def read_text(path: Path) -> str:
    """The text of a teams file. Raises TeamsError."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_NBYTES + 1)
    except OSError as error:
        raise TeamsError(f"cannot read the teams file {path}: {error.strerror}") from None
    if len(data) > MAX_NBYTES:
        raise TeamsError(f"{path} has more than {MAX_NBYTES >> 20} MiB: is it a teams file?")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise TeamsError(f"{path} is not TOML: it is not UTF-8 text") from None


def parse_teams(text: str, where: str) -> Teams:
    """The teams that a TOML text declares; `where` names it in errors. Raises TeamsError."""
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise TeamsError(f"{where} is not TOML: {why}") from None
    _only(content, {"teams"}, f"{where}:")
    tables = content.get("teams", {})
    if not isinstance(tables, dict) or not tables:
        raise TeamsError(
            f"{where}: it declares no team, so nobody would be let in. Add one with "
            f"`teacher-server team add NAME --teams {where}`."
        )
    teams = [_declared(name, table, f"{where}: team {name}:") for name, table in tables.items()]
    _no_shared(teams, where)
    return Teams(teams)


def _declared(name: str, table: Any, where: str) -> Declared:
    if not NAME.fullmatch(name):
        raise TeamsError(
            f"{where} a team's name is 1 to 64 letters, digits, - and _, and begins with a letter "
            "or digit"
        )
    if not isinstance(table, dict):
        raise TeamsError(f"{where} must be a table, got {_shown(table)}")
    _only(table, {"weight", "scopes", "tokens", "certificates", "limits", "disabled"}, where)
    weight = table.get("weight", 1)
    if not _is_number(weight) or not 0 < weight <= MAX_WEIGHT or not math.isfinite(weight):
        raise TeamsError(
            f"{where} weight must be a number above 0, at most {MAX_WEIGHT:.0f}, got "
            f"{_shown(weight)}"
        )
    scopes = _strings(table.get("scopes", ["score"]), f"{where} scopes")
    if unknown := sorted(set(scopes) - set(SCOPES)):
        raise TeamsError(
            f"{where} scopes: there is no scope {unknown[0]!r}; there are {', '.join(SCOPES)}"
        )
    disabled = table.get("disabled", False)
    if not isinstance(disabled, bool):
        raise TeamsError(f"{where} disabled must be true or false, got {_shown(disabled)}")
    tokens = table.get("tokens", [])
    if not isinstance(tokens, list):
        raise TeamsError(f"{where} tokens must be a list of tables, got {_shown(tokens)}")
    return Declared(
        Team(name, float(weight), frozenset(scopes), _limits(table.get("limits", {}), where)),
        tuple(_token(item, f"{where} tokens[{i}]") for i, item in enumerate(tokens)),
        tuple(_strings(table.get("certificates", []), f"{where} certificates")),
        disabled,
    )


def _limits(table: Any, where: str) -> TeamLimits:
    if not isinstance(table, dict):
        raise TeamsError(f"{where} limits must be a table, got {_shown(table)}")
    _only(table, {field.name for field in fields(TeamLimits)}, f"{where} limits:")
    for key, value in table.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 63:
            raise TeamsError(
                f"{where} limits.{key} must be a whole number of tokens above 0, got "
                f"{_shown(value)}; leave it out for no limit"
            )
    return TeamLimits(**table)


def _token(table: Any, where: str) -> Token:
    if not isinstance(table, dict):
        # Never shown: somebody may have put the token itself here.
        raise TeamsError(f'{where} must be a table such as {{ sha256 = "..." }}')
    _only(table, {"sha256", "expires"}, f"{where}:")
    digest, expires = table.get("sha256"), table.get("expires")
    if not isinstance(digest, str) or not SHA256.fullmatch(digest):
        raise TeamsError(
            f"{where}.sha256 must be the SHA-256 of the token, 64 lower-case hex digits, and not "
            "the token itself"
        )
    return Token(bytes.fromhex(digest), None if expires is None else _moment(expires, where))


def _moment(value: Any, where: str) -> datetime:
    """A date begins at midnight UTC; a time without an offset is UTC."""
    if isinstance(value, datetime):
        try:
            return value.astimezone(UTC) if value.tzinfo is not None else value.replace(tzinfo=UTC)
        except OverflowError:
            raise TeamsError(f"{where}.expires is outside the years 1 to 9999 in UTC") from None
    if isinstance(value, date):
        return datetime.combine(value, time(), UTC)
    raise TeamsError(
        f"{where}.expires must be a date or a time such as 2027-01-01 or 2027-01-01T08:00:00Z, "
        f"without quotes, got {_shown(value)}"
    )


def _no_shared(teams: Iterable[Declared], where: str) -> None:
    """Raises TeamsError where it would be open which team a caller belongs to."""
    owners: dict[object, str] = {}
    for one in teams:
        name = one.team.name
        for index, token in enumerate(one.tokens):
            if (other := owners.setdefault(token.digest, name)) != name or any(
                token.digest == earlier.digest for earlier in one.tokens[:index]
            ):
                raise TeamsError(
                    f"{where}: team {name}: tokens[{index}].sha256 is there already, in team "
                    f"{other}. Give every team tokens of its own."
                )
        for identity in one.certificates:
            if (other := owners.setdefault(identity, name)) != name:
                raise TeamsError(
                    f"{where}: team {name}: certificates: {identity!r} is in team {other} already"
                )


def _strings(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise TeamsError(f"{where} must be a list of strings, got {_shown(value)}")
    return value


def _only(table: Mapping[str, Any], allowed: set[str], where: str) -> None:
    if unknown := sorted(set(table) - allowed):
        raise TeamsError(
            f"{where} there is no key {unknown[0][:40]!r}; there are {', '.join(sorted(allowed))}"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # thousands of digits or of tables in tables
        return "something far too large"
    return text if len(text) <= 40 else f"{text[:40]}..."


class TeamsFile:
    """The teams of a file that may change; the last good ones while it is missing or wrong.

    A change counts once the file has stayed as it is between two looks: an editor that writes in
    place, or a copy over a slow link, would otherwise show half of it.
    """

    def __init__(self, path: Path) -> None:
        """Raises TeamsError."""
        self._path = path
        self._signature = _signature(path)
        self._seen = self._signature
        self._told = ""
        self.teams = read_teams(path)

    def look(self) -> bool:
        """Reads the file again if it has changed; returns whether there are new teams."""
        signature = _signature(self._path)
        settled = signature == self._seen
        self._seen = signature
        if signature == self._signature or not settled:
            return False
        try:
            teams = read_teams(self._path)
        except TeamsError as error:
            if signature is not None:
                self._signature = signature  # one that is missing may come back as it was
            if str(error) != self._told:
                self._told = str(error)
                logger.error("%s. The teams stay as they were before.", error)
            return False
        self._signature, self._told, self.teams = signature, "", teams
        logger.info("teams read again teams=%d", len(teams.declared))
        return True


def _signature(path: Path) -> tuple[int, int, int] | None:
    """What changes with a file's content; None if it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
