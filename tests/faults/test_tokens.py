"""Tokens that are foreign, expired, revoked or malformed, and certificates that change (row 17)."""

import json
import os
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import student_trainer.cli
from logit_codec import parse_targets
from logitstream.connection import Connection
from protos import teacher_pb2, teacher_pb2_grpc
from student_trainer import AccessDenied, TeacherUnavailable, connect
from student_trainer.teachers.request import Piece, ScoreOptions
from teacher_server import cli
from tests.conftest import Served
from tests.end_to_end.test_processes import free_port
from tests.support import tiny
from tests.support.fleet import wait_until
from tests.support.oracle import VOCAB, digest, within
from tests.support.proxy import Proxy
from tests.support.teams import add_team, command, make_certs

SEQUENCES = tiny.random_sequences(40, VOCAB, seed=31)
REFUSED_S = 15.0
"""Generous: a look at the file is every 0.05 s here. The promise is 60 s with the real interval."""
DAY_S = 86400


@dataclass
class Shared:
    """A service with TLS that teams share."""

    served: Served
    folder: Path
    metrics_port: int

    @property
    def teams(self) -> Path:
        return self.folder / "teams.toml"

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    def add(self, name: str, *flags: object) -> str:
        """A new team's token, once it is let in."""
        token = add_team(self.teams, name, *flags)
        wait_until(lambda: self.refusal(token) is None, f"{name} is let in")
        return token

    def connect(self, token: str, **options):
        return connect(self.served.address, token=token, ca=self.ca, **options)

    def refusal(self, token: str | None, *more: tuple[str, str]) -> teacher_pb2.RequestError | None:
        """Why Describe is refused, if it is."""
        metadata = [] if token is None else [("authorization", f"Bearer {token}")]
        connection = Connection.to(self.served.address, ca=self.ca)
        with connection.blocking_channel(self.served.address) as channel:
            stub = teacher_pb2_grpc.TeacherStub(channel)
            request = teacher_pb2.DescribeRequest()
            call = stub.Describe.future(request, timeout=10, metadata=[*metadata, *more])
            if call.code() == grpc.StatusCode.OK:
                return None
            trailing = dict(call.trailing_metadata())
            found = teacher_pb2.RequestError.FromString(trailing["logitstream-error-bin"])
            assert (found.code, found.message) == (call.code().value[0], call.details())
            return found

    def set_clock(self, seconds: float) -> None:
        """Sets the service's clock ahead."""
        (self.folder / "clock").write_text(str(seconds))

    def page(self) -> str:
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=5) as page:
            return page.read().decode()


def hurried(folder: Path) -> None:
    """Runs in the service: it looks at the file often, and its clock can be set ahead."""
    from teacher_server.admission import access

    access.LOOK_S, access.GRACE_S = 0.05, 0.5
    begin = access.Access.__init__

    def ahead() -> float:
        clock = folder / "clock"
        return time.time() + (float(clock.read_text() or 0) if clock.exists() else 0.0)

    def begun(self: access.Access, *arguments, **options) -> None:
        begin(self, *arguments, now=ahead, **options)

    access.Access.__init__ = begun


