"""The command line of both programs: flags, environment and files become a checked configuration.

A command is a pydantic class: its fields are the options, and their docstrings the help. cyclopts
reads the arguments and prints the help; pydantic checks all values at once. Whatever either of them
refuses becomes one line per mistake, which says what was given and what is allowed.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import pydantic
from cyclopts import App, Parameter, Token
from cyclopts.argument import Argument, ArgumentCollection
from cyclopts.config import Env
from cyclopts.exceptions import CycloptsError, MissingArgumentError

from logitstream.option_arguments import (
    Names,
    allowed,
    allows_none,
    append_to_table,
    find,
    is_in_table,
    is_list,
    is_plain,
    is_table,
    keys_of,
    label_argument,
    meaning,
    plain,
    show,
)
from logitstream.options import ServiceOptions, Settings
from logitstream.settings_files import flatten, format_toml, read_settings_file

HELP = ("-h", "--help")
PREFIX = "LOGITSTREAM"
"""Of the environment variables that stand for options: LOGITSTREAM_TRAIN_BATCH_SIZE."""
FILES = (
    "Options can also come from a TOML or YAML file, given as @FILE or --config FILE, and from the "
    "environment: --some-option is some_option in a file and {prefix}_SOME_OPTION in the "
    "environment. The command line wins over the environment, the environment over files, a later "
    "file over an earlier one, and each of them over the default."
)
SERVICES = (
    "The token of a service comes from --token-file, from the environment variable TEACHER_TOKEN, "
    "or from the variable that a connection file names; it is never an option itself."
)

Command = type[Settings]


@dataclass(frozen=True, slots=True)
class Group:
    """Commands under one name, such as a program's."""

    description: str
    commands: Mapping[str, "Command | Group"]
    files_of: Mapping[str, str] = field(default_factory=dict)
    """Maps a command to another whose files it also takes; settings for only that one are
    ignored."""


class WrongUsage(ValueError):
    """What is wrong with a command line, one line for each mistake."""

    def __init__(self, mistakes: Sequence[str]) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = tuple(mistakes)


def parse(prog: str, group: Group, arguments: Sequence[str]) -> Any:
    """Returns the configuration of the command that was given.

    Prints help, version or the resolved configuration and raises SystemExit where that is asked
    for. Raises WrongUsage.
    """
    tokens = [f"--config={one[1:]}" if one.startswith("@") else one for one in arguments]
    path: list[str] = []
    siblings, command = group, group
    while isinstance(command, Group) and tokens and tokens[0] in command.commands:
        path.append(tokens.pop(0))
        siblings, command = command, command.commands[path[-1]]
    if {*HELP} & {*tokens}:
        print_help(prog, group, path)
        raise SystemExit(0)
    if "--version" in tokens:
        print(f"{prog} {version('logitstream')}")
        raise SystemExit(0)
    if isinstance(command, Group):
        what = "a command is missing"
        if tokens:
            what = f"{tokens[0][:40]!r} is not a command{_suggest(tokens[0], command.commands)}"
        see = f"; see {' '.join([prog, *path])} --help"
        raise WrongUsage([f"{what}: give {' or '.join(command.commands)}{see}"])
    prefix = f"{_prefix(path)}_"
    names = Names(command.aliases, prefix)
    return _Reader(" ".join([prog, *path]), path[-1], command, siblings, names).read(
        tokens, Env(prefix, command=False)
    )


def read_settings(
    prog: str, name: str, command: Command, settings: Mapping[str, Any], where: str
) -> Any:
    """Returns the configuration of a command from a table, checked like a file.

    where: what messages call the table. Raises WrongUsage.
    """
    names = Names(command.aliases)
    reader = _Reader(f"{prog} {name}", name, command, Group("", {name: command}), names)
    reader.tables.append((where, flatten(settings)))
    return reader.read([])


def print_help(prog: str, group: Group, path: Sequence[str]) -> None:
    """Prints the options of a command, or the commands of a group."""
    _make_app(prog, group).help_print([*path])


