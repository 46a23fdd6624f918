"""Opens the ports of a replica, probes them regularly, and reopens those that have died.

A gRPC server can stop accepting calls while its open streams continue and nothing else looks wrong.
So each port is probed by a health check of its own, as a stranger would make; one whose server died,
or that failed to answer twice, gets a new server at once. Streams of the old one may continue for a
while. A port that cannot be reopened, or does not answer then either, ends the replica.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc

from teacher_server.errors import ServeError
from teacher_server.rpc.probe import is_answering
from teacher_server.rpc.tls import Tls

logger = logging.getLogger(__name__)

PROBE_EVERY_S, PROBE_AGAIN_S = 2.0, 0.25
"""Pause between two probes, and after one that failed."""
FAILURES = 2
"""Failed probes in a row after which a port gets a new server, and then the replica ends."""
REOPEN_S = (0.0, 0.01, 0.05, 0.2, 0.5, 1.0)
"""Pauses before the tries to open a port again."""
OLD_STREAMS_S = 30.0
"""How long streams of a server that was replaced may continue."""
MAX_OLD = 4
"""Replaced servers with such streams; streams of further ones end at once, and clients resume them at
the new server."""

MakeServer = Callable[[bool, Callable[[BaseException], None]], grpc.aio.Server]
"""Makes a server with all services, without a port: (shared, on_death) -> server."""


@dataclass(slots=True, eq=False)
class _Port:
    """A port, and the server that listens there now."""

    host: str
    number: int
    shared: bool
    """Shared with other replicas of this host: the kernel chooses which one gets a connection."""
    probed: int = 0
    """The port where this server alone can be probed; differs from `number` for a shared port."""
    server: grpc.aio.Server = field(init=False)
    has_answered: bool = False
    """Once, at least; a port that never did may be out of reach from here, rather than dead."""
    failures: int = 0
    reopened: bool = False
    """Since it answered last."""

    @property
    def where(self) -> str:
        return f"{self.host}:{self.number}"


class Ports:
    """The ports of a replica: `open` each, then `start`; run `watch` in a task of its own."""

    def __init__(
        self,
        make_server: MakeServer,
        tls: Tls | None,
        *,
        may_drop_connections: Callable[[], bool] = lambda: False,
    ) -> None:
        """may_drop_connections: whether new connections may have to wait, this process's own too."""
        self._make_server = make_server
        self._may_drop_connections = may_drop_connections
        self._tls = tls
        self._ports: list[_Port] = []
        self._old: dict[grpc.aio.Server, asyncio.Task[None]] = {}
        """Replaced servers whose streams may continue, and the task that stops each."""
        self._died: set[_Port] = set()
        self._wake = asyncio.Event()

    @property
    def numbers(self) -> set[int]:
        """The numbers of all ports that these servers listen on."""
        return {n for port in self._ports for n in (port.number, port.probed)}

    @property
    def silent(self) -> str:
        """The ports that do not answer now, as far as is known; empty: all do."""
        return ", ".join(port.where for port in self._ports if port.failures or port in self._died)

    def open(self, host: str, number: int, *, shared: bool = False) -> int:
        """Opens a port, where 0 is any free one; returns its number. Raises ServeError."""
        port = _Port(host, number, shared)
        self._listen(port)
        self._ports.append(port)
        return port.number

    async def start(self) -> None:
        """Accepts calls from now on."""
        for port in self._ports:
            await port.server.start()
            await self._probe(port)

    async def stop(self, grace_s: float) -> None:
        """Ends all servers; open calls may take `grace_s`."""
        servers = [*(port.server for port in self._ports), *self._old]
        await asyncio.gather(*(_stop(server, grace_s) for server in servers))

    async def watch(self) -> str:
        """Keeps the ports open; returns only to say which one cannot be kept open."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PROBE_AGAIN_S if self.silent else PROBE_EVERY_S):
                    await self._wake.wait()
            self._wake.clear()
            if not self._died:
                await asyncio.gather(*map(self._probe, self._ports))
            for port in self._ports:
                dead = port in self._died
                if not dead and port.failures < FAILURES:
                    continue
                if port.reopened and not dead:
                    return f"{port.where} was reopened and does not answer"
                self._died.discard(port)
                if not await self._reopen(port):
                    return f"{port.where} cannot be reopened"

    async def _probe(self, port: _Port) -> None:
        """Counts the failures in a row of a port."""
        answered = await is_answering(
            _own_address(port.host),
            port.probed,
            tls=self._tls is not None,
            wants_certificate=self._tls is not None and self._tls.client_ca is not None,
            may_be_dropped=self._may_drop_connections(),
        )
        if answered:
            port.has_answered, port.failures, port.reopened = True, 0, False
        elif answered is not None and port.has_answered:
            port.failures += 1

    async def _reopen(self, port: _Port) -> bool:
        """Gives a port a new server and starts it; False: that is impossible."""
        logger.error("%s does not answer any more, reopening it", port.where)
        self._retire(port.server)
        for pause_s in REOPEN_S:
            await asyncio.sleep(pause_s)  # the old server releases the port meanwhile
            with contextlib.suppress(ServeError):
                self._listen(port)
                await port.server.start()
                port.failures, port.reopened = 0, True
                await self._probe(port)
                logger.info("%s is open again", port.where)
                return True
        return False

    def _listen(self, port: _Port) -> None:
        """Gives a port a new server, not started. Raises ServeError."""

        def died(error: BaseException) -> None:
            # Not the text: a caller may have influenced it.
            logger.error("the server at %s died of %s", port.where, type(error).__name__)
            if port.server is server:  # and not one that was replaced meanwhile
                self._died.add(port)
                self._wake.set()

        server = self._make_server(port.shared, died)
        try:
            number = self._bind(server, port.host, port.number)
            if port.shared:
                port.probed = self._bind(server, _own_address(port.host), port.probed)
        except RuntimeError as error:
            raise ServeError(f"cannot listen on {port.where}: {error}") from error
        port.number, port.server = number, server
        port.probed = port.probed or number

    def _bind(self, server: grpc.aio.Server, host: str, number: int) -> int:
        where = f"{f'[{host}]' if ':' in host and not host.startswith('[') else host}:{number}"
        if self._tls is None:
            return server.add_insecure_port(where)
        return server.add_secure_port(where, self._tls.credentials())

    def _retire(self, server: grpc.aio.Server) -> None:
        """Stops a server in the background; its streams may continue for a while."""
        grace_s = OLD_STREAMS_S if len(self._old) < MAX_OLD else None
        self._old[server] = asyncio.create_task(_stop(server, grace_s))
        self._old[server].add_done_callback(lambda _: self._old.pop(server))


async def _stop(server: grpc.aio.Server, grace_s: float | None) -> None:
    """Stops a server, also one that died: its first stop raises what it died of."""
    for _ in range(2):
        with contextlib.suppress(Exception):
            await server.stop(grace_s)
            return


def _own_address(host: str) -> str:
    """Returns the address by which this machine reaches a port that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "[::]": "::1"}.get(host, host.strip("[]"))