@pytest.fixture(scope="module")
def shared(serve, folder, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    home = tmp_path_factory.mktemp("shared")
    add_team(home / "teams.toml", "first")
    port = free_port()
    served = serve(
        folder,
        *("--teams", str(home / "teams.toml"), *make_certs(home)),
        *("--metrics-port", str(port), "--threads", "1"),
        hook=partial(hurried, home),
    )
    return Shared(served, home, port)


def test_who_is_let_in_is_told_who_it_is(shared: Shared):
    token = shared.add("search", "--weight", 3, "--scopes", "score", "dense")
    with shared.connect(token) as teacher:
        assert teacher.info.team == teacher.info.caller.team == "search"
        assert teacher.info.caller.weight == 3
        assert list(teacher.info.caller.scopes) == ["dense", "score"]
        assert len(list(teacher.stream(SEQUENCES))) == len(SEQUENCES)
        assert len(list(teacher.stream(SEQUENCES[:2], targets="dense:bf16"))) == 2


def test_hidden_states_and_the_head_need_a_scope(
    shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LOGITSTREAM_CACHE", str(tmp_path))
    said = r'"hidden"; team outside has: score\. The operator can add it'
    with shared.connect(shared.add("outside")) as teacher:
        with pytest.raises(AccessDenied, match=f"FetchHead needs the scope {said}"):
            teacher.head()
        for kind in ("hidden:int8", "features:layers=1"):
            with pytest.raises(AccessDenied, match=said):
                list(teacher.stream(SEQUENCES, targets=kind))
        # The client asks for the head first; a request is refused all the same.
        asked = ScoreOptions(parse_targets("hidden:int8"), 1.0, 0, 0)
        with pytest.raises(AccessDenied, match=f"targets of kind hidden needs the scope {said}"):
            teacher.submit(Piece(SEQUENCES[0]), asked).result(30)
    assert 'teacher_team_tokens_total{team="outside"}' not in shared.page()
    assert not list(tmp_path.rglob("*.bin"))
    with shared.connect(shared.add("inside", "--scopes", "score", "hidden")) as teacher:
        for kind in ("hidden:int8", "features:layers=1"):
            assert len(list(teacher.stream(SEQUENCES[:2], targets=kind))) == 2
    nbytes = next(tmp_path.rglob("*.bin")).stat().st_size
    assert f'teacher_head_bytes_sent_total{{team="inside"}} {float(nbytes)}' in shared.page()


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        (None, "TOKEN_MISSING"),
        ("lst_" + "x" * 43, "TOKEN_UNKNOWN"),
        ("", "TOKEN_UNKNOWN"),
        (" ", "TOKEN_UNKNOWN"),
        ("a b", "TOKEN_UNKNOWN"),
        ("x" * 4000, "TOKEN_UNKNOWN"),
    ],
)
def test_foreign_and_malformed_tokens_are_refused(shared: Shared, token, reason: str):
    refused = shared.refusal(token)
    assert refused is not None
    assert (refused.code, refused.reason) == (16, reason)
    assert "TEACHER_TOKEN" in refused.message, "it says what to do"
    if token and token.strip():
        assert token not in refused.message
        with pytest.raises(AccessDenied, match="operator"):
            shared.connect(token)


@pytest.mark.parametrize("value", ["{token}", "Basic {token}", "Bearer{token}", "Bearer"])
def test_other_ways_to_show_a_token_are_refused(shared: Shared, value: str):
    token = shared.add(f"way-{abs(hash(value))}")
    refused = shared.refusal(None, ("authorization", value.format(token=token)))
    assert refused is not None
    assert refused.reason == "TOKEN_UNKNOWN"
    twice = shared.refusal(token, ("authorization", f"Bearer {token}"))
    assert twice is not None


def revoke(shared: Shared, name: str) -> None:
    """Takes a team out of the file by hand."""
    text = shared.teams.read_text()
    pattern = rf"\[teams\.{name}\]\n(?:[^\[\n][^\n]*\n| *\n)*"
    shorter = re.sub(pattern, "", text.replace("tokens = [\n", "tokens = [ \\\n"))
    shared.teams.write_text(shorter.replace("tokens = [ \\\n", "tokens = [\n"))


ENDS = {
    "revoked": ("belongs to no team|revoked", revoke),
    "disabled": (
        "disabled",
        lambda one, name: command("team", "disable", name, "--teams", one.teams),
    ),
    "expired": ("expired at", lambda one, name: one.set_clock(2 * DAY_S)),
    "rotated at once": (
        "belongs to no team|revoked",
        lambda one, name: command("team", "rotate", name, "--overlap", 0, "--teams", one.teams),
    ),
}


@pytest.mark.parametrize("how", ENDS)
def test_a_stream_in_full_flow_ends_when_its_token_does(shared: Shared, how: str):
    words, end = ENDS[how]
    name = f"flow-{how.replace(' ', '-')}"
    token = shared.add(name, "--days", 1 if how == "expired" else 0)
    got: list[str] = []
    with shared.connect(token) as teacher:
        wanted = [digest(targets) for _, targets in teacher.stream(SEQUENCES[:1])]

        def stream() -> None:
            for _, targets in teacher.stream(repeat(SEQUENCES[0]), ahead=8):
                got.append(digest(targets))
                if len(got) == 5:
                    end(shared, name)

        try:
            with pytest.raises(AccessDenied, match=words):
                within(REFUSED_S, stream)
        finally:
            shared.set_clock(0)
        assert set(got) == set(wanted), "what was answered is whole"
    wait_until(lambda: "teacher_streams 0.0" in shared.page(), "the stream is gone")


