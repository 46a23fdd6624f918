"""Reads a service's certificate and key from files that may be replaced at any time."""

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
"""A certificate that expires within this time is worth a warning."""


class Tls:
    """The files of a service; with `client_ca` every client must show a certificate of this CA.

    Files that cannot be used change nothing: new connections get the last usable ones until the files
    are in order again.
    """

    def __init__(self, cert: Path, key: Path, client_ca: Path | None = None) -> None:
        """cert: PEM of the certificate, followed by those between it and its CA. key: PEM without a
        passphrase."""
        self.cert = cert
        self.key = key
        self.client_ca = client_ca
        self._lock = threading.Lock()
        """Guards the fields below: gRPC calls from threads of its own, one for each port."""
        self._used: Files | None = None
        self._signature: _Signature | None = None
        """Signature of the files when `_used` was read."""
        self._logged = ""
        """The last problem, which is logged once."""

    def credentials(self) -> grpc.ServerCredentials:
        """Returns what a gRPC port is opened with; new connections see replaced files.

        May be called again, for another port or for the same one when it is reopened. Raises ServeError
        if the files cannot be used and never could be.
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
        """Logs what keeps clients from connecting, now or soon. host: the one that they are given."""
        try:
            files = self.read()
        except ServeError:
            return  # they are being replaced at this moment; the files in use were read before
        for warning in files.warnings(host):
            logger.warning("--tls-cert %s %s", self.cert, warning)

    def expires_s(self) -> float | None:
        """Returns when the certificate expires, in seconds since 1970; None: the file is unreadable."""
        try:
            first = _certificates(self.cert.read_bytes())[0]
        except (OSError, ValueError):
            return None
        return first.not_valid_after_utc.timestamp()

    def read(self) -> "Files":
        """Reads the files as they are now. Raises ServeError if they cannot be used."""
        files = Files(
            _read("--tls-cert", self.cert),
            _read("--tls-key", self.key),
            None if self.client_ca is None else _read("--tls-client-ca", self.client_ca),
        )
        if problem := files.problem():
            raise ServeError(f"cannot use {self._named()}: {problem}")
        return files

    def _newest(self) -> "Files":
        """Returns the files as they are now, or else the last usable ones.

        Between the replacement of a certificate and that of its key, the old pair stays in use.
        """
        with self._lock:
            try:
                signature = self._sign()
                if self._used is None:
                    self._used = self.read()
                elif signature != self._signature:
                    self._replace(self.read())
                # Taken before the files were read: a change since then is read next time.
                self._signature, self._logged = signature, ""
            except ServeError as error:
                if self._used is None:
                    raise
                if str(error) != self._logged:
                    self._logged = str(error)
                    logger.error("%s. The last usable certificate stays in use.", error)
            return self._used

    def _replace(self, files: "Files") -> None:
        """Puts new files in the place of those in use. Raises ServeError if it is too early."""
        if files == self._used:
            return
        if begins := files.begins_later():
            raise ServeError(
                f"cannot use {self._named()} yet: it is not valid before {_time(begins)}, and every "
                "client would refuse it until then"
            )
        self._used = files
        logger.info("certificate read again")

    def _sign(self) -> "_Signature":
        """Returns what changes with the content of a file. Raises ServeError."""
        paths = {"--tls-cert": self.cert, "--tls-key": self.key, "--tls-client-ca": self.client_ca}
        signature = []
        for flag, path in paths.items():
            if path is None:
                continue
            try:
                status = os.stat(path)
            except OSError as error:
                raise _unreadable(flag, path, error) from None
            signature.append((status.st_mtime_ns, status.st_size, status.st_ino))
        return tuple(signature)

    def _named(self) -> str:
        flags = {"--tls-cert": self.cert, "--tls-key": self.key, "--tls-client-ca": self.client_ca}
        return ", ".join(f"{flag} {path}" for flag, path in flags.items() if path is not None)


@dataclass(frozen=True, slots=True)
class Files:
    """The contents of the files, as PEM."""

    cert: bytes
    key: bytes
    client_ca: bytes | None
    """None: clients show no certificate."""

    def problem(self) -> str | None:
        """Says what is wrong with them, if anything is."""
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        part = "the certificate"
        try:
            first = _certificates(self.cert)[0]
            public = first.public_key()
            names_of(first)  # its list of names is parsed separately
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
                "gRPC does not accept keys of this certificate's kind, and no client could connect; "
                "make a certificate with an RSA key, or one on the curve P-256 or P-384"
            )
        if first.not_valid_after_utc < datetime.now(UTC):
            return (
                f"the certificate expired at {_time(first.not_valid_after_utc)}, and every client "
                "refuses it; put a new one in its place"
            )
        # No client could connect if every authority has expired. One valid one is enough: a bundle may
        # keep the old ones.
        last = max((ca.not_valid_after_utc for ca in authorities), default=None)
        if last is not None and last < datetime.now(UTC):
            return (
                f"every certificate of the client CA has expired, the last one at {_time(last)}, and no "
                "client could connect; put a new one in its place"
            )
        return None

    def begins_later(self) -> datetime | None:
        """Returns when files without a problem become valid, if that is still to come."""
        now = datetime.now(UTC)
        begins = _certificates(self.cert)[0].not_valid_before_utc
        if self.client_ca is not None:
            usable = (ca for ca in _certificates(self.client_ca) if ca.not_valid_after_utc >= now)
            begins = max(begins, min((ca.not_valid_before_utc for ca in usable), default=begins))
        return begins if begins > now else None

    def warnings(self, host: str) -> list[str]:
        """Says what keeps clients of this host from connecting, of files without a problem."""
        from cryptography import x509

        first = x509.load_pem_x509_certificates(self.cert)[0]
        now, warnings = datetime.now(UTC), []
        names = names_of(first)
        if not any(_is_for(name, host) for name in names):
            warnings.append(
                f"is not for {host}, the address that clients are given: they will not connect to it. "
                f"It is for {', '.join(names) or 'no name at all'}. Have a certificate made that has "
                f"{host} too, or --advertise a name that is in this one."
            )
        if first.not_valid_before_utc > now:
            begins = _time(first.not_valid_before_utc)
            warnings.append(f"is not valid before {begins}: until then every client refuses it.")
        if first.not_valid_after_utc < now + SOON:
            warnings.append(
                f"expires at {_time(first.not_valid_after_utc)}. Put a new one in its place; this "
                "service starts using it without a restart."
            )
        return warnings

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        """Returns them in gRPC's form."""
        return grpc.ssl_server_certificate_configuration(
            [(self.key, self.cert)], root_certificates=self.client_ca or None
        )


_Signature = tuple[tuple[int, int, int], ...]
_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----[^-]*-----END \1-----")
_CUT = re.compile(rb"-----(?:BEGIN|END) |^-[-A-Z ]*\Z", re.MULTILINE)
"""Finds the remains of an incomplete block, once the complete ones are removed."""


def _certificates(pem: bytes) -> "list[x509.Certificate]":
    """Returns all certificates of a file; text around them is allowed. Raises ValueError if none.

    A file that is cut off within one of them is refused, although the libraries accept those before it:
    clients that need the lost one would be locked out.
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
    """Whether gRPC accepts keys of this kind, on both sides (tried with 1.85)."""
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
    """Returns the names and addresses that a certificate is for, or else its common name."""
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.DuplicateExtension as error:
        raise ValueError(str(error)) from None
    except x509.ExtensionNotFound:
        common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return [str(attribute.value) for attribute in common]
    addresses = names.get_values_for_type(x509.IPAddress)
    return [*names.get_values_for_type(x509.DNSName), *map(str, addresses)]


def _is_for(name: str, host: str) -> bool:
    """Whether a name in a certificate stands for this host; a leading * stands for one label."""
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
    """Returns a context for finding out which service answers somewhere, not for talking to it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context
