"""Describes how a caller reaches a service and proves who it is: address, certificates, token.

What is not given comes from a connection file (`teacher-server team add` writes one for each team),
and what is missing there from the environment: TEACHER_TOKEN, TEACHER_CA, TEACHER_CERT, TEACHER_KEY.
"""

import ipaddress
import logging
import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:  # a command line is parsed with what is here, and needs no gRPC for that
    import grpc

Address = str | os.PathLike[str] | Sequence[str]
"""host:port, several of them for one service, or the path of a connection file."""
Pem = str | bytes | os.PathLike[str]
"""PEM itself, or its path."""

logger = logging.getLogger(__name__)

PUBLIC_AUTHORITIES = "public"
"""Value of `ca` that stands for the public authorities."""
FILE_SUFFIX = ".toml"
FILE_KEYS = {"address", "ca", "cert", "key", "token_env"}
LOCAL_HOSTS = ("localhost", "127.", "[::1]")


ADDRESS_RULE = (
    "an address is host:port, such as teacher.lab:50051, or a connection file such as team.toml"
)


def check_address(address: str) -> str:
    """Returns the address. Raises ValueError if it is neither host:port nor a connection file."""
    if address.endswith(FILE_SUFFIX):
        return address
    if "//" in address:
        raise ValueError(f"{ADDRESS_RULE}, without a scheme or path; got {address!r}")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or len(port) > 5 or not 1 <= int(port) <= 65535:
        raise ValueError(f"{ADDRESS_RULE}, and a port is 1 to 65535; got {address!r}")
    return address


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Connection:
    """One service as one caller sees it. Its repr shows no token."""

    addresses: tuple[str, ...]
    """host:port of one service or several of its replicas."""
    token: str | None = field(default=None, repr=False)
    ca: bytes | None = field(default=None, repr=False)
    """PEM of the authority that signed the service's certificate; empty: the public ones; None: the
    service speaks plain text."""
    cert: bytes | None = field(default=None, repr=False)
    key: bytes | None = field(default=None, repr=False)

    @classmethod
    def to(
        cls,
        address: Address,
        *,
        token: str | None = None,
        ca: Pem | None = None,
        cert: Pem | None = None,
        key: Pem | None = None,
    ) -> Self:
        """Describes a service at host:port, at several of them, or in a connection file (*.toml).

        ca, cert, key: paths, or PEM itself. Raises ValueError, and OSError where a file is missing.
        """
        given: dict[str, Any] = {}
        texts = [os.fspath(address)] if isinstance(address, str | os.PathLike) else address
        if len(texts) == 1 and texts[0].endswith(FILE_SUFFIX):
            given = _read_file(Path(texts[0]))
            texts = given["address"]
        addresses = tuple(texts)
        if not addresses:
            raise ValueError(f"{ADDRESS_RULE}; got none")
        for text in addresses:
            check_address(text)
        token = token or os.environ.get(given.get("token_env", "TEACHER_TOKEN")) or None
        ca = ca or given.get("ca") or os.environ.get("TEACHER_CA") or None
        cert = cert or given.get("cert") or os.environ.get("TEACHER_CERT") or None
        key = key or given.get("key") or os.environ.get("TEACHER_KEY") or None
        if (cert is None) != (key is None):
            raise ValueError("a client certificate needs both: cert and key")
        if cert is not None and ca is None:
            raise ValueError(
                "a client certificate needs TLS: give ca too, the authority of the service's "
                f'certificate, or "{PUBLIC_AUTHORITIES}" for the public ones'
            )
        if token is not None and not (token.isascii() and token.isprintable()):
            raise ValueError(
                "the token has characters that no token has; was it copied completely?"
            )
        public = ca is not None and os.fspath(ca) == PUBLIC_AUTHORITIES  # as a flag it is a Path
        return cls(
            addresses,
            token,
            b"" if public else _pem(ca, "ca"),
            _pem(cert, "cert"),
            _pem(key, "key"),
        )

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata of every call."""
        return () if self.token is None else (("authorization", f"Bearer {self.token}"),)

    def credentials(self) -> "grpc.ChannelCredentials | None":
        """Returns the credentials of a channel; None: plain text."""
        if self.ca is None:
            return None
        import grpc

        return grpc.ssl_channel_credentials(self.ca or None, self.key, self.cert)

    def channel(self, address: str, options: Sequence[tuple[str, Any]] = ()) -> "grpc.aio.Channel":
        """Opens an asyncio channel to one address."""
        import grpc

        credentials = self.credentials()
        if credentials is None:
            return grpc.aio.insecure_channel(address, options=options)
        return grpc.aio.secure_channel(address, credentials, options=options)

    def blocking_channel(
        self, address: str, options: Sequence[tuple[str, Any]] = ()
    ) -> "grpc.Channel":
        """Opens a channel for threads to one address."""
        import grpc

        credentials = self.credentials()
        if credentials is None:
            return grpc.insecure_channel(address, options=options)
        return grpc.secure_channel(address, credentials, options=options)

    def warn(self) -> None:
        """Logs a warning where the token can be read on the network."""
        remote = [address for address in self.addresses if not address.startswith(LOCAL_HOSTS)]
        if self.token is not None and self.ca is None and remote:
            logger.warning(
                "the token is sent to %s in plain text, readable for anyone on the network: give ca, "
                "the authority of the service's certificate",
                remote[0],
            )


def _read_file(path: Path) -> dict[str, Any]:
    """Reads a connection file, whose paths are relative to it. Raises ValueError, OSError."""
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        text = f"cannot read the connection file {path}: {error.strerror}"
        raise type(error)(text) from None
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path} is not TOML: {why}") from None
    if unknown := sorted(set(content) - FILE_KEYS):
        raise ValueError(
            f"{path}: unknown key {unknown[0]!r}; allowed are {', '.join(sorted(FILE_KEYS))}. A token "
            "never belongs in a file like this: token_env names the variable that has it."
        )
    texts = content.get("address", [])
    content["address"] = texts = [texts] if isinstance(texts, str) else texts
    rest = [content[key] for key in FILE_KEYS - {"address"} if key in content]
    if not (
        isinstance(texts, list)
        and texts
        and all(isinstance(value, str) for value in [*texts, *rest])
    ):
        raise ValueError(
            f"{path}: address must be host:port or a list of them, and all other values strings"
        )
    for key in ("ca", "cert", "key"):
        value = content.get(key)
        if value and value != PUBLIC_AUTHORITIES and not value.lstrip().startswith("-----BEGIN"):
            content[key] = path.parent / value
    return content


def _pem(value: Pem | None, what: str) -> bytes | None:
    """Returns PEM that is given as it is or by its path. Raises ValueError, OSError."""
    if value is None:
        return None
    if isinstance(value, str) and value.lstrip().startswith("-----BEGIN"):
        value = value.encode()
    if isinstance(value, bytes):
        data, where = value, what
    else:
        where = os.fspath(value)
        try:
            data = Path(value).read_bytes()
        except OSError as error:
            raise FileNotFoundError(f"cannot read {what} {where}: {error.strerror}") from None
        except ValueError as error:  # a null byte in it
            raise ValueError(f"cannot read {what} {where!r}: {error}") from None
    if b"-----BEGIN" not in data:
        raise ValueError(f"{where} is not PEM: a {what} begins with -----BEGIN")
    return data
