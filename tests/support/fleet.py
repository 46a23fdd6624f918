"""Replicas of one service that are killed, frozen, stopped and started again, and what they hold."""

import json
import os
import signal
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from logitstream.connection import Connection
from protos import teacher_pb2, teacher_pb2_grpc
from tests.conftest import Serve, Served
from tests.end_to_end.test_processes import free_port
from tests.support.proxy import Proxy

HELD = (
    "teacher_streams",
    "teacher_answer_bytes",
    "teacher_stream_answer_bytes_max",
    "teacher_queued_tokens",
)
"""Gauges that are 0 when no client is there."""

SMALL_BATCHES = ("--batch.max-tokens", "200")


class Fleet(AbstractContextManager["Fleet"]):
    """`count` replicas of one service; with `proxied`, clients can reach them through proxies only.

    flags: of every replica. batch_s: added to each forward until `hurry`, so that there is always a
    batch in hand. hook: runs in the processes before they start. token, ca: with which it asks its
    replicas, and they each other.
    """

    def __init__(
        self,
        serve: Serve,
        folder: Path,
        count: int = 2,
        *,
        flags: Sequence[str] = (),
        proxied: bool = False,
        batch_s: float = 0.0,
        hook: Callable[[], None] | None = None,
        service_id: str = "fleet",
        peers: Sequence[str] | None = None,
        token: str | None = None,
        ca: Path | None = None,
    ) -> None:
        self._serve = serve
        self._folder = folder
        self._flags = flags
        self._hook = hook
        self._service_id = service_id
        self._token, self._ca = token, ca
        self._closing = ExitStack()
        self._signs = Path(self._closing.enter_context(tempfile.TemporaryDirectory()))
        if batch_s:
            (self._signs / "slow").write_text(str(batch_s))
        self.own = [f"127.0.0.1:{free_port()}" for _ in range(count)]
        self._peers = self.own if peers is None else peers
        self._metrics = [free_port() for _ in range(count)]
        self.proxies = [self._closing.enter_context(Proxy(one)) for one in self.own if proxied]
        self.replicas: list[Served] = [self._begin(index) for index in range(count)]
        for replica in self.replicas:
            replica.wait_ready()

    @property
    def addresses(self) -> list[str]:
        """What clients are given."""
        return [proxy.address for proxy in self.proxies] or self.own

    def _begin(self, index: int) -> Served:
        port = self.own[index].rpartition(":")[2]
        others = [one for one in self._peers if one != self.own[index]]
        shown = {} if self._token is None else {"TEACHER_TOKEN": self._token}
        if self._ca is not None:
            shown["TEACHER_CA"] = str(self._ca)
        hook = partial(_prepare, self.addresses[index], self._signs, shown, self._hook)
        return self._serve(
            self._folder,
            *("--port", port, "--service-id", self._service_id, "--threads", "1"),
            *("--metrics-port", str(self._metrics[index])),
            *(("--peers", *others) if others else ()),
            *self._flags,
            hook=hook,
            ready=False,
        )

    def hurry(self) -> None:
        """All faults have been seen: forwards are as fast as they can be."""
        (self._signs / "slow").unlink()

    def hang(self) -> None:
        """The next forward, of whichever replica, goes on until `unhang`."""
        (self._signs / "hang").touch()

    def unhang(self) -> None:
        """The forward that hangs ends, as if it had only been slow."""
        (self._signs / "hung").unlink()

    def start(self, index: int) -> None:
        """Starts a replica again, and waits until it is ready."""
        self.replicas[index] = self._begin(index)
        self.replicas[index].wait_ready()

    def kill(self, index: int) -> None:
        """SIGKILL."""
        self.replicas[index].stop(signal.SIGKILL)

    def freeze(self, index: int) -> None:
        self.replicas[index].send_signal(signal.SIGSTOP)

    def thaw(self, index: int) -> None:
        self.replicas[index].send_signal(signal.SIGCONT)

    def live(self) -> list[int]:
        return [i for i, replica in enumerate(self.replicas) if replica.process.is_alive()]

    def gauge(self, index: int, name: str) -> float:
        """One metric of a replica."""
        return self.gauges(index)[name]

    def gauges(self, index: int) -> dict[str, float]:
        """The metrics of a replica that have no labels."""
        url = f"http://127.0.0.1:{self._metrics[index]}/metrics"
        with urllib.request.urlopen(url, timeout=5) as page:
            lines = page.read().decode().splitlines()
        pairs = (line.split() for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def rss_nbytes(self, index: int) -> int:
        """Resident memory of a replica's process."""
        pid = self.replicas[index].process.pid
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    @contextmanager
    def _called(self, index: int) -> Iterator[tuple[teacher_pb2_grpc.TeacherStub, Any]]:
        """A replica, and the metadata of a call to it."""
        connection = Connection.to(self.own[index], token=self._token, ca=self._ca)
        with connection.blocking_channel(self.own[index]) as channel:
            yield teacher_pb2_grpc.TeacherStub(channel), connection.metadata

    def describe(self, index: int) -> teacher_pb2.TeacherInfo:
        with self._called(index) as (stub, metadata):
            return stub.Describe(teacher_pb2.DescribeRequest(), timeout=10, metadata=metadata)

    def usage(self) -> list[teacher_pb2.UsageRow]:
        """The ledger of the fleet, which needs the flag --ledger, with all that its replicas know."""
        rows: list[teacher_pb2.UsageRow] = []
        for index in (*self.live(), *self.live()):  # each tells what it has, then all is read
            with self._called(index) as (stub, metadata):
                request = teacher_pb2.UsageRequest(since="2000-01-01")
                rows = list(stub.Usage(request, timeout=10, metadata=metadata).rows)
        return rows

    def wait_known(self, count: int | None = None, seconds: float = 15.0) -> None:
        """Until every live replica lists `count` ready ones: all that live, unless told."""
        wanted = len(self.live()) if count is None else count
        for index in self.live():
            wait_until(
                lambda index=index: (
                    sum(card.state == "ready" for card in self.describe(index).replicas) == wanted
                ),
                f"replica {index} lists {wanted}",
                seconds,
            )

    def assert_nothing_left(self, seconds: float = 5.0) -> None:
        """O5 on the servers: no streams, no queued work, no unfinished answers."""
        for index in self.live():
            found: dict[str, float] = {}

            def idle(index: int = index, found: dict[str, float] = found) -> bool:
                found.update(self.gauges(index))
                return not any(found[name] for name in HELD)

            wait_until(idle, lambda found=found: json.dumps({k: found[k] for k in HELD}), seconds)

    def wait_streams(self, count: int, seconds: float = 60.0) -> None:
        """Until replica 0 has no more than so many streams."""
        wait_until(lambda: self.gauge(0, "teacher_streams") <= count, "streams end", seconds)

    def __exit__(self, *_: object) -> None:
        for replica in self.replicas:
            if replica.process.is_alive():
                replica.send_signal(signal.SIGCONT)
                replica.stop(signal.SIGKILL)
        self._closing.close()


def wait_until(
    done: Callable[[], bool], what: str | Callable[[], str], seconds: float = 15.0
) -> float:
    """Waits for `done()`; returns how long that took, fails with `what` if it does not come."""
    started = time.monotonic()
    while not done():
        if time.monotonic() - started > seconds:
            raise AssertionError(
                f"not within {seconds} s: {what if isinstance(what, str) else what()}"
            )
        time.sleep(0.02)
    return time.monotonic() - started


def _prepare(
    address: str, signs: Path, shown: dict[str, str], hook: Callable[[], None] | None
) -> None:
    """Runs in the service: clients are told `address`, which may be a proxy's."""
    os.environ.update(shown)
    from teacher_server.cluster import peers
    from teacher_server.engine.model import TeacherModel
    from teacher_server.replica import Replica

    peers.INTERVAL_S = 0.2
    start, hidden_states = Replica.start, TeacherModel.hidden_states

    async def started(self: Replica, *arguments, **options) -> int:
        port = await start(self, *arguments, **options)
        self.description.address = address
        serving.append(True)
        return port

    serving: list[bool] = []

    def slowed(self: TeacherModel, *arguments):
        if not serving:  # what a replica tries before it serves is quick
            return hidden_states(self, *arguments)
        with suppress(OSError):
            time.sleep(float((signs / "slow").read_text()))
        with suppress(OSError):
            (signs / "hang").rename(signs / "hung")
            while (signs / "hung").exists():
                time.sleep(0.05)
        return hidden_states(self, *arguments)

    Replica.start, TeacherModel.hidden_states = started, slowed
    if hook is not None:
        hook()
