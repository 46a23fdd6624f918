"""What strangers can do to a service: peers that speak HTTP/2 badly, or say half of it (row 25)."""

import contextlib
import os
import re
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from logitstream.connection import Connection
from protos import teacher_pb2, teacher_pb2_grpc
from student_trainer import AccessDenied, TeacherUnavailable, connect
from teacher_server.rpc import sockets
from teacher_server.rpc.health import MAX_WATCHES
from tests.conftest import Served
from tests.faults.test_crowds import crowd
from tests.faults.test_oversize import Peak
from tests.support import tiny
from tests.support.fleet import Fleet, wait_until
from tests.support.http2 import (
    DATA,
    HEADERS,
    SERVICE,
    Peer,
    message,
)
from tests.support.oracle import VOCAB, digest, within
from tests.support.teams import add_team, make_certs

SEQUENCES = tiny.random_sequences(60, VOCAB, seed=51)
BAD_PATH = b"/\xe5"
STRANGERS_NBYTES = 128 << 20
"""What strangers may make a service grow by."""
METHODS = ("Describe", "Score", "FetchIdTable", "Usage", "Status")
PATHS = (
    *(f"{SERVICE}/{name}" for name in METHODS),
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
)


@pytest.fixture(scope="module")
def wanted(fleet: Fleet) -> list[str]:
    with connect(fleet.own[0]) as teacher:
        return [digest(targets) for _, targets in teacher.stream(SEQUENCES)]


