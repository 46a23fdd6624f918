"""Finds, reads and describes single options: what cyclopts calls arguments."""

import json
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

from cyclopts import Token
from cyclopts.argument import Argument, ArgumentCollection

from logitstream.options import Alias

KINDS = {int: "an integer", float: "a number", bool: "true or false"}


def find(arguments: ArgumentCollection, flag: str) -> Argument | None:
    """Returns the option of a flag, such as "--batch.max-tokens"."""
    try:
        argument, _, _ = arguments.match(flag.replace("_", "-"))
    except ValueError:
        return None
    return None if argument.children else argument


def allows_none(argument: Argument) -> bool:
    return types.NoneType in get_args(argument.hint)


def is_list(argument: Argument) -> bool:
    return get_origin(argument.hint) in (list, tuple)


def label_argument(argument: Argument) -> str:
    """Names an option as it was given: as a flag, a variable or a setting in a file."""
    token = argument.tokens[0] if argument.tokens else None
    if token is None or token.keyword is None:
        return argument.name if argument.index is None else argument.name.lstrip("-").upper()
    return label_token(token)


def label_token(token: Token) -> str:
    in_file = token.source not in ("cli", "env")
    return f"{token.keyword} in {token.source}" if in_file else str(token.keyword)


def is_table(argument: Argument) -> bool:
    return get_origin(argument.hint) is dict


def is_in_table(argument: Argument, token: Token) -> bool:
    """Whether a value belongs to a table, each name in which is a setting of its own.

    An option may be a table or a single value: --teacher.math A, or --teacher A.
    """
    may_be = any(get_origin(one) is dict for one in get_args(argument.hint))
    return is_table(argument) or (may_be and "." in (token.keyword or ""))


def keys_of(name: str) -> tuple[str, ...]:
    """Returns the names in a table of a dotted name: ("optim",) of training.optim."""
    return tuple(key.replace("-", "_") for key in name.split(".")[1:])


def append_to_table(argument: Argument, token: Token) -> None:
    """Adds a value to a table, unless an earlier source gave the same name another."""
    for other in argument.tokens:
        if other.keys == token.keys and other.source != token.source:
            return
    argument.append(token)


def meaning(argument: Argument) -> str:
    """Returns the first sentence of an option's help."""
    return re.split(r"(?<=\w)\. |[;.]$", argument.parameter.help or "")[0]


def allowed(argument: Argument) -> str:
    """Says what an option takes."""
    if is_list(argument):
        return "one or more values"
    kinds = [argument.hint, *get_args(argument.hint)]
    for kind in kinds:
        if get_origin(kind) is Literal:
            return " or ".join(map(str, get_args(kind)))
    return next((KINDS[kind] for kind in kinds if kind in KINDS), "a value")


def plain(found: Any) -> str:
    """Says what pydantic wanted, in our words."""
    text = found["msg"].removeprefix("Value error, ").partition(", unable to")[0]
    return re.sub(r"^(Input|String|List|Tuple) should (\w+)", r"must \2", text)


def is_plain(value: Any) -> bool:
    """Tells whether some option can take a value of a file; Python prints no number that is
    huge."""
    is_huge = isinstance(value, int) and value.bit_length() > 64
    return not (value is None or is_huge or isinstance(value, dict | list))


def show(value: Any) -> str:
    """Shows a value about as it stands in the file."""
    if isinstance(value, int) and not is_plain(value):
        return "a number of more than 64 bits"
    if isinstance(value, list):
        return f"[{', '.join(map(show, value[:3]))}{', ...' if len(value) > 3 else ''}]"
    if isinstance(value, dict):
        return "a table"
    return json.dumps(value[:40] if isinstance(value, str) else value, default=str)


@dataclass(slots=True)
class Names:
    """Knows by which names options were given."""

    aliases: Mapping[str, Alias]
    prefix: str = ""
    """Of the environment variables that stand for options."""
    given: dict[tuple[str, ...], dict[str, str]] = field(default_factory=dict)
    """Of each option, its names as they stand in files, and as messages show them."""

    def note(self, argument: Argument, token: Token) -> None:
        """Remembers under which name an option was given."""
        if argument.keys and token.keyword is not None and not is_in_table(argument, token):
            names = self.given.setdefault(argument.keys, {})
            names.setdefault(self._read(token), label_token(token))

    def find_conversion(self, token: Token) -> Callable[[str, Mapping[str, str]], str] | None:
        """Returns what turns a value under this name into the option's own."""
        name = f"_{self._read(token)}"
        found = (alias for other, alias in self.aliases.items() if name.endswith(f"_{other}"))
        return next((alias.convert for alias in found if alias.convert), None)

    def settle(self, arguments: ArgumentCollection) -> list[str]:
        """Turns values under other names into ours; explains which options have two names."""
        given = {
            argument.keys[-1]: argument.tokens[-1].value
            for argument in arguments
            if argument.keys and argument.tokens
        }
        for argument in arguments:
            for index, token in enumerate(argument.tokens):
                if (convert := self.find_conversion(token)) is not None:
                    argument.tokens[index] = token.evolve(value=convert(token.value, given))
        return [
            f"{' and '.join(names.values())} are one setting: give one of them"
            for names in self.given.values()
            if len(names) > 1
        ]

    def _read(self, token: Token) -> str:
        name = (token.keyword or "").lower().lstrip("-")
        if token.source == "env":
            name = name.removeprefix(self.prefix.lower())
        return re.sub("[.-]", "_", name)
