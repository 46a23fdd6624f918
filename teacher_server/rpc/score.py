"""Serves one Score stream: starts its requests, writes their parts, and fails what is refused.

A request goes straight through: it is admitted, reserved with the accounts, waits for the answer
budget, and its sequences are scored, encoded and written. Reading stops while unfinished answers
fill the stream's budget, so that a slow reader holds up itself, through HTTP/2, and no other stream.
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
import xxhash

from protos import teacher_pb2
from protos.answer_check import answer_check, full_answer_check, request_digest
from teacher_server.admission.access import Caller
from teacher_server.admission.requests import SESSION_ID_NBYTES, Admission, check_request
from teacher_server.errors import RequestRefused, invalid
from teacher_server.ledger.accounts import Accounts, origin
from teacher_server.monitoring.metrics import Metrics
from teacher_server.monitoring.team_stats import TeamStats
from teacher_server.pipeline import Encoding, Pipeline, SequenceJob
from teacher_server.rpc.answer_budget import StreamBudget
from teacher_server.rpc.messages import error_message, timing_message
from teacher_server.teams.declaration import Team

PART_SLACK_NBYTES = 1024
"""Space in a part for everything beside its payload."""
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
    unfinished: int = 0
    """Sequences whose last part has not been encoded."""
    failed: bool = False
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    """One for each sequence that is being answered."""
    tokens: int = 0
    """Tokens of these sequences."""
    progress: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when one of the tasks ends."""

    def add(self, task: asyncio.Task[None], tokens: int) -> None:
        self.tasks.add(task)
        self.tokens += tokens

    def discard(self, task: asyncio.Task[None], tokens: int) -> None:
        self.tasks.discard(task)
        self.tokens -= tokens
        self.progress.set()

    async def wait_below(self, tokens: int) -> None:
        """Waits until at most `tokens` are being answered, or none at all."""
        while self.tasks and self.tokens > tokens:
            self.progress.clear()
            await self.progress.wait()


