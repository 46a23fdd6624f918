"""The command line of both sides: flags and @file.toml to a configuration, or a line per mistake.

A command is a pydantic class: its fields are the options, and their docstrings the help, which tyro
draws. The arguments are read here, because tyro stops at the first mistake, says it in a box and
cannot tell a value of a file from a flag; pydantic then checks all values at once.
"""

import difflib
import re
import tomllib
import types
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pydantic
import tyro
from pydantic.fields import FieldInfo

from logitstream.connection import check_address

Command = type[pydantic.BaseModel]
HELP = ("-h", "--help")
FILES = (
    "Options can also stand in a TOML file, given as @FILE.toml: `batch_size = 16` there is "
    "--batch-size 16. What comes later on the command line wins."
)
SERVICES = (
    "The token of a service comes from the environment variable TEACHER_TOKEN, or the one that a "
    "connection file names; never from an option."
)
OF_SIZE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")
"""Errors of pydantic about values that are numbers."""
AtAddress = Annotated[
    tyro.conf.Positional[str],
    tyro.conf.arg(metavar="HOST:PORT"),
    pydantic.AfterValidator(check_address),
]
"""The service that a command is about."""
KINDS = {int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True, slots=True)
class Group:
    """Commands under one name, such as a program's."""

    description: str
    commands: Mapping[str, "Command | Group"]
    files_of: Mapping[str, str] = field(default_factory=dict)
    """A command, and the one whose files it takes too: what only that one knows is passed over."""


class WrongUsage(ValueError):
    """What is wrong with a command line, one line for each mistake."""

    def __init__(self, mistakes: Sequence[str]) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = tuple(mistakes)


def parse(prog: str, group: Group, arguments: Sequence[str]) -> Any:
    """The configuration of the command that was given.

    Prints the help and raises SystemExit where it is asked for; raises WrongUsage.
    """
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", ())
    if name in HELP:
        print(_overview(prog, group))
        raise SystemExit(0)
    if name == "--version":
        print(f"{prog} {version('logitstream')}")
        raise SystemExit(0)
    if name not in group.commands:
        what = "a command is missing"
        if name:
            what = f"{name[:40]!r} is not a command{_near(name, group.commands)}"
        raise WrongUsage([f"{what}: give {' or '.join(group.commands)}{_see(prog)}"])
    command = group.commands[name]
    if isinstance(command, Group):
        return parse(f"{prog} {name}", command, rest)
    if set(HELP) & {*rest}:
        print_help(f"{prog} {name}", command)
        raise SystemExit(0)
    return _Reader(prog, name, command, group).read(rest)


def read_settings(
    prog: str, name: str, command: Command, settings: Mapping[str, Any], where: str
) -> Any:
    """The configuration of a command that a table stands for, checked like a TOML file.

    where: what the table is called in messages. Raises WrongUsage.
    """
    reader = _Reader(prog, name, command, Group("", {name: command}))
    for key, value in _flattened(settings):
        reader.read_setting(where, key, value)
    return reader.finished()


def print_help(prog: str, command: Command) -> None:
    """The options of one command."""
    notes = [FILES, SERVICES] if {"ca", "cert", "key"} <= {*command.model_fields} else [FILES]
    description = "\n\n".join([" ".join((command.__doc__ or "").split()), *notes])
    try:
        tyro.cli(command, prog=prog, description=description, args=["--help"])
    except SystemExit as ended:
        if ended.code:
            raise


