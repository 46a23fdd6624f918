"""The server's side of TLS: certificate and key from files that may be replaced at any time."""

import ipaddress
import logging
import os
import re
import ssl
import threading
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


class Tls:
    """The files of a service; `client_ca`: every client must show a certificate of this CA.

    Files that cannot be used change nothing: whoever connects meets the last ones that could be, until
    they are in order again.
    """

    def __init__(self, cert: Path, key: Path, client_ca: Path | None = None) -> None:
        """cert: PEM, the certificate first and then those between it and its CA. key: PEM, without a
        passphrase."""
        self.cert = cert
        self.key = key
        self.client_ca = client_ca
        self._lock = threading.Lock()
        """Of what follows: gRPC asks from threads of its own, those of several ports."""
        self._used: Files | None = None
        self._signature: _Signature | None = None
        """Of the files when `_used` was read."""
        self._told = ""

    def credentials(self) -> grpc.ServerCredentials:
        """What a gRPC port is opened with; new connections see replaced files.

        May be called again, for another port or for the same one opened anew. Raises ServeError if the
        files cannot be used and never could be.
        """
        shown = self._newest()

        def changed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal shown
            newest = self._newest()
            if newest is shown:
                return None
            shown = newest
            return newest.configuration()

        return grpc.dynamic_ssl_server_credentials(
            shown.configuration(),
            changed,  # pyright: ignore[reportArgumentType]  None: as before
            require_client_authentication=self.client_ca is not None,
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
        try:
            first = _certificates(self.cert.read_bytes())[0]
        except (OSError, ValueError):
            return None
        return first.not_valid_after_utc.timestamp()

    def read(self) -> "Files":
        """The files as they are now. Raises ServeError."""
        files = Files(
            _read("--tls-cert", self.cert),
            _read("--tls-key", self.key),
            None if self.client_ca is None else _read("--tls-client-ca", self.client_ca),
        )
        if problem := files.problem():
            raise ServeError(f"cannot use {self._named()}: {problem}")
        return files

    def _newest(self) -> "Files":
        """The files, or the last that could be used. Between the replacement of a certificate and that
        of its key, the old pair stays in use."""
        with self._lock:
            try:
                signature = self._look()
                if self._used is None:
                    self._used = self.read()
                elif signature != self._signature:
                    self._take_up(self.read())
                self._signature, self._told = signature, ""
            except ServeError as error:
                if self._used is None:
                    raise
                if str(error) != self._told:
                    self._told = str(error)
                    logger.error("%s. The certificate stays as it was before.", error)
            return self._used

    def _take_up(self, files: "Files") -> None:
        """Puts other files in the place of those in use. Raises ServeError."""
        if files == self._used:
            return
        if begins := files.begins_later():
            raise ServeError(
                f"cannot use {self._named()} yet: it is not valid before {_time(begins)}, and every "
                "client would refuse it until then"
            )
        self._used = files
        logger.info("certificate read again")

    def _look(self) -> "_Signature":
        """What changes with the content of a file. Raises ServeError."""
        paths = {"--tls-cert": self.cert, "--tls-key": self.key, "--tls-client-ca": self.client_ca}
        found = []
        for flag, path in paths.items():
            if path is None:
                continue
            try:
                one = os.stat(path)
            except OSError as error:
                raise _unreadable(flag, path, error) from None
            found.append((one.st_mtime_ns, one.st_size, one.st_ino))
        return tuple(found)

    def _named(self) -> str:
        flags = {"--tls-cert": self.cert, "--tls-key": self.key, "--tls-client-ca": self.client_ca}
        return ", ".join(f"{flag} {path}" for flag, path in flags.items() if path is not None)


@dataclass(frozen=True, slots=True)
class Files:
    """The contents, as PEM."""

    cert: bytes
    key: bytes
    client_ca: bytes | None
    """None: clients show no certificate."""

    def problem(self) -> str | None:
        """What is wrong with them, if something is."""
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        part = "the certificate"
        try:
            first = _certificates(self.cert)[0]
            public = first.public_key()
            names_of(first)  # what it is for has a form of its own
            part = "the key"
            key = load_pem_private_key(self.key, None)
            part = "the client CA"
            authorities = [] if self.client_ca is None else _certificates(self.client_ca)
        except TypeError:
            return "the key has a passphrase; write it without one, readable for this user only"
        except (ValueError, UnsupportedAlgorithm) as error:
            return f"{part} is not PEM as it should be ({_first_sentence(error)})"
        if key.public_key() != public:
            return "the key is not the one of the certificate"
        if not _is_known(public):
            return (
                "the key of the certificate is of a kind that gRPC does not take, and nobody could "
                "connect; make a certificate with an RSA key, or one on the curve P-256 or P-384"
            )
        if first.not_valid_after_utc < datetime.now(UTC):
            return (
                f"the certificate expired at {_time(first.not_valid_after_utc)}, and every client "
                "refuses it; put a new one in its place"
            )
        # No chain to an authority that has expired holds, so nobody could connect. One that is valid is
        # enough: a bundle may keep the old ones.
        last = max((one.not_valid_after_utc for one in authorities), default=None)
        if last is not None and last < datetime.now(UTC):
            return (
                f"every certificate of the client CA has expired, the last one at {_time(last)}, and no "
                "client could connect; put a new one in its place"
            )
        return None

    def begins_later(self) -> datetime | None:
        """From when on usable files can be used, if that is still to come."""
        now = datetime.now(UTC)
        begins = _certificates(self.cert)[0].not_valid_before_utc
        if self.client_ca is not None:
            usable = (
                one for one in _certificates(self.client_ca) if one.not_valid_after_utc >= now
            )
            begins = max(begins, min((one.not_valid_before_utc for one in usable), default=begins))
        return begins if begins > now else None

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


_Signature = tuple[tuple[int, int, int], ...]
_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----[^-]*-----END \1-----")
_CUT = re.compile(rb"-----(?:BEGIN|END) |^-[-A-Z ]*\Z", re.MULTILINE)
"""What is left of a block that has no end, behind the whole ones."""


def _certificates(pem: bytes) -> "list[x509.Certificate]":
    """All certificates of a file, at least one; text around them is allowed. Raises ValueError.

    A file that is cut off within one of them is refused, although the libraries take those before it:
    whoever needs the lost one would be locked out.
    """
    from cryptography import x509

    if not pem.strip():
        raise ValueError("it is empty")
    if _CUT.search(_BLOCK.sub(b"", pem)):
        raise ValueError("it is cut off")
    if not any(kind.endswith(b"CERTIFICATE") for kind in _BLOCK.findall(pem)):
        raise ValueError("there is no certificate in it")
    try:
        return x509.load_pem_x509_certificates(pem)
    except x509.InvalidVersion as error:
        raise ValueError(str(error)) from None


def _is_known(public: object) -> bool:
    """Whether gRPC takes keys of this kind, on both sides (tried with 1.85)."""
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    if isinstance(public, ec.EllipticCurvePublicKey):
        return isinstance(public.curve, ec.SECP256R1 | ec.SECP384R1)
    return isinstance(public, rsa.RSAPublicKey)


def _read(flag: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(flag, path, error) from None


def _unreadable(flag: str, path: Path, error: OSError) -> ServeError:
    return ServeError(f"cannot read {flag} {path}: {error.strerror}")


def _first_sentence(error: Exception) -> str:
    return str(error).partition(". ")[0].rstrip(".") or type(error).__name__


def names_of(certificate: "x509.Certificate") -> list[str]:
    """The names and addresses that a certificate is for; without any, clients take its common name."""
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.DuplicateExtension as error:
        raise ValueError(str(error)) from None
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