@pytest.mark.parametrize("how", ENDS)
def test_an_idle_stream_ends_when_its_token_does(shared: Shared, how: str):
    words, end = ENDS[how]
    name = f"idle-{how.replace(' ', '-')}"
    token = shared.add(name, "--days", 1 if how == "expired" else 0)
    connection = Connection.to(shared.served.address, ca=shared.ca, token=token)
    quiet = threading.Event()

    def nothing() -> Iterator[Any]:
        quiet.wait(60)
        yield from ()

    with connection.blocking_channel(shared.served.address) as channel:
        metadata = connection.metadata
        scoring = teacher_pb2_grpc.TeacherStub(channel).Score(nothing(), metadata=metadata)
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        reflecting = stub.ServerReflectionInfo(nothing(), metadata=metadata)
        wait_until(lambda: "teacher_streams 1.0" in shared.page(), "the stream is open")
        try:
            end(shared, name)
            for call in (scoring, reflecting):
                with pytest.raises(grpc.RpcError, match=words):
                    within(REFUSED_S, lambda call=call: list(call))
                assert call.code() == grpc.StatusCode.UNAUTHENTICATED
        finally:
            shared.set_clock(0)
            quiet.set()


def test_a_reader_that_stopped_does_not_keep_its_stream(shared: Shared):
    token = shared.add("stalled", "--scopes", "score", "dense")
    connection = Connection.to(shared.served.address, ca=shared.ca, token=token)
    requests = [
        teacher_pb2.ScoreRequest(
            request_id=number,
            token_ids=SEQUENCES[0].numpy().astype("<i4").tobytes(),
            lengths=[len(SEQUENCES[0])],
            targets=teacher_pb2.TargetSpec(dense=teacher_pb2.Dense(bits=32)),
        )
        for number in range(400)
    ]
    with connection.blocking_channel(shared.served.address) as channel:
        stub = teacher_pb2_grpc.TeacherStub(channel)
        call = stub.Score(iter(requests), metadata=connection.metadata)

        def stuck() -> bool:
            page = shared.page()
            taken = re.search(r"^teacher_answer_bytes (\S+)$", page, re.MULTILINE)
            full = taken is not None and float(taken[1]) > 15 << 20
            return full and "teacher_queued_tokens 0.0" in page

        wait_until(stuck, "all is scored, and more than the client's window waits for it", 60.0)
        command("team", "disable", "stalled", "--teams", shared.teams)
        wait_until(lambda: "teacher_streams 0.0" in shared.page(), "the stream is gone")
        wait_until(lambda: "teacher_answer_bytes 0.0" in shared.page(), "its answers too")
        call.cancel()


def test_rotation_lets_both_tokens_in_for_a_while(shared: Shared):
    old = shared.add("changing")
    made = command("team", "rotate", "changing", "--teams", shared.teams, "--json")
    new = json.loads(made)["token"]
    wait_until(lambda: shared.refusal(new) is None, "the new token is let in")
    assert shared.refusal(old) is None
    shared.set_clock(8 * DAY_S)
    try:
        wait_until(lambda: shared.refusal(old) is not None, "the old one is let in no more")
        assert shared.refusal(new) is None
    finally:
        shared.set_clock(0)


def test_a_file_that_is_damaged_or_gone_changes_nothing(shared: Shared):
    token = shared.add("steady")
    good = shared.teams.read_text()
    said = len(shared.served.output())
    with shared.connect(token) as teacher:
        for text in (good.replace("weight", "wieght", 1), good[:-3], "", None):
            if text is None:
                shared.teams.unlink()
            else:
                shared.teams.write_text(text)
            told = len(shared.served.output())
            wait_until(
                lambda told=told: "stay as they were" in shared.served.output()[told:], "it is told"
            )
            assert len(list(teacher.stream(SEQUENCES[:4]))) == 4
            assert shared.refusal(token) is None
    shared.teams.write_text(good)
    later = shared.add("later")
    assert shared.refusal(later) is None
    assert shared.served.output()[said:].count("stay as they were") == 4, "each once"
    assert "wieght" in shared.served.output()[said:]


