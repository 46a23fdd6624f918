"""Edits a teams file in place: whatever else is in it, comments too, stays as it is.

An edit is a change of a few lines of text. What comes out is read again and compared with what was
wanted before it replaces the file, so that a file of an unusual shape is refused and never spoilt.
"""

import contextlib
import os
import re
import tomllib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from logitstream.files import locked, write_atomically
from teacher_server.errors import TeamsError
from teacher_server.teams.declaration import Declared, Teams, Token, parse_teams, read_text

HEADER = """\
# Who may use the teacher; docs/sharing.md explains it. `teacher-server team` edits this file and keeps
# what else is in it. A service reads it again within a few seconds of a change.
"""
NEW_MODE = 0o600

Edit = Callable[[str, Teams | None], str]
"""The text and what it declares (None: nothing yet) to the new text."""


def edit_file(path: Path, edit: Edit, *, create: bool = False) -> Teams:
    """Changes the file under a lock, all or nothing; returns what it declares now.

    Raises TeamsError.
    """
    path = Path(os.path.realpath(path))
    try:
        with locked(path.parent):
            if create and not path.exists():
                text, before = HEADER, None
            else:
                text = read_text(path)
                before = parse_teams(text, str(path))
            new = edit(text, before)
            after = parse_teams(new, str(path))
            _replace(path, new)
    except OSError as error:
        raise TeamsError(f"cannot write {path}: {error.strerror}") from None
    return after


def add_team(text: str, declared: Declared) -> str:
    """The text with one more team at its end."""
    team = declared.team
    lines = [f"[teams.{team.name}]", f"weight = {team.weight:g}"]
    lines.append(f"scopes = {_strings(sorted(team.scopes))}")
    if declared.tokens:
        lines += ["tokens = [", *(f"  {token_entry(token)}," for token in declared.tokens), "]"]
    if declared.certificates:
        lines.append(f"certificates = {_strings(declared.certificates)}")
    return f"{text.rstrip()}\n\n" + "\n".join(lines) + "\n"


def set_tokens(text: str, declared: Declared, tokens: tuple[Token, ...]) -> str:
    """The text with other tokens of a team; those that stay keep their place and their comments.

    Raises TeamsError.
    """
    name = declared.team.name
    if not declared.tokens:
        entry = "\n".join(f"  {token_entry(token)}," for token in tokens)
        return _insert(text, name, f"tokens = [\n{entry}\n]", {"tokens": _tables(tokens)})
    start, end = _statement(text, name, "tokens")
    array = text[start:end]
    kept = {token.digest: token for token in tokens}
    for old in declared.tokens:
        place = re.search(r"\{[^{}]*" + old.digest.hex() + r"[^{}]*\}[ \t]*,?", array)
        if place is None:
            raise _unusual(name, "tokens")
        new = kept.pop(old.digest, None)
        if new is None:
            before, after = array[: place.start()], array[place.end() :]
            # The whole line, with its comment, if nothing else is on it.
            line = re.match(r"[ \t]*(#[^\n]*)?\n", after)
            if line and not before.rpartition("\n")[2].strip():
                before, after = before[: before.rfind("\n") + 1], after[line.end() :]
            array = before + after
        elif new != old:
            array = f"{array[: place.start()]}{token_entry(new)},{array[place.end() :]}"
    opening = array.index("[") + 1
    added = "".join(f"\n  {token_entry(token)}," for token in kept.values())
    rest = array[opening:]
    if added and not rest.startswith("\n"):
        added += "\n  "
        rest = rest.lstrip()
    new_text = text[:start] + array[:opening] + added + rest + text[end:]
    order = [token for token in tokens if token.digest in kept]
    order += [token for token in tokens if token.digest not in kept]
    return _verified(text, new_text, name, {"tokens": _tables(tuple(order))})