class ScoreStream:
    """Answers the requests of one client stream, and lets one part be written at a time."""

    def __init__(
        self,
        context: grpc.aio.ServicerContext,
        caller: Caller,
        budget: StreamBudget,
        *,
        admission: Admission,
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
        self._unanswered: dict[int, _Answer] = {}
        self._writing = asyncio.Lock()

    async def serve(self, requests: AsyncIterator[teacher_pb2.ScoreRequest]) -> None:
        """Answers every request. Raises RequestRefused if reading them ended with one."""
        refused = None
        with self._budget.may_end_task():
            async with asyncio.TaskGroup() as tasks:
                try:
                    async for request in requests:
                        await self._start(request, tasks)
                except RequestRefused as error:
                    refused = error  # ends the stream once the requests before it are answered
        if refused is not None:
            raise refused

    async def _start(self, request: teacher_pb2.ScoreRequest, tasks: asyncio.TaskGroup) -> None:
        """Admits one request and starts its sequences, or answers it with an error."""
        answer = _Answer(
            request.request_id,
            request_digest(request),
            origin(request.session_id or self._session_id, request.item_id or request.request_id),
        )
        try:
            jobs = await self._admit(request, answer)
        except Exception as error:
            await self._fail(answer, error)
            return
        answer.unfinished = len(jobs)
        self._unanswered[request.request_id] = answer
        await self._start_jobs(answer, jobs, tasks)

    async def _admit(self, request: teacher_pb2.ScoreRequest, answer: _Answer) -> list[SequenceJob]:
        """Returns the jobs of a request, their tokens reserved. Raises what refuses it."""
        # Asked for each request: a token may have expired, a team changed, since the stream began.
        answer.team = team = self._caller.team()
        check_request(team, request)
        if request.request_id in self._unanswered:
            raise invalid(
                "DUPLICATE_REQUEST_ID",
                f"request {request.request_id} is not answered yet and was sent again. Give every "
                "request of a stream an id of its own.",
                field="request_id",
            )
        jobs = [job for job in self._admission.admit(request, team) if len(job.request.rows)]
        await self._accounts.reserve(team, sum(job.num_tokens for job in jobs))
        return jobs

    async def _start_jobs(
        self, answer: _Answer, jobs: list[SequenceJob], tasks: asyncio.TaskGroup
    ) -> None:
        """Starts each sequence when the budget has bytes for its answer."""
        waiting = deque(jobs)
        team = answer.team.name
        max_tokens = self._admission.limits.max_queued_tokens // 2
        try:
            while waiting:
                job = waiting[0]
                # A request that is larger than the queue enters it piece by piece.
                await answer.wait_below(max_tokens - job.num_tokens)
                await self._budget.acquire(job.reply_nbytes, team)
                if answer.failed:
                    self._budget.release(job.reply_nbytes, team)
                    return
                waiting.popleft()
                task = tasks.create_task(self._answer(answer, job))
                answer.add(task, job.num_tokens)
                self._team_stats.admitted(team, job.num_tokens)
                # Not in a finally of the task: one that is cancelled before it begins has none.
                task.add_done_callback(partial(self._end, answer, job))
        finally:
            for job in waiting:
                self._accounts.settle(job)

    def _end(self, answer: _Answer, job: SequenceJob, task: asyncio.Task[None]) -> None:
        """Gives back what a sequence held, once it is answered or never will be."""
        team = answer.team.name
        answer.discard(task, job.num_tokens)
        self._budget.release(job.reply_nbytes, team)
        self._team_stats.answered(team, job.num_tokens)
        self._accounts.settle(job)

    async def _answer(self, answer: _Answer, job: SequenceJob) -> None:
        """Scores, encodes and writes one sequence, each part as soon as it is encoded."""
        try:
            with closing(self._pipeline.score(job)) as parts:
                await self._write_parts(answer, job, parts)
        except grpc.aio.InternalError:
            answer.failed = True  # the client has gone: there is no one to send the error to
        except Exception as error:
            await self._fail(answer, error, job)

    async def _write_parts(self, answer: _Answer, job: SequenceJob, parts: Encoding) -> None:
        """Writes the parts of one sequence; the last one is recorded as delivered."""
        timing = None
        digest = xxhash.xxh3_128_digest(job.ids_bytes)
        num_rows = len(job.request.rows)
        nbytes = 0
        async for encoded in parts:
            nbytes += len(encoded.payload)
            if timing is None:
                timing = timing_message(job)
                timing.compact_us = int(1e6 * encoded.compact_s)
            timing.encode_us = int(1e6 * encoded.seconds)
            response = teacher_pb2.ScoreResponse(request_id=answer.request_id)
            part = response.part  # filled in place: a message passed in would be copied
            part.sequence = job.index
            part.first_row = encoded.first_row
            part.num_rows = encoded.num_rows
            part.ids_digest = digest
            part.payload = encoded.payload
            part.teacher_fingerprint = self._admission.fingerprint
            part.timing.CopyFrom(timing)
            record_delivery = None
            if encoded.first_row + encoded.num_rows == num_rows:
                answer.unfinished -= 1
                part.last = answer.unfinished == 0
                record_delivery = partial(
                    self._accounts.record_delivery,
                    answer.team,
                    answer.origin,
                    job.index,
                    digest,
                    num_rows,
                    nbytes,
                )
                self._pipeline.record_encoded(encoded)
            await self._write(answer, response, before=record_delivery)
            self._metrics.bytes_sent.labels(answer.team.name).inc(len(encoded.payload))

    async def _fail(
        self, answer: _Answer, error: Exception, job: SequenceJob | None = None
    ) -> None:
        """Answers a request with an error, once, and drops its other sequences."""
        if answer.failed:
            return
        message = (
            error_message(error)
            if job is None
            else error_message(error, sequence=job.index, rows=job.request.rows)
        )
        self._metrics.rejected.labels(answer.team.name, message.reason).inc()
        if answer.team is not UNKNOWN_TEAM:
            self._team_stats.rejected(answer.team.name)
            if isinstance(error, RequestRefused):
                self._accounts.record_rejection(answer.team)
        response = teacher_pb2.ScoreResponse(request_id=answer.request_id, error=message)
        await self._write(answer, response)
        current = asyncio.current_task()
        for task in answer.tasks:
            if task is not current:
                task.cancel()

    async def _write(
        self,
        answer: _Answer,
        response: teacher_pb2.ScoreResponse,
        *,
        before: Callable[[], None] | None = None,
    ) -> None:
        """Writes one part or error; after an error of a request nothing of it is written.

        before: called just before the write, if there is one.
        """
        async with self._writing:
            if answer.failed:
                return  # it failed while this part waited for its turn
            answer.failed = response.HasField("error")
            ended = answer.failed or response.part.last
            # A second request with the same id must not end the first one's entry.
            if ended and self._unanswered.get(answer.request_id) is answer:
                del self._unanswered[answer.request_id]
            response.check = answer_check(answer.request_digest, response)
            response.full_check = full_answer_check(answer.request_digest, response)
            if before is not None:
                before()
            # While this is set and old, the budget may end the stream: its reader has stopped.
            self._budget.blocked_s = time.monotonic()
            try:
                await self._context.write(response)
            finally:
                self._budget.blocked_s = 0.0


async def read_until(
    stop: asyncio.Event, requests: AsyncIterator[teacher_pb2.ScoreRequest]
) -> AsyncIterator[teacher_pb2.ScoreRequest]:
    """Yields the requests until `stop` is set."""
    stopping = asyncio.ensure_future(stop.wait())
    reading = None
    try:
        while not stop.is_set():
            reading = asyncio.ensure_future(anext(requests, None))
            await asyncio.wait({reading, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done() or (request := reading.result()) is None:
                return
            yield request
    finally:
        stopping.cancel()
        if reading is not None:
            reading.cancel()
