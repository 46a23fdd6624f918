"""Serves one Score stream: starts its requests, writes their parts, and fails what is refused.

A request goes straight through: it is admitted, reserved with the accounts, waits for the answer
budget, and its sequences are scored, encoded and written. Reading stops while unfinished answers
fill the stream's budget, so that a slow reader holds up itself, through HTTP/2, and no other stream.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import closing
from functools import partial

import grpc
import xxhash

from protos import teacher_pb2
from protos.answer_check import answer_check, full_answer_check
from teacher_server.admission.access import Caller
from teacher_server.admission.requests import Admission, check_request
from teacher_server.errors import RequestRefused
from teacher_server.ledger.accounts import Accounts
from teacher_server.monitoring.metrics import Metrics
from teacher_server.monitoring.team_stats import TeamStats
from teacher_server.pipeline import Encoding, Pipeline, SequenceJob
from teacher_server.rpc.answer_budget import StreamBudget
from teacher_server.rpc.answers import Answer, Answers
from teacher_server.rpc.messages import error_message, timing_message

PART_SLACK_NBYTES = 1024
"""Space in a part for everything beside its payload."""


class ScoreStream:
    """Answers the requests of one client stream."""

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
        self._budget = budget
        self._admission = admission
        self._pipeline = pipeline
        self._accounts = accounts
        self._metrics = metrics
        self._answers = Answers(
            context,
            caller,
            budget,
            accounts=accounts,
            metrics=metrics,
            team_stats=team_stats,
            response_type=teacher_pb2.ScoreResponse,
            bind=_bind,
        )

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
        answer = self._answers.begin(request)
        try:
            jobs = await self._admit(request, answer)
        except Exception as error:
            await self._fail(answer, error)
            return
        self._answers.admit(answer, len(jobs))
        await self._answers.start(
            answer,
            jobs,
            tasks,
            nbytes=lambda job: job.reply_nbytes,
            run=partial(self._answer, answer),
            # A request that is larger than the queue enters it piece by piece.
            max_tokens=self._admission.limits.max_queued_tokens // 2,
        )

    async def _admit(self, request: teacher_pb2.ScoreRequest, answer: Answer) -> list[SequenceJob]:
        """Returns the jobs of a request, their tokens reserved. Raises what refuses it."""
        team = self._answers.identify(answer)
        check_request(team, request)
        self._answers.check_id(answer)
        jobs = [job for job in self._admission.admit(request, team) if len(job.request.rows)]
        await self._accounts.reserve(team, sum(job.num_tokens for job in jobs))
        return jobs

    async def _answer(self, answer: Answer, job: SequenceJob) -> None:
        """Scores, encodes and writes one sequence, each part as soon as it is encoded."""
        try:
            with closing(self._pipeline.score(job)) as parts:
                await self._write_parts(answer, job, parts)
        except grpc.aio.InternalError:
            answer.is_over = True  # the client has gone: there is no one to send the error to
        except Exception as error:
            await self._fail(answer, error, job)

    async def _write_parts(self, answer: Answer, job: SequenceJob, parts: Encoding) -> None:
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
            await self._answers.write(answer, response, before=record_delivery)
            self._metrics.bytes_sent.labels(answer.team.name).inc(len(encoded.payload))

    async def _fail(self, answer: Answer, error: Exception, job: SequenceJob | None = None) -> None:
        """Answers a request with an error, once, and drops its other sequences."""
        if answer.is_over:
            return
        message = (
            error_message(error)
            if job is None
            else error_message(error, sequence=job.index, rows=job.request.rows)
        )
        self._answers.count_rejection(answer, error, message.reason)
        await self._answers.fail(answer, message)


def _bind(digest: bytes, response: teacher_pb2.ScoreResponse) -> None:
    response.check = answer_check(digest, response)
    response.full_check = full_answer_check(digest, response)


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
