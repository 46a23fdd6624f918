"""What stands between gRPC and every handler: who calls, then what is asked, then what went wrong.

Every handler here takes a stream of messages, also that of a call with one message (on the wire there
is no difference): gRPC would receive and parse the message first and ask the handler then. So
nothing of a call is read before its caller is let in. While nobody reads, a connection can send
`server.WINDOW_NBYTES` and no more.

Where everybody is let in (health checks, a service without teams), few calls at a time have their one
message read, and each for a short time when others wait.
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
from teacher_server.rpc.connections import Connections, Note

SMALL_NBYTES = 16 << 10
"""What the one message of a call may have; a stream of requests has limits of its own."""
MESSAGE_S = 10.0
"""How long the one message of a call may take to come."""
FIRST_REQUEST_S = 60.0
"""How long a stream may be open before its first request has come."""
READERS = 6
"""Messages of strangers that are read at a time; each may have what the transport allows."""
TURN_S = 0.01
"""How long a stranger's message is waited for while others wait."""
SOON = 8
"""Calls of a stranger after which its connection is looked at soon."""
PROBES = "/grpc.health.v1.Health/"
"""Who only calls these is a stranger still."""

NO_METHOD = "there is no such method here; reflection lists those that are"

Handler = Callable[[Any, grpc.aio.ServicerContext], Any]
Parse = Callable[[bytes], Any]


class Interceptor(grpc.aio.ServerInterceptor):
    """Wraps the handlers of all services. access: None lets everybody in."""

    def __init__(self, access: Access | None, connections: Connections) -> None:
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
        # Whether answers are yielded or written and returned decides how gRPC calls a handler.
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
        """One call: lets its caller in, and turns what goes wrong into its status."""
        note = self._begin(context)
        try:
            caller = self._enter(method, context, note)
            with contextlib.nullcontext() if self._access is None else self._access.watched(caller):
                yield _Call(method, messages, caller, note, self._readers)
        except RequestRefused as refused:
            note.refusals += 1
            await self._refuse(context, refused)
        except grpc.aio.BaseError:
            raise  # an abort, or a caller that has gone: gRPC's own
        except Exception as error:
            await self._refuse(context, incident(error))
        finally:
            note.calls -= 1

    def _begin(self, context: grpc.aio.ServicerContext) -> Note:
        """Counts a call, whatever it is."""
        note = self._connections.note(context.peer())
        note.begun += 1
        note.calls += 1
        if note.begun > SOON and not note.vouched:
            self._connections.hurry()
        return note

    def unknown_method(self) -> grpc.RpcMethodHandler:
        """Answers calls to methods that nobody has, without a look at what they say."""

        async def refuse(_: object, context: grpc.aio.ServicerContext) -> None:
            note = self._begin(context)
            try:
                note.refusals += 1
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, NO_METHOD)
            finally:
                note.calls -= 1

        return grpc.stream_unary_rpc_method_handler(refuse)

    def _enter(self, method: "_Method", context: grpc.aio.ServicerContext, note: Note) -> Caller:
        """Who makes this call. Raises RequestRefused if that is nobody, or may not do this."""
        if method.is_probe and not note.vouched:
            note.vouched = probe.is_own(context.invocation_metadata() or ())
        if self._access is None or (method.rule is not None and method.rule.everybody):
            return Caller()
        caller = self._access.enter(context, method.rule, method.name)
        note.vouched = True
        CURRENT.set(caller)  # of this call's task alone
        return caller

    async def _refuse(self, context: grpc.aio.ServicerContext, refused: RequestRefused) -> None:
        if self._access is None:
            await abort(context, refused)
        await abort(context, refused, (SERVICE_METADATA, self._access.service_id))


class _Method:
    """One RPC and its handler."""

    def __init__(self, name: str, behaviour: Handler, parse: Parse, streaming: bool) -> None:
        """streaming: whether it takes a stream of requests."""
        self.name = name
        self.behaviour = behaviour
        self.streaming = streaming
        self.rule: Rule | None = RULES.get(name)
        self.is_probe = name.startswith(PROBES)
        self._parse = parse

    def parse(self, data: bytes) -> Any:
        """Raises RequestRefused."""
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
                f"{len(data)} bytes came that are no request of {self.name}. What came before "
                "them is answered; see teacher.proto.",
                field="",
            ) from None


class _Call:
    """The requests of one call: an iterator over those of a stream."""

    def __init__(
        self,
        method: _Method,
        messages: AsyncIterator[bytes],
        caller: Caller,
        note: Note,
        readers: "_Readers",
    ) -> None:
        self._method = method
        self._messages = messages
        self._caller = caller
        self._note = note
        self._readers = readers
        self._is_first = True

    async def request(self) -> Any:
        """What its handler takes: its one request, or all of them. Raises RequestRefused."""
        if self._method.streaming:
            return self
        try:
            if self._note.vouched:
                async with asyncio.timeout(MESSAGE_S):
                    data = await anext(self._messages, None)
            else:
                data = await self._readers.read(self._messages)
        except TimeoutError:
            raise RequestRefused(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                "MESSAGE_INCOMPLETE",
                f"the message of this call to {self._method.name} did not come whole in time. "
                "Send it at once; where many do not, each of them has less time.",
            ) from None
        if data is None:
            raise invalid("MALFORMED", f"a call to {self._method.name} has one message.", field="")
        self._count(data)
        return self._received(data)

    def raise_if_refused(self) -> None:
        """Raises why its caller is let in no more."""
        if self._caller.refused is not None:
            raise self._caller.refused

    def __aiter__(self) -> "_Call":
        return self

    async def __anext__(self) -> Any:
        """The next request, as long as the caller is let in. Raises RequestRefused."""
        # As asyncio.timeout does it: no task of its own for every request.
        if self._caller.refused is not None:
            raise StopAsyncIteration
        task = asyncio.current_task()
        assert task is not None
        cancelling = task.cancelling()
        self._caller.reader = task
        self._note.readers += 1
        try:
            async with asyncio.timeout(FIRST_REQUEST_S if self._is_first else None):
                data = await anext(self._messages)
            self._count(data)  # before it stops to be read, or it would be too much for a stranger
        except TimeoutError:
            raise RequestRefused(
                grpc.StatusCode.UNAVAILABLE,
                "NO_REQUEST",
                f"no request came over this stream for {FIRST_REQUEST_S:.0f} s. Open another one "
                "when there is something to ask.",
            ) from None
        except asyncio.CancelledError:
            if self._caller.refused is not None and task.uncancel() <= cancelling:
                raise StopAsyncIteration from None
            raise
        finally:
            self._caller.reader = None
            self._note.readers -= 1
        return self._received(data)

    def _count(self, data: bytes) -> None:
        """Takes a message that came whole off what its connection has sent."""
        self._note.messages += 1
        self._note.messages_nbytes += len(data)

    def _received(self, data: bytes) -> Any:
        request = self._method.parse(data)
        self._is_first = False
        self._note.vouched = self._note.vouched or not self._method.is_probe
        return request


class _Readers:
    """Reads messages of strangers, few at a time."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._places = asyncio.Semaphore(READERS)
        self._waiting = 0

    async def read(self, messages: AsyncIterator[bytes]) -> bytes | None:
        """The one message of a call; None: there is none. Raises TimeoutError."""
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
                self._connections.hurry()  # it may be sending without an end
                if self._waiting or loop.time() > ends_s:
                    raise TimeoutError
            return reading.result()
        finally:
            reading.cancel()
            self._places.release()
