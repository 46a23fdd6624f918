"""A TCP proxy in front of one replica that breaks what passes through it, on the test's command.

It runs in a thread of its own. `up` is what clients send, `down` what they receive; the settings of
both may be changed at any time from the test's thread. All damage follows from a seed or an offset.
"""

import asyncio
import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Self

CHUNK_NBYTES = 1 << 16
QUEUED_CHUNKS = 64
"""What one direction of one connection holds while it is delayed: 4 MiB."""
TICK_S = 0.005
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: close by RST."""

Damage = Callable[[int, bytes], bytes]
"""The offset of a chunk in its direction, over all connections, and the chunk -> what is sent."""


@dataclass
class Direction:
    """One way through the proxy."""

    delay_s: float = 0.0
    bytes_per_s: float = 0.0
    """0: as fast as it goes."""
    chop_nbytes: int = 0
    """Largest write; 0: whole chunks."""
    damage: Damage | None = None
    reset_at: int | None = None
    """Both sides get an RST when this many bytes have passed; once."""
    end_at: int | None = None
    """Only this direction of the connection is ended (FIN) there; once."""
    nbytes: int = 0
    """Passed so far, of all connections."""

    def shape(self, chunk: bytes) -> list[bytes]:
        """The writes that a chunk is sent in, damaged as asked."""
        offset = self.nbytes
        self.nbytes += len(chunk)
        if self.damage is not None:
            chunk = self.damage(offset, chunk)
        size = self.chop_nbytes or max(1, len(chunk))
        return [chunk[start : start + size] for start in range(0, len(chunk), size)]


@dataclass(eq=False)
class _Pair:
    """A client's connection and the one to the replica that belongs to it."""

    client: socket.socket
    server: socket.socket
    tasks: list["asyncio.Task[None]"] = field(default_factory=list)
    ended: int = 0
    """Directions whose end was passed on."""


class Proxy:
    """127.0.0.1:port -> `target`; a context manager."""

    def __init__(self, target: str = "") -> None:
        self.target = target
        self.up = Direction()
        self.down = Direction()
        self.connections = 0
        """Accepted so far."""
        self._held = False
        self._pairs: set[_Pair] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._listener = self._listen(0)
        self._port: int = self._listener.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._run(self._open())

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def hold(self) -> None:
        """A cut: connections stay, also new ones are accepted, and nothing passes."""
        self._held = True

    def release(self) -> None:
        """The link is back; what was held arrives, as TCP sends it again."""
        self._held = False

    def refuse(self) -> None:
        """Nobody listens any more, and what was open is reset."""
        self._run(self._refuse())

    def accept(self) -> None:
        """Listens again after `refuse`."""
        self._listener = self._listen(self._port)
        self._run(self._open())

    def reset(self) -> None:
        """An RST to both sides of every connection."""
        self._run(self._reset())

    def calm(self) -> None:
        """Ends every fault; what is open stays open."""
        for direction in (self.up, self.down):
            direction.delay_s = direction.bytes_per_s = 0.0
            direction.chop_nbytes = 0
            direction.damage = direction.reset_at = direction.end_at = None
        self.release()

    def close(self) -> None:
        self._run(self._refuse())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10.0)

    @staticmethod
    def _listen(port: int) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", port), backlog=128)
        listener.setblocking(False)
        return listener

    async def _open(self) -> None:
        self._loop.add_reader(self._listener, self._accept)

    async def _refuse(self) -> None:
        if self._listener.fileno() < 0:
            return  # refused before
        self._loop.remove_reader(self._listener)
        self._listener.close()
        await self._reset()

    async def _reset(self) -> None:
        for pair in list(self._pairs):
            self._end(pair, reset=True)
        await asyncio.gather(*self._closing)

    def _accept(self) -> None:
        # No `sock_accept`: cancelled at the wrong moment it loses the connection it has accepted.
        with contextlib.suppress(OSError):
            client, _ = self._listener.accept()
            self.connections += 1
            pair = _Pair(client, socket.socket())
            self._pairs.add(pair)
            pair.tasks.append(self._loop.create_task(self._connect(pair)))

    async def _connect(self, pair: _Pair) -> None:
        client, server = pair.client, pair.server
        try:
            for one in (client, server):
                one.setblocking(False)
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._passable()
            host, _, port = self.target.rpartition(":")
            await self._loop.sock_connect(server, (host, int(port)))
        except (OSError, ValueError):
            self._end(pair, reset=False)
            return
        for source, sink, way in ((client, server, self.up), (server, client, self.down)):
            queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUED_CHUNKS)
            for work in (self._read(source, queue), self._write(pair, sink, queue, way)):
                pair.tasks.append(self._loop.create_task(work))

    async def _passable(self) -> None:
        while self._held:  # noqa: ASYNC110 - set from another thread
            await asyncio.sleep(TICK_S)

    async def _read(
        self, source: socket.socket, queue: "asyncio.Queue[tuple[float, bytes]]"
    ) -> None:
        chunk = b"-"
        while chunk:
            try:
                chunk = await self._loop.sock_recv(source, CHUNK_NBYTES)
            except OSError:
                chunk = b""
            await queue.put((time.monotonic(), chunk))

    async def _write(
        self,
        pair: _Pair,
        sink: socket.socket,
        queue: "asyncio.Queue[tuple[float, bytes]]",
        way: Direction,
    ) -> None:
        try:
            while True:
                came_s, chunk = await queue.get()
                await asyncio.sleep(max(0.0, came_s + way.delay_s - time.monotonic()))
                await self._passable()
                if not chunk:
                    break
                for piece in way.shape(chunk):
                    await self._loop.sock_sendall(sink, piece)
                    await self._passable()
                    if way.bytes_per_s:
                        await asyncio.sleep(len(piece) / way.bytes_per_s)
                if way.reset_at is not None and way.nbytes >= way.reset_at:
                    way.reset_at = None
                    self._end(pair, reset=True)
                    return
                if way.end_at is not None and way.nbytes >= way.end_at:
                    way.end_at = None
                    break
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            self._end(pair, reset=False)
            return
        pair.ended += 1
        if pair.ended == 2:
            self._end(pair, reset=False)

    def _end(self, pair: _Pair, *, reset: bool) -> None:
        if pair in self._pairs:
            self._pairs.discard(pair)
            closing = self._loop.create_task(self._close(pair, reset))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def _close(self, pair: _Pair, reset: bool) -> None:
        """Closes both sockets once nothing waits on them any more: their numbers are used again."""
        for task in pair.tasks:
            task.cancel()
        await asyncio.gather(*pair.tasks, return_exceptions=True)
        for one in (pair.client, pair.server):
            with contextlib.suppress(OSError):
                if reset:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            one.close()


