"""A service of two replicas on a Ray of its own, started once by the command line."""

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import torch

from protos import teacher_pb2, teacher_pb2_grpc
from student_trainer import connect

VOCAB = 1001


def describe(address: str) -> teacher_pb2.TeacherInfo:
    """What one replica says, over a connection of its own."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(address, options=options) as channel:
        stub = teacher_pb2_grpc.TeacherStub(channel)
        return stub.Describe(teacher_pb2.DescribeRequest(), timeout=5)


def members(address: str) -> dict[str, str]:
    """The addresses of the replicas that are ready, by id; empty while nobody answers."""
    try:
        return {r.id: r.address for r in describe(address).replicas if r.state == "ready"}
    except grpc.RpcError:
        return {}


def wait_for(what: Callable[[], object], seconds: float, *, step_s: float = 0.1) -> float:
    """Waits until `what()` is true; returns how long that took."""
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < seconds, "it did not happen in time"
        time.sleep(step_s)
    return time.monotonic() - began


@contextmanager
def trainer(address: str, *, ahead: int = 16) -> Iterator[list[int]]:
    """A stream that runs meanwhile; its list grows by one with each answer, errors are raised."""
    answered: list[int] = []
    errors: list[BaseException] = []
    stop = threading.Event()

    def train() -> None:
        try:
            with connect(address) as teacher:
                sequences = iter(lambda: torch.arange(200), None)
                for number, _ in enumerate(teacher.stream(sequences, ahead=ahead)):
                    answered.append(number)
                    if stop.is_set():
                        return
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        wait_for(lambda: answered or errors, 30)
        yield answered
        seen = len(answered)
        wait_for(lambda: len(answered) > seen or errors, 30)  # it still gets answers
    finally:
        stop.set()
        thread.join(60)
    assert not errors, errors[0]
    assert answered == list(range(len(answered)))


@dataclass
class Launched:
    """A `teacher-server serve` with a session of its own, so that all it starts can be found."""

    process: subprocess.Popen[bytes]
    folder: Path
    environment: dict[str, str]
    address: str = ""

    def output(self) -> str:
        return (self.folder / "out").read_text()

    def log(self) -> str:
        return (self.folder / "err").read_text()

    @property
    def ray_address(self) -> str:
        return self.log().partition("ray started address=")[2].split()[0]

    def wait_ready(self, seconds: float = 300) -> str:
        wait_for(lambda: self.output() or self.process.poll() is not None, seconds)
        assert self.output().startswith("ready "), self.log()
        self.address = self.output().split()[1]
        return self.address

    def processes(self) -> dict[int, str]:
        """The command lines of everything it started that still runs, by pid."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.process.pid and state != "Z":
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    found[int(folder.name)] = command.strip()
            except OSError:
                continue  # ended while we looked
        return found

    def replica_pids(self, name: str = "teacher") -> list[int]:
        title = f"ray::ServeReplica:{name}:"
        return [pid for pid, command in self.processes().items() if command.startswith(title)]

    def stop(self, seconds: float = 180) -> int:
        """Ctrl-C in its terminal; what is left after that is killed, and the test fails."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
        try:
            code = self.process.wait(seconds)
            wait_for(lambda: not self.processes(), 10)
        finally:
            for pid in self.processes():
                os.kill(pid, signal.SIGKILL)
        return code


Launch = Callable[..., Launched]


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """launch(folder, "--flag", ...) -> Launched, ready; everything is stopped at the end."""
    started: list[Launched] = []

    def start(
        folder: Path | str, *flags: str, on: Launched | None = None, ready: bool = True
    ) -> Launched:
        if on is None:
            environment = {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
        else:
            environment = on.environment
            flags = ("--ray-address", on.ray_address, *flags)
        if "--port" not in flags:
            flags = ("--port", "0", *flags)
        logs = tmp_path_factory.mktemp("launched")
        with open(logs / "out", "wb") as out, open(logs / "err", "wb") as err:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "teacher_server", "serve"),
                    *("--model", str(folder), *flags),
                ],
                stdout=out,
                stderr=err,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        launched = Launched(process, logs, environment)
        started.append(launched)
        if ready:
            launched.wait_ready()
        return launched

    yield start
    for launched in reversed(started):
        launched.stop()


@pytest.fixture(scope="session")
def service(
    launch: Launch,
    model_folder: Callable[[str, int], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Launched:
    ledger = tmp_path_factory.mktemp("ray") / "ledger"
    return launch(model_folder("Gemma2", VOCAB), "--replicas", "2", "--ledger", str(ledger))


@pytest.fixture
def pair(service: Launched) -> Launched:
    """The service, both of its replicas ready."""
    wait_for(lambda: len(members(service.address)) == 2, 60)
    return service
