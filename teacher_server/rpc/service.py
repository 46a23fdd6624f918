"""The gRPC servicer: the only file of the server that knows how answers are put into messages.

One stream is one straight line: read a request, admit it, wait for room, submit its sequences,
encode what was scored, write the parts. Reading stops while unfinished answers fill the stream's
room, so that a slow reader holds itself up through HTTP/2 and nobody else.
"""

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial

import grpc
import xxhash
from torch import Tensor

from logit_codec import IdTable, Targets, encode_parts
from protos import teacher_pb2, teacher_pb2_grpc
from protos.answer_check import answer_check, full_answer_check, request_digest
from teacher_server.admission.access import Caller, check_request, current_caller
from teacher_server.admission.requests import SESSION_ID_NBYTES, Admission, Admitted
from teacher_server.encoding import Encoder, Parts
from teacher_server.engine.batch import StageTimes
from teacher_server.errors import RequestRefused, invalid, quoted
from teacher_server.ledger.accounts import Accounts, origin
from teacher_server.ledger.lease import DirectoryAway
from teacher_server.monitoring.last_minute import WINDOW_S
from teacher_server.monitoring.metrics import Metrics
from teacher_server.monitoring.replica_stats import ReplicaStats
from teacher_server.monitoring.team_stats import TeamSnapshot, TeamStats, idle
from teacher_server.rpc.answer_budget import ProcessRoom, StreamRoom
from teacher_server.rpc.messages import (
    _caller_message,
    _error_message,
    _team_status,
    _whose_usage,
    first_day,
    usage_row,
)
from teacher_server.scheduling.job import Job
from teacher_server.teams.declaration import Team

logger = logging.getLogger(__name__)

PART_SLACK_NBYTES = 1024
"""Room in a part for everything beside its payload."""
NOBODY = Team("", scopes=frozenset())
"""Whose request it is as long as that is not known."""
LEVELS = {
    teacher_pb2.LEVEL_UNSPECIFIED: 1,
    teacher_pb2.LEVEL_INTERACTIVE: 0,
    teacher_pb2.LEVEL_TRAINING: 1,
    teacher_pb2.LEVEL_BULK: 2,
}


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """What the compute thread made of one job."""

    targets: Targets
    times: StageTimes
    batch_sequences: int
    batch_tokens: int
    started_s: float
    """time.monotonic() when its batch was taken."""


Score = Callable[[Job], Awaitable[Scored]]
"""Submits a job and waits for its result; cancelling it makes the job depart."""


