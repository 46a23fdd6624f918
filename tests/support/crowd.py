"""Many connections to one service that do no work: `python -m tests.support.crowd KIND COUNT ADDRESS
[OWN_ADDRESS [CA]]`.

Prints "here N" when all N were made, goes on until its standard input ends, and then prints how
many were closed by the service meanwhile. Hand-written HTTP/2 over loopback only, with TLS where the
authority of the service's certificate is given.
"""

import asyncio
import contextlib
import ipaddress
import os
import random
import resource
import ssl
import sys
import threading

from tests.support.http2 import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PING,
    PREFACE,
    RST_STREAM,
    SERVICE,
    Frame,
    Frames,
    Windows,
    call_headers,
    frame,
    header_block,
    message,
    reply,
    settings,
)

FLOOD_PINGS = 100
SLOW_S = 0.5
CONNECTED_S = 5.0
"""How long some of them are waited for: a service may not let them in now."""
AT_ONCE = 100
UNFINISHED_NBYTES = 15 << 20
WATCHES = 32


class Idle(asyncio.Protocol):
    """Speaks HTTP/2 as a client that has nothing to ask: it answers settings and pings."""

    every_s = 0.1
    """How often `act` is called."""

    def __init__(self, crowd: "Crowd") -> None:
        self.crowd = crowd
        self.frames = Frames()
        self.next_stream = 1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.begin()
        self._act()

    def begin(self) -> None:
        self.transport.write(PREFACE + settings())

    def act(self) -> None:
        """What it does again and again."""

    def _act(self) -> None:
        if not self.transport.is_closing() and type(self).act is not Idle.act:
            if self.transport.get_write_buffer_size() < 1 << 20:
                self.act()
            asyncio.get_running_loop().call_later(self.every_s, self._act)

    def stream(self) -> int:
        """The number of a new stream."""
        self.next_stream += 2
        return self.next_stream - 2

    def data_received(self, data: bytes) -> None:
        for received in self.frames.feed(data):
            self.transport.write(reply(received))
            self.see(received)

    def see(self, received: Frame) -> None:
        """Looks at what the service says."""

    def connection_lost(self, _: Exception | None) -> None:
        self.crowd.closed += not self.crowd.over


class Returning(Idle):
    """Comes back when it is sent away."""

    def connection_lost(self, _: Exception | None) -> None:
        super().connection_lost(_)
        if not self.crowd.over:
            self.crowd.come_back(type(self))


class Silent(Idle):
    """Connects and says nothing; with TLS, not even that it speaks TLS."""

    def begin(self) -> None:
        pass


class HalfTls(Idle):
    """Begins a TLS handshake and leaves it at that."""

    def begin(self) -> None:
        self.transport.write(bytes.fromhex("16030100c8010000c40303") + os.urandom(100))


class Slow(Idle):
    """Says what an HTTP/2 client says first, a byte at a time."""

    every_s = SLOW_S
    place = 0

    def begin(self) -> None:
        pass

    def act(self) -> None:
        self.transport.write(PREFACE[self.place : self.place + 1])
        self.place = (self.place + 1) % len(PREFACE)


class Flood(Returning):
    """Sends pings without an end."""

    def act(self) -> None:
        self.transport.write(frame(PING, payload=bytes(8)) * FLOOD_PINGS)


class SettingsFlood(Returning):
    """Sends settings without an end; each has to be acknowledged."""

    def act(self) -> None:
        self.transport.write(settings((3, 100)) * FLOOD_PINGS)


class ResetFlood(Returning):
    """Begins calls and takes them back at once."""

    def act(self) -> None:
        block = header_block(call_headers(f"{SERVICE}/Describe"))
        for _ in range(50):
            stream = self.stream()
            self.transport.write(
                frame(HEADERS, END_HEADERS, stream, block)
                + frame(RST_STREAM, 0, stream, (8).to_bytes(4, "big"))
            )


class Chain(Returning):
    """Headers that never end: one CONTINUATION after the other."""

    def begin(self) -> None:
        super().begin()
        block = header_block(call_headers(f"{SERVICE}/Describe"))
        self.transport.write(frame(HEADERS, 0, 1, block))

    def act(self) -> None:
        block = header_block([(b"x-" + os.urandom(4).hex().encode(), b"y" * 1000)] * 16)
        self.transport.write(frame(CONTINUATION, 0, 1, block))


class Table(Returning):
    """Fills the table of headers, which it says is huge, and refers to it again and again."""

    def begin(self) -> None:
        self.transport.write(PREFACE + settings((1, 2**32 - 1), (6, 2**31 - 1)))

    def act(self) -> None:
        stream = self.stream()
        value = os.urandom(2000).hex().encode()
        entry = b"\x40\x05x-big\x7f" + bytes(
            (0x80 | (len(value) - 127) & 127, len(value) - 127 >> 7)
        )
        block = header_block(call_headers(f"{SERVICE}/Describe")) + entry + value + b"\xbe" * 2000
        self.transport.write(frame(HEADERS, END_HEADERS | END_STREAM, stream, block))


