"""Guards every handler: lets the caller in, reads and checks its requests, and reports what failed.

Every handler here takes a stream of messages, also that of a call with one message (on the wire there
is no difference): otherwise gRPC would receive and parse the message before it calls the handler. So
nothing of a call is read before its caller is let in. Until it is read, a connection can send
`server.WINDOW_NBYTES` and no more.

Where every caller is let in (health checks, a service without teams), the one message of a call is
read for few calls at a time, and for each only briefly while others wait.
"""

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from teacher_server.admission.access import CURRENT, RULES, SERVICE_METADATA, Access, Caller, Rule
from teacher_server.errors import RequestRefused, abort, incident, invalid
from teacher_server.rpc import probe
from teacher_server.rpc.connections import ConnectionLimiter, PeerActivity

SMALL_NBYTES = 16 << 10
"""Size limit of the one message of a call; streams of requests have limits of their own."""
MESSAGE_S = 10.0
"""How long the one message of a call may take to arrive."""
FIRST_REQUEST_S = 60.0
"""How long a stream may be open before its first request arrives."""
READERS = 6
"""Messages of strangers that are read at a time; each may be as large as the transport allows."""
TURN_S = 0.01
"""How long one stranger's message is waited for while other strangers wait for their turn."""
SOON = 8
"""Calls of a stranger after which the connections are inspected soon."""
PROBES = "/grpc.health.v1.Health/"
"""A caller of nothing but these remains a stranger."""

NO_METHOD = "there is no such method here; reflection lists those that are"

Handler = Callable[[Any, grpc.aio.ServicerContext], Any]
Parse = Callable[[bytes], Any]


