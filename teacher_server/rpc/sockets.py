"""Inspects the sockets of this process without releasing the interpreter's lock.

Python's own calls release it around each system call, and have to wait for it again: up to 5 ms each
time while the event loop is busy, which is when inspecting matters. These take microseconds, and none
of them blocks. Linux only; on other systems no socket is found.
"""

import ctypes
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

FILES = Path("/proc/self/fd")
SO_COOKIE = 57
"""Socket option: a number that no other socket has had since the system was started."""
COOKIE = struct.Struct("Q")
RECEIVED = struct.Struct("<128xQ")
"""tcpi_bytes_received of Linux's struct tcp_info."""
SO_ACCEPTCONN = 30
SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27
INSTRUCTION_NBYTES = 8
TCP_INFO = getattr(socket, "TCP_INFO", 11)
ADDRESS_NBYTES = 128

_libc = ctypes.PyDLL(None)


def open_sockets() -> Iterator[tuple[int, int]]:
    """Yields the file descriptor and cookie of every socket of this process."""
    for name in os.listdir(FILES):
        cookie = cookie_of(int(name))
        if cookie is not None:
            yield int(name), cookie


def cookie_of(file: int) -> int | None:
    """Returns what tells a socket from all others; None: the descriptor is not a socket's."""
    data = _option(file, socket.SOL_SOCKET, SO_COOKIE, COOKIE.size)
    return None if data is None else COOKIE.unpack(data)[0]


def received_nbytes(file: int) -> int:
    """Returns the bytes that a TCP connection has received; 0 where the system does not say."""
    data = _option(file, socket.IPPROTO_TCP, TCP_INFO, RECEIVED.size)
    return 0 if data is None else RECEIVED.unpack(data)[0]


def is_listening(file: int) -> bool:
    """Whether a socket accepts connections."""
    data = _option(file, socket.SOL_SOCKET, SO_ACCEPTCONN, 4)
    return data is not None and any(data)


def own_address(file: int) -> tuple[str, int] | None:
    """Returns host and port of this end of a TCP socket; None: it has none."""
    return _address(_libc.getsockname, file)


def other_address(file: int) -> tuple[str, int] | None:
    """Returns host and port of the other end; None: there is none."""
    return _address(_libc.getpeername, file)


def shut_down(file: int, cookie: int) -> bool:
    """Ends a connection in both directions; False: the descriptor has become another socket's."""
    copy = _libc.dup(file)
    if copy < 0:
        return False
    try:
        # The copy stays this socket's, even if another thread closes the descriptor meanwhile.
        return cookie_of(copy) == cookie and _libc.shutdown(copy, socket.SHUT_RDWR) == 0
    finally:
        _libc.close(copy)


def attach_filter(file: int, program: bytes) -> bool:
    """Puts a classic BPF program on a socket in place of its last one; False if that is impossible."""
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HL", len(program) // INSTRUCTION_NBYTES, ctypes.addressof(buffer))
    return not _libc.setsockopt(file, socket.SOL_SOCKET, SO_ATTACH_FILTER, header, len(header))


def detach_filter(file: int) -> None:
    """Removes the program of a socket, if it has one."""
    nothing = ctypes.c_int()
    _libc.setsockopt(file, socket.SOL_SOCKET, SO_DETACH_FILTER, ctypes.byref(nothing), 4)


def _option(file: int, level: int, name: int, nbytes: int) -> bytes | None:
    """Returns a socket option of `nbytes`; None where it does not exist, or is shorter."""
    buffer = ctypes.create_string_buffer(nbytes)
    size = ctypes.c_uint32(nbytes)
    if _libc.getsockopt(file, level, name, buffer, ctypes.byref(size)) or size.value < nbytes:
        return None
    return buffer.raw


def _address(ask: Callable[..., int], file: int) -> tuple[str, int] | None:
    buffer = ctypes.create_string_buffer(ADDRESS_NBYTES)
    size = ctypes.c_uint32(ADDRESS_NBYTES)
    if ask(file, buffer, ctypes.byref(size)):
        return None
    (family,) = struct.unpack_from("=H", buffer)
    (port,) = struct.unpack_from(">H", buffer, 2)
    if family == socket.AF_INET:
        return socket.inet_ntop(family, buffer.raw[4:8]), port
    if family == socket.AF_INET6:
        return socket.inet_ntop(family, buffer.raw[8:24]), port
    return None
