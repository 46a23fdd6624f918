"""The server's side of TLS: certificate and key from files that may be replaced at any time."""

import ipaddress
import logging
import os
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from teacher_server.errors import ServeError

if TYPE_CHECKING:
    from cryptography import x509

logger = logging.getLogger(__name__)

SOON = timedelta(days=14)
"""A certificate that ends within this is worth a warning."""


@dataclass(frozen=True, slots=True)
class Tls:
    """The files of a service; `client_ca`: every client must show a certificate of this CA."""

    cert: Path
    """PEM, the certificate first and then those between it and its CA."""
    key: Path
    """PEM, without a passphrase."""
    client_ca: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """What a gRPC port is opened with; new connections see replaced files. Raises ServeError."""
        watched = _Watched(self)
        return grpc.dynamic_ssl_server_credentials(
            watched.first,
            watched.changed,  # pyright: ignore[reportArgumentType]  None: as before
            require_client_authentication=bool(self.client_ca),
        )

    def warn(self, host: str) -> None:
        """Logs what will keep clients away, now or soon. host: what they are told."""
        try:
            files = self.read()
        except ServeError:
            return  # they are being replaced at this moment; what is in use was read before
        for warning in files.warnings(host):
            logger.warning("--tls-cert %s %s", self.cert, warning)

    def expires_s(self) -> float | None:
        """When the certificate ends, in seconds since 1970; None while the file cannot be read."""
        from cryptography import x509

        try:
            first = x509.load_pem_x509_certificates(self.cert.read_bytes())[0]
        except (OSError, ValueError):
            return None
        return first.not_valid_after_utc.timestamp()

    def read(self) -> "Files":
        """The files as they are now. Raises ServeError."""
        files = Files(*(_read(path) for path in (self.cert, self.key, self.client_ca)))
        problem = files.problem()
        if problem:
            raise ServeError(f"cannot use --tls-cert {self.cert}, --tls-key {self.key}: {problem}")
        return files


@dataclass(frozen=True, slots=True)
class Files:
    """The contents, as PEM."""

    cert: bytes
    key: bytes
    client_ca: bytes

    def problem(self) -> str | None:
        """What is wrong with them, if something is."""
        from cryptography import x509
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        try:
            first = x509.load_pem_x509_certificates(self.cert)[0]
            key = load_pem_private_key(self.key, None)
            if self.client_ca:
                x509.load_pem_x509_certificates(self.client_ca)
        except TypeError:
            return "the key has a passphrase; write it without one, readable for this user only"
        except (ValueError, UnsupportedAlgorithm) as error:
            return f"not PEM as it should be ({error})"
        if key.public_key() != first.public_key():
            return "the key is not the one of the certificate"
        if first.not_valid_after_utc < datetime.now(UTC):
            return (
                f"the certificate expired at {_time(first.not_valid_after_utc)}, and every client "
                "refuses it; put a new one in its place"
            )
        return None

    def warnings(self, host: str) -> list[str]:
        """What will keep clients away who are told to connect to this host, of usable files."""
        from cryptography import x509

        first = x509.load_pem_x509_certificates(self.cert)[0]
        now, found = datetime.now(UTC), []
        names = names_of(first)
        if not any(_is_for(name, host) for name in names):
            found.append(
                f"is not for {host}, which clients are told: they will not connect to it. It is for "
                f"{', '.join(names) or 'no name at all'}. Have a certificate made that has {host} "
                "too, or --advertise a name that is in this one."
            )
        if first.not_valid_before_utc > now:
            begins = _time(first.not_valid_before_utc)
            found.append(f"is not valid before {begins}: until then every client refuses it.")
        if first.not_valid_after_utc < now + SOON:
            found.append(
                f"expires at {_time(first.not_valid_after_utc)}. Put a new one in its place, this "
                "service takes it up without a restart."
            )
        return found

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        """For gRPC."""
        return grpc.ssl_server_certificate_configuration(
            [(self.key, self.cert)], root_certificates=self.client_ca or None
        )


class _Watched:
    """Files that are looked at whenever somebody connects; asked by threads of gRPC."""

    def __init__(self, tls: Tls) -> None:
        self._tls = tls
        self._signature = self._look()
        self._files = tls.read()
        self._told = ""
        self.first = self._files.configuration()

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """The new files, or None if there are none. Between the replacement of a certificate and
        that of its key, the old pair stays in use."""
        try:
            signature = self._look()
            if signature == self._signature:
                return None
            files = self._tls.read()
        except (OSError, ServeError) as error:
            if str(error) != self._told:
                self._told = str(error)
                logger.error("%s. The certificate stays as it was before.", error)
            return None
        self._told = ""
        self._signature = signature
        if files == self._files:
            return None
        self._files = files
        logger.info("certificate read again")
        return files.configuration()

    def _look(self) -> tuple[tuple[int, int, int], ...]:
        paths = (self._tls.cert, self._tls.key, self._tls.client_ca)
        found = (os.stat(path) for path in paths if path is not None)
        return tuple((one.st_mtime_ns, one.st_size, one.st_ino) for one in found)


def _read(path: Path | None) -> bytes:
    if path is None:
        return b""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ServeError(f"cannot read {path}: {error.strerror}") from None


def names_of(certificate: "x509.Certificate") -> list[str]:
    """The names and addresses that a certificate is for; without any, clients take its common name."""
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return [str(one.value) for one in common]
    found = [*names.get_values_for_type(x509.DNSName), *names.get_values_for_type(x509.IPAddress)]
    return list(map(str, found))


def _is_for(name: str, host: str) -> bool:
    """Whether a name in a certificate stands for this host; a leading * for one label of it."""
    host = host.strip("[]").rstrip(".").lower()
    try:
        return ipaddress.ip_address(host) == ipaddress.ip_address(name)
    except ValueError:
        pass
    name = name.lower()
    if name.startswith("*."):
        return host.partition(".")[2] == name[2:]
    return host == name


def _time(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def context_without_checks() -> ssl.SSLContext:
    """For looking at who answers somewhere, not for talking to it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context