def set_disabled(text: str, declared: Declared, disabled: bool) -> str:
    """The text with a team disabled or not. Raises TeamsError."""
    name = declared.team.name
    value = f"disabled = {str(disabled).lower()}"
    wanted = {"disabled": disabled}
    try:
        start, end = _statement(text, name, "disabled")
    except TeamsError:
        return _insert(text, name, value, wanted)
    line = re.sub(r"=\s*(true|false)", f"= {str(disabled).lower()}", text[start:end], count=1)
    return _verified(text, text[:start] + line + text[end:], name, wanted)


def token_entry(token: Token) -> str:
    """One token as TOML."""
    if token.expires is None:
        return f'{{ sha256 = "{token.digest.hex()}" }}'
    return f'{{ sha256 = "{token.digest.hex()}", expires = {_time(token.expires)} }}'


def _time(moment: datetime) -> str:
    moment = moment.astimezone(UTC)
    midnight = moment.hour == moment.minute == moment.second == moment.microsecond == 0
    return f"{moment:%Y-%m-%d}" if midnight else f"{moment:%Y-%m-%dT%H:%M:%SZ}"


def _tables(tokens: tuple[Token, ...]) -> list[dict[str, Any]]:
    return [tomllib.loads(f"t = {token_entry(token)}")["t"] for token in tokens]


def _strings(values: Any) -> str:
    quoted = (value.replace("\\", "\\\\").replace('"', '\\"') for value in values)
    return "[" + ", ".join(f'"{value}"' for value in quoted) + "]"


def _table(text: str, name: str) -> tuple[int, int]:
    """Where the body of [teams.NAME] begins and ends. Raises TeamsError."""
    quoted = re.escape(name)
    header = re.compile(
        rf"^[ \t]*\[[ \t]*teams[ \t]*\.[ \t]*(?:{quoted}|\"{quoted}\"|'{quoted}')[ \t]*\][^\n]*\n?",
        re.MULTILINE,
    )
    found = header.search(text)
    if found is None:
        raise _unusual(name, "a header of its own")
    following = re.compile(r"^[ \t]*\[", re.MULTILINE)
    place = found.end()
    # A line that begins with a bracket may be inside a list: a header is where the text before it is
    # whole.
    for one in following.finditer(text, found.end()):
        with contextlib.suppress(ValueError):
            tomllib.loads(text[found.start() : one.start()])
            return place, one.start()
    return place, len(text)


def _statement(text: str, name: str, key: str) -> tuple[int, int]:
    """Where `key = value` of a team begins and ends. Raises TeamsError."""
    start, end = _table(text, name)
    for found in re.finditer(rf"^[ \t]*(?:{key}|\"{key}\")[ \t]*=", text[start:end], re.MULTILINE):
        first = start + found.start()
        last = first
        while last < end:
            newline = text.find("\n", last)
            last = end if newline < 0 else newline + 1
            with contextlib.suppress(ValueError):
                if key in tomllib.loads(text[first:last]):
                    return first, last
    raise _unusual(name, key)


def _insert(text: str, name: str, line: str, wanted: dict[str, Any]) -> str:
    start, _ = _table(text, name)
    head = text[:start] if text[:start].endswith("\n") else text[:start] + "\n"
    return _verified(text, f"{head}{line}\n{text[start:]}", name, wanted)


def _verified(before: str, after: str, name: str, wanted: dict[str, Any]) -> str:
    """`after`, if it differs from `before` in what is wanted and in nothing else."""
    expected = tomllib.loads(before)
    expected["teams"][name] |= wanted
    try:
        same = tomllib.loads(after) == expected
    except ValueError:
        same = False
    if not same:
        raise _unusual(name, next(iter(wanted)))
    return after


def _unusual(name: str, what: str) -> TeamsError:
    return TeamsError(
        f"cannot find {what} of team {name} where this command looks for it: it edits teams that are "
        f"written as a table [teams.{name}] with one key per line. Nothing was changed; edit the file "
        "by hand."
    )


def _replace(path: Path, text: str) -> None:
    mode = path.stat().st_mode & 0o777 if path.exists() else NEW_MODE
    write_atomically(path, text.encode(), mode)
