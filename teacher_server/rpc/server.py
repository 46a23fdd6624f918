"""Makes gRPC's asyncio server with settings that strangers cannot exhaust, and a main loop that they
cannot end.

grpc.aio decodes the path of every call to an unknown method as UTF-8, in the one task that accepts
calls. A path that is not UTF-8 ends that task, and with it the server: no call is accepted any more,
while open streams continue (docs/log.md has the report). `Acceptor` keeps those calls away from that
task. It relies on parts of grpc.aio that are not public; where they are missing the plain server is
used, and `ports.py` opens a new one when it has died.
"""

import asyncio
import contextlib
import functools
import logging
import resource
from collections.abc import Callable, Sequence
from typing import Any

import grpc
from grpc._cython import cygrpc  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
from grpc.aio import _server as grpc_aio_server  # pyright: ignore[reportAttributeAccessIssue]

from protos import teacher_pb2
from teacher_server.admission.limits import Limits

logger = logging.getLogger(__name__)

MAX_METADATA_NBYTES = 16 << 10
MAX_STREAMS = 256
"""Calls that one connection may have open at the same time."""
WINDOW_NBYTES = 64 << 10
"""What a connection may send before any of it is read."""
INTERNALS = ("_handle_rpc", "_schedule_rpc_coro", "_MethodResolver", "get_working_loop")
UNKNOWN_METHOD = "/unknown"
SERVICE_NAME = teacher_pb2.DESCRIPTOR.services_by_name["Teacher"].full_name


def can_be_hardened() -> bool:
    """Whether the installed grpcio has what `Acceptor` relies on."""
    return all(hasattr(cygrpc, name) for name in INTERNALS) and all(
        hasattr(cygrpc.AioServer, name)
        for name in ("_make_request_call_future", "_request_call", "_serving_task_crash_handler")
    )


def make_server(
    interceptors: Sequence[grpc.aio.ServerInterceptor],
    options: Sequence[tuple[str, Any]],
    unknown_method: grpc.RpcMethodHandler,
    on_death: Callable[[BaseException], None],
) -> grpc.aio.Server:
    """Makes a server without ports or services.

    unknown_method: handles calls to methods that no service has. on_death: called with the error when
    the server stops accepting calls without having been stopped.
    """
    if not can_be_hardened():
        _warn_once()
        return grpc.aio.server(interceptors=interceptors, options=options)
    return _Server(interceptors, options, unknown_method, on_death)


@functools.cache
def _warn_once() -> None:
    logger.warning(
        "this grpcio (%s) is unknown: a malformed call may end a server, which is then reopened "
        "within seconds. Tested versions are in constraints.txt.",
        grpc.__version__,
    )


class _Server(grpc_aio_server.Server):
    """grpc.aio's server, on top of an `Acceptor`."""

    def __init__(
        self,
        interceptors: Sequence[grpc.aio.ServerInterceptor],
        options: Sequence[tuple[str, Any]],
        unknown_method: grpc.RpcMethodHandler,
        on_death: Callable[[BaseException], None],
    ) -> None:
        self._loop = cygrpc.get_working_loop()
        augmented = grpc_aio_server._augment_channel_arguments(tuple(options), None)
        self._server = Acceptor(self._loop, None, (), interceptors, augmented, None)
        self._server.unknown_method = unknown_method
        self._server.on_death = on_death


class Acceptor(cygrpc.AioServer):
    """Accepts calls, and those to methods that are not registered in a task of their own.

    Every service here registers its methods, so the rest are methods of no service: they go to one
    handler, which never looks at their names.
    """

    unknown_method: grpc.RpcMethodHandler
    on_death: Callable[[BaseException], None]

    def _make_request_call_future(self, method: bytes | None) -> "asyncio.Future[Any]":
        if method is not None:
            return super()._make_request_call_future(method)
        # This task ends with the server and not before, so the main loop never sees such a call.
        return asyncio.get_running_loop().create_task(self._accept_unknown_methods())

    async def _accept_unknown_methods(self) -> None:
        loop = asyncio.get_running_loop()
        handlers = cygrpc._MethodResolver([], {UNKNOWN_METHOD: self.unknown_method})
        answers: set[asyncio.Task[None]] = set()  # the loop itself keeps weak references only
        while True:
            call = await self._request_call()
            answer = cygrpc._handle_rpc(UNKNOWN_METHOD, handlers, (), call, loop, False)
            task = loop.create_task(cygrpc._schedule_rpc_coro(answer, call, loop, UNKNOWN_METHOD))
            answers.add(task)
            task.add_done_callback(answers.discard)

    def _serving_task_crash_handler(self, task: "asyncio.Task[None]") -> None:
        # gRPC's own handler begins a shutdown that fails half-way, and logs what the caller sent.
        if not task.cancelled() and (error := task.exception()) is not None:
            self.on_death(error)


def server_options(limits: Limits, *, shared: bool = False) -> list[tuple[str, int]]:
    """Returns the gRPC settings of a replica's server.

    shared: other processes of this host listen at its port too.
    """
    return [
        # Two services on one port would answer in turns; gRPC shares ports by default.
        ("grpc.so_reuseport", int(shared)),
        # Up to here a request that is too large gets an answer; beyond, the transport ends the stream.
        ("grpc.max_receive_message_length", 4 * limits.max_request_nbytes),
        ("grpc.max_send_message_length", 2 * max(limits.max_part_nbytes, limits.max_reply_nbytes)),
        # A call that is not let in is not read, so that its connection cannot send more than this.
        # With the probe gRPC would let every connection send 4 MiB; requests are small, and what
        # speeds up answers is the client's window.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", WINDOW_NBYTES),
        ("grpc.max_concurrent_streams", MAX_STREAMS),
        # A peer that sends nothing at all after a ping has gone: noticed after about 10 + 5 s.
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        # As has one whose bytes make no sense any more; slow links answer a ping in time.
        ("grpc.http2.ping_timeout_ms", 25_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # Of all entries of a call together. Both, because gRPC refuses at random in between.
        ("grpc.max_metadata_size", MAX_METADATA_NBYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_NBYTES),
        # A peer that connects and sends nothing is not waited for.
        ("grpc.server_handshake_timeout_ms", 20_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ]


def allow_many_connections() -> None:
    """Raises this process's soft limit of open files, which is often 1,024, to its hard limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