class Interceptor(grpc.aio.ServerInterceptor):
    """Wraps the handlers of all services. access: None lets every caller in."""

    def __init__(self, access: Access | None, connections: ConnectionLimiter) -> None:
        self._access = access
        self._connections = connections
        self._readers = _Readers(connections)
        self._wrapped: dict[str, grpc.RpcMethodHandler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        method: str = handler_call_details.method  # pyright: ignore[reportAttributeAccessIssue]
        if method not in self._wrapped:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            self._wrapped[method] = self._wrap(handler, method)
        return self._wrapped[method]

    def _wrap(self, handler: Any, method: str) -> grpc.RpcMethodHandler:
        behaviour: Handler = (
            handler.unary_unary
            or handler.unary_stream
            or handler.stream_unary
            or handler.stream_stream
        )
        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        call = _Method(method, behaviour, handler.request_deserializer, handler.request_streaming)
        # gRPC calls handlers that yield answers in another way than those that write or return them.
        guard = self._yielding if inspect.isasyncgenfunction(behaviour) else self._returning
        return make(guard(call), None, handler.response_serializer)

    def _returning(self, method: "_Method") -> Handler:
        async def answer(messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> Any:
            async with self._call(method, messages, context) as call:
                response = await method.behaviour(await call.request(), context)
                call.raise_if_refused()
                return response

        return answer

    def _yielding(self, method: "_Method") -> Handler:
        async def answer(
            messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext
        ) -> AsyncIterator[Any]:
            async with self._call(method, messages, context) as call:
                async for response in method.behaviour(await call.request(), context):
                    yield response
                    if not method.streaming:  # answers to one request, as many as there may be
                        call.raise_if_refused()
                call.raise_if_refused()

        return answer

    @contextlib.asynccontextmanager
    async def _call(
        self, method: "_Method", messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext
    ) -> "AsyncIterator[_Call]":
        """Spans one call: lets its caller in, and turns what goes wrong into its status."""
        activity = self._begin(context)
        try:
            caller = self._enter(method, context, activity)
            with contextlib.nullcontext() if self._access is None else self._access.watched(caller):
                yield _Call(method, messages, caller, activity, self._readers)
        except RequestRefused as refused:
            activity.refusals += 1
            await self._refuse(context, refused)
        except grpc.aio.BaseError:
            raise  # an abort, or a caller that has left: gRPC handles both
        except Exception as error:
            await self._refuse(context, incident(error))
        finally:
            activity.calls_open -= 1

    def _begin(self, context: grpc.aio.ServicerContext) -> PeerActivity:
        """Counts a call, before anything about it is known."""
        activity = self._connections.activity(context.peer())
        activity.calls_begun += 1
        activity.calls_open += 1
        if activity.calls_begun > SOON and not activity.trusted:
            self._connections.look_soon()
        return activity

    def unknown_method(self) -> grpc.RpcMethodHandler:
        """Returns a handler that refuses calls to methods of no service, without reading them."""

        async def refuse(_: object, context: grpc.aio.ServicerContext) -> None:
            activity = self._begin(context)
            try:
                activity.refusals += 1
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, NO_METHOD)
            finally:
                activity.calls_open -= 1

        return grpc.stream_unary_rpc_method_handler(refuse)

    def _enter(
        self, method: "_Method", context: grpc.aio.ServicerContext, activity: PeerActivity
    ) -> Caller:
        """Returns who makes this call. Raises RequestRefused for unknown callers and missing scopes."""
        if method.is_probe and not activity.trusted:
            activity.trusted = probe.is_own(context.invocation_metadata() or ())
        if self._access is None or (method.rule is not None and method.rule.everybody):
            return Caller()
        caller = self._access.enter(context, method.rule, method.name)
        activity.trusted = True
        CURRENT.set(caller)  # visible in this call's task alone
        return caller

    async def _refuse(self, context: grpc.aio.ServicerContext, refused: RequestRefused) -> None:
        if self._access is None:
            await abort(context, refused)
        await abort(context, refused, (SERVICE_METADATA, self._access.service_id))


class _Method:
    """An RPC and its handler."""

    def __init__(self, name: str, behaviour: Handler, parse: Parse, streaming: bool) -> None:
        """streaming: whether it takes a stream of requests."""
        self.name = name
        self.behaviour = behaviour
        self.streaming = streaming
        self.rule: Rule | None = RULES.get(name)
        self.is_probe = name.startswith(PROBES)
        self._parse = parse

    def parse(self, data: bytes) -> Any:
        """Returns the request in a message. Raises RequestRefused if there is none."""
        if not self.streaming and len(data) > SMALL_NBYTES:
            raise invalid(
                "REQUEST_TOO_LARGE",
                f"a message to {self.name} may have {SMALL_NBYTES} bytes, got {len(data)}.",
                field="",
            )
        try:
            return self._parse(data)
        except (DecodeError, ValueError):
            raise invalid(
                "MALFORMED",
                f"{len(data)} bytes arrived that are not a request of {self.name}. Requests before "
                "them are answered; see teacher.proto.",
                field="",
            ) from None


class _Call:
    """The requests of one call, as an async iterator for a stream of them."""

    def __init__(
        self,
        method: _Method,
        messages: AsyncIterator[bytes],
        caller: Caller,
        activity: PeerActivity,
        readers: "_Readers",
    ) -> None:
        self._method = method
        self._messages = messages
        self._caller = caller
        self._activity = activity
        self._readers = readers
        self._is_first = True

    async def request(self) -> Any:
        """Returns what the handler takes: its one request, or all of them. Raises RequestRefused."""
        if self._method.streaming:
            return self
        try:
            if self._activity.trusted:
                async with asyncio.timeout(MESSAGE_S):
                    data = await anext(self._messages, None)
            else:
                data = await self._readers.read(self._messages)
        except TimeoutError:
            raise RequestRefused(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                "MESSAGE_INCOMPLETE",
                f"the message of this call to {self._method.name} did not arrive whole in time. "
                "Send it at once; while many calls do not, each of them has less time.",
            ) from None
        if data is None:
            raise invalid("MALFORMED", f"a call to {self._method.name} has one message.", field="")
        self._count(data)
        return self._parse(data)

    def raise_if_refused(self) -> None:
        """Raises the reason if its caller has lost access since the call began."""
        if self._caller.refused is not None:
            raise self._caller.refused

    def __aiter__(self) -> "_Call":
        return self

    async def __anext__(self) -> Any:
        """Returns the next request, as long as the caller has access. Raises RequestRefused."""
        # Access is withdrawn by cancelling this task, as asyncio.timeout does it: a task of its own
        # for every request would cost more.
        if self._caller.refused is not None:
            raise StopAsyncIteration
        task = asyncio.current_task()
        assert task is not None
        cancelling = task.cancelling()
        self._caller.reader = task
        self._activity.readers += 1
        try:
            async with asyncio.timeout(FIRST_REQUEST_S if self._is_first else None):
                data = await anext(self._messages)
            # While this call still counts as a reader: without one, a large message that is not yet
            # counted would be too much for a stranger.
            self._count(data)
        except TimeoutError:
            raise RequestRefused(
                grpc.StatusCode.UNAVAILABLE,
                "NO_REQUEST",
                f"no request arrived over this stream for {FIRST_REQUEST_S:.0f} s. Open another one "
                "when there is something to ask.",
            ) from None
        except asyncio.CancelledError:
            # Only the cancellation by Access ends the iteration; any other one belongs to the call.
            if self._caller.refused is not None and task.uncancel() <= cancelling:
                raise StopAsyncIteration from None
            raise
        finally:
            self._caller.reader = None
            self._activity.readers -= 1
        return self._parse(data)

    def _count(self, data: bytes) -> None:
        """Counts a message that arrived whole, so that it no longer counts as unread."""
        self._activity.messages += 1
        self._activity.messages_nbytes += len(data)

    def _parse(self, data: bytes) -> Any:
        request = self._method.parse(data)
        self._is_first = False
        # Without teams, one valid request is what makes a caller more than a stranger.
        self._activity.trusted = self._activity.trusted or not self._method.is_probe
        return request


class _Readers:
    """Reads messages of strangers, READERS at a time."""

    def __init__(self, connections: ConnectionLimiter) -> None:
        self._connections = connections
        self._places = asyncio.Semaphore(READERS)
        self._waiting = 0

    async def read(self, messages: AsyncIterator[bytes]) -> bytes | None:
        """Returns the one message of a call; None: there is none. Raises TimeoutError."""
        self._waiting += 1
        try:
            async with asyncio.timeout(MESSAGE_S):
                await self._places.acquire()
        finally:
            self._waiting -= 1
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + MESSAGE_S
        reading = asyncio.ensure_future(anext(messages, None))
        try:
            while not reading.done():
                await asyncio.wait({reading}, timeout=TURN_S)
                if reading.done():
                    break
                self._connections.look_soon()  # it may be sending without end
                if self._waiting or loop.time() > ends_s:
                    raise TimeoutError
            return reading.result()
        finally:
            reading.cancel()
            self._places.release()