@dataclass(frozen=True, slots=True)
class _Option:
    """A field of a command, or of a section of one."""

    path: tuple[str, ...]
    name: str
    """As a flag, without the dashes in front: "batch.max-tokens"."""
    field: FieldInfo
    kinds: tuple[Any, ...]
    """What its type is made of: (int, NoneType)."""

    @property
    def is_positional(self) -> bool:
        return tyro.conf.Positional in self.field.metadata

    @property
    def is_flag(self) -> bool:
        return self.kinds == (bool,)

    @property
    def is_list(self) -> bool:
        return any(get_origin(kind) in (list, tuple) for kind in self.kinds)

    @property
    def label(self) -> str:
        """How a person knows it."""
        if self.is_positional:  # tyro.conf.arg(metavar=...)
            metavars = [getattr(one, "metavar", None) for one in self.field.metadata]
            return next(filter(None, metavars), self.name.upper())
        return f"--{self.name}"

    @property
    def allowed(self) -> str:
        """What it takes."""
        if self.is_list:
            return "one or more values"
        for kind in self.kinds:
            if get_origin(kind) is Literal:
                return " or ".join(map(str, get_args(kind)))
        return next((KINDS[kind] for kind in self.kinds if kind in KINDS), "a value")

    @property
    def meaning(self) -> str:
        """The first sentence of its help."""
        text = " ".join((self.field.description or "").split())
        return re.split(r"(?<=\w)\. |[;.]$", text)[0]


def _options(command: Command, path: tuple[str, ...] = ()) -> dict[str, _Option]:
    """All of a command, by the name of the flag."""
    found: dict[str, _Option] = {}
    for name, info in command.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, pydantic.BaseModel):
            found |= _options(info.annotation, (*path, name))
            continue
        # tyro.conf.arg(name=...) gives a field another name.
        shown = next((one.name for one in info.metadata if getattr(one, "name", None)), name)
        flag = ".".join((*path, shown)).replace("_", "-")
        found[flag] = _Option((*path, name), flag, info, _kinds(info.annotation))
    return found