def test_a_team_may_do_what_its_scopes_say(shared: Shared):
    plain = shared.add("plain")
    with shared.connect(plain) as teacher:
        with pytest.raises(AccessDenied, match=r'"dense".*plain has: score'):
            list(teacher.stream(SEQUENCES[:1], targets="dense:bf16"))
        assert len(list(teacher.stream(SEQUENCES[:2]))) == 2, "the stream goes on"
        text = shared.teams.read_text()
        without = text.replace(
            '[teams.plain]\nweight = 1\nscopes = ["score"]', "[teams.plain]\nscopes = []"
        )
        assert without != text
        shared.teams.write_text(without)
        with pytest.raises(AccessDenied, match='"score"'):
            within(REFUSED_S, lambda: list(teacher.stream(repeat(SEQUENCES[0]))))
    with shared.connect(plain) as teacher, pytest.raises(AccessDenied, match="score"):
        list(teacher.stream(SEQUENCES[:1]))


def test_the_largest_request_of_a_team_is_answered_and_one_token_more_is_not(shared: Shared):
    token = shared.add("small")
    text = shared.teams.read_text()
    shared.teams.write_text(
        text.replace("[teams.small]", "[teams.small]\nlimits = { max_request_tokens = 20 }")
    )
    with shared.connect(token) as teacher:
        wait_until(lambda: _limit(shared, token) == 20, "the limit is known")
        ids = SEQUENCES[0].new_ones(20)
        assert len(list(teacher.stream([ids]))) == 1
        with pytest.raises(ValueError, match=r"21 tokens.*team small.*at most 20"):
            list(teacher.stream([SEQUENCES[0].new_ones(21)]))


def _limit(shared: Shared, token: str) -> int:
    with shared.connect(token) as teacher:
        return teacher.info.caller.max_request_tokens


def test_new_certificates_are_no_error_at_any_client(shared: Shared):
    token = shared.add("rotating")
    serials, errors = set(), []
    stop = threading.Event()

    def stream() -> None:
        try:
            with shared.connect(token) as teacher:
                for _ in teacher.stream(repeat(SEQUENCES[0]), ahead=4):
                    if stop.is_set():
                        assert teacher.counters.reconnects == 0
                        return
        except BaseException as error:
            errors.append(error)

    streaming = threading.Thread(target=stream)
    streaming.start()
    try:
        for _ in range(5):
            serials.add(_certificate(shared.served.address))
            make_certs(shared.folder, "--host", "127.0.0.1", "--force")
            for _ in range(4):
                with shared.connect(token) as teacher:
                    assert len(list(teacher.stream(SEQUENCES[:2]))) == 2
        # Half a rotation: a certificate without its key.
        key = shared.folder / "server-key.pem"
        old, before = key.read_bytes(), _certificate(shared.served.address)
        make_certs(shared.folder, "--host", "127.0.0.1", "--force")
        new = key.read_bytes()
        key.write_bytes(old)
        assert _certificate(shared.served.address) == before
        assert shared.refusal(token) is None
        key.write_bytes(new)
        serials |= {before, _certificate(shared.served.address)}
    finally:
        stop.set()
        streaming.join(30)
    assert not errors
    assert len(serials) == 7, "every pair was used"


def _certificate(address: str) -> str:
    import ssl

    host, port = address.split(":")
    return ssl.get_server_certificate((host, int(port)))


def test_every_call_that_reflection_lists_has_a_rule_and_probes_need_no_token(shared: Shared):
    from teacher_server.admission.access import RULES

    token = shared.add("looking")
    connection = Connection.to(shared.served.address, ca=shared.ca, token=token)
    with connection.blocking_channel(shared.served.address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=5
        )
        assert check.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        ask = reflection_pb2.ServerReflectionRequest

        def reflect(request, metadata):
            return next(
                iter(stub.ServerReflectionInfo(iter([request]), timeout=5, metadata=metadata))
            )

        with pytest.raises(grpc.RpcError, match="needs a token"):
            reflect(ask(list_services=""), ())
        listed = reflect(ask(list_services=""), connection.metadata).list_services_response.service
        found = set()
        for service in listed:
            answer = reflect(ask(file_containing_symbol=service.name), connection.metadata)
            from google.protobuf.descriptor_pb2 import FileDescriptorProto

            for data in answer.file_descriptor_response.file_descriptor_proto:
                file = FileDescriptorProto.FromString(data)
                for one in file.service:
                    name = f"{file.package}.{one.name}"
                    found |= {f"/{name}/{method.name}" for method in one.method}
        for method in sorted(found):
            if "Health" in method:
                continue
            call = channel.unary_unary(method)
            with pytest.raises(grpc.RpcError) as caught:
                call(b"", timeout=5)
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED, method  # type: ignore[attr-defined]
    assert found == set(RULES)


