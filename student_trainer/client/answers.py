"""Checks, decodes and resolves answers; asks again for those that arrived damaged or refused."""

import asyncio
import logging
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from logit_codec import CodecError, IdTable
from protos import teacher_pb2
from student_trainer.client.counters import Counters
from student_trainer.client.dispatch import Dispatch, Fate, Unanswered, assemble
from student_trainer.client.links import Link
from student_trainer.client.pending import Pending
from student_trainer.client.side_tasks import CLOSED, SideTasks, unexpected
from student_trainer.client.stalls import Stalls
from student_trainer.errors import (
    BY_CODE,
    IncompatibleTeacher,
    ProtocolError,
    TargetsCorrupt,
    TeacherError,
    TeacherInternalError,
    TeacherOverloaded,
    TeacherUnavailable,
)
from student_trainer.teachers.request import Answer

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""How often a request whose targets arrive damaged is sent before TargetsCorrupt is raised."""
FAILED_PAUSE_S = 1.0
"""How long after a failure the same replica is asked again, if there is no other one."""


class Answers:
    """Takes what links bring and ends each request with an answer, an error or another attempt."""

    def __init__(
        self,
        dispatch: Dispatch,
        stalls: Stalls,
        tasks: SideTasks,
        counters: Counters,
        *,
        patience_s: float,
        where: str,
    ) -> None:
        """where: names the service in messages."""
        self.id_tables: list[IdTable] = []
        """What answers may be coded with, beside the built-in identity."""
        self.num_paused = 0
        """Requests that wait before they are sent again; dispatch does not know of them."""
        self._dispatch = dispatch
        self._stalls = stalls
        self._tasks = tasks
        self._counters = counters
        self._patience_s = patience_s
        self._where = where
        # Decoding takes longer than the loop may be blocked: other links would look silent.
        self.decoder = ThreadPoolExecutor(1, thread_name_prefix="decode")

    def close(self) -> None:
        """Ends the decoding thread."""
        self.decoder.shutdown(wait=False, cancel_futures=True)

    def receive(self, link: Link, response: teacher_pb2.ScoreResponse) -> bool:
        """Takes one message; returns whether it ended a request and arrived undamaged."""
        ended = self._dispatch.receive(link, response)
        if ended is None:
            return False
        pending, fate = ended
        try:
            self._note_passed_over(link, pending)
            if fate is Fate.DAMAGED:
                self.ask_again(pending, TargetsCorrupt("an answer was damaged on its way"))
            elif fate is Fate.ANSWERED:
                self._observe(link, pending, response.part.timing)
                self._tasks.spawn(self._finish(pending), pending.resolve)
            else:
                self._tasks.spawn(self.handle_refusal(pending, response.error), pending.resolve)
        except BaseException as error:  # dispatch has forgotten the request: only we can end it
            logger.error("the client failed", exc_info=error)
            pending.resolve(unexpected(error))
        return fate is not Fate.DAMAGED

    def _note_passed_over(self, link: Link, pending: Pending) -> None:
        """Marks the oldest request of a link if a later one is answered before it."""
        oldest = self._dispatch.oldest(link, Pending)
        if oldest is not None and oldest.number < pending.number and oldest.passed_s is None:
            oldest.passed_s = time.monotonic()

    def _observe(self, link: Link, pending: Pending, timing: teacher_pb2.Timing) -> None:
        """Learns from a good answer how long batches take."""
        link.clear_failures()
        batch_s = (timing.forward_us + timing.head_us) / 1e6
        # No batch takes longer than its answers do, whatever a flipped bit in the timing says.
        self._stalls.observe_batch(min(batch_s, link.last_answer_s - pending.written_s))

    async def _finish(self, pending: Pending) -> None:
        """Decodes a whole answer off the loop; asks again if it is damaged."""
        loop = asyncio.get_running_loop()
        try:
            decoding = loop.run_in_executor(self.decoder, _decode, pending, self.id_tables)
        except RuntimeError:  # the executor was shut down: closed, or the interpreter ends
            pending.resolve(TeacherError(CLOSED))
            return
        try:
            answer = await decoding
        except (CodecError, TargetsCorrupt, IncompatibleTeacher) as error:
            self.ask_again(pending, error)
            return
        except ProtocolError as error:
            pending.resolve(error)
            return
        self._counters.rows += answer.targets.num_rows
        self._counters.payload_nbytes += sum(len(part.payload) for part in pending.parts.values())
        pending.resolve(answer)

    def ask_again(self, pending: Unanswered, error: Exception) -> None:
        """Sends a request again whose answer was damaged, or fails it after MAX_ATTEMPTS."""
        self._counters.corrupt += 1
        pending.num_damaged += 1
        if pending.num_damaged < MAX_ATTEMPTS:
            logger.warning("targets arrived damaged, asking again: %s", error)
            self._resend(pending)
            return
        kind: type[TeacherError] = TargetsCorrupt
        if isinstance(error, IncompatibleTeacher):
            kind = IncompatibleTeacher
        elif isinstance(error, CodecError) and "digest" not in str(error):
            kind = ProtocolError
        failure = kind(f"{error} ({pending.num_damaged} times, from {self._where})")
        failure.__cause__ = error
        pending.resolve(failure)

    async def handle_refusal(self, pending: Unanswered, error: teacher_pb2.RequestError) -> None:
        """Waits out RESOURCE_EXHAUSTED, asks once more after DATA_LOSS and INTERNAL, raises the rest."""
        kind = BY_CODE.get(error.code, ProtocolError)
        if kind is TeacherOverloaded and error.reason != "OUT_OF_MEMORY":
            if await self._wait_out(pending, error.retry_after_ms / 1000):
                self._counters.resent += 1
                self._dispatch.submit(pending)  # to any link: the limit is not one replica's
                return
        elif kind is TeacherUnavailable or (kind is TargetsCorrupt and pending.num_damaged == 0):
            pending.num_damaged += kind is TargetsCorrupt
            self._resend(pending)
            return
        elif kind is TeacherInternalError and await self._leave_failed(pending, error.message):
            self._resend(pending)
            return
        pending.resolve(kind(error.message))

    async def _wait_out(self, pending: Unanswered, retry_after_s: float) -> bool:
        """Waits as long as the teacher asked for; False if that would exceed the patience."""
        now = time.monotonic()
        pending.waited_since_s = pending.waited_since_s or now
        delay_s = retry_after_s or random.uniform(0.5, 1.0)
        if now + delay_s - pending.waited_since_s > self._patience_s:
            return False
        await self._pause(delay_s)
        return True

    async def _leave_failed(self, pending: Unanswered, why: str) -> bool:
        """Distrusts a replica that answered with INTERNAL; False if another one did before."""
        failed_before = bool(pending.failed_at)
        link = pending.link
        assert isinstance(link, Link)
        pending.failed_at.add(link)
        # A link that is distrusted already only answers what it was sent before its failure.
        if link.distrust(time.monotonic()):
            logger.warning("the teacher at %s failed, asking once more: %s", link.address, why)
            self._dispatch.set_trusted(link, False)
        if failed_before:
            return False
        if not self._dispatch.has_another(pending):
            await self._pause(FAILED_PAUSE_S)
        return True

    def _resend(self, pending: Unanswered) -> None:
        self._counters.resent += 1
        self._dispatch.resend(pending)

    async def _pause(self, seconds: float) -> None:
        """Waits before a request is sent again; the keeper watches the links in the meantime."""
        self.num_paused += 1
        try:
            await asyncio.sleep(seconds)
        finally:
            self.num_paused -= 1


def _decode(pending: Pending, id_tables: Sequence[IdTable]) -> Answer:
    """Runs `assemble` in the decoding thread; turns unexpected exceptions into ProtocolError."""
    try:
        return assemble(pending, pending.request.teacher_fingerprint, id_tables)
    except (CodecError, TargetsCorrupt, IncompatibleTeacher):
        raise
    except BaseException as error:  # StopIteration and SystemExit too, which no loop can carry
        raise unexpected(error) from error
