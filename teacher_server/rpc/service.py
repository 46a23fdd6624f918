"""Implements the RPCs of the Teacher service for one replica."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import grpc

from logit_codec import TeacherHead
from logit_codec.teacher_head import HeadFile
from protos import teacher_pb2, teacher_pb2_grpc
from protos.answer_check import head_check
from teacher_server.admission.access import current_caller
from teacher_server.admission.generation import GenerationAdmission
from teacher_server.admission.requests import Admission
from teacher_server.errors import RequestRefused, invalid, quoted
from teacher_server.ledger.accounts import Accounts
from teacher_server.ledger.lease import DirectoryAway
from teacher_server.monitoring.last_minute import WINDOW_S
from teacher_server.monitoring.metrics import Metrics
from teacher_server.monitoring.team_stats import TeamSnapshot, TeamStats, idle
from teacher_server.pipeline import Pipeline
from teacher_server.rpc.answer_budget import ReplicaBudget
from teacher_server.rpc.description import Description
from teacher_server.rpc.generate import GenerateStream
from teacher_server.rpc.messages import (
    caller_message,
    first_day,
    select_usage,
    team_status,
    usage_row,
)
from teacher_server.rpc.score import ScoreStream, read_until
from teacher_server.teams.declaration import Team

logger = logging.getLogger(__name__)

HEAD_CHUNK_NBYTES = 1 << 20


class TeacherService(teacher_pb2_grpc.TeacherServicer):
    """Answers the RPCs; a Score stream is handed to `ScoreStream`."""

    def __init__(
        self,
        *,
        description: Description,
        admission: Admission,
        pipeline: Pipeline,
        accounts: Accounts,
        metrics: Metrics,
        team_stats: TeamStats,
        generation: GenerationAdmission,
        head: TeacherHead | None = None,
    ) -> None:
        """head: what FetchHead streams."""
        self._head = head
        self._generation = generation
        self._description = description
        self._admission = admission
        self._pipeline = pipeline
        self._accounts = accounts
        self._metrics = metrics
        self._team_stats = team_stats
        limits = admission.limits
        # Answers that are being computed and encoded are tensors, which the budget does not count.
        tensors_nbytes = min(2 * limits.max_reply_nbytes, limits.max_answers_nbytes // 4)
        self._budget = ReplicaBudget(
            limits.max_answers_nbytes - tensors_nbytes, copies_nbytes=2 * limits.max_part_nbytes
        )
        self._draining = asyncio.Event()
        self._export_gauges()

    def _export_gauges(self) -> None:
        watch = self._metrics.watch

        def watch_teams(name: str, read: Callable[[TeamSnapshot], float]) -> None:
            watch(name, lambda: {team.team: read(team) for team in self._list_teams()})

        watch("teacher_streams", lambda: self._budget.num_streams)
        watch("teacher_answer_bytes", lambda: self._budget.taken_nbytes)
        watch("teacher_stream_answer_bytes_max", lambda: self._budget.fullest_nbytes)
        watch_teams("teacher_team_share_ratio", lambda team: team.share)
        watch_teams("teacher_team_entitled_ratio", lambda team: team.entitled)
        watch_teams("teacher_team_in_flight_tokens", lambda team: team.tokens_in_flight)
        watch_teams("teacher_team_queued_tokens", lambda team: team.queued_tokens)

    def _list_teams(self) -> list[TeamSnapshot]:
        return self._team_stats.teams(self._pipeline.queued_by_team())

    def drain(self) -> None:
        """Lets streams answer the requests that were read, then ends them with UNAVAILABLE."""
        self._draining.set()

    async def streams_ended(self) -> None:
        """Returns when no Score stream is open."""
        await self._budget.empty.wait()

    async def Describe(
        self, request: teacher_pb2.DescribeRequest, context: grpc.aio.ServicerContext
    ) -> teacher_pb2.TeacherInfo:
        info = self._description.info()
        team = current_caller().team()
        info.team = team.name
        info.caller.CopyFrom(caller_message(team))
        left = await self._accounts.left_today(team)
        if left is not None:
            info.caller.tokens_left_today = left
        return info

    async def FetchIdTable(
        self, request: teacher_pb2.FetchIdTableRequest, context: grpc.aio.ServicerContext
    ) -> teacher_pb2.FetchIdTableResponse:
        table = self._admission.id_table
        if table is None or request.digest != table.digest:
            raise RequestRefused(
                grpc.StatusCode.NOT_FOUND,
                "UNKNOWN_ID_TABLE",
                f"there is no id table {quoted(request.digest.hex())} here; Describe lists the "
                "tables of this teacher.",
                field="digest",
            )
        return teacher_pb2.FetchIdTableResponse(data=table.to_bytes())

    async def FetchHead(
        self, request: teacher_pb2.FetchHeadRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[teacher_pb2.HeadChunk]:
        head = self._head
        if head is None or request.fingerprint != head.fingerprint:
            raise RequestRefused(
                grpc.StatusCode.NOT_FOUND,
                "UNKNOWN_HEAD",
                f"there is no vocabulary head {quoted(request.fingerprint)} here; Describe names the "
                "one of this teacher.",
                field="fingerprint",
            )
        file = HeadFile(head)
        if request.offset > file.nbytes:
            raise invalid(
                "OFFSET_OUT_OF_RANGE",
                f"this head has {file.nbytes} bytes, got offset {request.offset}.",
                field="offset",
            )
        # gRPC waits for a slow reader before it takes the next chunk, so one is held at a time.
        sent = self._metrics.head_bytes_sent.labels(current_caller().team().name)
        for offset in range(request.offset, file.nbytes, HEAD_CHUNK_NBYTES):
            chunk = await asyncio.to_thread(_read_chunk, file, offset)
            yield chunk
            sent.inc(len(chunk.data))

    async def Usage(
        self, request: teacher_pb2.UsageRequest, context: grpc.aio.ServicerContext
    ) -> teacher_pb2.UsageResponse:
        team = select_usage(current_caller().team(), request.team)
        try:
            since = first_day(request.since)
        except ValueError as error:
            raise invalid("BAD_DAY", str(error), field="since") from None
        try:
            rows = await self._accounts.usage(team, since)
        except DirectoryAway as error:
            logger.warning("cannot answer Usage, the directory is away: %s", error)
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
        stats = {team.team: team for team in self._list_teams()}
        cost = sum(team.cost for team in stats.values())
        replica = self._description.status()
        replica.streams = self._budget.num_streams
        if "admin" not in caller.scopes:
            # With its own share, the total would tell the caller how busy the others are.
            cost = 0.0
            replica = teacher_pb2.ReplicaStatus(
                id=replica.id, address=replica.address, state=replica.state
            )
            stats = {caller.name: stats.get(caller.name, idle(caller.name))}
        declared = {**self._accounts.teams(), caller.name: caller}
        teams = [declared.get(name) or Team(name, stats[name].weight) for name in stats]
        left = await asyncio.gather(*map(self._accounts.left_today, teams))
        return teacher_pb2.StatusResponse(
            replica=replica,
            teams=[
                team_status(stats[team.name], team, tokens)
                for team, tokens in zip(teams, left, strict=True)
            ],
            cost_per_second=cost / WINDOW_S,
        )

    async def Score(
        self,
        request_iterator: AsyncIterator[teacher_pb2.ScoreRequest],
        context: grpc.aio.ServicerContext,
    ) -> None:
        # A client may wait for a first sign before it writes, as the trainer's does.
        await context.send_initial_metadata(())
        with self._budget.stream(self._admission.limits.max_stream_nbytes) as budget:
            stream = ScoreStream(
                context,
                current_caller(),
                budget,
                admission=self._admission,
                pipeline=self._pipeline,
                accounts=self._accounts,
                metrics=self._metrics,
                team_stats=self._team_stats,
            )
            await stream.serve(read_until(self._draining, request_iterator))
        if self._draining.is_set():
            raise RequestRefused(
                grpc.StatusCode.UNAVAILABLE,
                "DRAINING",
                "this replica is draining; every request that it had read is answered",
            )

    async def Generate(
        self,
        request_iterator: AsyncIterator[teacher_pb2.GenerateRequest],
        context: grpc.aio.ServicerContext,
    ) -> None:
        await context.send_initial_metadata(())
        with self._budget.stream(self._admission.limits.max_stream_nbytes) as budget:
            stream = GenerateStream(
                context,
                current_caller(),
                budget,
                admission=self._generation,
                pipeline=self._pipeline,
                accounts=self._accounts,
                metrics=self._metrics,
                team_stats=self._team_stats,
            )
            # A text may take minutes: another replica goes on with it from what was received.
            await _serve_until(self._draining, stream.serve(request_iterator))
        if self._draining.is_set():
            raise RequestRefused(
                grpc.StatusCode.UNAVAILABLE,
                "DRAINING",
                "this replica is draining; another one goes on with what was received",
            )


async def _serve_until(stop: asyncio.Event, serve: Coroutine[Any, Any, None]) -> None:
    """Serves a stream until it ends or `stop` is set, whatever comes first."""
    serving = asyncio.ensure_future(serve)
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
        if not serving.done():
            serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving


def _read_chunk(file: HeadFile, offset: int) -> teacher_pb2.HeadChunk:
    data = file.read(offset, HEAD_CHUNK_NBYTES)
    chunk = teacher_pb2.HeadChunk(offset=offset, data=data, total_bytes=file.nbytes)
    chunk.check = head_check(chunk)
    return chunk