def _kinds(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(kind for one in get_args(annotation) for kind in _kinds(one))
    return (annotation,)


@dataclass(slots=True)
class _Reader:
    """Reads the arguments of one command, and collects what is wrong with them."""

    prog: str
    name: str
    command: Command
    group: Group
    options: dict[str, _Option] = field(init=False)
    given: dict[tuple[str, ...], Any] = field(default_factory=dict)
    """Texts, lists of them and booleans, by the path of the field."""
    labels: dict[tuple[str, ...], str] = field(default_factory=dict)
    """Where each was given, for a person."""
    mistakes: list[str] = field(default_factory=list)
    all_read: bool = True
    """Whether every file could be read: what is missing may be in another."""
    passed_over: bool = False
    """Whether values behind an unknown option were: what is missing may be among them."""

    def __post_init__(self) -> None:
        self.options = _options(self.command)

    def _takers(self, name: str) -> list[str]:
        """The commands that have an option."""
        return [
            one
            for one, command in self.group.commands.items()
            if not isinstance(command, Group) and name in _options(command)
        ]

    def read(self, arguments: Sequence[str]) -> pydantic.BaseModel:
        """Raises WrongUsage."""
        waiting = deque(arguments)
        free: list[str] = []
        """Values that no option took."""
        before: _Option | None = None
        while waiting:
            argument = waiting.popleft()
            if argument.startswith("@"):
                self._read_file(Path(argument[1:]))
            elif _is_option(argument):
                before = self._read_option(argument, waiting)
            elif any(option.is_positional for option in self.options.values()):
                free.append(argument)
            elif argument.endswith(".toml") and Path(argument).is_file():
                self.all_read = False
                self._wrong(f"{argument} is no option: give @{argument} to read options from it")
            else:
                self._wrong(f"{argument[:40]!r} belongs to no option{_taken(before)}")
        self._read_positional(free)
        return self.finished()

    def finished(self) -> pydantic.BaseModel:
        """What was read, checked. Raises WrongUsage."""
        config = self._checked()
        if config is None or self.mistakes:
            see = _see(f"{self.prog} {self.name}")
            raise WrongUsage([f"{one}{see}" for one in self.mistakes])
        return config

    def _wrong(self, mistake: str) -> None:
        self.mistakes.append(mistake)

    def _give(self, option: _Option, value: Any, label: str) -> None:
        if value == "None" and types.NoneType in option.kinds:
            value = None
        self.given[option.path] = value
        self.labels[option.path] = label

    def _refused(self, option: _Option) -> None:
        """It was given, so it is not missing; and what was wrong with it has been said."""
        self.given[option.path] = None
        self.labels.pop(option.path, None)

    def _read_option(self, argument: str, waiting: deque[str]) -> _Option | None:
        flag, equals, value = argument.partition("=")
        option = self.options.get(flag.lstrip("-").replace("_", "-"))
        if option is None or option.is_positional or not flag.startswith("--"):
            while waiting and _is_value(waiting[0]):
                waiting.popleft()  # of the option that there is not; never shown, it may be a secret
                self.passed_over = True
            self._wrong(self._unknown(flag, flag.lstrip("-"), "--"))
            return None
        if option.is_flag:
            if equals:
                self._wrong(f"{option.label} takes no value, got {value[:40]!r}")
            self._give(option, True, option.label)
            return option
        values = [value] if equals else []
        while waiting and _is_value(waiting[0]) and (option.is_list or not values):
            values.append(waiting.popleft())
        if values:
            self._give(option, values if option.is_list else values[0], option.label)
        else:
            self._wrong(f"{option.label} needs {option.allowed}, got nothing")
            self._refused(option)
        return option

    def _read_positional(self, free: list[str]) -> None:
        for option in self.options.values():
            if not (option.is_positional and free):
                continue
            taken = free[:] if option.is_list else free[:1]
            del free[: len(taken)]
            self._give(option, taken if option.is_list else taken[0], option.label)
        for one in free:
            self._wrong(f"{one[:40]!r} is one too many")

    def _read_file(self, path: Path) -> None:
        try:
            settings = _flattened(tomllib.loads(path.read_text()))
        except OSError as error:
            self.all_read = False
            self._wrong(f"cannot read {path}: {error.strerror}")
        except (ValueError, RecursionError) as error:
            self.all_read = False
            why = "it is nested too deep" if isinstance(error, RecursionError) else error
            self._wrong(f"{path} is not TOML: {why}")
        else:
            for key, value in settings:
                self.read_setting(str(path), key, value)

    def read_setting(self, where: str, key: str, value: Any) -> None:
        """One key of a table. Raises nothing: what is wrong is said in the end."""
        name = key.replace("_", "-")
        option, label = self.options.get(name), f"{key} in {where}"
        if option is None:
            if self.group.files_of.get(self.name) not in self._takers(name):
                self._wrong(self._unknown(label, name, ""))
            return
        values = value if isinstance(value, list) else [value]
        are_flags = {isinstance(one, bool) for one in values}
        if (
            any(isinstance(one, dict | list) or _is_huge(one) for one in values)
            or (isinstance(value, list) and not option.is_list)
            or are_flags - {option.is_flag}
        ):
            allowed = KINDS[bool] if option.is_flag else option.allowed
            self._wrong(f"{label} must be {allowed}, got {_toml(value)}")
            self._refused(option)
        elif option.is_flag:
            self._give(option, value, label)
        else:
            texts = [str(one) for one in values]
            self._give(option, texts if option.is_list else texts[0], label)

    def _unknown(self, label: str, name: str, dashes: str) -> str:
        if name.replace("_", "-") in ("token", "teacher-token"):
            return f"{label} is not an option: set the environment variable TEACHER_TOKEN instead"
        own = self.options.get(name.replace("_", "-"))
        if own is not None:
            return f"{label} is not an option of {self.name}: give {own.label} without a name"
        if takers := self._takers(name.replace("_", "-")):
            return f"{label} is an option of {' and '.join(takers)}, not of {self.name}"
        near = _near(name, [one for one, o in self.options.items() if not o.is_positional], dashes)
        return f"{label} is not an option of {self.name}{near}"

    def _checked(self) -> pydantic.BaseModel | None:
        """What pydantic makes of it; None after mistakes."""
        tree: dict[str, Any] = {}
        for path, value in self.given.items():
            node = tree
            for name in path[:-1]:
                node = node.setdefault(name, {})
            node[path[-1]] = value
        known = {path for path in self.given if path not in self.labels}
        """Wrong already."""
        by_path = {option.path: option for option in self.options.values()}
        try:
            return self.command.model_validate(tree)
        except pydantic.ValidationError as error:
            for found in error.errors():
                path = tuple(one for one in found["loc"] if isinstance(one, str))
                if path in known:
                    continue
                option = by_path.get(path)
                if option is None:
                    self._wrong(_plain(found))
                elif found["type"] == "missing":
                    if self.all_read and not (option.is_positional and self.passed_over):
                        self._wrong(f"{option.label} is missing: {option.meaning}")
                elif found["type"] == "value_error":  # of a validator, which says it all
                    self._wrong(f"{self.labels[path]}: {_plain(found)}")
                else:
                    got = found["input"] if found["type"] in OF_SIZE else repr(found["input"])
                    self._wrong(f"{self.labels[path]} {_must(found, option)}, got {got}")
        return None


def _must(found: Any, option: _Option) -> str:
    """What pydantic wanted, in our words."""
    limits = found.get("ctx", {})
    match found["type"]:
        case "greater_than_equal":
            return f"must be at least {limits['ge']:g}"
        case "greater_than":
            return f"must be more than {limits['gt']:g}"
        case "less_than_equal":
            return f"must be at most {limits['le']:g}"
        case "string_too_short":
            return "must not be empty"
        case "string_pattern_mismatch":
            return f"must look like {limits['pattern']}"
        case "literal_error":
            return f"must be {limits['expected']}"
        case "finite_number":
            return "must be a finite number"
        case "int_parsing" | "float_parsing" | "int_from_float" | "int_parsing_size":
            return f"must be {option.allowed}"
    return _plain(found)


def _plain(found: Any) -> str:
    return found["msg"].removeprefix("Value error, ")


def _flattened(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """A table within a table has a dotted name."""
    found = []
    for key, value in content.items():
        if isinstance(value, dict) and value:
            found += _flattened(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


def _is_huge(value: Any) -> bool:
    """A whole number that no option takes; of those with thousands of digits there is no text."""
    return isinstance(value, int) and value.bit_length() > 64


def _toml(value: Any) -> str:
    """A value about as it stands in the file."""
    if isinstance(value, bool):
        return str(value).lower()
    if _is_huge(value):
        return "a number of more than 64 bits"
    if isinstance(value, str):
        return f'"{value[:40]}"'
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value[:3]))}{', ...' if len(value) > 3 else ''}]"
    return "a table" if isinstance(value, dict) else str(value)


