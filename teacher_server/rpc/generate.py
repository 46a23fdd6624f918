"""Serves one Generate stream: starts its requests, writes their texts as they come, cancels and fails.

A request is admitted when it is read. In the order of reading, each is then reserved with the accounts, and
each of its samples waits for its part of the answer budget and is written by the pipeline, some tokens at a
time. A text is at most two flushes ahead of what was written to the stream, and that is what it holds
of the budget: a reader that stops pauses its own texts. Reading goes on for a while when the budget is
used up, because a client that gives a text up says so on the same stream.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import grpc
import numpy as np
import xxhash

from protos import teacher_pb2
from protos.answer_check import generation_check
from teacher_server.admission.access import Caller
from teacher_server.admission.generation import GenerationAdmission
from teacher_server.errors import RequestRefused
from teacher_server.ledger.accounts import Accounts
from teacher_server.monitoring.metrics import Metrics
from teacher_server.monitoring.team_stats import TeamStats
from teacher_server.pipeline import (
    GenerationJob,
    Pipeline,
    WrittenPart,
    WrittenParts,
    bound_unread,
)
from teacher_server.rpc.answer_budget import StreamBudget
from teacher_server.rpc.answers import Answer, Answers
from teacher_server.rpc.messages import error_message, text_timing

BLOCK_TOKENS = 64
"""New tokens of a text that the ledger counts together, from its first one on."""
READ_AHEAD_NBYTES = 1 << 20
"""While requests that wait to be started take as much, no further one is read."""
JOB_NBYTES = 4 << 10
"""What one sample that waits takes beside the ids of its request."""
FINISH = {
    "": teacher_pb2.FINISH_UNSPECIFIED,
    "stop": teacher_pb2.FINISH_STOP,
    "length": teacher_pb2.FINISH_LENGTH,
}


@dataclass(slots=True, eq=False)
class _Admitted:
    """Holds the texts of a request that was admitted."""

    answer: Answer
    jobs: list[GenerationJob]
    request_nbytes: int

    @property
    def nbytes(self) -> int:
        """What it takes in memory until it is started."""
        return self.request_nbytes + len(self.jobs) * JOB_NBYTES


class _ReadAhead:
    """Queues requests that were admitted and are not started, bounded by what they take."""

    def __init__(self) -> None:
        self._waiting: asyncio.Queue[_Admitted | None] = asyncio.Queue()
        self._nbytes = 0
        self._has_room = asyncio.Event()
        self._has_room.set()

    def put(self, admitted: _Admitted) -> None:
        self._count(admitted.nbytes)
        self._waiting.put_nowait(admitted)

    def end(self) -> None:
        """Says that no further request comes."""
        self._waiting.put_nowait(None)

    async def wait_for_room(self) -> None:
        """Waits until another request may be read."""
        await self._has_room.wait()

    async def take(self) -> AsyncIterator[_Admitted]:
        """Yields the requests in order; each counts until the next one is taken."""
        while (admitted := await self._waiting.get()) is not None:
            yield admitted
            self._count(-admitted.nbytes)

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
    """Answers the requests of one client stream."""

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
        self._budget = budget
        self._admission = admission
        self._pipeline = pipeline
        self._accounts = accounts
        self._metrics = metrics
        self._read_ahead = _ReadAhead()
        self._answers = Answers(
            context,
            caller,
            budget,
            accounts=accounts,
            metrics=metrics,
            team_stats=team_stats,
            response_type=teacher_pb2.GenerateResponse,
            bind=_bind,
        )

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
        answer = self._answers.find(request_id)
        if answer is not None:
            error = RequestRefused(
                grpc.StatusCode.CANCELLED, "CANCELLED", "the client cancelled this request."
            )
            await self._answers.fail(answer, error_message(error))

    async def _admit(self, request: teacher_pb2.GenerateRequest) -> None:
        """Queues one request to be started, or answers it with an error."""
        answer = self._answers.begin(request)
        try:
            team = self._answers.identify(answer)
            self._answers.check_id(answer)
            jobs = self._admission.admit(request, team)
        except Exception as error:
            await self._fail(answer, error)
            return
        self._answers.admit(answer, len(jobs))
        self._read_ahead.put(_Admitted(answer, jobs, request.ByteSize()))

    async def _start_admitted(self, tasks: asyncio.TaskGroup) -> None:
        """Starts the requests in the order in which they were read."""
        async for admitted in self._read_ahead.take():
            answer, jobs = admitted.answer, admitted.jobs
            if answer.is_over:
                continue  # it was cancelled while it waited
            try:
                await self._accounts.reserve(answer.team, sum(job.num_tokens for job in jobs))
            except Exception as error:
                await self._fail(answer, error)
                continue
            await self._answers.start(
                answer, jobs, tasks, nbytes=bound_unread, run=partial(self._answer, answer)
            )

    async def _answer(self, answer: Answer, job: GenerationJob) -> None:
        """Has one sample written, and sends each part as soon as it is encoded."""
        try:
            with closing(self._pipeline.generate(job)) as parts:
                await self._write_parts(answer, job, parts)
        except grpc.aio.InternalError:
            answer.is_over = True  # the client has gone: there is no one to send the error to
        except Exception as error:
            await self._fail(answer, error)

    async def _write_parts(self, answer: Answer, job: GenerationJob, parts: WrittenParts) -> None:
        """Writes the parts of one sample; what of it is delivered is recorded by blocks."""
        blocks = _Blocks(len(job.text.new_ids))
        async for written in parts:
            response = self._make_response(answer, job, written)
            if written.finish:
                answer.unfinished -= 1
                response.part.last = answer.unfinished == 0
            nbytes = len(written.payload)
            complete = blocks.add(len(written.token_ids), nbytes, bool(written.finish))
            record = partial(self._record_delivery, answer, job, complete)
            await self._answers.write(answer, response, before=record)
            parts.mark_read()
            self._metrics.bytes_sent.labels(answer.team.name).inc(nbytes)

    def _make_response(
        self, answer: Answer, job: GenerationJob, written: WrittenPart
    ) -> teacher_pb2.GenerateResponse:
        response = teacher_pb2.GenerateResponse(request_id=answer.request_id)
        part = response.part  # filled in place: a message passed in would be copied
        part.sample = job.text.rule.sample
        part.first = written.first
        part.token_ids = np.array(written.token_ids, dtype="<i4").tobytes()
        part.payload = written.payload
        part.finish = FINISH[written.finish]
        part.teacher_fingerprint = self._admission.fingerprint
        part.timing.CopyFrom(text_timing(written))
        return response

    def _record_delivery(
        self, answer: Answer, job: GenerationJob, complete: list[tuple[int, int, int]]
    ) -> None:
        """Counts the blocks of a sample that are complete with what goes to the transport next."""
        for block, rows, nbytes in complete:
            digest = xxhash.xxh3_128_digest(job.text.prompt_digest + block.to_bytes(4, "little"))
            self._accounts.record_delivery(
                answer.team, answer.origin, job.text.rule.sample, digest, rows, nbytes
            )

    async def _fail(self, answer: Answer, error: Exception) -> None:
        """Answers a request with an error, once, and drops its texts."""
        if answer.is_over:
            return
        message = error_message(error)
        self._answers.count_rejection(answer, error, message.reason)
        await self._answers.fail(answer, message)


def _bind(digest: bytes, response: teacher_pb2.GenerateResponse) -> None:
    response.check = generation_check(digest, response)