class Shared:
    """A service with TLS that one team uses; its token, and what strangers need to speak to it."""

    def __init__(self, served: Served, home: Path, token: str) -> None:
        self.served, self.token = served, token
        self.address = served.address
        self.ca = home / "ca.pem"

    def tls(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.ca))
        context.check_hostname = False
        context.set_alpn_protocols(["h2"])
        return context

    def connect(self):
        return connect(self.address, token=self.token, ca=self.ca)

    def rss_nbytes(self) -> int:
        pages = int(Path(f"/proc/{self.served.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def shared(serve, folder, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    home = tmp_path_factory.mktemp("edge")
    token = add_team(home / "teams.toml", "good", "--scopes", "score", "dense")
    served = serve(
        folder,
        *("--teams", str(home / "teams.toml"), *make_certs(home)),
        *("--threads", "1"),
    )
    return Shared(served, home, token)


def statuses(peer: Peer, seconds: float = 5.0) -> list[bytes]:
    """The grpc-status values in what comes, as far as they are written out."""
    found = []
    for one in peer.receive(seconds):
        if one.kind == HEADERS:
            found += re.findall(rb"grpc-status.(\d+)", one.payload)
    return found


# Deaf servers.


@pytest.mark.parametrize("secured", [False, True])
def test_a_path_that_is_not_utf8_deafens_nobody(fleet: Fleet, shared: Shared, wanted, secured):
    address = shared.address if secured else fleet.own[0]
    served = shared.served if secured else fleet.replicas[0]
    make = shared.connect if secured else partial(connect, address)
    with make() as teacher:
        pairs = teacher.stream(SEQUENCES, ahead=4)
        got = [digest(next(pairs)[1])]
        for _ in range(4):
            with Peer(address, tls=shared.tls() if secured else None) as peer:
                peer.call(BAD_PATH)
                assert b"12" in statuses(peer, 1.0), "UNIMPLEMENTED, as any unknown method"
        with make() as another:
            assert another.info.service_id == teacher.info.service_id
        got += [digest(targets) for _, targets in pairs]
        assert got == wanted
        assert teacher.counters.reconnects == 0
    assert "Traceback" not in served.output()
    assert "reopening it" not in served.output()


def unhardened() -> None:
    """Runs in the service: gRPC's own server, which such a path ends."""
    from teacher_server.rpc import ports, server

    server.can_be_hardened = lambda: False
    ports.OLD_STREAMS_S = 2.0


def fragile() -> None:
    """Runs in the service: its server dies of any call to a method that nobody has."""
    from teacher_server.rpc import ports
    from teacher_server.rpc.server import Acceptor

    ports.OLD_STREAMS_S = 2.0

    async def die(self: Acceptor) -> None:
        await self._request_call()
        raise LookupError("as gRPC's own would")

    Acceptor._accept_unknown_methods = die


@pytest.mark.parametrize("hook", [unhardened, fragile])
def test_a_server_that_died_is_opened_anew_and_streams_resume(serve, folder, wanted, hook):
    with Fleet(serve, folder, 1, hook=hook, batch_s=0.1) as fleet:

        def opened() -> int:
            return fleet.replicas[0].output().count("reopening it")

        with connect(fleet.own[0]) as teacher:
            pairs = teacher.stream(SEQUENCES, ahead=8)
            got = [digest(next(pairs)[1])]
            for number in range(1, 4):
                with Peer(fleet.own[0]) as peer:
                    peer.call(BAD_PATH)
                    # Five times what is promised. It answers still until it has read the path.
                    wait_until(lambda n=number: opened() >= n, "reopening it", 25.0)
                    wait_until(lambda: answers(fleet.own[0]), "it answers again", 25.0)
            fleet.hurry()
            got += within(60, lambda: [digest(targets) for _, targets in pairs])
        assert got == wanted
        fleet.assert_nothing_left(30.0)


def answers(address: str) -> bool:
    """Whether a new connection to this address gets an answer."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(address, options=options) as channel:
        try:
            stub = teacher_pb2_grpc.TeacherStub(channel)
            stub.Describe(teacher_pb2.DescribeRequest(), timeout=2)
        except grpc.RpcError:
            return False
    return True


def silent_once() -> None:
    """Runs in the service: its server accepts nothing more after the first call to nobody."""
    from teacher_server.rpc.server import Acceptor

    accept, gone = Acceptor._make_request_call_future, []

    def stall(self: Acceptor, method: bytes | None):
        import asyncio

        if gone and gone[0] is self:
            return asyncio.get_running_loop().create_task(asyncio.sleep(3600))
        return accept(self, method)

    async def wait(self: Acceptor) -> None:
        import asyncio

        await self._request_call()
        gone.append(self)
        await asyncio.sleep(3600)

    Acceptor._make_request_call_future, Acceptor._accept_unknown_methods = stall, wait


def test_a_server_that_accepts_and_says_nothing_is_replaced(serve, folder):
    with Fleet(serve, folder, 1, hook=silent_once) as fleet:
        assert answers(fleet.own[0])
        with Peer(fleet.own[0]) as peer:
            peer.call("/nobody/Nothing")
            wait_until(lambda: "reopening it" in fleet.replicas[0].output(), "noticed", 60.0)
            wait_until(lambda: answers(fleet.own[0]), "it answers again", 25.0)


def never_again() -> None:
    """Runs in the service: a server dies of a call to nobody, and its port cannot be opened again."""
    from teacher_server.errors import ServeError
    from teacher_server.rpc import ports

    fragile()
    listen, ports.REOPEN_S = ports.Ports._listen, (0.0, 0.01)

    def once(self: ports.Ports, port) -> None:
        if port in self._ports:
            raise ServeError("taken")
        listen(self, port)

    ports.Ports._listen = once


def test_a_port_that_cannot_be_opened_again_ends_its_replica_and_another_takes_over(
    serve, folder, wanted
):
    with Fleet(serve, folder, 2, hook=never_again) as fleet, connect(fleet.own) as teacher:
        fleet.wait_known()
        pairs = teacher.stream(SEQUENCES, ahead=8)
        got = [digest(next(pairs)[1])]
        with Peer(fleet.own[0]) as peer:
            peer.call("/nobody/Nothing")
            wait_until(lambda: not fleet.replicas[0].process.is_alive(), "it ends", 30.0)
        assert fleet.replicas[0].process.exitcode == 1
        assert "cannot be reopened" in fleet.replicas[0].output()
        got += within(60, lambda: [digest(targets) for _, targets in pairs])
        assert got == wanted


# Memory before anybody is asked who they are.


@pytest.mark.parametrize("count", [100, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "kind",
    [
        "unfinished",
        pytest.param("unfinished-check", marks=pytest.mark.slow),
        "watching",
        "idle",
        "half-tls",
    ],
)
def test_strangers_do_not_make_a_shared_service_grow(shared: Shared, kind: str, count: int):
    with shared.connect() as teacher:
        list(teacher.stream(SEQUENCES))
        before = shared.rss_nbytes()
        with crowd(kind, count, shared.address, ca=shared.ca):
            for _ in range(4):
                assert len(within(60, lambda: list(teacher.stream(SEQUENCES[:20])))) == 20
                assert shared.rss_nbytes() - before < STRANGERS_NBYTES
        assert teacher.counters.reconnects == 0
    assert "Traceback" not in shared.served.output()


@pytest.mark.parametrize("kind", ["settings", "resets", "chain", "table", "bad-text", "bad-path"])
def test_bad_peers_disturb_nobody_and_leave_nothing(shared: Shared, kind: str):
    files = Path(f"/proc/{shared.served.process.pid}/fd")
    with shared.connect() as teacher:
        list(teacher.stream(SEQUENCES))
        before, open_before = shared.rss_nbytes(), len(list(files.iterdir()))
        with crowd(kind, 30, shared.address, ca=shared.ca):
            for _ in range(4):
                assert len(within(60, lambda: list(teacher.stream(SEQUENCES[:20])))) == 20
                time.sleep(0.3)
            assert shared.rss_nbytes() - before < STRANGERS_NBYTES
        with shared.connect() as another:
            assert another.info.team == "good"
        assert teacher.counters.reconnects == 0
        wait_until(lambda: len(list(files.iterdir())) <= open_before + 8, "files are closed", 30.0)
    log = shared.served.output()
    assert "Traceback" not in log
    assert "secret-of-a-stranger" not in log


def test_who_comes_anew_during_a_flood_of_calls_is_let_in(fleet: Fleet):
    # Without the gate nobody was let in for as long as it lasted; with it about one in ten waits
    # for more than the 10 s after which `connect` says that nobody answers.
    # Not at the lowest priority: beside other work it would be no flood.
    output = fleet.replicas[0].output
    with crowd("resets", 300, fleet.own[0], niceness=0):
        wait_until(lambda: "are let in for a while" in output(), "the gate is narrow", 60.0)

        def is_let_in() -> bool:
            with contextlib.suppress(TeacherUnavailable), connect(fleet.own[0]) as teacher:
                return len(within(60, lambda: list(teacher.stream(SEQUENCES[:20])))) == 20
            return False

        # The crowd takes all the time that a busy machine has: only "for ever" is a failure.
        wait_until(is_let_in, "a newcomer is let in", 150.0)
    assert "reopening it" not in output(), "its own questions wait, too"
    with connect(fleet.own[0]) as teacher:
        assert len(within(60, lambda: list(teacher.stream(SEQUENCES[:20])))) == 20


def test_a_call_that_is_not_let_in_is_answered_before_its_message_has_come(shared: Shared):
    with Peer(shared.address, tls=shared.tls()) as peer:
        for name in METHODS:
            peer.call(f"{SERVICE}/{name}", data=message(b"", 15 << 20)[:3], end=False)
        assert sorted(statuses(peer, 2.0)) == [b"16"] * len(METHODS)


def test_a_stranger_who_sends_a_lot_is_shut_out_and_one_who_asks_is_not(fleet: Fleet):
    with Peer(fleet.own[0]) as good, Peer(fleet.own[0]) as bad:
        good.call("/grpc.health.v1.Health/Check", data=message(b""))
        stream = bad.call(f"{SERVICE}/Usage", end=False)
        sent = bad.push(stream, message(bytes(15 << 20)), 20.0)
        assert sent < 15 << 20
        assert bad.is_closed(10.0)
        good.call("/grpc.health.v1.Health/Check", data=message(b""))
        answered = [one for one in good.receive(1.0) if one.kind == DATA]
        assert len(answered) == 2


def test_a_message_whose_length_is_a_lie_is_not_waited_for(fleet: Fleet):
    for name in ("Describe", "Score"):
        with Peer(fleet.own[0]) as peer:
            stream = peer.call(f"{SERVICE}/{name}", end=False)
            assert peer.push(stream, message(bytes(8 << 20), 1 << 30), 5.0) < 1 << 20


def limited(**limits: int) -> tuple[str, ...]:
    return tuple(
        text
        for name, value in limits.items()
        for text in (f"--admission.{name.replace('_', '-')}", str(value))
    )


@pytest.mark.parametrize(
    "limits",
    [
        {"max_connections": 30},
        {"max_connections_per_address": 30},
        {"max_strangers_mib": 1},  # 16 KiB each: 64 of them
    ],
)
def test_the_oldest_strangers_make_room_and_who_was_let_in_stays(serve, folder, limits):
    with Fleet(serve, folder, 1, flags=limited(**limits)) as fleet, contextlib.ExitStack() as open_:
        with connect(fleet.own[0]) as teacher:
            list(teacher.stream(SEQUENCES[:2]))
            peers = [open_.enter_context(Peer(fleet.own[0])) for _ in range(100)]
            wait_until(lambda: fleet.gauge(0, "teacher_connections") <= 65, "some have gone")
            assert peers[0].is_closed(5.0)
            assert not peers[-1].is_closed(0.5)
            assert len(list(teacher.stream(SEQUENCES[:2]))) == 2
            assert teacher.counters.reconnects == 0
        assert "connections shut down" in fleet.replicas[0].output()


def test_more_calls_than_a_stranger_may_make_end_its_connection(shared: Shared):
    with Peer(shared.address, tls=shared.tls()) as peer:
        with contextlib.suppress(OSError):
            for _ in range(300):
                peer.call(f"{SERVICE}/Describe", data=message(b""))
        assert peer.is_closed(10.0)


def hasty() -> None:
    """Runs in the service: calls have less time."""
    from teacher_server.rpc import interceptor

    interceptor.FIRST_REQUEST_S = interceptor.MESSAGE_S = 0.5


def test_a_call_without_a_message_and_a_stream_without_a_request_end(serve, folder):
    with Fleet(serve, folder, 1, hook=hasty) as fleet, Peer(fleet.own[0]) as peer:
        peer.call(f"{SERVICE}/Status", end=False)
        peer.call(f"{SERVICE}/Score", end=False)
        assert sorted(statuses(peer, 3.0)) == [b"14", b"4"], "UNAVAILABLE, DEADLINE_EXCEEDED"
        fleet.wait_streams(0)
        with connect(fleet.own[0]) as teacher:
            wait_until(lambda: not teacher.replicas, "its quiet stream ended", 10.0)
            assert len(list(teacher.stream(SEQUENCES))) == len(SEQUENCES)
            assert teacher.counters.reconnects == 0


def test_watches_are_few_and_the_oldest_makes_room(fleet: Fleet):
    with grpc.insecure_channel(fleet.own[0]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert stub.Check(health_pb2.HealthCheckRequest()).status == 1  # SERVING
        first = stub.Watch(health_pb2.HealthCheckRequest())
        assert next(first).status == 1
        unknown = stub.Watch(health_pb2.HealthCheckRequest(service="nobody"))
        assert next(unknown).status == 3  # SERVICE_UNKNOWN
        with crowd("watching", MAX_WATCHES // 32 + 1, fleet.own[0]):
            for watch in (first, unknown):
                with pytest.raises(grpc.RpcError) as caught:
                    next(watch)
                assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]
            assert next(stub.Watch(health_pb2.HealthCheckRequest())).status == 1
        for name in ("x" * 300, "\x00" * 5000):
            with pytest.raises(grpc.RpcError) as caught:
                stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]


def test_one_watch_that_leaves_takes_no_other_along(serve, folder):
    with Fleet(serve, folder, 1) as fleet, grpc.insecure_channel(fleet.own[0]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        staying, leaving = (stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(2))
        assert [next(staying).status, next(leaving).status] == [1, 1]
        leaving.cancel()
        time.sleep(0.2)
        fleet.replicas[0].send_signal(signal.SIGTERM)
        assert next(staying).status == 2  # NOT_SERVING


# Memory of those who are let in.


@pytest.fixture(scope="module")
def wide_folder(model_folder: Callable[[str, int], Path]) -> Path:
    return model_folder("Gemma2", 32_000)


def test_many_streams_that_hold_one_answer_each_stay_within_the_limit(serve, wide_folder):
    """Each answer is 3 MiB; 60 streams would hold 180 MiB, and the process may hold 32."""
    flags = ("--admission.max-answers-mib", "32")
    with Fleet(serve, wide_folder, 1, flags=flags) as fleet, contextlib.ExitStack() as open_:
        spec = teacher_pb2.TargetSpec(dense=teacher_pb2.Dense(bits=32))
        request = teacher_pb2.ScoreRequest(
            request_id=1, token_ids=bytes(4 * 25), lengths=[25], targets=spec
        )
        channel = open_.enter_context(grpc.insecure_channel(fleet.own[0]))
        stub = teacher_pb2_grpc.TeacherStub(channel)
        assert len(list(stub.Score(iter([request])))) > 1
        peak = Peak(fleet)
        held = threading.Event()
        open_.callback(held.set)

        def requests() -> Iterator[teacher_pb2.ScoreRequest]:
            yield request
            held.wait()

        calls = []
        for _ in range(60):
            one = open_.enter_context(
                grpc.insecure_channel(
                    fleet.own[0],
                    options=[
                        ("grpc.use_local_subchannel_pool", 1),
                        ("grpc.http2.lookahead_bytes", 1 << 16),
                        ("grpc.http2.bdp_probe", 0),
                    ],
                )
            )
            calls.append(teacher_pb2_grpc.TeacherStub(one).Score(requests()))
        wait_until(lambda: fleet.gauge(0, "teacher_streams") == 60, "60 streams", 60.0)
        time.sleep(3.0)
        assert fleet.gauge(0, "teacher_answer_bytes") <= 32 << 20
        assert peak.growth_nbytes() < 100 << 20, "with what computing takes"
        for call in calls:
            call.cancel()
        fleet.assert_nothing_left(30.0)


# What is said, and what is not.


def test_a_token_that_is_not_utf8_is_in_no_log(shared: Shared):
    with Peer(shared.address, tls=shared.tls()) as peer:
        for path in PATHS:
            peer.call(
                path, (b"authorization", f"Bearer {shared.token}".encode() + b"\xe5"), end=False
            )
        peer.call(f"{SERVICE}/Describe", (b"x-\xe5", b"Bearer " + shared.token.encode()))
        peer.receive(1.0)
    assert shared.token not in shared.served.output()
    assert "Traceback" not in shared.served.output()


@pytest.mark.parametrize("path", PATHS)
def test_a_malformed_message_is_an_invalid_argument_with_a_sentence(fleet: Fleet, path: str):
    with grpc.insecure_channel(fleet.own[0]) as channel:
        call = channel.stream_stream(path)(iter([b"\xff\xff\xff"]), timeout=10)
        with pytest.raises(grpc.RpcError):
            list(call)
        assert call.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert path in call.details()
        error = dict(call.trailing_metadata())["logitstream-error-bin"]
        assert teacher_pb2.RequestError.FromString(error).reason == "MALFORMED"
    assert "Traceback" not in fleet.replicas[0].output()


@pytest.mark.parametrize("path", [path for path in PATHS if not path.endswith("/Score")])
def test_a_message_that_need_not_be_large_may_not_be(fleet: Fleet, path: str):
    with grpc.insecure_channel(fleet.own[0]) as channel:
        call = channel.stream_stream(path)(iter([bytes(1 << 20)]), timeout=10)
        with pytest.raises(grpc.RpcError):
            list(call)
        assert call.code() in (
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.UNAVAILABLE,  # shut down meanwhile: it was a stranger's
        )


def test_what_was_sent_does_not_come_back(fleet: Fleet):
    spec = teacher_pb2.TargetSpec(top_k=teacher_pb2.TopK(k=4, bits=16))
    good = {"token_ids": bytes(32), "lengths": [8], "targets": spec, "request_id": 1}
    wide = teacher_pb2.TargetSpec(top_k=teacher_pb2.TopK(k=4, bits=16), id_table=b"\xab" * 500_000)
    with grpc.insecure_channel(fleet.own[0]) as channel:
        stub = teacher_pb2_grpc.TeacherStub(channel)
        for fields in (
            {"teacher_fingerprint": "f" * 500_000},
            {"teacher_fingerprint": "\x1b[2J\n" * 1000},
            {"targets": wide},
            {"session_id": bytes(500_000)},
        ):
            request = teacher_pb2.ScoreRequest(**{**good, **fields})
            (answer,) = list(stub.Score(iter([request]), timeout=10))
            assert answer.error.message
            assert len(answer.error.message) < 700
            assert answer.error.message.isprintable()
        for name, request in (
            ("FetchIdTable", teacher_pb2.FetchIdTableRequest(digest=bytes(8000))),
            ("Usage", teacher_pb2.UsageRequest(since="x" * 8000)),
        ):
            call = getattr(stub, name).future(request, timeout=10)
            assert len(call.details()) < 300


def test_what_others_use_together_is_told_to_the_admin_only(serve, folder, tmp_path):
    teams = tmp_path / "teams.toml"
    tokens = {
        "plain": add_team(teams, "plain"),
        "chief": add_team(teams, "chief", "--scopes", "score", "admin"),
    }
    served = serve(folder, "--teams", str(teams), "--threads", "1")
    with connect(served.address, token=tokens["plain"]) as teacher:
        list(teacher.stream(SEQUENCES[:4]))
    for name, token in tokens.items():
        connection = Connection.to(served.address, token=token)
        with connection.blocking_channel(served.address) as channel:
            stub = teacher_pb2_grpc.TeacherStub(channel)
            status = stub.Status(
                teacher_pb2.StatusRequest(), timeout=10, metadata=connection.metadata
            )
        assert (status.cost_per_second > 0) == (name == "chief")


def test_a_wrong_token_is_told_why_before_its_connection_goes(shared: Shared):
    for _ in range(5):
        with pytest.raises(AccessDenied, match="belongs to no team"):
            connect(shared.address, token="lst_" + "x" * 43, ca=shared.ca)


def test_a_socket_is_told_from_another_that_took_its_descriptor():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        one = socket.create_connection(listening.getsockname())
        other, _ = listening.accept()
        with one, other:
            cookie = sockets.cookie_of(other.fileno())
            assert (other.fileno(), cookie) in list(sockets.open_sockets())
            assert [sockets.is_listening(end.fileno()) for end in (listening, other)] == [
                True,
                False,
            ]
            assert sockets.own_address(other.fileno()) == listening.getsockname()
            assert sockets.other_address(other.fileno()) == one.getsockname()
            one.sendall(b"four")
            wait_until(lambda: sockets.received_nbytes(other.fileno()) == 4, "it came")
            assert not sockets.shut_down(one.fileno(), cookie)
            assert other.recv(9) == b"four", "nothing was shut down"
            assert sockets.shut_down(other.fileno(), cookie)
            assert one.recv(9) == b""
    with open("/dev/null") as file:
        assert sockets.cookie_of(file.fileno()) is None
        assert sockets.other_address(file.fileno()) is None
