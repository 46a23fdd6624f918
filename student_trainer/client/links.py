"""Runs one connection to one replica: requests out, answers in, and whether it still lives."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

from protos import teacher_pb2, teacher_pb2_grpc
from student_trainer.client.counters import Counters
from student_trainer.client.describe import NOT_A_MESSAGE, Metadata, describe, explain
from student_trainer.client.discovery import backoff_s
from student_trainer.client.dispatch import Dispatch
from student_trainer.client.pending import PendingTexts

PROBE_AFTER_S = 4.0
"""A link without a message for this long is probed."""
PROBE_S = 5.0
"""How long a replica may take to answer a probe."""
FIRST_SIGN_S = 0.5
"""How long to listen before the first write, if the stream before this one ended with INTERNAL.

A write that fails because the service has just refused the stream makes grpc.aio report INTERNAL
instead of the refusal, nearly always where the refusal comes at once (grpc/grpc issue 36066).
"""

Receive = Callable[["Link", Any], None]
"""Takes a message that a stream brought."""


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """Says how a stream ended."""

    code: grpc.StatusCode
    details: str
    bug: Exception | None = None
    """Set if this client failed, not the other side."""

    @property
    def reason(self) -> str:
        """The end as a text for the log."""
        return f"{self.code.name}: {self.details or 'the service ended the stream'}"


class SilentReplica(Exception):
    """A replica gave no sign of life when it was asked for one."""


class Link:
    """Holds a channel to one replica, with a Score stream, and a Generate stream while it is needed."""

    def __init__(
        self,
        replica_id: str,
        address: str,
        channel: grpc.aio.Channel,
        metadata: Metadata,
        counters: Counters,
    ) -> None:
        now = time.monotonic()
        self.replica_id = replica_id
        self.address = address
        self.stub = teacher_pb2_grpc.TeacherStub(channel)
        self.outbox: asyncio.Queue[int] = asyncio.Queue()
        """Numbers of the requests for targets to write."""
        self.text_outbox: asyncio.Queue[int | teacher_pb2.GenerateRequest] = asyncio.Queue()
        """Numbers of the requests for texts to write, and cancellations of earlier ones."""
        self.has_text_stream = False
        self.last_sign_s = now
        """When the replica last gave any sign of life."""
        self.last_answer_s = now
        """When the stream last brought a message, or nothing was outstanding."""
        self.is_idle = False
        """Whether the replica reported since then that it has no work."""
        self.tasks: list[asyncio.Task[None]] = []
        """What drives the stream; `hang_up` cancels it."""
        self.probing: asyncio.Task[None] | None = None
        """The last probe: there is one at a time."""
        self._channel = channel
        self._metadata = metadata
        self._counters = counters
        self._num_failures = 0
        """How often it was distrusted since the last good answer."""
        self._distrusted_until_s: float | None = None

    async def converse(
        self, dispatch: Dispatch, receive: Receive, *, listen_first: bool, texts: bool = False
    ) -> StreamEnd:
        """Writes what dispatch places on this link and hands on what comes, until the stream ends.

        listen_first: whether to wait a moment for a refusal before the first write. texts: over the
        Generate stream instead of the Score stream.
        """
        method = self.stub.Generate if texts else self.stub.Score
        outbox: asyncio.Queue[Any] = self.text_outbox if texts else self.outbox
        call = method(metadata=self._metadata)
        writing = asyncio.create_task(
            self._write(call, outbox, dispatch, listen_first=listen_first)
        )
        self.tasks.append(writing)
        try:
            async for response in call:
                self.last_sign_s = self.last_answer_s = time.monotonic()
                self.is_idle = False
                if response is None:  # gRPC hands out None for bytes that are not a message
                    self._counters.corrupt += 1
                    return StreamEnd(grpc.StatusCode.UNKNOWN, NOT_A_MESSAGE)
                self._counters.received_nbytes += response.ByteSize()
                receive(self, response)
            return StreamEnd(await call.code(), await call.details())
        except grpc.aio.AioRpcError as error:
            return StreamEnd(error.code(), error.details() or "")
        except asyncio.CancelledError:
            # Reading ends this way too when the writer failed and cancelled the call.
            if writing.done() and not writing.cancelled() and (bug := writing.exception()):
                return _end_by(bug)
            raise
        except Exception as error:
            return _end_by(error)
        finally:
            writing.cancel()
            call.cancel()

    async def _write(
        self, call: Any, outbox: "asyncio.Queue[Any]", dispatch: Dispatch, *, listen_first: bool
    ) -> None:
        """Writes requests; a broken stream is left to the reader to report."""
        try:
            if listen_first:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(FIRST_SIGN_S):
                        await call.initial_metadata()
            while True:
                entry = await outbox.get()
                if isinstance(entry, teacher_pb2.GenerateRequest):
                    await call.write(entry)
                    continue
                pending = dispatch.find_to_write(entry)
                if pending is None:
                    continue
                self._counters.sent_nbytes += pending.request.ByteSize()
                pending.written_s = time.monotonic()
                await call.write(pending.request)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return
        except Exception:
            call.cancel()  # wakes the reader, which reports what this task raised
            raise

    def cancel(self, pending: PendingTexts) -> None:
        """Tells the replica that nobody waits for the current attempt any more."""
        if self.has_text_stream and pending.written_s:
            self.text_outbox.put_nowait(
                teacher_pb2.GenerateRequest(
                    session_id=pending.request.session_id, request_id=pending.number, cancel=True
                )
            )

    async def wait_for_a_request(self) -> None:
        """Waits until there is something to write to the Score stream."""
        self.outbox.put_nowait(await self.outbox.get())

    def rest(self, now: float) -> None:
        """Restarts the clocks of a link on which nothing is outstanding."""
        self.last_sign_s = self.last_answer_s = now

    def needs_probe(self, now: float) -> bool:
        """Whether the replica has been silent for long and no probe is under way."""
        is_probed = self.probing is not None and not self.probing.done()
        return now - self.last_sign_s > PROBE_AFTER_S and not is_probed

    async def probe(self) -> teacher_pb2.TeacherInfo | None:
        """Asks a silent replica for a sign of life. Raises SilentReplica if none comes.

        Returns None if it did not answer but the stream brought something in the meantime.
        """
        asked_s = time.monotonic()
        try:
            info = await self.describe()
        except grpc.aio.AioRpcError as error:
            if self.last_sign_s > asked_s:
                return None
            silent_s = time.monotonic() - self.last_sign_s
            raise SilentReplica(f"silent for {silent_s:.0f} s: {explain(error)}") from error
        self.last_sign_s = time.monotonic()
        return info

    async def describe(self) -> teacher_pb2.TeacherInfo:
        """Asks the replica to describe itself. Raises grpc.aio.AioRpcError."""
        return await describe(self._channel, self._metadata, PROBE_S)

    def distrust(self, now: float) -> bool:
        """Starts a time in which other links are preferred; False if one is running already."""
        if self._distrusted_until_s is not None:
            return False
        self._distrusted_until_s = now + backoff_s(self._num_failures)
        self._num_failures += 1
        return True

    def regains_trust(self, now: float) -> bool:
        """Ends that time; whether it ended just now."""
        if self._distrusted_until_s is None or now <= self._distrusted_until_s:
            return False
        self._distrusted_until_s = None
        return True

    def clear_failures(self) -> None:
        """Forgets earlier failures after a good answer."""
        self._num_failures = 0

    async def hang_up(self) -> None:
        """Ends the stream and closes the channel."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self._channel.close()


def _end_by(bug: BaseException) -> StreamEnd:
    """Describes the end of a stream by a failure of this client."""
    failure = bug if isinstance(bug, Exception) else RuntimeError(repr(bug))
    return StreamEnd(grpc.StatusCode.UNKNOWN, f"the client failed: {bug!r}", failure)
