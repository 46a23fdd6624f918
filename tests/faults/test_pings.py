"""What teacher.proto says of HTTP/2 pings, tried with frames on a bare connection."""

import socket
import time
from collections import deque
from collections.abc import Iterator

import pytest

from tests.support.fleet import Fleet
from tests.support.http2 import ACK, GOAWAY, PING, PREFACE, Frame, Frames, frame, reply, settings

ENHANCE_YOUR_CALM = 11


class Connection:
    """HTTP/2 frames, without a library that pings and answers by itself."""

    def __init__(self, address: str) -> None:
        self.answers_pings = False
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)))
        self.socket.sendall(PREFACE + settings())
        self._cut = Frames()
        self._received: deque[Frame] = deque()

    def ping(self) -> None:
        self.socket.sendall(frame(PING, payload=bytes(8)))

    def wait_for(self, kind: int, flags: int, seconds: float) -> bytes | None:
        """The payload of the next frame of this kind; None if another end comes first."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            while self._received:
                one = self._received.popleft()
                if self.answers_pings:
                    self.socket.sendall(reply(one))
                if (one.kind, one.flags) == (kind, flags):
                    return one.payload
            self.socket.settimeout(left)
            try:
                chunk = self.socket.recv(65536)
            except TimeoutError:
                return None
            if not chunk:
                return None
            self._received += self._cut.feed(chunk)
        return None


@pytest.fixture
def connection(fleet: Fleet) -> Iterator[Connection]:
    connection = Connection(fleet.own[0])
    yield connection
    connection.socket.close()


def test_the_third_ping_that_comes_too_soon_ends_the_connection(connection: Connection):
    for _ in range(3):
        connection.ping()
        assert connection.wait_for(PING, ACK, 10) is not None
    connection.ping()
    payload = connection.wait_for(GOAWAY, 0, 10)
    assert payload is not None
    assert int.from_bytes(payload[4:8], "big") == ENHANCE_YOUR_CALM


@pytest.mark.slow
def test_a_ping_every_10_s_without_calls_is_tolerated(connection: Connection):
    connection.answers_pings = True
    for _ in range(5):
        connection.ping()
        assert connection.wait_for(PING, ACK, 5) is not None
        assert connection.wait_for(GOAWAY, 0, 10) is None


@pytest.mark.slow
def test_a_connection_that_answers_no_ping_is_closed(connection: Connection):
    assert connection.wait_for(PING, 0, 5 * 10) is not None
    assert connection.wait_for(GOAWAY, 0, 5 * 25) is not None
