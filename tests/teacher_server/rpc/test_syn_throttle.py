"""Fewer new connections from addresses that misbehave, on real sockets."""

import contextlib
import socket
import sys
from collections.abc import Iterator

import pytest

from teacher_server.rpc.sockets import attach_filter, detach_filter
from teacher_server.rpc.syn_throttle import (
    ADJUST_S,
    ATTACK,
    FORGET_S,
    MAX_ADDRESSES,
    SMALLEST_SHARE,
    SynThrottle,
    filter_program,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="filters of Linux")
LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
MANY = [f"192.0.2.{number}" for number in range(MAX_ADDRESSES + 1)]


@contextlib.contextmanager
def listening(family: socket.AddressFamily) -> Iterator[socket.socket]:
    with socket.create_server((LOOPBACK[family], 0), family=family) as server:
        yield server


def is_let_in(server: socket.socket, own: str, family: socket.AddressFamily) -> bool:
    """Whether the first request for a connection is taken up: the next comes after a second."""
    with socket.socket(family) as client:
        client.bind((own, 0))
        client.settimeout(0.3)
        try:
            client.connect((LOOPBACK[family], server.getsockname()[1]))
        except TimeoutError:
            return False
        accepted, _ = server.accept()
        accepted.close()
        return True


@pytest.mark.parametrize("family", list(LOOPBACK))
@pytest.mark.parametrize("others", [0, 1, 10])
def test_an_address_is_kept_out_and_no_other(family: socket.AddressFamily, others: int):
    other = MANY[:others] + [f"2001:db8::{number}" for number in range(others)]
    own = LOOPBACK[family]
    with listening(family) as server:
        assert attach_filter(server.fileno(), filter_program(0.0, [*other, own]))
        assert not is_let_in(server, own, family)
        assert attach_filter(server.fileno(), filter_program(0.0, other))
        assert is_let_in(server, own, family)
        assert attach_filter(server.fileno(), filter_program(0.0, [own]))
        detach_filter(server.fileno())
        detach_filter(server.fileno())  # it may be done twice
        assert is_let_in(server, own, family)


def test_a_neighbour_on_the_same_host_is_let_in():
    with listening(socket.AF_INET) as server:
        assert attach_filter(server.fileno(), filter_program(0.0, ["127.0.0.3"]))
        assert not is_let_in(server, "127.0.0.3", socket.AF_INET)
        assert is_let_in(server, "127.0.0.2", socket.AF_INET)


def test_an_address_of_ipv4_as_a_socket_of_ipv6_says_it():
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        assert attach_filter(server.fileno(), filter_program(0.0, ["::ffff:127.0.0.3"]))
        assert not is_let_in(server, "127.0.0.3", socket.AF_INET)
        assert is_let_in(server, "127.0.0.2", socket.AF_INET)
        assert is_let_in(server, "::1", socket.AF_INET6)


def test_too_many_addresses_are_everybody():
    with listening(socket.AF_INET) as server:
        assert attach_filter(server.fileno(), filter_program(0.0, MANY))
        assert not is_let_in(server, "127.0.0.1", socket.AF_INET)


def test_a_share_is_let_in():
    with listening(socket.AF_INET) as server:
        assert attach_filter(server.fileno(), filter_program(0.7, ["127.0.0.1"]))
        let_in = sum(is_let_in(server, "127.0.0.1", socket.AF_INET) for _ in range(40))
    assert 13 < let_in < 40  # by chance outside once in 500,000 runs


def test_a_connection_that_exists_is_left_alone():
    with contextlib.ExitStack() as sockets:
        server = sockets.enter_context(listening(socket.AF_INET))
        client = sockets.enter_context(socket.create_connection(server.getsockname()))
        accepted = sockets.enter_context(server.accept()[0])
        assert attach_filter(server.fileno(), filter_program(0.0, ["127.0.0.1"]))
        client.sendall(b"one")
        assert accepted.recv(8) == b"one"
        accepted.sendall(b"two")
        assert client.recv(8) == b"two"


def test_a_socket_that_is_none_cannot():
    with open("/dev/null") as file:
        assert not attach_filter(file.fileno(), filter_program(0.5, []))


def test_the_share_falls_while_strangers_misbehave_and_recovers(caplog):
    now = [100.0]
    throttle = SynThrottle(clock=lambda: now[0])
    with listening(socket.AF_INET) as server:

        def adjust(reports: int) -> float:
            now[0] += ADJUST_S
            for _ in range(reports):
                throttle.report("127.0.0.1")
            throttle.adjust([server.fileno()])
            return throttle.share

        assert adjust(ATTACK - 1) == 1.0
        assert not throttle.is_active
        assert adjust(ATTACK) < 1.0
        assert "strangers at 127.0.0.1 misbehave" in caplog.text
        for _ in range(10):
            adjust(100)
        assert throttle.share == SMALLEST_SHARE
        tries = [is_let_in(server, "127.0.0.1", socket.AF_INET) for _ in range(20)]
        assert 20 - sum(tries) > 0, "some have to wait"
        assert is_let_in(server, "127.0.0.2", socket.AF_INET)
        while throttle.is_active:
            assert adjust(0) > SMALLEST_SHARE
        assert all(is_let_in(server, "127.0.0.1", socket.AF_INET) for _ in range(20))
        now[0] += FORGET_S
        adjust(0)
        for address in MANY[:ATTACK]:
            throttle.report(address)
        adjust(0)
        assert throttle.is_active
        assert is_let_in(server, "127.0.0.1", socket.AF_INET), "it was forgotten"
    assert caplog.text.count("misbehave") == 1


def test_a_socket_of_a_port_that_was_opened_anew_has_the_filter_too():
    now = [100.0]
    throttle = SynThrottle(clock=lambda: now[0])
    for _ in range(ATTACK):
        throttle.report("127.0.0.1")
    with listening(socket.AF_INET) as old:
        throttle.adjust([old.fileno()])
    assert throttle.share == 0.5
    with listening(socket.AF_INET) as new:
        now[0] += ADJUST_S
        throttle.adjust([new.fileno()])
        tries = [is_let_in(new, "127.0.0.1", socket.AF_INET) for _ in range(30)]
    assert 0 < sum(tries) < 30
