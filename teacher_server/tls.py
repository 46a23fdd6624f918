"""The server's side of TLS: certificate and key from files that may be replaced at any time."""

import logging
import os
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from teacher_server.errors import ServeError

logger = logging.getLogger(__name__)


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

    def check(self) -> None:
        """Raises ServeError if the files cannot be used."""
        self.read()

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
        return None

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


def context_without_checks() -> ssl.SSLContext:
    """For looking at who answers somewhere, not for talking to it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context
