"""What teacher.proto says of HTTP/2 pings, tried with frames on a bare connection."""

import socket
import time
from collections.abc import Iterator

import pytest

from tests.faults.fleet import Fleet

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, PING, GOAWAY = 4, 6, 7
ACK = 1
ENHANCE_YOUR_CALM = 11


class Connection:
    """HTTP/2 frames, without a library that pings and answers by itself."""

    def __init__(self, address: str) -> None:
        self.answers_pings = False
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)))
        self.socket.sendall(PREFACE + self._frame(SETTINGS, b""))
        self._received = b""

    @staticmethod
    def _frame(kind: int, payload: bytes, flags: int = 0) -> bytes:
        return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + bytes(4) + payload

    def ping(self) -> None:
        self.socket.sendall(self._frame(PING, bytes(8)))

    def wait_for(self, kind: int, flags: int, seconds: float) -> bytes | None:
        """The payload of the next frame of this kind; None if another end comes first."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            while len(self._received) >= 9:
                size = 9 + int.from_bytes(self._received[:3], "big")
                if len(self._received) < size:
                    break
                frame, self._received = self._received[:size], self._received[size:]
                if (frame[3], frame[4]) == (PING, 0) and self.answers_pings:
                    self.socket.sendall(self._frame(PING, frame[9:], ACK))
                if (frame[3], frame[4]) == (kind, flags):
                    return frame[9:]
            self.socket.settimeout(left)
            try:
                chunk = self.socket.recv(65536)
            except TimeoutError:
                return None
            if not chunk:
                return None
            self._received += chunk
        return None


@pytest.fixture(scope="module")
def fleet(serve, folder) -> Iterator[Fleet]:
    with Fleet(serve, folder, 1) as fleet:
        yield fleet


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
