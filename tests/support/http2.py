"""Hand-written HTTP/2, for peers that no gRPC library would be: frames and headers, byte by byte.

Loopback only. Nothing here checks what it sends; `Peer` answers pings and settings as a good peer
does.
"""

import contextlib
import ipaddress
import socket
import ssl
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = (
    range(10)
)
ACK = END_STREAM = 1
END_HEADERS = 4
SERVICE = "/logitstream.v1.Teacher"

Header = tuple[bytes, bytes]


class Frame(NamedTuple):
    """One frame as it was received."""

    kind: int
    flags: int
    stream: int
    payload: bytes


class Frames:
    """Cuts what is received into frames."""

    def __init__(self) -> None:
        self._data = b""

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that are whole now."""
        self._data += data
        found = []
        while len(self._data) >= 9:
            end = 9 + int.from_bytes(self._data[:3], "big")
            if len(self._data) < end:
                break
            kind, flags, stream = self._data[3], self._data[4], self._data[5:9]
            payload = self._data[9:end]
            found.append(Frame(kind, flags, int.from_bytes(stream, "big"), payload))
            self._data = self._data[end:]
        return found


def reply(received: Frame) -> bytes:
    """What a good peer answers to a frame of the connection itself."""
    if received.kind not in (SETTINGS, PING) or received.flags & ACK:
        return b""
    return frame(received.kind, ACK, 0, received.payload if received.kind == PING else b"")


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    """One frame as bytes."""
    head = len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big")
    return head + payload


def settings(*pairs: tuple[int, int]) -> bytes:
    """A SETTINGS frame of (identifier, value) pairs."""
    payload = b"".join(key.to_bytes(2, "big") + value.to_bytes(4, "big") for key, value in pairs)
    return frame(SETTINGS, payload=payload)


def header_block(headers: Iterable[Header]) -> bytes:
    """HPACK: every header as a literal with its name, neither indexed nor compressed."""
    return b"".join(b"\x00" + hpack_string(name) + hpack_string(value) for name, value in headers)


def hpack_string(text: bytes) -> bytes:
    """A string as it is, after its length: an integer with a prefix of 7 bits."""
    size = len(text)
    if size < 127:
        return bytes((size,)) + text
    size -= 127
    head = bytearray((127,))
    while size >= 128:
        head.append(size % 128 + 128)
        size //= 128
    return bytes(head) + bytes((size,)) + text


def call_headers(path: bytes | str, *more: Header) -> list[Header]:
    """What a gRPC call begins with; `more` is its metadata."""
    return [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path if isinstance(path, bytes) else path.encode()),
        (b":authority", b"localhost"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        *more,
    ]


def message(data: bytes, length: int | None = None) -> bytes:
    """A gRPC message; `length` is what its prefix claims, by default the truth."""
    return b"\x00" + (len(data) if length is None else length).to_bytes(4, "big") + data


class Windows:
    """What may be sent on one stream of a new connection."""

    def __init__(self, stream: int) -> None:
        self.stream = stream
        self._initial = self._of_stream = self._of_connection = 65535

    @property
    def room(self) -> int:
        """Bytes that may be sent now, in one frame."""
        return max(0, min(16384, self._of_stream, self._of_connection))

    def take(self, size: int) -> None:
        self._of_stream -= size
        self._of_connection -= size

    def see(self, received: Frame) -> bool:
        """Takes a frame of the other side into account; False: the stream is over."""
        if received.kind == WINDOW_UPDATE:
            size = int.from_bytes(received.payload, "big")
            if received.stream == self.stream:
                self._of_stream += size
            elif not received.stream:
                self._of_connection += size
        elif received.kind == SETTINGS and not received.flags & ACK:
            for place in range(0, len(received.payload), 6):
                if received.payload[place : place + 2] == b"\0\4":
                    size = int.from_bytes(received.payload[place + 2 : place + 6], "big")
                    self._of_stream += size - self._initial
                    self._initial = size
        return received.kind != GOAWAY and not (
            received.kind == RST_STREAM and received.stream == self.stream
        )


class Peer:
    """One connection to loopback. A context manager; every method may raise OSError."""

    def __init__(
        self,
        address: str,
        *,
        tls: ssl.SSLContext | None = None,
        greet: bool = True,
        more_settings: Sequence[tuple[int, int]] = (),
    ) -> None:
        host, _, port = address.rpartition(":")
        assert ipaddress.ip_address(host).is_loopback
        self.socket: socket.socket = socket.create_connection((host, int(port)), 10.0)
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_hostname="localhost")
        self._frames = Frames()
        self._next_stream = 1
        if greet:
            self.send(PREFACE + settings(*more_settings))

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def call(
        self, path: bytes | str, *metadata: Header, data: bytes = b"", end: bool = True
    ) -> int:
        """Begins a call and sends so many bytes of it; returns the number of its stream."""
        stream = self._next_stream
        self._next_stream += 2
        block = header_block(call_headers(path, *metadata))
        self.send(
            frame(HEADERS, END_HEADERS, stream, block)
            + frame(DATA, END_STREAM if end else 0, stream, data)
        )
        return stream

    def push(self, stream: int, data: bytes, seconds: float = 5.0) -> int:
        """Sends data on a stream as its windows allow, for so long; returns how much was sent."""
        windows = Windows(stream)
        sent = 0
        deadline = time.monotonic() + seconds
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while sent < len(data) and time.monotonic() < deadline:
                size = min(windows.room, len(data) - sent)
                if size:
                    self.socket.settimeout(seconds)
                    self.send(frame(DATA, 0, stream, data[sent : sent + size]))
                    windows.take(size)
                    sent += size
                self.socket.settimeout(0.001 if windows.room else 0.05)
                with contextlib.suppress(TimeoutError, BlockingIOError):
                    if not all([windows.see(one) for one in self.receive_ready()]):
                        break
        return sent

    def receive_ready(self) -> list[Frame]:
        """The whole frames that one read brings; raises TimeoutError or BlockingIOError."""
        data = self.socket.recv(1 << 16)
        if not data:
            raise ConnectionError("closed")
        frames = self._frames.feed(data)
        with contextlib.suppress(OSError):
            self.send(b"".join(map(reply, frames)))
        return frames

    def receive(self, seconds: float = 5.0) -> list[Frame]:
        """All frames that come until the peer closes or is silent for so long."""
        frames: list[Frame] = []
        self.socket.settimeout(seconds)
        with contextlib.suppress(OSError):
            while True:
                frames += self.receive_ready()
        return frames

    def is_closed(self, seconds: float) -> bool:
        """Whether the other side closes the connection within so long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.socket.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                self.receive_ready()
            except (TimeoutError, BlockingIOError):
                continue
            except OSError:
                return True
        return False

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
