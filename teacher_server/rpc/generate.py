"""Serves one Generate stream: starts its requests, writes their texts as they come, cancels and fails.

A request is admitted when it is read. In the order of reading, each is then reserved with the accounts, and
each of its samples waits for its part of the answer budget and is written by the pipeline, some tokens at a
time. A text is at most two flushes ahead of what was written to the stream, and that is what it holds
of the budget: a reader that stops pauses its own texts. Reading goes on for a while when the budget is
used up, because a client that gives a text up says so on the same stream.
"""

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial

import grpc
import numpy as np
import xxhash

from protos import teacher_pb2
from protos.answer_check import generation_check, request_digest
from teacher_server.admission.access import Caller
from teacher_server.admission.generation import GenerationAdmission
from teacher_server.admission.requests import SESSION_ID_NBYTES
from teacher_server.errors import RequestRefused, invalid
from teacher_server.ledger.accounts import Accounts, origin
from teacher_server.monitoring.metrics import Metrics
from teacher_server.monitoring.team_stats import TeamStats
from teacher_server.pipeline import GenerationJob, Pipeline, WrittenPart, WrittenParts
from teacher_server.rpc.answer_budget import StreamBudget
from teacher_server.rpc.messages import error_message, text_timing
from teacher_server.teams.declaration import Team

BLOCK_TOKENS = 64
"""New tokens of a text that the ledger counts together, from its first one on."""
FLUSH_TOKENS, FLUSH_NBYTES = 64, 1 << 20
"""A flush of the pipeline has at most so many tokens, and bytes up to the token that exceeds these."""
UNREAD_FLUSHES = 2
READ_AHEAD_NBYTES = 1 << 20
"""While requests that wait to be started take as much, no further one is read."""
JOB_NBYTES = 4 << 10
"""What one sample that waits takes beside the ids of its request."""
FINISH = {
    "": teacher_pb2.FINISH_UNSPECIFIED,
    "stop": teacher_pb2.FINISH_STOP,
    "length": teacher_pb2.FINISH_LENGTH,
}
Jobs = list[tuple[int, GenerationJob]]
"""The samples of one request, by their numbers."""
UNKNOWN_TEAM = Team("", scopes=frozenset())
"""The team of a request until its caller is known."""


@dataclass(slots=True, eq=False)
class _Answer:
    """Tracks what is outstanding of one request."""

    request_id: int
    request_digest: bytes
    origin: bytes
    """Names the request in the ledger."""
    team: Team = UNKNOWN_TEAM
    prompt_digest: bytes = b""
    unfinished: int = 0
    """Samples that have not ended."""
    is_over: bool = False
    """Whether its last part or an error was written, or nothing may be any more."""
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    """One for each sample that is being answered."""


class _ReadAhead:
    """Queues requests that were admitted and are not started, bounded by what they take."""

    def __init__(self) -> None:
        self._waiting: asyncio.Queue[tuple[_Answer, Jobs, int] | None] = asyncio.Queue()
        self._nbytes = 0
        self._has_room = asyncio.Event()
        self._has_room.set()

    def put(self, answer: _Answer, jobs: Jobs, request_nbytes: int) -> None:
        nbytes = request_nbytes + len(jobs) * JOB_NBYTES
        self._count(nbytes)
        self._waiting.put_nowait((answer, jobs, nbytes))

    def end(self) -> None:
        """Says that no further request comes."""
        self._waiting.put_nowait(None)

    async def wait_for_room(self) -> None:
        """Waits until another request may be read."""
        await self._has_room.wait()

    async def take(self) -> AsyncIterator[tuple[_Answer, Jobs]]:
        """Yields the requests in order; each counts until the next one is taken."""
        while (entry := await self._waiting.get()) is not None:
            answer, jobs, nbytes = entry
            yield answer, jobs
            self._count(-nbytes)

    def _count(self, nbytes: int) -> None:
        self._nbytes += nbytes
        if self._nbytes < READ_AHEAD_NBYTES:
            self._has_room.set()
        else:
            self._has_room.clear()


