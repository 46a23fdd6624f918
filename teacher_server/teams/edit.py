"""Edits a teams file in place and keeps everything else in it: comments, order and spacing."""

import os
import tomllib
from collections.abc import Callable, Iterable
from datetime import UTC, time
from pathlib import Path

import tomlkit
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import Array, InlineTable, Item, Table

from logitstream.files import locked, write_atomically
from teacher_server.errors import TeamsError
from teacher_server.teams.declaration import Declared, Teams, Token, parse_teams, read_text

HEADER = """\
# Who may use the teacher; docs/sharing.md explains it. `teacher-server team` edits this file and keeps
# what else is in it. A service reads it again within a few seconds of a change.
"""
NEW_MODE = 0o600

Edit = Callable[[tomlkit.TOMLDocument, Teams | None], None]
"""Changes the document, given what it declares (None: nothing yet)."""


def edit_file(path: Path, edit: Edit, *, create: bool = False) -> None:
    """Changes the file under a lock, as a whole or not at all. Raises TeamsError."""
    path = Path(os.path.realpath(path))
    try:
        with locked(path.parent):
            text, teams, mode = HEADER, None, NEW_MODE
            if path.exists() or not create:
                text = read_text(path)
                teams = parse_teams(text, str(path))
                mode = path.stat().st_mode & 0o777
            document = tomlkit.parse(text)
            edit(document, teams)
            text = tomlkit.dumps(document)
            parse_teams(text, str(path))
            # Who may use the service is decided by this text, so that a library's slip must not pass.
            if tomllib.loads(text) != document.unwrap():
                raise TeamsError(f"cannot edit {path}. Nothing was changed; edit the file by hand.")
            write_atomically(path, text.encode(), mode)
    except OSError as error:
        raise TeamsError(f"cannot write {path}: {error.strerror}") from None
    except TOMLKitError as error:
        raise TeamsError(f"cannot edit {path}: {error}. Nothing was changed.") from None


def add_team(document: tomlkit.TOMLDocument, declared: Declared) -> None:
    """Adds a team at the end."""
    team = declared.team
    weight = int(team.weight) if team.weight.is_integer() else team.weight
    table = tomlkit.table()
    table |= {"weight": weight, "scopes": sorted(team.scopes)}
    if declared.tokens:
        table["tokens"] = _array(declared.tokens)
    if declared.certificates:
        table["certificates"] = list(declared.certificates)
    if "teams" in document:
        table.trivia.indent = "\n"  # an empty line above its header
    else:
        document["teams"] = tomlkit.table(is_super_table=True)
    document["teams"][team.name] = table  # type: ignore[index]


def set_tokens(
    document: tomlkit.TOMLDocument, declared: Declared, tokens: tuple[Token, ...]
) -> None:
    """Changes the tokens of a team; those that stay keep their comments. Raises TeamsError."""
    table = _find(document, declared.team.name)
    if "tokens" not in table:
        _put_first(table, "tokens", _array(tokens))
        return
    entries = table["tokens"]
    if not isinstance(entries, Array):
        raise _unusual(declared.team.name)
    wanted = {token.digest: token for token in tokens}
    for index, old in reversed([*enumerate(declared.tokens)]):
        new = wanted.pop(old.digest, None)
        if new is None:
            del entries[index]
        elif new != old:
            entries[index] = _entry(new)
    for token in reversed(wanted.values()):
        entries.insert(0, _entry(token))


def set_disabled(document: tomlkit.TOMLDocument, name: str, disabled: bool) -> None:
    """Disables or enables a team. Raises TeamsError."""
    table = _find(document, name)
    if "disabled" in table:
        table["disabled"] = disabled
    else:
        _put_first(table, "disabled", tomlkit.item(disabled))


def _find(document: tomlkit.TOMLDocument, name: str) -> Table:
    table = document["teams"][name]  # type: ignore[index]
    # A team without a header of its own is spread over dotted keys, or in braces.
    if not isinstance(table, Table) or table.is_super_table():
        raise _unusual(name)
    return table


def _put_first(table: Table, key: str, item: Item) -> None:
    """Adds a key right below the header.

    Added at the end, it would come between the next table's header and the comment above that, which
    for TOML belongs to this table.
    """
    if table.value.body:
        table.value._insert_at(0, tomlkit.key(key), item)
    else:
        table.add(key, item)


def _array(tokens: Iterable[Token]) -> Array:
    """Returns a list with one token per line."""
    array = tomlkit.array()
    array.extend(map(_entry, tokens))
    return array.multiline(True)


def _entry(token: Token) -> InlineTable:
    entry = tomlkit.inline_table()
    entry["sha256"] = token.digest.hex()
    if token.expires is not None:
        moment = token.expires.astimezone(UTC)
        entry["expires"] = moment if moment.time() != time() else moment.date()
    return entry


def _unusual(name: str) -> TeamsError:
    return TeamsError(
        f"cannot edit team {name}: this command edits teams that are written as a table [teams.{name}] "
        "with one key per line. Nothing was changed; edit the file by hand."
    )
