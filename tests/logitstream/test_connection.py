"""How callers reach a service, and what they are told when they do not."""

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from logitstream import diagnosis
from logitstream.connection import Connection
from logitstream.diagnosis import diagnose, in_short
from tests.support.teams import command, make_certs

PEM = "-----BEGIN CERTIFICATE-----\nabc\n-----END CERTIFICATE-----"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TOKEN", "CA", "CERT", "KEY"):
        monkeypatch.delenv(f"TEACHER_{name}", raising=False)


def test_what_is_given_counts_before_the_file_and_the_file_before_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("given", "file", "environment"):
        (tmp_path / f"{name}.pem").write_text(PEM.replace("abc", name))
    monkeypatch.setenv("TEACHER_TOKEN", "from-environment")
    monkeypatch.setenv("OTHER_TOKEN", "from-other")
    monkeypatch.setenv("TEACHER_CA", str(tmp_path / "environment.pem"))
    plain = Connection.to("a:1")
    assert (plain.addresses, plain.token) == (("a:1",), "from-environment")
    assert plain.ca is not None
    assert b"environment" in plain.ca
    file = tmp_path / "team.toml"
    file.write_text('address = ["a:1", "b:2"]\nca = "file.pem"\ntoken_env = "OTHER_TOKEN"\n')
    for path in (file, str(file)):
        found = Connection.to(path)
        assert (found.addresses, found.token) == (("a:1", "b:2"), "from-other")
        assert found.ca is not None
        assert b"file" in found.ca
    given = Connection.to(file, token="mine", ca=tmp_path / "given.pem")
    assert given.token == "mine"
    assert given.ca is not None
    assert b"given" in given.ca
    assert given.metadata == (("authorization", "Bearer mine"),)
    assert "mine" not in repr(given)


@pytest.mark.parametrize("ca", [PEM, PEM.encode()])
def test_pem_may_be_given_itself(ca):
    assert Connection.to("a:1", ca=ca).ca == PEM.encode()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"address": "teacher.lab"}, "host:port.*connection file"),
        ({"address": "https://teacher.lab:50051"}, "without a scheme"),
        ({"address": "teacher.lab:50051/"}, "a port is 1 to 65535"),
        ({"address": "teacher.lab:99999"}, "a port is 1 to 65535"),
        ({"address": "teacher.lab:http"}, "a port is 1 to 65535"),
        ({"address": ":50051"}, "host:port"),
        ({"address": []}, "host:port"),
        ({"address": "a:1", "cert": PEM}, "both: cert and key"),
        ({"address": "a:1", "cert": PEM, "key": PEM}, "needs TLS"),
        ({"address": "a:1", "ca": b"abc"}, "not PEM"),
        ({"address": "a:1", "token": "two\nlines"}, "copied completely"),
    ],
)
def test_what_cannot_be_used_is_told(arguments: dict, words: str):
    with pytest.raises(ValueError, match=words):
        Connection.to(**arguments)


def test_a_connection_file_with_a_mistake_is_told(tmp_path: Path):
    file = tmp_path / "team.toml"
    with pytest.raises(FileNotFoundError, match=r"team\.toml"):
        Connection.to(file)
    for text, words in (
        ("address = ", "not TOML"),
        ("ca = 'x'", "address must be"),
        ("address = 'a:1'\ntoken = 'secret'", "token never belongs in a file"),
        ("address = 'a:1'\nca = 'none.pem'", r"none\.pem"),
        ("address = " + "[" * 5000, "not TOML: it is nested too deep"),
        ("address = 'a:1'\nca = " + "9" * 5000, "not TOML"),
        ("address = 'a:" + "9" * 5000 + "'", "a port is 1 to 65535"),
        ("address = 'a:1'\nca = 0x" + "f" * 5000, "all other values strings"),
        ('address = "a:1"\nca = "a\\u0000b"', "cannot read ca .*null byte"),
    ):
        file.write_text(text)
        with pytest.raises((ValueError, OSError), match=words) as caught:
            Connection.to(file)
        assert "secret" not in str(caught.value)


@contextmanager
def server(
    host: str, pair: tuple[Path, Path] | None, client_ca: Path | None = None
) -> Iterator[str]:
    """A gRPC server without any service."""
    running = grpc.server(ThreadPoolExecutor(2))
    if pair is None:
        port = running.add_insecure_port(f"{host}:0")
    else:
        cert, key = pair
        credentials = grpc.ssl_server_credentials(
            [(key.read_bytes(), cert.read_bytes())],
            root_certificates=client_ca and client_ca.read_bytes(),
            require_client_auth=client_ca is not None,
        )
        port = running.add_secure_port(f"{host}:0", credentials)
    running.start()
    yield f"{host}:{port}"
    running.stop(None).wait(5)