def test_no_token_is_in_logs_metrics_or_arguments(shared: Shared, tmp_path: Path):
    token, foreign = shared.add("secret"), "lst_" + "y" * 43
    with shared.connect(token) as teacher:
        assert len(list(teacher.stream(SEQUENCES[:4]))) == 4
        assert token not in repr(teacher._session._connection)
        assert shared.refusal(foreign) is not None
        places = {
            "log": shared.served.output(),
            "metrics": shared.page(),
            "teams file": shared.teams.read_text(),
            "description": str(teacher.info),
        }
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                places[str(process)] = process.read_bytes().decode(errors="replace")
            except OSError:
                continue  # it has ended
    ids = ", ".join(map(str, SEQUENCES[0][:8].tolist()))
    for place, text in places.items():
        assert ids not in text, place
        assert token not in text, place
        assert foreign not in text, place
        assert token[10:30] not in text, place
    assert 'teacher_rejected_total{reason="TOKEN_UNKNOWN",team=""}' in places["metrics"]
    environment = Path(f"/proc/{os.getpid()}/environ").read_bytes()
    assert token.encode() not in environment


def test_commands_take_the_connection_file(
    shared: Shared, folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from student_trainer.config import CorpusConfig
    from student_trainer.training import run as runs

    address = ("--address", shared.served.address, "--ca", shared.ca, "--out", tmp_path)
    monkeypatch.setenv("TEACHER_TOKEN", shared.add("filed", *address))
    file = tmp_path / "filed-connection.toml"
    described = json.loads(command("describe", file, "--json"))
    assert described["caller"]["team"] == described["team"] == "filed"
    assert described["caller"]["max_tokens_per_day"] == 0
    assert "scopes score" in command("describe", file)
    for place in ({"teacher": str(file)}, {"teacher": shared.served.address, "ca": shared.ca}):
        config = CorpusConfig(student=folder, data=["*.txt"], sequence_length=64, **place)
        with runs.open_teacher(config, None) as teacher:
            assert teacher.info.team == "filed"
    monkeypatch.delenv("TEACHER_TOKEN")
    assert cli.main(["describe", str(file)]) == 1


def test_a_certificate_stands_for_a_team(serve, folder, tmp_path: Path):
    make_certs(tmp_path, "--host", "127.0.0.1", "--client", "search", "stranger")
    teams = tmp_path / "teams.toml"
    command("team", "add", "search", "--certificates", "search", "--teams", teams)
    token = add_team(teams, "other")
    tls = (
        "--tls-cert",
        str(tmp_path / "server.pem"),
        "--tls-key",
        str(tmp_path / "server-key.pem"),
    )
    served = serve(
        folder,
        *("--teams", str(teams), *tls, "--tls-client-ca", str(tmp_path / "ca.pem")),
        hook=partial(hurried, tmp_path),
    )
    ca = tmp_path / "ca.pem"
    pair = {"cert": tmp_path / "client-search.pem", "key": tmp_path / "client-search-key.pem"}
    strange = {
        "cert": tmp_path / "client-stranger.pem",
        "key": tmp_path / "client-stranger-key.pem",
    }
    with connect(served.address, ca=ca, **pair) as teacher:
        assert teacher.info.team == "search"

        def until_it_ends() -> None:
            for number, _ in enumerate(teacher.stream(repeat(SEQUENCES[0]))):
                if number == 3:
                    (tmp_path / "clock").write_text(str(400 * DAY_S))

        with pytest.raises(AccessDenied, match="expired at"):
            within(REFUSED_S, until_it_ends)
    (tmp_path / "clock").write_text("0")
    with connect(served.address, ca=ca, token=token, **strange) as teacher:
        assert teacher.info.team == "other", "a token counts before a certificate"
    with pytest.raises(AccessDenied, match=r"stranger.*belongs to no team"):
        connect(served.address, ca=ca, **strange)
    with pytest.raises(TeacherUnavailable, match="asks for a client certificate"):
        connect(served.address, ca=ca, token=token, patience_s=0.1)
    served.stop()


def test_what_is_wrong_with_a_connection_is_told(shared: Shared, tmp_path: Path):
    address = shared.served.address
    with pytest.raises(TeacherUnavailable, match="speaks TLS and was spoken to in plain text"):
        connect(address, patience_s=0.1)
    make_certs(tmp_path)
    with pytest.raises(TeacherUnavailable, match="not signed by the given authority"):
        connect(address, ca=tmp_path / "ca.pem", patience_s=0.1)


@pytest.mark.parametrize("mistake", ["plain text", "another authority", "TLS"])
def test_what_will_not_come_right_is_not_waited_for(
    serve, folder, shared: Shared, tmp_path: Path, capsys: pytest.CaptureFixture[str], mistake: str
):
    make_certs(tmp_path)
    other = tmp_path / "ca.pem"
    target, flags, why = {
        "plain text": (shared.served, [], "speaks TLS and was spoken to in plain text"),
        "another authority": (shared.served, ["--ca", str(other)], "not signed by the given"),
        "TLS": (None, ["--ca", str(other)], "does not speak TLS"),
    }[mistake]
    target = target or serve(folder, "--threads", "1")
    with Proxy(target.address) as proxy:
        assert student_trainer.cli.main(["check", proxy.address, *flags]) == 1
        # It was looked at twice. Ten seconds of attempts are about a hundred connections.
        assert proxy.connections < 20
        check = capsys.readouterr().err
        assert cli.main(["describe", proxy.address, *flags]) == 1
    for err in (check, capsys.readouterr().err):
        line = err.strip().splitlines()[-1]
        assert why in line
        assert line.index(why) < line.index("UNAVAILABLE"), "what gRPC says comes last"


def test_a_service_that_is_not_there_yet_is_waited_for(shared: Shared):
    token = shared.add("early")
    with Proxy(f"127.0.0.1:{free_port()}") as proxy, ThreadPoolExecutor(1) as pool:
        connecting = pool.submit(connect, proxy.address, token=token, ca=shared.ca)
        wait_until(lambda: proxy.connections >= 6, "it was tried and looked at")
        proxy.target = shared.served.address
        with connecting.result(60) as teacher:
            assert teacher.info.team == "early"


def as_client(token: str, ca: str) -> None:
    """Runs in a replica: to its peers it is a client."""
    from teacher_server.cluster import peers

    peers.INTERVAL_S = 0.2
    os.environ.update(TEACHER_TOKEN=token, TEACHER_CA=ca)


def test_replicas_know_each_other_through_tls_and_strange_names_are_left_out(
    serve, folder, tmp_path: Path
):
    teams = tmp_path / "teams.toml"
    token, replicas = add_team(teams, "search"), add_team(teams, "replicas", "--scopes", "generate")
    tls = make_certs(tmp_path, "--host", "127.0.0.1", "--only-these")
    ca = tmp_path / "ca.pem"
    ports = [free_port(), free_port()]
    addresses = [f"127.0.0.1:{port}" for port in ports]
    served = [
        serve(
            folder,
            *("--port", str(port), "--peers", *addresses, "--service-id", "one", *tls),
            # Whoever listens there shows a certificate that does not have this name.
            *("--teams", str(teams), "--threads", "1", "--advertise", advertised),
            hook=partial(as_client, replicas, str(ca)),
            ready=False,
        )
        for port, advertised in zip(ports, ("127.0.0.1", "localhost"), strict=True)
    ]
    told = [one.wait_ready() for one in served]
    assert told == [addresses[0], f"localhost:{ports[1]}"]
    assert "is not for" not in served[0].output()
    assert "is not for localhost, the address that clients are given" in served[1].output()

    def listed(address: str) -> set[str]:
        with connect(address, token=token, ca=ca) as teacher:
            return {card.address for card in teacher.info.replicas}

    both = {addresses[0], f"localhost:{ports[1]}"}
    for address in addresses:
        wait_until(lambda address=address: listed(address) == both, "they know each other")
    with connect(addresses[0], token=token, ca=ca) as teacher:
        began = time.monotonic()
        while time.monotonic() - began < 3.0:
            assert len(list(teacher.stream(SEQUENCES))) == len(SEQUENCES)
        assert teacher.replicas == addresses[:1]
        assert teacher.counters.reconnects == 0
    with connect(addresses[1], token=token, ca=ca) as teacher:

        def both_used() -> bool:
            list(teacher.stream(SEQUENCES, ahead=40))
            return set(teacher.replicas) == set(addresses)

        wait_until(both_used, "the other one is found by its own address")
    for one in served:
        assert one.stop() == 0