def _make_app(name: str, command: Command | Group, path: Sequence[str] = (), **options: Any) -> App:
    """Makes the cyclopts App of a command, or of a group with all its commands."""
    app = App(
        name,
        help=_describe(command),
        help_epilogue=_describe_sources(command, path),
        help_format="plaintext",
        version_flags=(),
        default_parameter=Parameter(
            negative=(), consume_multiple=True, allow_repeating=True, show_default=_show_default
        ),
        **options,
    )
    if isinstance(command, Group):
        for index, (sub_name, sub_command) in enumerate(command.commands.items()):
            app.command(_make_app(sub_name, sub_command, [*path, sub_name], sort_key=index))
        return app

    def collect(settings: Any = None, *, config: Any = (), print_config: bool = False) -> Any:
        return settings, print_config

    collect.__annotations__ = {
        "settings": Annotated[command, Parameter(name="*", required=True)],
        "config": Annotated[
            list[Path],
            Parameter(consume_multiple=False, help="Read options from this TOML or YAML file."),
        ],
        "print_config": Annotated[
            bool, Parameter(help="Print the resolved configuration as TOML and exit.")
        ],
    }
    app.default(collect)
    return app


def _describe(command: Command | Group) -> str:
    """Returns the text above the options; its first paragraph stands in the list of commands."""
    if isinstance(command, Group):
        return command.description
    paragraphs = re.split(r"(?<=[.?])\s+", (command.__doc__ or "").strip(), maxsplit=1)
    return "\n\n".join(" ".join(text.split()) for text in paragraphs)


def _describe_sources(command: Command | Group, path: Sequence[str]) -> str:
    """Returns the text below the options."""
    is_group = isinstance(command, Group)
    text = FILES.format(prefix=_prefix([*path, "COMMAND"] if is_group else path))
    return f"{text}\n\n{SERVICES}" if is_group or issubclass(command, ServiceOptions) else text


def _show_default(value: Any) -> str | None:
    """Shows a default in the help, unless it is empty."""
    if isinstance(value, list | tuple):
        value = " ".join(map(str, value))
    return None if value is None or value is False or value in ("", {}) else str(value)


