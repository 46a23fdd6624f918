"""The ports that a replica listens on: opened, asked regularly, and opened again when they are dead.

A gRPC server can stop to accept calls while its open streams go on and nothing else looks wrong. So
each port is asked by a health check of its own, as a stranger would; one that has died, or has failed
to answer twice, gets a new server at once. The old one's streams may go on for a while. A port that
cannot be opened again, or that does not answer then either, is the replica's end.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc

from teacher_server.errors import ServeError
from teacher_server.rpc.probe import answers
from teacher_server.rpc.tls import Tls

logger = logging.getLogger(__name__)

ASK_EVERY_S, ASK_AGAIN_S = 2.0, 0.25
"""Between two questions, and after one that was not answered."""
FAILURES = 2
"""After so many in a row a port gets a new server, and once more after that the replica ends."""
REOPEN_S = (0.0, 0.01, 0.05, 0.2, 0.5, 1.0)
"""Pauses before the tries to open a port again."""
OLD_STREAMS_S = 30.0
"""How long streams of a server that was replaced may go on."""
MAX_OLD = 4
"""Servers with such streams; those of further ones end at once, and go on at the new server."""

Make = Callable[[bool, Callable[[BaseException], None]], grpc.aio.Server]
"""Makes a server with all services, without a port: (shared, on_death) -> server."""


@dataclass(slots=True, eq=False)
class _Port:
    """One port, and the server that listens there now."""

    host: str
    number: int
    shared: bool
    """With other replicas of this host: the kernel chooses who gets a connection."""
    asked: int = 0
    """Where this server alone can be asked: the number of a shared port is not its own."""
    server: grpc.aio.Server = field(init=False)
    proven: bool = False
    """It has answered once; one that never did may be out of reach from here, and not dead."""
    failures: int = 0
    reopened: bool = False
    """Since it answered last."""

    @property
    def where(self) -> str:
        return f"{self.host}:{self.number}"


class Ports:
    """All ports of a replica. `open` each, then `start`; `watch` is a task of its own."""

    def __init__(
        self, make: Make, tls: Tls | None, *, is_gate_narrow: Callable[[], bool] = lambda: False
    ) -> None:
        """is_gate_narrow: whether new connections may have to wait, those of this process too."""
        self._make = make
        self._is_gate_narrow = is_gate_narrow
        self._tls = tls
        self._ports: list[_Port] = []
        self._old: dict[grpc.aio.Server, asyncio.Task[None]] = {}
        """Servers that were replaced and whose streams may go on, and who waits for them."""
        self._died: set[_Port] = set()
        self._wake = asyncio.Event()

    @property
    def numbers(self) -> set[int]:
        """Of all ports that these servers listen on."""
        return {n for port in self._ports for n in (port.number, port.asked)}

    @property
    def silent(self) -> str:
        """Where nobody answers now, as far as is known; empty: everywhere."""
        return ", ".join(port.where for port in self._ports if port.failures or port in self._died)

    def open(self, host: str, number: int, *, shared: bool = False) -> int:
        """Opens a port, 0: a free one; returns its number. Raises ServeError."""
        port = _Port(host, number, shared)
        self._listen(port)
        self._ports.append(port)
        return port.number

    async def start(self) -> None:
        """Calls are accepted from now on."""
        for port in self._ports:
            await port.server.start()
            await self._ask(port)

    async def stop(self, grace_s: float) -> None:
        """Ends all servers; calls that are open may take so long."""
        servers = [*(port.server for port in self._ports), *self._old]
        await asyncio.gather(*(_stop(server, grace_s) for server in servers))

    async def watch(self) -> str:
        """Keeps the ports open; returns only to say which one cannot be."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ASK_AGAIN_S if self.silent else ASK_EVERY_S):
                    await self._wake.wait()
            self._wake.clear()
            if not self._died:
                await asyncio.gather(*map(self._ask, self._ports))
            for port in self._ports:
                dead = port in self._died
                if not dead and port.failures < FAILURES:
                    continue
                if port.reopened and not dead:
                    return f"{port.where} was opened anew and does not answer"
                self._died.discard(port)
                if not await self._reopen(port):
                    return f"{port.where} cannot be opened again"

    async def _ask(self, port: _Port) -> None:
        """Counts in a row how often a port did not answer."""
        answered = await answers(
            _to_itself(port.host),
            port.asked,
            tls=self._tls is not None,
            wants_certificate=self._tls is not None and self._tls.client_ca is not None,
            may_be_dropped=self._is_gate_narrow(),
        )
        if answered:
            port.proven, port.failures, port.reopened = True, 0, False
        elif answered is not None and port.proven:
            port.failures += 1

    async def _reopen(self, port: _Port) -> bool:
        """A new server takes the port over; False: it could not."""
        logger.error("nobody answers at %s any more, it is opened anew", port.where)
        self._wind_up(port.server)
        for pause_s in REOPEN_S:
            await asyncio.sleep(pause_s)  # the old server lets go of the port
            with contextlib.suppress(ServeError):
                self._listen(port)
                await port.server.start()
                port.failures, port.reopened = 0, True
                await self._ask(port)
                logger.info("%s is open again", port.where)
                return True
        return False

    def _listen(self, port: _Port) -> None:
        """Gives a port a new server, not started. Raises ServeError."""

        def died(error: BaseException) -> None:
            # Not the text: a caller may have had a hand in it.
            logger.error("the server at %s died of %s", port.where, type(error).__name__)
            if port.server is server:
                self._died.add(port)
                self._wake.set()

        server = self._make(port.shared, died)
        try:
            number = self._add(server, port.host, port.number)
            if port.shared:
                port.asked = self._add(server, _to_itself(port.host), port.asked)
        except RuntimeError as error:
            raise ServeError(f"cannot listen on {port.where}: {error}") from error
        port.number, port.server = number, server
        port.asked = port.asked or number

    def _add(self, server: grpc.aio.Server, host: str, number: int) -> int:
        where = f"{f'[{host}]' if ':' in host and not host.startswith('[') else host}:{number}"
        if self._tls is None:
            return server.add_insecure_port(where)
        return server.add_secure_port(where, self._tls.credentials())

    def _wind_up(self, server: grpc.aio.Server) -> None:
        """Stops a server on the side; its streams may go on for a while."""
        grace_s = OLD_STREAMS_S if len(self._old) < MAX_OLD else None
        self._old[server] = asyncio.create_task(_stop(server, grace_s))
        self._old[server].add_done_callback(lambda _: self._old.pop(server))


async def _stop(server: grpc.aio.Server, grace_s: float | None) -> None:
    """Also a server that died: its first stop ends where it raises what it died of."""
    for _ in range(2):
        with contextlib.suppress(Exception):
            await server.stop(grace_s)
            return


def _to_itself(host: str) -> str:
    """The address by which a process of this machine reaches a port that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "[::]": "::1"}.get(host, host.strip("[]"))