class _Blocks:
    """Counts the rows of one text that were delivered, in blocks at fixed places of the text.

    A text that goes on at another replica is counted there from the block on that was not complete here:
    each block is counted once, whoever writes its last token.
    """

    def __init__(self, num_received: int) -> None:
        self._next = num_received
        self._nbytes = 0

    def add(self, num_tokens: int, nbytes: int, is_last: bool) -> list[tuple[int, int, int]]:
        """Adds delivered tokens; returns (block, rows, bytes) of each block that is complete now."""
        end = self._next + num_tokens
        self._nbytes += nbytes
        complete = []
        while (self._next // BLOCK_TOKENS + 1) * BLOCK_TOKENS <= end:
            block = self._next // BLOCK_TOKENS
            self._next = (block + 1) * BLOCK_TOKENS
            complete.append((block, BLOCK_TOKENS, self._nbytes))
            self._nbytes = 0
        self._next = end
        if is_last and end % BLOCK_TOKENS:
            complete.append((end // BLOCK_TOKENS, end % BLOCK_TOKENS, self._nbytes))
        return complete


class GenerateStream:
    """Answers the requests of one client stream, and lets one part be written at a time."""

    def __init__(
        self,
        context: grpc.aio.ServicerContext,
        caller: Caller,
        budget: StreamBudget,
        *,
        admission: GenerationAdmission,
        pipeline: Pipeline,
        accounts: Accounts,
        metrics: Metrics,
        team_stats: TeamStats,
    ) -> None:
        self._context = context
        self._caller = caller
        self._budget = budget
        self._admission = admission
        self._pipeline = pipeline
        self._accounts = accounts
        self._metrics = metrics
        self._team_stats = team_stats
        self._session_id = secrets.token_bytes(SESSION_ID_NBYTES)
        """The session of requests that name none."""
        self._read_ahead = _ReadAhead()
        self._unanswered: dict[int, _Answer] = {}
        self._writing = asyncio.Lock()

    async def serve(self, requests: AsyncIterator[teacher_pb2.GenerateRequest]) -> None:
        """Answers every request. Raises RequestRefused if reading them ended with one."""
        refused = None
        with self._budget.may_end_task():
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._start_admitted(tasks))
                try:
                    async for request in requests:
                        if request.cancel:
                            await self._cancel(request.request_id)
                        else:
                            await self._admit(request)
                        await self._read_ahead.wait_for_room()
                except RequestRefused as error:
                    refused = error  # ends the stream once the requests before it are answered
                self._read_ahead.end()
        if refused is not None:
            raise refused

    async def _cancel(self, request_id: int) -> None:
        """Ends an unanswered request for its client."""
        answer = self._unanswered.get(request_id)
        if answer is not None:
            error = RequestRefused(
                grpc.StatusCode.CANCELLED, "CANCELLED", "the client cancelled this request."
            )
            await self._fail(answer, error, is_refusal=False)

    async def _admit(self, request: teacher_pb2.GenerateRequest) -> None:
        """Queues one request to be started, or answers it with an error."""
        answer = _Answer(
            request.request_id,
            request_digest(request),
            origin(request.session_id or self._session_id, request.item_id or request.request_id),
        )
        try:
            # Asked for each request: a token may have expired, a team changed, since the stream began.
            answer.team = self._caller.team()
            if request.request_id in self._unanswered:
                raise invalid(
                    "DUPLICATE_REQUEST_ID",
                    f"request {request.request_id} is not answered yet and was sent again. Give every "
                    "request of a stream an id of its own.",
                    field="request_id",
                )
            jobs = self._admission.admit(request, answer.team)
        except Exception as error:
            await self._fail(answer, error)
            return
        answer.unfinished = len(jobs)
        answer.prompt_digest = xxhash.xxh3_128_digest(request.prompt_ids)
        self._unanswered[request.request_id] = answer
        self._read_ahead.put(answer, jobs, request.ByteSize())

    async def _start_admitted(self, tasks: asyncio.TaskGroup) -> None:
        """Starts the requests in the order in which they were read."""
        async for answer, jobs in self._read_ahead.take():
            if answer.is_over:
                continue  # it was cancelled while it waited
            try:
                await self._accounts.reserve(answer.team, sum(job.num_tokens for _, job in jobs))
            except Exception as error:
                await self._fail(answer, error)
                continue
            await self._start_jobs(answer, jobs, tasks)

    async def _start_jobs(self, answer: _Answer, jobs: Jobs, tasks: asyncio.TaskGroup) -> None:
        """Starts each sample when the budget has bytes for what it may be ahead of its reader.

        Their tokens are reserved: those that are not started are settled here.
        """
        waiting = deque(jobs)
        team = answer.team.name
        try:
            while waiting:
                number, job = waiting[0]
                nbytes = _unread_nbytes(job)
                await self._budget.acquire(nbytes, team)
                if answer.is_over:
                    self._budget.release(nbytes, team)
                    return
                waiting.popleft()
                task = tasks.create_task(self._answer(answer, number, job))
                answer.tasks.add(task)
                self._team_stats.admitted(team, job.num_tokens)
                # Not in a finally of the task: one that is cancelled before it begins has none.
                task.add_done_callback(partial(self._end, answer, job))
        finally:
            for _, job in waiting:
                self._accounts.settle(job)

    def _end(self, answer: _Answer, job: GenerationJob, task: asyncio.Task[None]) -> None:
        """Gives back what a text held, once it is answered or never will be."""
        team = answer.team.name
        answer.tasks.discard(task)
        self._budget.release(_unread_nbytes(job), team)
        self._team_stats.answered(team, job.num_tokens)
        self._accounts.settle(job)

    async def _answer(self, answer: _Answer, number: int, job: GenerationJob) -> None:
        """Has one sample written, and sends each part as soon as it is encoded."""
        try:
            with closing(self._pipeline.generate(job)) as parts:
                await self._write_parts(answer, number, job, parts)
        except grpc.aio.InternalError:
            answer.is_over = True  # the client has gone: there is no one to send the error to
        except Exception as error:
            await self._fail(answer, error)

    async def _write_parts(
        self, answer: _Answer, number: int, job: GenerationJob, parts: WrittenParts
    ) -> None:
        """Writes the parts of one sample; what of it is delivered is recorded by blocks."""
        blocks = _Blocks(len(job.text.new_ids))
        async for written in parts:
            response = self._make_response(answer, number, written)
            if written.finish:
                answer.unfinished -= 1
                response.part.last = answer.unfinished == 0
            nbytes = len(written.payload)
            complete = blocks.add(len(written.token_ids), nbytes, bool(written.finish))
            record = partial(self._record_delivery, answer, number, complete)
            await self._write(answer, response, before=record)
            parts.mark_read()
            self._metrics.bytes_sent.labels(answer.team.name).inc(nbytes)

    def _make_response(
        self, answer: _Answer, number: int, written: WrittenPart
    ) -> teacher_pb2.GenerateResponse:
        response = teacher_pb2.GenerateResponse(request_id=answer.request_id)
        part = response.part  # filled in place: a message passed in would be copied
        part.sample = number
        part.first = written.first
        part.token_ids = np.array(written.token_ids, dtype="<i4").tobytes()
        part.payload = written.payload
        part.finish = FINISH[written.finish]
        part.teacher_fingerprint = self._admission.fingerprint
        part.timing.CopyFrom(text_timing(written))
        return response

    def _record_delivery(
        self, answer: _Answer, number: int, complete: list[tuple[int, int, int]]
    ) -> None:
        """Counts the blocks of a sample that are complete with what goes to the transport next."""
        for block, rows, nbytes in complete:
            digest = xxhash.xxh3_128_digest(answer.prompt_digest + block.to_bytes(4, "little"))
            self._accounts.record_delivery(answer.team, answer.origin, number, digest, rows, nbytes)

    async def _fail(self, answer: _Answer, error: Exception, *, is_refusal: bool = True) -> None:
        """Answers a request with an error, once, and drops its texts."""
        if answer.is_over:
            return
        message = error_message(error)
        if is_refusal:
            self._metrics.rejected.labels(answer.team.name, message.reason).inc()
            if answer.team is not UNKNOWN_TEAM:
                self._team_stats.rejected(answer.team.name)
                if isinstance(error, RequestRefused):
                    self._accounts.record_rejection(answer.team)
        response = teacher_pb2.GenerateResponse(request_id=answer.request_id, error=message)
        await self._write(answer, response)
        current = asyncio.current_task()
        for task in answer.tasks:
            if task is not current:
                task.cancel()

    async def _write(
        self,
        answer: _Answer,
        response: teacher_pb2.GenerateResponse,
        *,
        before: Callable[[], None] | None = None,
    ) -> None:
        """Writes one part or error; after the last part or an error of a request nothing of it is written.

        before: called just before the write, if there is one.
        """
        async with self._writing:
            if answer.is_over:
                return  # it ended while this one waited for its turn
            answer.is_over = response.HasField("error") or response.part.last
            # A second request with the same id must not end the first one's entry.
            if answer.is_over and self._unanswered.get(answer.request_id) is answer:
                del self._unanswered[answer.request_id]
            response.check = generation_check(answer.request_digest, response)
            if before is not None:
                before()
            # While this is set and old, the budget may end the stream: its reader has stopped.
            self._budget.blocked_s = time.monotonic()
            try:
                await self._context.write(response)
            finally:
                self._budget.blocked_s = 0.0


def _unread_nbytes(job: GenerationJob) -> int:
    """Returns an upper bound of what is written of a text and not read yet."""
    flush = min(FLUSH_TOKENS * job.row_nbytes, FLUSH_NBYTES + job.row_nbytes)
    return UNREAD_FLUSHES * flush
