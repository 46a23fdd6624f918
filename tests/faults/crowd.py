"""Many connections to one service that do no work: `python -m tests.faults.crowd KIND COUNT ADDRESS`.

Prints "here N" when all N are there, holds them until its standard input ends, and then prints how
many were closed by the service meanwhile. Raw sockets, to loopback only.
"""

import asyncio
import contextlib
import ipaddress
import resource
import sys
import threading

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, PING, ACK = 4, 6, 1
FLOOD_PINGS = 100
SLOW_S = 0.5
AT_ONCE = 100


def frame(kind: int, flags: int = 0, payload: bytes = b"") -> bytes:
    """One HTTP/2 frame of the connection itself."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags, 0, 0, 0, 0)) + payload


class Idle(asyncio.Protocol):
    """Speaks HTTP/2 as a client that has nothing to ask: it answers settings and pings."""

    def __init__(self, crowd: "Crowd") -> None:
        self.crowd = crowd
        self.data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.begin()

    def begin(self) -> None:
        self.transport.write(PREFACE + frame(SETTINGS))

    def data_received(self, data: bytes) -> None:
        self.data += data
        while len(self.data) >= 9:
            end = 9 + int.from_bytes(self.data[:3], "big")
            if len(self.data) < end:
                return
            kind, flags, payload = self.data[3], self.data[4], self.data[9:end]
            self.data = self.data[end:]
            if not flags & ACK and kind in (SETTINGS, PING):
                self.transport.write(frame(kind, ACK, payload if kind == PING else b""))

    def connection_lost(self, _: Exception | None) -> None:
        self.crowd.closed += not self.crowd.over


class Silent(Idle):
    """Connects and says nothing."""

    def begin(self) -> None:
        pass


class Slow(Idle):
    """Says what an HTTP/2 client says first, a byte at a time."""

    def begin(self) -> None:
        self.say(0)

    def say(self, place: int) -> None:
        if self.transport.is_closing():
            return
        self.transport.write(PREFACE[place : place + 1])
        loop = asyncio.get_running_loop()
        loop.call_later(SLOW_S, self.say, (place + 1) % len(PREFACE))


class Flood(Idle):
    """Sends pings without an end, and comes back when it is sent away."""

    def begin(self) -> None:
        super().begin()
        self.flood()

    def flood(self) -> None:
        if self.transport.is_closing():
            return
        self.transport.write(frame(PING, payload=bytes(8)) * FLOOD_PINGS)
        asyncio.get_running_loop().call_later(0.1, self.flood)

    def connection_lost(self, _: Exception | None) -> None:
        super().connection_lost(_)
        if not self.crowd.over:
            self.crowd.come_back(Flood)


class Crowd:
    """Holds the connections."""

    def __init__(self, host: str, port: int, own: str) -> None:
        self.host, self.port, self.own = host, port, own
        self.closed = 0
        self.over = False
        self.tasks: set[asyncio.Task[None]] = set()

    async def come(self, kind: type[Idle], *, after_s: float = 0.0) -> None:
        await asyncio.sleep(after_s)
        loop = asyncio.get_running_loop()
        await loop.create_connection(
            lambda: kind(self), self.host, self.port, local_addr=(self.own, 0)
        )

    def come_back(self, kind: type[Idle]) -> None:
        async def later() -> None:
            with contextlib.suppress(OSError):
                await self.come(kind, after_s=0.5)

        task = asyncio.get_running_loop().create_task(later())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


async def main(kind: str, count: int, address: str, own: str) -> None:
    host, port = address.split(":")
    assert ipaddress.ip_address(host).is_loopback
    crowd = Crowd(host, int(port), own)
    made = {"idle": Idle, "silent": Silent, "slow": Slow, "flood": Flood}[kind]
    for first in range(0, count, AT_ONCE):
        await asyncio.gather(*(crowd.come(made) for _ in range(first, min(first + AT_ONCE, count))))
    print(f"here {count}", flush=True)
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()

    def wait() -> None:
        sys.stdin.read()
        loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=wait, daemon=True).start()
    await ended.wait()
    crowd.over = True
    print(f"closed {crowd.closed}", flush=True)


if __name__ == "__main__":
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]))
