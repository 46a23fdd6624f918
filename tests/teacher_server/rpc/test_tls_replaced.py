"""Certificates that are replaced while ports are open: what cannot be used changes nothing."""

import logging
import os
import socket
import ssl
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509

from teacher_server import cli
from teacher_server.commands import certs
from teacher_server.errors import ServeError
from teacher_server.rpc.tls import Tls


def make(folder: Path, days: int = 365) -> None:
    """A certificate for the service, and one for a client; an authority that is there signs both."""
    certs.make(folder, ["127.0.0.1"], ["search"], days=days, replace=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make(tmp_path)
    return tmp_path


def tls_of(folder: Path) -> Tls:
    return Tls(folder / "server.pem", folder / "server-key.pem", folder / "ca.pem")


@contextmanager
def opened(tls: Tls) -> Iterator[int]:
    """A gRPC port with these credentials."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_secure_port("127.0.0.1:0", tls.credentials())
    server.start()
    try:
        yield port
    finally:
        server.stop(0).wait()


def met(port: int, pair: Path) -> int | None:
    """The serial of the certificate that a client meets; None if the service refuses it.

    pair: the folder with the client's certificate and key.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(pair / "client-search.pem", pair / "client-search-key.pem")
    try:
        with (
            socket.create_connection(("127.0.0.1", port), 10) as plain,
            context.wrap_socket(plain) as secured,
        ):
            secured.sendall(
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
            )
            der = secured.getpeercert(True)
            # Of TLS 1.3 a client learns only behind the handshake whether it was let in.
            return (
                x509.load_der_x509_certificate(der or b"").serial_number
                if secured.recv(1)
                else None
            )
    except (ssl.SSLError, ConnectionError):
        return None


def serial(folder: Path) -> int:
    return x509.load_pem_x509_certificate((folder / "server.pem").read_bytes()).serial_number


def expired_ca(folder: Path) -> bytes:
    """An authority of its own that has expired."""
    other = folder / "other"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certs, "CA_DAYS", -1)
        patch.setattr(certs, "BACKDATE", timedelta(days=2))
        make(other)
    return (other / "ca.pem").read_bytes()


def expire(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certs, "BACKDATE", timedelta(days=2))
        certs.make(folder, ["127.0.0.1"], [], days=-1, replace=True)


def begin_later(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certs, "BACKDATE", timedelta(days=-1))
        certs.make(folder, ["127.0.0.1"], [], days=30, replace=True)