def _is_option(argument: str) -> bool:
    return re.match(r"--?[A-Za-z]|--$", argument) is not None


def _is_value(argument: str) -> bool:
    return not _is_option(argument) and not argument.startswith("@")


def _taken(before: _Option | None) -> str:
    if before is None or before.is_list:
        return ""
    return f": {before.label} takes {'no' if before.is_flag else 'one'} value"


def _near(name: str, names: Any, dashes: str = "") -> str:
    near = difflib.get_close_matches(name.replace("_", "-"), list(names), 1)
    return f" (did you mean {dashes}{near[0]}?)" if near else ""


def _see(prog: str) -> str:
    return f"; see {prog} --help"


def _overview(prog: str, group: Group) -> str:
    """The help of a program: its commands, each with the first sentence of what it does."""
    width = max(map(len, group.commands))
    lines = [f"  {name:{width}}  {_summary(one)}" for name, one in group.commands.items()]
    last = [f"{prog} COMMAND --help lists the options of a command; {prog} --version."]
    last += [FILES, SERVICES]
    return "\n".join(
        ["usage: " + prog + " COMMAND ...", "", group.description, "", *lines, "", *last]
    )


def _summary(command: "Command | Group") -> str:
    if isinstance(command, Group):
        return command.description
    return re.split(r"(?<=\.)\s+", (command.__doc__ or "").strip())[0]