@dataclass(slots=True)
class _Reader:
    """Reads one command from its sources, and collects what is wrong with them."""

    prog: str
    """With the command, as the help is asked for."""
    name: str
    command: Command
    group: Group
    names: Names
    tables: list[tuple[str, list[tuple[str, Any]]]] = field(default_factory=list)
    """Names of files and the settings in them; a later one wins."""
    arguments: ArgumentCollection = field(init=False)
    """All options, with the tokens that were given for them."""
    mistakes: list[str] = field(default_factory=list)
    refused: set[tuple[str, ...]] = field(default_factory=set)
    """Options that a file set to what cannot be read: they are not missing."""
    all_read: bool = True
    """Whether every file could be read: what is missing may be in another."""
    held: dict[tuple[str, ...], list[Token]] = field(default_factory=dict)
    """Of each table, what the command line says."""
    dropped_values: bool = False
    """Whether values of an unknown option were dropped: what is missing may be among them."""

    def read(self, tokens: list[str], *sources: Any) -> Settings:
        """Returns the configuration. sources: what cyclopts is to read before files. Raises
        WrongUsage."""
        app = _make_app(
            self.name, self.command, config=[self.hold_tables, *sources, self.read_files]
        )
        self.arguments = app.assemble_argument_collection()
        tokens = self._drop_unknown(tokens)
        settings, print_config, invalid = None, False, None
        try:
            collect, bound, unused, _ = app.parse_known_args(tokens)
            settings, print_config = collect(*bound.args, **bound.kwargs)
        except CycloptsError as error:
            unused, invalid = error.unused_tokens or [], error.__cause__
            is_missing = isinstance(error, MissingArgumentError) and error.keyword is None
            if not is_missing and not isinstance(invalid, pydantic.ValidationError):
                raise self._refuse(self._explain_usage(error)) from None
        if settings is None and invalid is None:
            # Without any value cyclopts does not ask pydantic, and names one missing option only.
            try:
                settings = self.command.model_validate({})
            except pydantic.ValidationError as error:
                invalid = error
        self.mistakes += [self._explain_unused(token, tokens) for token in unused]
        if isinstance(invalid, pydantic.ValidationError):
            self._explain_values(invalid)
        if settings is None or self.mistakes:
            raise self._refuse()
        if print_config:
            print(_format_toml(settings, self.arguments), end="")
            raise SystemExit(0)
        return settings

    def _refuse(self, *mistakes: str) -> WrongUsage:
        return WrongUsage([f"{one}; see {self.prog} --help" for one in [*self.mistakes, *mistakes]])

    # Sources.

    def hold_tables(self, app: App, commands: Any, arguments: ArgumentCollection) -> None:
        """Takes away what the command line says of tables: a source of cyclopts', which would not
        read the environment's share of a table too."""
        for argument in arguments:
            if is_table(argument):
                self.held[argument.keys], argument.tokens = argument.tokens, []

    def read_files(self, app: App, commands: Any, arguments: ArgumentCollection) -> None:
        """Fills in what neither the command line nor the environment gave: a source of
        cyclopts'."""
        self.arguments = arguments
        for argument in arguments:
            if [token.value for token in argument.tokens] == ["None"] and allows_none(argument):
                argument.tokens = [argument.tokens[0].evolve(value="", implicit_value=None)]
            if is_table(argument):
                self._settle_table(argument)
        for argument in arguments:
            for token in argument.tokens:
                if token.source != "cli":
                    self.names.note(argument, token)
        for token in arguments["--config"].tokens:
            self._read_file(Path(token.value))
        for where, settings in reversed(self.tables):
            given = {id(argument) for argument in arguments if argument.tokens}
            for key, value in settings:
                self._read_setting(where, key, value, given)
        self.mistakes += self.names.settle(arguments)

    def _read_file(self, path: Path) -> None:
        try:
            self.tables.append((str(path), read_settings_file(path)))
            return
        except OSError as error:
            self.mistakes.append(f"cannot read {path}: {error.strerror}")
        except ValueError as error:
            self.mistakes.append(str(error))
        self.all_read = False

    def _read_setting(self, where: str, key: str, value: Any, given: set[int]) -> None:
        name = key.replace("_", "-")
        argument, label = self._find_owner(name), f"{key} in {where}"
        if argument is None or name in ("config", "print-config"):
            if self.group.files_of.get(self.name) not in self._takers(name):
                self.mistakes.append(self._explain_unknown(label, name, ""))
            return
        token = Token(keyword=key, source=where)
        if is_in_table(argument, token):
            if "." not in key and value != {}:
                self.mistakes.append(f"{label} must be a table, got {show(value)}")
            if "." not in key:
                return
            if all(other.keys for other in argument.tokens):  # no single value instead of a table
                append_to_table(argument, token.evolve(implicit_value=value, keys=keys_of(key)))
            return
        if self.names.find_conversion(token) is not None:
            value = json.dumps(value).strip('"')
        is_flag = argument.hint is bool
        values = value if isinstance(value, list) and is_list(argument) else [value]
        if not (value is None and allows_none(argument)) and not all(
            is_plain(one) and isinstance(one, bool) is is_flag for one in values
        ):
            self.mistakes.append(f"{label} must be {allowed(argument)}, got {show(value)}")
            self.refused.add(argument.keys)
            return
        self.names.note(argument, token)
        if id(argument) in given:
            return
        if is_flag or value in (None, []):
            argument.append(token.evolve(implicit_value=value))
        else:
            for index, one in enumerate(values):
                argument.append(token.evolve(index=index, value=str(one)))

    # Aliases, and tables whose names are not ours.

    def _find_owner(self, name: str) -> Argument | None:
        """Returns the option of a name; a name in a table may be that of an option too."""
        argument = find(self.arguments, f"--{name}")
        keys = keys_of(name)
        if argument is not None and is_table(argument) and len(keys) == 1:
            is_shared = keys[0] in self.command.shared_names
            return find(self.arguments, f"--{keys[0]}") if is_shared else argument
        return argument

    def _settle_table(self, argument: Argument) -> None:
        """Gives what belongs to other options to them; the first source of a name wins."""
        tokens = [*self.held.pop(argument.keys, ()), *argument.tokens]
        argument.tokens = []
        for token in tokens:
            keys = tuple(key.replace("-", "_") for key in token.keys)
            owner = self._find_owner(".".join([argument.name.lstrip("-"), *keys]))
            if owner is None or owner is argument:
                append_to_table(argument, token.evolve(keys=keys))
            else:
                owner.append(token.evolve(keys=()))

    def _drop_unknown(self, tokens: Sequence[str]) -> list[str]:
        """Reports unknown options; drops them and their values, which may be secret, unseen."""
        kept: list[str] = []
        dropping = False
        for index, token in enumerate(tokens):
            if token == "--":
                return [*kept, *tokens[index:]]
            if re.match("--?[A-Za-z]", token):
                flag = token.partition("=")[0]
                argument = self._find_owner(flag.lstrip("-").replace("_", "-"))
                dropping = argument is None
                if argument is not None and is_table(argument) and "." not in flag:
                    self.mistakes.append(f"{flag} is a table: give {flag}.NAME VALUE")
                    dropping = True
                elif argument is not None:
                    self.names.note(argument, Token(keyword=flag, source="cli"))
                else:
                    self.mistakes.append(self._explain_unknown(flag, flag.lstrip("-"), "--"))
            elif dropping:
                self.dropped_values = True
            if not dropping:
                kept.append(token)
        return kept

    # Explanations.

    def _takers(self, name: str) -> list[str]:
        """Returns the other commands that have an option."""
        return [
            other
            for other, command in self.group.commands.items()
            if not isinstance(command, Group)
            and command is not self.command
            and find(_make_app(other, command).assemble_argument_collection(), f"--{name}")
        ]

    def _explain_unknown(self, label: str, name: str, dashes: str) -> str:
        name = name.replace("_", "-")
        if name in ("token", "teacher-token"):
            return (
                f"{label} is not an option: give --token-file FILE, or set the environment "
                "variable TEACHER_TOKEN"
            )
        if takers := self._takers(name):
            return f"{label} is an option of {' and '.join(takers)}, not of {self.name}"
        if more := self.command.explain_unknown(name.replace("-", "_")):
            return f"{label} is not an option of {self.name}: {more}"
        names = [name.lstrip("-") for one in self.arguments if one.show for name in one.names]
        return f"{label} is not an option of {self.name}{_suggest(name, names, dashes)}"

    def _explain_usage(self, error: CycloptsError) -> str:
        """Explains what cyclopts refused: an option without a value, or a flag with a wrong one."""
        argument, token = error.argument, getattr(error, "token", None)
        if argument is None:
            return str(error)
        if token is not None:
            return f"{token.keyword} must be {allowed(argument)}, got {token.value[:40]!r}"
        keyword = getattr(error, "keyword", None) or argument.name
        return f"{keyword} needs {allowed(argument)}, got nothing"

    def _explain_unused(self, token: str, tokens: list[str]) -> str:
        """Explains a value that belongs to no option."""
        text = f"unexpected argument {token[:40]!r}"
        if token.endswith((".toml", ".yaml", ".yml")) and Path(token).is_file():
            self.all_read = False
            return f"{text}: give @{token} to read options from it"
        before = [one for one in tokens[: tokens.index(token)] if one.startswith("--")]
        argument = find(self.arguments, before[-1].partition("=")[0]) if before else None
        if argument is None or is_list(argument):
            return text
        return f"{text}: {argument.name} takes {'no' if argument.hint is bool else 'one'} value"

    def _explain_values(self, error: pydantic.ValidationError) -> None:
        by_keys = {argument.keys: argument for argument in self.arguments if argument.keys}
        for found in error.errors():
            argument = by_keys.get(tuple(key for key in found["loc"] if isinstance(key, str)))
            if argument is None:  # found by a validator of the whole
                self.mistakes.append(plain(found))
            elif found["type"] == "missing":
                may_be_dropped = self.dropped_values and argument.index is not None
                if self.all_read and not may_be_dropped and argument.keys not in self.refused:
                    self.mistakes.append(
                        f"{label_argument(argument)} is missing: {meaning(argument)}"
                    )
            elif is_table(argument):  # whose validator names what is wrong, one line for each
                self.mistakes += plain(found).splitlines()
            elif found["type"] == "value_error":  # of a validator, which says what is allowed
                self.mistakes.append(f"{label_argument(argument)}: {plain(found)}")
            else:
                got = found["input"] if "than" in found["type"] else repr(found["input"])
                self.mistakes.append(f"{label_argument(argument)} {plain(found)}, got {got}")


def _format_toml(settings: Settings, arguments: ArgumentCollection) -> str:
    """Writes a configuration as a TOML file that the same command reads."""
    values = settings.model_dump(mode="json")
    named: dict[str, Any] = {}
    for argument in arguments:
        value = values
        for key in argument.keys:
            value = value[key]
        if argument.keys and not argument.children:
            named[argument.name.lstrip("-").replace("-", "_")] = value
    return format_toml(named)


def _suggest(name: str, names: Iterable[str], dashes: str = "") -> str:
    near = difflib.get_close_matches(name.replace("_", "-"), [*names], 1)
    return f" (did you mean {dashes}{near[0]}?)" if near else ""


def _prefix(path: Sequence[str]) -> str:
    return "_".join([PREFIX, *path]).upper().replace("-", "_")