def written(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Changes a file in place."""

    def write(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return write


def another_key(folder: Path) -> None:
    make(folder / "other")
    os.replace(folder / "other" / "server-key.pem", folder / "server-key.pem")


def use_p521(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certs.ec, "SECP256R1", certs.ec.SECP521R1)
        certs.make(folder, ["127.0.0.1"], [], days=30, replace=True)


BAD_CA = {
    "an empty client CA": (written("ca.pem", lambda pem: b""), "the client CA is not PEM"),
    "a blank client CA": (written("ca.pem", lambda pem: b"\n \n"), "it is empty"),
    "a client CA without a certificate": (
        written("ca.pem", lambda pem: b"to be done\n"),
        "there is no certificate in it",
    ),
    "a client CA of other PEM": (
        lambda folder: (folder / "ca.pem").write_bytes((folder / "ca-key.pem").read_bytes()),
        "there is no certificate in it",
    ),
    "a client CA that is cut off": (written("ca.pem", lambda pem: pem[:200]), "is cut off"),
    "a client CA whose second one is cut off": (
        written("ca.pem", lambda pem: pem + pem[:200]),
        "is cut off",
    ),
    "a client CA that is cut off in a dash": (
        written("ca.pem", lambda pem: pem + b"-----BEGIN CERT"),
        "is cut off",
    ),
    "a client CA with damaged content": (
        written("ca.pem", lambda pem: pem[:100] + b"!!!" + pem[103:]),
        "the client CA is not PEM",
    ),
    "an expired client CA": (
        lambda folder: (folder / "ca.pem").write_bytes(expired_ca(folder)),
        "every certificate of the client CA has expired",
    ),
    "a missing client CA": (
        lambda folder: (folder / "ca.pem").unlink(),
        "cannot read --tls-client-ca",
    ),
}
BAD = {
    **BAD_CA,
    "an empty certificate": (written("server.pem", lambda pem: b""), "the certificate is not PEM"),
    "a certificate whose chain is cut off": (
        written("server.pem", lambda pem: pem + pem[:300]),
        "is cut off",
    ),
    "an expired certificate": (expire, "the certificate expired at"),
    "a missing certificate": (
        lambda folder: (folder / "server.pem").unlink(),
        "cannot read --tls-cert",
    ),
    "a key that gRPC does not take": (
        use_p521,
        "gRPC does not accept keys of this certificate's kind",
    ),
    "an empty key": (written("server-key.pem", lambda pem: b""), "the key is not PEM"),
    "a key that is cut off": (
        written("server-key.pem", lambda pem: pem[:60]),
        "the key is not PEM",
    ),
    "the key of another certificate": (another_key, "the key is not the one of the certificate"),
    "a missing key": (
        lambda folder: (folder / "server-key.pem").unlink(),
        "cannot read --tls-key",
    ),
}
LATER = {"a certificate that begins tomorrow": (begin_later, "is not valid before")}


@pytest.mark.parametrize("what", [*BAD, *LATER])
def test_files_that_cannot_be_used_lock_nobody_out(
    folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    caplog: pytest.LogCaptureFixture,
    what: str,
):
    caplog.set_level(logging.INFO, logger="teacher_server.rpc.tls")
    client = tmp_path_factory.mktemp("client")
    for name in ("client-search.pem", "client-search-key.pem"):
        (client / name).write_bytes((folder / name).read_bytes())
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    spoil, why = (BAD | LATER)[what]
    with opened(tls_of(folder)) as port:
        before = serial(folder)
        assert met(port, client) == before
        spoil(folder)
        assert [met(port, client) for _ in range(3)] == [before] * 3
        (error,) = [one.getMessage() for one in caplog.records if one.levelno == logging.ERROR]
        assert why in error
        assert str(folder) in error
        assert error.endswith(". The last usable certificate stays in use.")
        for path, content in kept.items():
            path.write_bytes(content)
        assert met(port, client) == before
        make(folder)
        assert met(port, client) == serial(folder) != before
        assert caplog.text.count("certificate read again") == 1


def test_a_file_that_vanishes_is_told_each_time_and_once(
    folder: Path, caplog: pytest.LogCaptureFixture
):
    aside = folder / "aside"
    with opened(tls_of(folder)) as port:
        for times in (1, 2):
            os.rename(folder / "ca.pem", aside)
            assert met(port, folder) == met(port, folder) == serial(folder)
            assert caplog.text.count("cannot read --tls-client-ca") == times
            os.rename(aside, folder / "ca.pem")  # it comes back as it was
            assert met(port, folder) == serial(folder)


def test_a_port_that_is_opened_again_gets_the_last_files_that_could_be_used(
    folder: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, logger="teacher_server.rpc.tls")
    tls = tls_of(folder)
    with opened(tls) as first:
        assert met(first, folder) == serial(folder)
        make(folder)
        assert met(first, folder) == serial(folder)
        good = serial(folder)
        ca = (folder / "ca.pem").read_bytes()
        (folder / "ca.pem").write_bytes(b"")
        with opened(tls) as second:
            assert met(first, folder) == met(second, folder) == good
            assert caplog.text.count("The last usable certificate stays") == 1, (
                "one problem, whatever the ports"
            )
            (folder / "ca.pem").write_bytes(ca)
            make(folder)
            assert met(first, folder) == met(second, folder) == serial(folder) != good
    with opened(tls) as third:
        assert met(third, folder) == serial(folder)


def test_files_that_never_could_be_used_open_no_port(folder: Path):
    (folder / "ca.pem").write_bytes(b"")
    with pytest.raises(ServeError, match="the client CA"):
        tls_of(folder).credentials()
    with pytest.raises(ServeError, match="cannot read --tls-cert"):
        Tls(folder / "none.pem", folder / "server-key.pem").credentials()


@pytest.mark.parametrize("what", BAD_CA)
def test_serve_refuses_a_client_ca_that_lets_nobody_in(
    folder: Path, capsys: pytest.CaptureFixture[str], what: str
):
    spoil, why = BAD_CA[what]
    spoil(folder)
    tls = tls_of(folder)
    flags = ["--tls-cert", tls.cert, "--tls-key", tls.key, "--tls-client-ca", tls.client_ca]
    assert cli.main(["serve", "--model", str(folder), *map(str, flags)]) == 2
    err = capsys.readouterr().err
    assert why in err
    assert f"--tls-client-ca {tls.client_ca}" in err


def test_a_client_ca_may_have_text_around_it_and_old_authorities_in_it(folder: Path):
    ca = (folder / "ca.pem").read_bytes()
    text = (
        "# the laboratory's, since 2026: fran\u00e7ais -- and dashes - too\n# ---------\n".encode()
    )
    (folder / "ca.pem").write_bytes(text + expired_ca(folder) + text + ca.rstrip())
    with opened(tls_of(folder)) as port:
        assert met(port, folder) == serial(folder)
