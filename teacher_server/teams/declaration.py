"""Reads the teams file: who shares a teacher, with which weight, for what, and up to which limits.

One TOML file declares the teams, docs/sharing.md shows it:

    [teams.search]
    weight = 3
    scopes = ["score"]
    tokens = [{ sha256 = "9f86d0...", expires = 2027-01-01 }]
    certificates = ["search.trainers.lab"]
    limits = { max_tokens_per_day = 2_000_000_000 }

The file holds only the SHA-256 of a token. A fast hash is enough: a token is 256 random bits, so
there is nothing to guess that a slow one would protect.
"""

import hashlib
import logging
import os
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from teacher_server.errors import TeamsError

logger = logging.getLogger(__name__)

Scope = Literal["score", "generate", "hidden", "dense", "admin"]
SCOPES: tuple[str, ...] = get_args(Scope)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
SHA256 = re.compile(r"[0-9a-f]{64}")
TOKEN_PREFIX = "lst_"
"""Begins every token, so that scanners for leaked secrets recognise one."""
MAX_WEIGHT = 1e6
MAX_NBYTES = 16 << 20
"""Limit of the file's size, far above any real one: a wrong path must not fill the memory."""
TABLE = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


def _to_digest(value: object) -> bytes:
    if not isinstance(value, str) or not SHA256.fullmatch(value):
        raise ValueError("not a SHA-256")
    return bytes.fromhex(value)


def _to_moment(value: object) -> datetime:
    """Takes a date as its midnight, and a time without an offset as one, in UTC."""
    if isinstance(value, datetime):
        if value.tzinfo is None:
            return value.replace(tzinfo=UTC)
        try:
            return value.astimezone(UTC)
        except OverflowError:
            raise ValueError("outside the years 1 to 9999") from None
    if isinstance(value, date):
        return datetime.combine(value, time(), UTC)
    raise ValueError("not a date")


Limit = Annotated[int, Field(strict=True, gt=0, lt=1 << 63)] | None


@dataclass(frozen=True, slots=True)
class TeamLimits:
    """Limits what one team may use of the whole service; None is no limit."""

    __pydantic_config__ = TABLE
    max_tokens_in_flight: Limit = None
    """Tokens that are admitted and not answered."""
    max_tokens_per_second: Limit = None
    """Tokens given to the model."""
    max_tokens_per_day: Limit = None
    """Tokens given to the model from midnight to midnight, UTC."""
    max_request_tokens: Limit = None
    """Tokens of one request."""


@dataclass(frozen=True, slots=True)
class Team:
    """Describes one team as it is declared now."""

    name: str
    weight: float = 1.0
    scopes: frozenset[str] = frozenset({"score"})
    limits: TeamLimits = TeamLimits()


DEFAULT_TEAM = Team("default", scopes=frozenset(SCOPES))
"""The team of every caller where no teams are declared."""


@dataclass(frozen=True, slots=True)
class Token:
    """Stands for a token whose text is not kept."""

    __pydantic_config__ = TABLE
    digest: Annotated[bytes, BeforeValidator(_to_digest), Field(validation_alias="sha256")]
    """SHA-256 of the token, 32 bytes."""
    expires: Annotated[datetime, BeforeValidator(_to_moment)] | None = None
    """The token is refused from this moment on; None: never."""


@dataclass(frozen=True, slots=True)
class Declared:
    """Joins one team with the ways in which its members prove who they are."""

    team: Team
    tokens: tuple[Token, ...] = ()
    certificates: tuple[str, ...] = ()
    """Names, common or subject alternative, of client certificates."""
    disabled: bool = False


class Teams:
    """Finds the teams of one file by name, token and certificate."""

    def __init__(self, declared: Iterable[Declared]) -> None:
        self.declared = {entry.team.name: entry for entry in declared}
        self.by_digest = {
            token.digest: (entry, token)
            for entry in self.declared.values()
            for token in entry.tokens
        }
        self.by_certificate = {
            name: entry for entry in self.declared.values() for name in entry.certificates
        }


def token_digest(token: str) -> bytes:
    """Hashes a token with SHA-256."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def read_teams(path: Path) -> Teams:
    """Reads the teams that a file declares. Raises TeamsError, which names the file, team and key."""
    return parse_teams(read_text(path), str(path))


def read_text(path: Path) -> str:
    """Reads the text of a teams file. Raises TeamsError."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_NBYTES + 1)
    except OSError as error:
        raise TeamsError(f"cannot read the teams file {path}: {error.strerror}") from None
    if len(data) > MAX_NBYTES:
        raise TeamsError(f"{path} is larger than {MAX_NBYTES >> 20} MiB: is it a teams file?")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise TeamsError(f"{path} is not TOML: it is not UTF-8 text") from None


def parse_teams(text: str, where: str) -> Teams:
    """Parses TOML text into teams; `where` names it in errors. Raises TeamsError."""
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise TeamsError(f"{where} is not TOML: {why}") from None
    try:
        tables = _File.model_validate(content).teams
    except ValidationError as error:
        raise TeamsError(_explain(error, where)) from None
    if not tables:
        raise TeamsError(
            f"{where}: it declares no team, so no caller would be accepted. Add one with "
            f"`teacher-server team add NAME --teams {where}`."
        )
    declared = [table.declare(name) for name, table in tables.items()]
    _check_unshared(declared, where)
    return Teams(declared)


