"""Makes a private authority and certificates (`teacher-server certs`), for a closed network."""

import ipaddress
import socket
import sys
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from logitstream.files import write_atomically
from teacher_server.config import CertsConfig
from teacher_server.errors import ServeError, TeacherServerError

CA_DAYS = 3650
BACKDATE = timedelta(minutes=5)
"""Certificates are valid from a little before now, for clocks that are slow."""
ALWAYS = ("localhost", "127.0.0.1", "::1")
"""Names in every service's certificate, for clients that come through a tunnel."""
CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH


def make(
    out: Path,
    hosts: Iterable[str],
    clients: Iterable[str],
    *,
    days: int,
    replace: bool,
    with_local: bool = True,
) -> list[Path]:
    """Writes certificates and keys into a folder, signed by its authority; returns their paths.

    Raises ServeError.
    """
    hosts, clients = list(hosts), list(clients)
    names = ["server"] if hosts or not clients else []
    names += [f"client-{client}" for client in clients]
    try:
        out.mkdir(parents=True, exist_ok=True)
        existing = [name for name in names if (out / f"{name}.pem").exists()]
        if existing and not replace:
            raise ServeError(
                f"{out / existing[0]}.pem exists already. --force replaces it with one that the same "
                "authority signs; a running service reads it again by itself."
            )
        ca, ca_key = _open_authority(out)
        for name in names:
            if name == "server":
                own = list(
                    dict.fromkeys([*(hosts or _own_names()), *(ALWAYS if with_local else ())])
                )
                certificate, key = _sign(ca, ca_key, own, days, SERVER)
            else:
                certificate, key = _sign(ca, ca_key, [name.removeprefix("client-")], days, CLIENT)
            # The key first: a service that sees the new certificate finds its key.
            write_atomically(out / f"{name}-key.pem", _key_pem(key), 0o600)
            write_atomically(out / f"{name}.pem", _pem(certificate), 0o644)
    except OSError as error:
        raise ServeError(f"cannot write into {out}: {error.strerror}") from None
    except ValueError as error:
        raise ServeError(f"cannot use the authority in {out}: {error}") from None
    return [out / "ca.pem", *(out / f"{name}.pem" for name in names)]


def _open_authority(out: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """Reads the folder's authority, and makes one if there is none."""
    path, key_path = out / "ca.pem", out / "ca-key.pem"
    if path.exists() or key_path.exists():
        if not (path.exists() and key_path.exists()):
            raise ValueError("it needs both: ca.pem and ca-key.pem")
        key = serialization.load_pem_private_key(key_path.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return x509.load_pem_x509_certificate(path.read_bytes()), key
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "logitstream private authority")])
    public = key.public_key()
    certificate = (
        _builder(name, name, public, CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(key, hashes.SHA256())
    )
    write_atomically(key_path, _key_pem(key), 0o600)
    write_atomically(path, _pem(certificate), 0o644)
    return certificate, key


def _sign(
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    names: list[str],
    days: int,
    purpose: x509.ObjectIdentifier,
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """Makes a key, and a certificate for these names; the first is its common name too."""
    key = ec.generate_private_key(ec.SECP256R1())
    public = key.public_key()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    alternatives = x509.SubjectAlternativeName([_general_name(name) for name in names])
    certificate = (
        _builder(subject, ca.subject, public, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(alternatives, critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(issuer_key, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    return certificate, key


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        return x509.DNSName(name)


def _own_names() -> list[str]:
    names = [socket.gethostname(), socket.getfqdn()]
    return [name for name in names if name and name.isascii()]


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def make_certificates(config: CertsConfig) -> int:
    """Makes certificates and prints their paths; returns the exit code."""
    try:
        paths = make(
            config.out,
            config.host,
            config.client,
            days=config.days,
            replace=config.force,
            with_local=not config.only_these,
        )
    except TeacherServerError as error:
        print(f"teacher-server: {error}", file=sys.stderr)
        return 1
    for path in paths:
        print(path)
    return 0