class BadText(Returning):
    """Calls whose path, names and values are no UTF-8, a token among them."""

    def act(self) -> None:
        garbage = bytes(random.choices(range(128, 256), k=8))
        paths = [b"/" + garbage, b"/logitstream.v1.Teacher/Score", b"/grpc.health.v1.Health/Check"]
        for path in paths:
            metadata = [
                (b"authorization", b"Bearer secret-of-a-stranger" + garbage),
                (b"x-text", garbage),
                (b"x-data-bin", garbage),
                (b"user-agent", garbage),
            ]
            block = header_block(call_headers(path, *metadata))
            stream = self.stream()
            self.transport.write(
                frame(HEADERS, END_HEADERS, stream, block)
                + frame(DATA, END_STREAM, stream, message(garbage))
            )


class BadPath(Returning):
    """One call to a path that is no UTF-8, again and again."""

    def act(self) -> None:
        block = header_block(call_headers(b"/\xe5"))
        self.transport.write(frame(HEADERS, END_HEADERS | END_STREAM, self.stream(), block))


class Watching(Idle):
    """Opens calls of Watch and leaves them open."""

    def begin(self) -> None:
        super().begin()
        block = header_block(call_headers("/grpc.health.v1.Health/Watch"))
        for _ in range(WATCHES):
            stream = self.stream()
            self.transport.write(
                frame(HEADERS, END_HEADERS, stream, block)
                + frame(DATA, END_STREAM, stream, message(b""))
            )


class Unfinished(Idle):
    """One call whose large message lacks its last byte."""

    path = f"{SERVICE}/Describe"
    sent = 0

    def begin(self) -> None:
        super().begin()
        self.windows = Windows(1)
        self.transport.write(frame(HEADERS, END_HEADERS, 1, header_block(call_headers(self.path))))
        self.left = message(bytes(UNFINISHED_NBYTES), UNFINISHED_NBYTES + 1)
        self.push()

    def push(self) -> None:
        while self.sent < len(self.left) and (room := self.windows.room):
            piece = self.left[self.sent : self.sent + room]
            self.transport.write(frame(DATA, 0, 1, piece))
            self.windows.take(len(piece))
            self.sent += len(piece)

    def see(self, received: Frame) -> None:
        self.windows.see(received)
        self.push()


class UnfinishedScore(Unfinished):
    """The same for the call whose messages may be large."""

    path = f"{SERVICE}/Score"


class UnfinishedCheck(Unfinished):
    """The same for a call that everybody may make."""

    path = "/grpc.health.v1.Health/Check"


KINDS: dict[str, type[Idle]] = {
    "idle": Idle,
    "silent": Silent,
    "half-tls": HalfTls,
    "slow": Slow,
    "flood": Flood,
    "settings": SettingsFlood,
    "resets": ResetFlood,
    "chain": Chain,
    "table": Table,
    "bad-text": BadText,
    "bad-path": BadPath,
    "watching": Watching,
    "unfinished": Unfinished,
    "unfinished-score": UnfinishedScore,
    "unfinished-check": UnfinishedCheck,
}
WITHOUT_TLS = (Silent, HalfTls)
"""Kinds that do not get as far as TLS."""


class Crowd:
    """Holds the connections."""

    def __init__(self, host: str, port: int, own: str, ca: str | None) -> None:
        self.host, self.port, self.own = host, port, own
        self.closed = 0
        self.over = False
        self.tasks: set[asyncio.Task[None]] = set()
        self.tls = None
        if ca is not None:
            self.tls = ssl.create_default_context(cafile=ca)
            self.tls.set_alpn_protocols(["h2"])

    async def come(self, kind: type[Idle], *, after_s: float = 0.0) -> None:
        await asyncio.sleep(after_s)
        tls = None if issubclass(kind, WITHOUT_TLS) else self.tls
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ConnectionError, ssl.SSLError, TimeoutError):
            await loop.create_connection(
                lambda: kind(self),
                self.host,
                self.port,
                local_addr=(self.own, 0),
                ssl=tls,
                server_hostname="localhost" if tls else None,
            )

    def come_back(self, kind: type[Idle]) -> None:
        task = asyncio.get_running_loop().create_task(self.come(kind, after_s=0.5))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


async def main(kind: str, count: int, address: str, own: str, ca: str | None) -> None:
    host, port = address.split(":")
    assert ipaddress.ip_address(host).is_loopback
    crowd = Crowd(host, int(port), own, ca)
    for first in range(0, count, AT_ONCE):
        some = range(first, min(first + AT_ONCE, count))
        tasks = [asyncio.create_task(crowd.come(KINDS[kind])) for _ in some]
        crowd.tasks.update(tasks)
        await asyncio.wait(tasks, timeout=CONNECTED_S)
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
    kind, count, address = sys.argv[1:4]
    own = sys.argv[4] if len(sys.argv) > 4 else "127.0.0.1"
    ca = sys.argv[5] if len(sys.argv) > 5 else None
    asyncio.run(main(kind, int(count), address, own, ca))