def test_the_likely_cause_of_a_failure_is_found(tmp_path: Path):
    make_certs(tmp_path, "--host", "127.0.0.1", "--client", "search")
    make_certs(tmp_path / "other", "--host", "127.0.0.1", "--client", "search")
    pair = tmp_path / "server.pem", tmp_path / "server-key.pem"
    ca, other = tmp_path / "ca.pem", tmp_path / "other" / "ca.pem"

    def client(folder: Path) -> dict[str, Path]:
        return {"cert": folder / "client-search.pem", "key": folder / "client-search-key.pem"}

    def found(address: str, **options) -> str:
        return diagnose(address, Connection.to(address, **options))

    with server("127.0.0.1", None) as address:
        assert "does not speak TLS" in found(address, ca=ca)
    with server("127.0.0.1", pair) as address:
        assert "speaks TLS and was spoken to in plain text" in found(address)
        assert "not signed by the given authority" in found(address, ca=other)
        assert "not signed by the given authority" in found(address, ca="public")
        assert "not signed by the given authority" in found(address, ca=Path("public"))  # --ca
        assert found(address, ca=ca) == "", "nothing is wrong"
    with server("127.0.0.2", pair) as address:
        assert "is not for 127.0.0.2" in found(address, ca=ca)
    with server("127.0.0.1", pair, client_ca=ca) as address:
        assert "asks for a client certificate" in found(address, ca=ca)
        assert "does not accept this client certificate" in found(
            address, ca=ca, **client(tmp_path / "other")
        )
        assert found(address, ca=ca, **client(tmp_path)) == ""
    assert found("127.0.0.1:1") == "", "nobody is there"


def test_a_name_that_does_not_exist_is_told_apart_from_a_name_server_that_is_away(monkeypatch):
    def answer(number: int) -> str:
        def fail(*_, **__):
            raise socket.gaierror(number, "...")

        monkeypatch.setattr(socket, "getaddrinfo", fail)
        return diagnose("techer.lab:50051", Connection.to("techer.lab:50051"))

    assert answer(socket.EAI_NONAME).startswith("There is no host called techer.lab")
    assert answer(socket.EAI_AGAIN) == ""


@contextmanager
def listener(treat: Callable[[socket.socket], None]) -> Iterator[str]:
    """Somebody who accepts connections, treats each in some way, and closes it."""
    with socket.create_server(("127.0.0.1", 0)) as accepting:

        def accept() -> None:
            while True:
                client, _ = accepting.accept()
                with client:
                    if stopping.is_set():
                        return
                    with contextlib.suppress(OSError):
                        treat(client)

        stopping = threading.Event()
        thread = threading.Thread(target=accept)
        thread.start()
        yield f"127.0.0.1:{accepting.getsockname()[1]}"
        stopping.set()
        socket.create_connection(accepting.getsockname()).close()
        thread.join()


def test_nothing_is_said_of_who_may_answer_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A service that starts behind a tunnel or a proxy is waited for, so these must not be guesses."""
    monkeypatch.setattr(diagnosis, "TRY_S", 0.3)
    make_certs(tmp_path, "--host", "127.0.0.1")
    ca = tmp_path / "ca.pem"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem", tmp_path / "server-key.pem")

    def hang_up(client: socket.socket) -> None:
        client.recv(1)

    def stay_silent(client: socket.socket) -> None:
        while client.recv(1 << 16):
            pass

    def end_tls(client: socket.socket) -> None:
        context.wrap_socket(client, server_side=True).close()

    for treat in (hang_up, stay_silent, end_tls):
        with listener(treat) as address:
            assert diagnose(address, Connection.to(address, ca=ca)) == "", treat.__name__
    for treat in (hang_up, stay_silent):
        with listener(treat) as address:
            assert diagnose(address, Connection.to(address)) == "", treat.__name__


def test_a_status_of_grpc_is_told_in_short():
    unavailable = grpc.StatusCode.UNAVAILABLE
    details = (
        "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:17603: Failed to "
        "connect to remote host: Connection refused"
    )
    told = "UNAVAILABLE: Failed to connect to remote host: Connection refused"
    assert in_short(unavailable, details) == told
    assert in_short(unavailable, "this replica is draining") == (
        "UNAVAILABLE: this replica is draining"
    )
    assert in_short(unavailable, None) == "UNAVAILABLE"
    long = in_short(unavailable, "two\nlines" * 50)
    assert "\n" not in long
    assert len(long) < 130


def test_certificates_are_not_overwritten_and_keys_are_private(tmp_path: Path, capsys):
    from teacher_server import cli

    make_certs(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"ca.pem", "ca-key.pem", "server.pem", "server-key.pem"}
    assert all(
        path.stat().st_mode & 0o077 == 0 for path in tmp_path.iterdir() if "key" in path.name
    )
    assert cli.main(["certs", "--out", str(tmp_path), "--host", "a"]) == 1
    assert "--force" in capsys.readouterr().err
    command("certs", "--out", tmp_path, "--client", "search")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()}.items() >= before.items()
    command("certs", "--out", tmp_path, "--host", "a", "--force")
    assert (tmp_path / "server.pem").read_bytes() != before["server.pem"]
    assert (tmp_path / "ca.pem").read_bytes() == before["ca.pem"]