def flips(seed: int, *, every_nbytes: int, first: int = 0) -> Damage:
    """One flipped bit in about every so many bytes, from offset `first` on."""

    def flip(chunk: bytearray, place: int, chance: random.Random) -> None:
        chunk[place] ^= 1 << chance.randrange(8)

    return _at_random_places(seed, every_nbytes, first, flip)


def losses(seed: int, *, every_nbytes: int, first: int = 0) -> Damage:
    """1 to 9 bytes are left out about every so many bytes."""

    def lose(chunk: bytearray, place: int, chance: random.Random) -> None:
        del chunk[place : place + chance.randint(1, 9)]

    return _at_random_places(seed, every_nbytes, first, lose)


def repeats(seed: int, *, every_nbytes: int, first: int = 0) -> Damage:
    """1 to 9 bytes come twice about every so many bytes."""

    def repeat(chunk: bytearray, place: int, chance: random.Random) -> None:
        size = chance.randint(1, 9)
        chunk[place:place] = chunk[place : place + size]

    return _at_random_places(seed, every_nbytes, first, repeat)


def flip_at(*places: int) -> Damage:
    """Flips the lowest bit of the bytes at these offsets."""

    def damage(offset: int, chunk: bytes) -> bytes:
        changed = bytearray(chunk)
        for place in places:
            if offset <= place < offset + len(chunk):
                changed[place - offset] ^= 1
        return bytes(changed)

    return damage


def _at_random_places(
    seed: int,
    every_nbytes: int,
    first: int,
    change: Callable[[bytearray, int, random.Random], None],
) -> Damage:
    chance = random.Random(seed)
    following = first + chance.expovariate(1 / every_nbytes)

    def damage(offset: int, chunk: bytes) -> bytes:
        nonlocal following
        places = []
        while following < offset + len(chunk):
            if following >= offset:
                places.append(int(following) - offset)
            following += max(1.0, chance.expovariate(1 / every_nbytes))
        changed = bytearray(chunk)
        for place in reversed(places):
            change(changed, place, chance)
        return bytes(changed)

    return damage