class _Table(BaseModel):
    """Checks the table of one team."""

    model_config = TABLE
    weight: Annotated[float, Field(strict=True, gt=0, le=MAX_WEIGHT, allow_inf_nan=False)] = 1.0
    scopes: frozenset[Scope] = frozenset({"score"})
    tokens: tuple[Token, ...] = ()
    certificates: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    limits: TeamLimits = TeamLimits()
    disabled: Annotated[bool, Field(strict=True)] = False

    def declare(self, name: str) -> Declared:
        team = Team(name, self.weight, frozenset(self.scopes), self.limits)
        return Declared(team, self.tokens, self.certificates, self.disabled)


class _File(BaseModel):
    """Checks the whole file."""

    model_config = TABLE
    teams: dict[Annotated[str, Field(pattern=f"^{NAME.pattern}$")], _Table] = {}


A_LIMIT = "a whole number of tokens above 0, or left out for no limit"
ALLOWED = {
    "": f"a table with {', '.join(sorted(_Table.model_fields))}",
    "name": "1 to 64 letters, digits, - and _, and begin with a letter or digit",
    "weight": f"a number above 0, at most {MAX_WEIGHT:.0f}",
    "scopes": f"a list of {', '.join(SCOPES)}",
    "scopes[]": f"one of {', '.join(SCOPES)}",
    "tokens": 'a list of tables such as { sha256 = "..." }',
    "tokens[]": "a table with sha256 and expires",
    "tokens[].sha256": "the SHA-256 of the token, 64 lower-case hex digits, and not the token itself",
    "tokens[].expires": "a date or a time such as 2027-01-01 or 2027-01-01T08:00:00Z, without "
    "quotes, in the years 1 to 9999 in UTC",
    "certificates": "a list of strings",
    "certificates[]": "a string that is not empty",
    "limits": f"a table with {', '.join(field.name for field in fields(TeamLimits))}",
    **{f"limits.{field.name}": A_LIMIT for field in fields(TeamLimits)},
    "disabled": "true or false",
}
"""What each key of a team's table must be; [] is an item of a list."""
UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")
"""What pydantic calls it in a model and in a dataclass."""


def _explain(error: ValidationError, where: str) -> str:
    """Describes the first mistake in one line: its place, what is allowed there, what was got."""
    mistake = error.errors(include_url=False, include_context=False)[0]
    is_unknown_key = mistake["type"] in UNKNOWN_KEY
    root, *path = mistake["loc"]
    key = str([root, *path][-1])
    got = f"the unknown key {key[:40]!r}" if is_unknown_key else _shown(mistake["input"])
    # It may be a token in the wrong place: errors are logged, and shown on other people's screens.
    if path[1:2] == ["tokens"] or TOKEN_PREFIX in got:
        got = "an unknown key" if is_unknown_key else "something else"
    if not path:
        return f"{where}: it must have tables [teams.NAME] and nothing else, got {got}"
    name, *path = path[:-1] if is_unknown_key else path
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    place = "name" if path == ["[key]"] else place.removeprefix(".")
    allowed = ALLOWED[re.sub(r"\[\d+\]", "[]", place)]
    subject = f"{place} must be" if place else "must be"
    team = name if NAME.fullmatch(str(name)) else _shown(name)
    return f"{where}: team {team}: {subject} {allowed}, got {got}"


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # thousands of digits, or of tables in tables
        return "something far too large"
    return text if len(text) <= 40 else f"{text[:40]}..."


def _check_unshared(teams: Iterable[Declared], where: str) -> None:
    """Raises TeamsError where it would be ambiguous which team a caller belongs to."""
    owners: dict[object, str] = {}
    for entry in teams:
        name = entry.team.name
        for index, token in enumerate(entry.tokens):
            if token.digest in owners:
                raise TeamsError(
                    f"{where}: team {name}: tokens[{index}].sha256 is there already, in team "
                    f"{owners[token.digest]}. Give every team tokens of its own."
                )
            owners[token.digest] = name
        for identity in entry.certificates:
            if (other := owners.setdefault(identity, name)) != name:
                raise TeamsError(
                    f"{where}: team {name}: certificates: {identity!r} is in team {other} already"
                )


class TeamsFile:
    """Follows a teams file that may change; keeps the last good teams while it is missing or wrong.

    A change counts once the file is the same at two looks in a row: an editor that writes in place,
    or a copy over a slow link, would otherwise be read half-written.
    """

    def __init__(self, path: Path) -> None:
        """Raises TeamsError."""
        self._path = path
        self._signature = _signature(path)
        """Of the content that `teams` came from, or that was refused."""
        self._seen = self._signature
        """At the last look."""
        self._logged = ""
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
                self._signature = signature  # a missing file may come back just as it was
            if str(error) != self._logged:
                self._logged = str(error)
                logger.error("%s. The teams stay as they were before.", error)
            return False
        self._signature, self._logged, self.teams = signature, "", teams
        logger.info("teams read again teams=%d", len(teams.declared))
        return True


def _signature(path: Path) -> tuple[int, int, int] | None:
    """Returns numbers that change with a file's content; None if the file is missing."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
