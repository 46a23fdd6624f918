"""What the options of both programs have in common: their base class, and how to reach a service."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pydantic
from cyclopts import Group, Parameter

from logitstream import logs
from logitstream.connection import check_address


@dataclass(frozen=True, slots=True)
class Alias:
    """The name that another program has for an option."""

    option: str
    convert: Callable[[str, Mapping[str, str]], str] | None = None
    """Turns a value under this name into the option's own, given all options' values as text."""


class Settings(pydantic.BaseModel):
    """Base of commands and of their sections. A field with kw_only=False is positional too."""

    aliases: ClassVar[Mapping[str, Alias]] = {}
    """Other names of options, by which flags, files and the environment may call them too."""
    shared_names: ClassVar[Collection[str]] = ()
    """Of those and of options, the names that a table may hold too, with the same meaning."""

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        for info in cls.model_fields.values():
            # cyclopts also takes a field by position unless the field is keyword-only.
            info.kw_only = info.kw_only is not False
            info.description = " ".join((info.description or "").split())
        for name, info in cls.model_fields.items():
            others = [f"--{one.replace('_', '-')}" for one in cls.find_aliases(name)]
            if others:
                known = [one for one in info.metadata if not isinstance(one, _Aliased)]
                info.metadata = [*known, _Aliased(alias=others)]

    @classmethod
    def find_aliases(cls, option: str) -> list[str]:
        """Returns the other names of an option."""
        return [name for name, alias in cls.aliases.items() if alias.option == option]

    @classmethod
    def explain_unknown(cls, name: str) -> str:
        """Says what to do instead of giving an option of this name, if there is more to say."""
        return ""


class _Aliased(Parameter):
    """Marks the parameter that carries an option's aliases."""


LOGGING = Group("Logging", sort_key=1)
"""Comes after the other options in the help."""


class LogOptions(Settings):
    """What a command logs to stderr."""

    log_level: Annotated[logs.Level, Parameter(group=LOGGING)] = "info"
    """Least severe messages to log."""
    log_format: Annotated[logs.Format, Parameter(group=LOGGING)] = "text"
    """text for people, or json: one object per line, for a log collector."""


class ServiceOptions(LogOptions):
    """How a command reaches a service, and proves who is calling."""

    ca: Path | None = None
    """PEM file of the authority that signed the service's certificate; turns on TLS. Default:
    TEACHER_CA."""
    cert: Path | None = None
    """Client certificate, a PEM file. Default: TEACHER_CERT."""
    key: Path | None = None
    """Private key of the client certificate, a PEM file. Default: TEACHER_KEY."""
    token_file: Path | None = None
    """File that holds the token, instead of TEACHER_TOKEN."""

    def credentials(self) -> dict[str, Any]:
        """Returns what a connection takes: token, ca, cert and key. Raises ValueError."""
        return {"token": self._read_token(), "ca": self.ca, "cert": self.cert, "key": self.key}

    def _read_token(self) -> str | None:
        if self.token_file is None:
            return None
        try:
            token = self.token_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not text"
            raise ValueError(f"cannot read --token-file {self.token_file}: {why}") from None
        if not token:
            raise ValueError(f"--token-file {self.token_file} is empty")
        return token


class _Addressed(Settings):
    address: Annotated[str, pydantic.AfterValidator(check_address)] = pydantic.Field(kw_only=False)
    """HOST:PORT of the service, or a connection file (*.toml) of it."""


class AddressedService(ServiceOptions, _Addressed):  # pydantic puts fields of the last base first
    """The running service that a command calls."""


Json = Annotated[bool, Parameter(name="json")]
"""The option --json; a field called json would hide a method of pydantic's."""