class TeacherService(teacher_pb2_grpc.TeacherServicer):
    """Answers Describe and Score for one replica."""

    def __init__(
        self,
        *,
        describe: Callable[[], teacher_pb2.TeacherInfo],
        admission: Admission,
        bucket_length: Callable[[int], int],
        score: Score,
        encoded: Callable[[Job], None],
        accounts: Accounts,
        encoder: Encoder,
        teacher_fingerprint: str,
        id_table: IdTable | None,
        metrics: Metrics,
        standing: TeamStats,
        status: Callable[[], teacher_pb2.ReplicaStatus],
        team_standings: Callable[[], list[TeamSnapshot]],
        workload: ReplicaStats,
    ) -> None:
        self._describe = describe
        self._admission = admission
        self._bucket_length = bucket_length
        self._score = score
        self._encoded = encoded
        self._accounts = accounts
        self._encoder = encoder
        self._fingerprint = teacher_fingerprint
        self._id_table = id_table
        self._metrics = metrics
        self._standing = standing
        self._status = status
        self._team_standings = team_standings
        self._workload = workload
        limits = admission.limits
        # Answers that are being computed and encoded are there as tensors beside their bytes.
        tensors_nbytes = min(2 * limits.max_reply_nbytes, limits.max_answers_nbytes // 4)
        self._room = ProcessRoom(
            limits.max_answers_nbytes - tensors_nbytes, copies_nbytes=2 * limits.max_part_nbytes
        )
        metrics.watch("teacher_streams", lambda: self._room.num_streams)
        metrics.watch("teacher_answer_bytes", lambda: self._room.taken_nbytes)
        metrics.watch("teacher_stream_answer_bytes_max", lambda: self._room.fullest_nbytes)
        self._draining = asyncio.Event()

    async def streams_ended(self) -> None:
        """Returns when no Score stream is open."""
        await self._room.empty.wait()

    def drain(self) -> None:
        """Streams finish what they have read, then end with UNAVAILABLE."""
        self._draining.set()

    async def Describe(
        self, request: teacher_pb2.DescribeRequest, context: grpc.aio.ServicerContext
    ) -> teacher_pb2.TeacherInfo:
        info = self._describe()
        team = current_caller().team()
        info.team = team.name
        info.caller.CopyFrom(_caller_message(team))
        left = await self._accounts.left_today(team)
        if left is not None:
            info.caller.tokens_left_today = left
        return info

    async def FetchIdTable(
        self, request: teacher_pb2.FetchIdTableRequest, context: grpc.aio.ServicerContext
    ) -> teacher_pb2.FetchIdTableResponse:
        table = self._id_table
        if table is None or request.digest != table.digest:
            raise RequestRefused(
                grpc.StatusCode.NOT_FOUND,
                "UNKNOWN_ID_TABLE",
                f"there is no id table {quoted(request.digest.hex())} here; Describe names those "
                "that are.",
                field="digest",
            )
        return teacher_pb2.FetchIdTableResponse(data=table.to_bytes())

    async def Usage(
        self, request: teacher_pb2.UsageRequest, context: grpc.aio.ServicerContext
    ) -> teacher_pb2.UsageResponse:
        wanted = _whose_usage(current_caller().team(), request.team)
        try:
            since = first_day(request.since)
        except ValueError as error:
            raise invalid("BAD_DAY", str(error), field="since") from None
        try:
            rows = await self._accounts.usage(wanted, since)
        except DirectoryAway as error:
            logger.warning("usage was asked for, and the directory is away: %s", error)
            raise RequestRefused(
                grpc.StatusCode.UNAVAILABLE,
                "LEDGER_AWAY",
                "the ledger cannot be read now; try again in a moment",
            ) from None
        return teacher_pb2.UsageResponse(rows=map(usage_row, rows))

    async def Status(
        self, request: teacher_pb2.StatusRequest, context: grpc.aio.ServicerContext
    ) -> teacher_pb2.StatusResponse:
        caller = current_caller().team()
        replica = self._status()
        replica.streams = self._room.num_streams
        known = {**self._accounts.teams(), caller.name: caller}
        standings = {standing.team: standing for standing in self._team_standings()}
        cost = sum(standing.cost for standing in standings.values())
        if "admin" not in caller.scopes:
            cost = 0.0  # with its own share it would tell how busy the others are
            replica = teacher_pb2.ReplicaStatus(
                id=replica.id, address=replica.address, state=replica.state
            )
            standings = {caller.name: standings.get(caller.name, idle(caller.name))}
        teams = [known.get(name) or Team(name, standings[name].weight) for name in standings]
        left = await asyncio.gather(*map(self._accounts.left_today, teams))
        return teacher_pb2.StatusResponse(
            replica=replica,
            teams=[
                _team_status(standings[team.name], team, tokens)
                for team, tokens in zip(teams, left, strict=True)
            ],
            cost_per_second=cost / WINDOW_S,
        )

    async def Score(
        self,
        request_iterator: AsyncIterator[teacher_pb2.ScoreRequest],
        context: grpc.aio.ServicerContext,
    ) -> None:
        refused = None
        # A client may wait for a first sign before it writes; see FIRST_SIGN_S of the one here.
        await context.send_initial_metadata(())
        with self._room.stream(self._admission.limits.max_stream_nbytes) as room:
            stream = _Stream(context, room, current_caller())
            task = asyncio.current_task()
            assert task is not None
            room.end = task.cancel
            async with asyncio.TaskGroup() as tasks:
                try:
                    async for request in _until(self._draining, request_iterator):
                        await self._start(request, stream, tasks)
                except RequestRefused as error:
                    refused = error  # ends the stream, when what came before it is answered
        if refused is not None:
            raise refused
        if self._draining.is_set():
            raise RequestRefused(
                grpc.StatusCode.UNAVAILABLE,
                "DRAINING",
                "this replica is draining; everything that it had read is answered",
            )

    async def _start(
        self, request: teacher_pb2.ScoreRequest, stream: "_Stream", tasks: asyncio.TaskGroup
    ) -> None:
        """Admits one request and submits its sequences as the stream has room for their answers."""
        answer = _Answer(request.request_id, request_digest(request))
        answer.origin = origin(
            request.session_id or stream.session_id, request.item_id or request.request_id
        )
        try:
            answer.team = stream.caller.team()
            check_request(answer.team, request)
            if request.request_id in stream.unanswered:
                raise invalid(
                    "DUPLICATE_REQUEST_ID",
                    f"request {request.request_id} is not answered yet and came again. Give every "
                    "request of a stream an id of its own.",
                    field="request_id",
                )
            admitted = self._admission.admit(request)
            level = LEVELS[request.level]
            works = [(item, self._job(item, level, answer.team)) for item in admitted]
            tokens = sum(job.bucket for _, job in works if job is not None)
            await self._accounts.reserve(answer.team, tokens)
        except Exception as error:
            await self._fail(answer, stream, error)
            return
        waiting = deque((i, item, job) for i, (item, job) in enumerate(works) if job is not None)
        answer.unfinished = len(waiting)
        stream.unanswered[request.request_id] = answer
        team, room = answer.team.name, stream.room
        try:
            while waiting:
                index, item, job = waiting[0]
                # A request that is larger than the queue enters it piece by piece.
                await answer.wait_below(self._admission.limits.max_queued_tokens // 2 - job.bucket)
                await room.take(job.reply_nbytes, team)
                if answer.failed:
                    room.give(job.reply_nbytes, team)
                    return
                waiting.popleft()
                task = tasks.create_task(self._answer(answer, index, item, job, stream))
                answer.started(task, job.bucket)
                self._standing.admitted(team, job.bucket)
                # Not in a finally of the task: one that is cancelled before it begins has none.
                task.add_done_callback(partial(self._ended, answer, job, stream))
        finally:
            for *_, job in waiting:
                self._accounts.settle(job)

    def _job(self, item: Admitted, level: int, team: Team) -> Job | None:
        """Of an admitted sequence; None if no row of it is wanted."""
        if not len(item.wanted.rows):
            return None
        bucket = self._bucket_length(len(item.wanted.token_ids))
        return Job(item.wanted, bucket, item.reply_nbytes, level, team, held=bucket)

    def _ended(
        self, answer: "_Answer", job: Job, stream: "_Stream", task: asyncio.Task[None]
    ) -> None:
        """One sequence is answered, or never will be."""
        team = answer.team.name
        answer.ended(task, job.bucket)
        stream.room.give(job.reply_nbytes, team)
        self._encoded(job)  # if it came to nothing
        self._standing.answered(team, job.bucket)
        self._accounts.settle(job)

    async def _answer(
        self, answer: "_Answer", index: int, item: Admitted, job: Job, stream: "_Stream"
    ) -> None:
        """Scores, encodes and writes one sequence, each part as soon as it is encoded."""
        try:
            scored = await self._score(job)
            encoding = self._encoder.encode(job, partial(self._encode, item, scored))
            timing = teacher_pb2.Timing(
                queue_us=int(1e6 * max(0.0, scored.started_s - job.submitted_s)),
                forward_us=int(1e6 * scored.times.forward_s),
                head_us=int(1e6 * scored.times.head_s),
                batch_sequences=scored.batch_sequences,
                batch_tokens=scored.batch_tokens,
            )
            self._metrics.queue_s.observe(timing.queue_us / 1e6)
            del scored  # a reader that stopped holds the bytes, not the tensors too
            digest = xxhash.xxh3_128_digest(item.ids_bytes)
            nbytes = 0
            with closing(encoding):
                async for made in encoding:
                    nbytes += len(made.payload)
                    timing.encode_us = int(1e6 * made.seconds)
                    response = teacher_pb2.ScoreResponse(request_id=answer.request_id)
                    part = response.part  # filled in place: a message passed in would be copied
                    part.sequence = index
                    part.first_row = made.first_row
                    part.num_rows = made.num_rows
                    part.ids_digest = digest
                    part.payload = made.payload
                    part.teacher_fingerprint = self._fingerprint
                    part.timing.CopyFrom(timing)
                    delivered = None
                    if made.first_row + made.num_rows == len(item.wanted.rows):
                        answer.unfinished -= 1
                        part.last = answer.unfinished == 0
                        delivered = partial(
                            *(
                                self._accounts.record_delivery,
                                answer.team,
                                answer.origin,
                                index,
                                digest,
                            ),
                            *(len(item.wanted.rows), nbytes),
                        )
                        self._metrics.encode_s.observe(made.seconds)
                        self._workload.encoded(made.seconds)
                    await stream.write(answer, response, before=delivered)
                    self._metrics.bytes_sent.labels(answer.team.name).inc(len(made.payload))
        except grpc.aio.InternalError:
            answer.failed = True  # nobody takes it: the client has gone
        except Exception as error:
            await self._fail(answer, stream, error, sequence=index, rows=item.wanted.rows)

    def _encode(self, item: Admitted, scored: Scored) -> Parts:
        limit = self._admission.limits.max_part_nbytes - PART_SLACK_NBYTES
        return encode_parts(
            scored.targets, item.wanted.spec, max_nbytes=limit, id_table=item.id_table
        )

    async def _fail(
        self,
        answer: "_Answer",
        stream: "_Stream",
        error: Exception,
        *,
        sequence: int | None = None,
        rows: Tensor | None = None,
    ) -> None:
        """Ends a request with an error, once; its other sequences are dropped."""
        if answer.failed:
            return
        message = _error_message(error, sequence, rows)
        self._metrics.rejected.labels(answer.team.name, message.reason).inc()
        if answer.team is not NOBODY:
            self._standing.rejected(answer.team.name)
            if isinstance(error, RequestRefused):
                self._accounts.record_rejection(answer.team)
        response = teacher_pb2.ScoreResponse(request_id=answer.request_id, error=message)
        await stream.write(answer, response)
        current = asyncio.current_task()
        for task in answer.tasks:
            if task is not current:
                task.cancel()


@dataclass(slots=True, eq=False)
class _Answer:
    """What is outstanding of one request."""

    request_id: int
    request_digest: bytes
    team: Team = NOBODY
    """Whose request it is."""
    origin: bytes = b""
    """Names it in the ledger."""
    unfinished: int = 0
    """Sequences whose final part has not been made."""
    failed: bool = False
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    tokens: int = 0
    """Padded tokens of these tasks."""
    progress: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when one of them ends."""

    def started(self, task: asyncio.Task[None], tokens: int) -> None:
        self.tasks.add(task)
        self.tokens += tokens

    def ended(self, task: asyncio.Task[None], tokens: int) -> None:
        self.tasks.discard(task)
        self.tokens -= tokens
        self.progress.set()

    async def wait_below(self, tokens: int) -> None:
        """Until no more than so many tokens are under way, or none at all."""
        while self.tasks and self.tokens > tokens:
            self.progress.clear()
            await self.progress.wait()


class _Stream:
    """One client stream: its room, and one writer at a time."""

    def __init__(self, context: grpc.aio.ServicerContext, room: StreamRoom, caller: Caller) -> None:
        self.room = room
        self.caller = caller
        self.unanswered: dict[int, _Answer] = {}
        self.session_id = secrets.token_bytes(SESSION_ID_NBYTES)
        """Of requests that name none."""
        self._context = context
        self._lock = asyncio.Lock()

    async def write(
        self,
        answer: _Answer,
        response: teacher_pb2.ScoreResponse,
        *,
        before: Callable[[], None] | None = None,
    ) -> None:
        """Writes one part or error; nothing follows an error of the same request.

        before: called if it is really written, just before that.
        """
        async with self._lock:
            if answer.failed:
                return
            answer.failed = response.HasField("error")
            ended = answer.failed or response.part.last
            if ended and self.unanswered.get(answer.request_id) is answer:
                del self.unanswered[answer.request_id]
            response.check = answer_check(answer.request_digest, response)
            response.full_check = full_answer_check(answer.request_digest, response)
            if before is not None:
                before()
            self.room.blocked_s = time.monotonic()
            try:
                await self._context.write(response)
            finally:
                self.room.blocked_s = 0.0


async def _until(
    stop: asyncio.Event, requests: AsyncIterator[teacher_pb2.ScoreRequest]
) -> AsyncIterator[teacher_pb2.ScoreRequest]:
    """The requests, up to the moment when `stop` is set."""
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
