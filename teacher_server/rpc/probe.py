"""Probes a port of this process the way a stranger would: one health check, in hand-written HTTP/2.

A gRPC channel could do it too, but with a certificate to verify, a log of its own, and by means of
the library that is being checked.
"""

import asyncio
import hmac
import secrets
import socket
import ssl
from collections.abc import Iterable

from teacher_server.rpc.tls import context_without_checks

PROBE_S = 2.0
"""How long an answer may take."""
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, GOAWAY = 0, 1, 3, 4, 7
END_STREAM, END_HEADERS = 1, 4
EMPTY_MESSAGE = bytes(5)
OWN_HEADER = "logitstream-probe"
OWN = secrets.token_hex(16)
"""Its value, which marks a call of this process: such calls do not wait among those of strangers."""
CALL = {
    b":method": b"POST",
    b":scheme": b"http",
    b":path": b"/grpc.health.v1.Health/Check",
    b":authority": b"localhost",
    b"te": b"trailers",
    b"content-type": b"application/grpc",
    OWN_HEADER.encode(): OWN.encode(),
}


def is_own(metadata: Iterable[tuple[str, str | bytes]]) -> bool:
    """Whether a call with this metadata was made by `is_answering` in this process."""
    return any(
        key == OWN_HEADER
        and isinstance(value, str)
        and hmac.compare_digest(value.encode(), OWN.encode())
        for key, value in metadata
    )


async def is_answering(
    host: str, port: int, *, tls: bool, wants_certificate: bool, may_be_dropped: bool = False
) -> bool | None:
    """Whether a call to this port is answered; None: unknown, because this process was too busy.

    wants_certificate: the port accepts clients with a certificate only. There is none here, so a
    handshake counts as an answer.
    may_be_dropped: not every new connection is accepted now, so one that fails proves nothing.
    """
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    connected = False
    try:
        async with asyncio.timeout(PROBE_S):
            connection = await _connect(host, port)
            connected = True
            return await _ask(connection, tls, wants_certificate)
    except ssl.SSLError:
        return wants_certificate
    except TimeoutError:
        was_busy = loop.time() - began_s > 1.5 * PROBE_S
        return None if was_busy or (may_be_dropped and not connected) else False
    except OSError:
        return False


async def _connect(host: str, port: int) -> socket.socket:
    connection = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    connection.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(connection, (host, port))
    except BaseException:
        connection.close()
        raise
    return connection


async def _ask(connection: socket.socket, tls: bool, wants_certificate: bool) -> bool:
    context = context_without_checks() if tls else None
    reader, writer = await asyncio.open_connection(
        sock=connection, ssl=context, server_hostname="localhost" if tls else None
    )
    try:
        if wants_certificate:
            return True
        writer.write(
            PREFACE
            + _frame(SETTINGS)
            + _frame(HEADERS, END_HEADERS, 1, _headers())
            + _frame(DATA, END_STREAM, 1, EMPTY_MESSAGE)
        )
        while True:
            head = await reader.readexactly(9)
            await reader.readexactly(int.from_bytes(head[:3], "big"))
            if head[3] == HEADERS:
                return True
            if head[3] in (RST_STREAM, GOAWAY):
                return False
    except asyncio.IncompleteReadError:
        return False
    finally:
        writer.transport.abort()  # with TLS, a proper close would wait for the other side


def _frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    head = len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big")
    return head + payload


def _headers() -> bytes:
    """Encodes CALL as HPACK literals without indexing; all are shorter than 127 bytes."""
    return b"".join(
        b"\x00" + bytes((len(name),)) + name + bytes((len(value),)) + value
        for name, value in CALL.items()
    )
