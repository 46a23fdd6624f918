"""One replica: wires the stages together and owns its gRPC servers. Knows nothing of Ray.

Three kinds of thread: the event loop (messages), one compute thread (forward and head, one batch
after the other), one encode thread (targets to bytes while the next batch is computed).

A replica has a port of its own, and may share an entry port with the other replicas of its service
on this host. Who the others are it is told from outside (`set_others`): by Ray, or by `peers`.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Self

import grpc
import torch
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from logitstream.messages import describe_model
from protos import teacher_pb2, teacher_pb2_grpc
from teacher_server.admission.access import Access
from teacher_server.admission.limits import Limits
from teacher_server.admission.requests import Admission
from teacher_server.backlog import EncodeBacklog
from teacher_server.config import ServeConfig
from teacher_server.encoding import Encoder
from teacher_server.engine.head import VocabularyHead
from teacher_server.engine.loading import load
from teacher_server.engine.model import TeacherModel
from teacher_server.errors import RequestRefused
from teacher_server.ledger.accounts import Accounts, open_accounts
from teacher_server.ledger.lease import DirectoryLink
from teacher_server.monitoring.memory import device_nbytes, keep_freed_memory, resident_nbytes
from teacher_server.monitoring.metrics import Metrics
from teacher_server.monitoring.replica_stats import WorkloadCounter
from teacher_server.monitoring.team_stats import Standing, TeamStanding
from teacher_server.rpc.connections import ConnectionLimits, Connections
from teacher_server.rpc.entry_port import check_entry
from teacher_server.rpc.grpc_log import keep_callers_out_of_the_log
from teacher_server.rpc.health import Health
from teacher_server.rpc.interceptor import Interceptor
from teacher_server.rpc.ports import Ports
from teacher_server.rpc.server import (
    SERVICE_NAME,
    allow_many_connections,
    make_server,
    server_options,
)
from teacher_server.rpc.service import Scored, TeacherService
from teacher_server.rpc.tls import Tls
from teacher_server.scheduling.cost import CostModel
from teacher_server.scheduling.job import Job
from teacher_server.scheduling.scheduler import Scheduler
from teacher_server.teams.declaration import TeamsFile

logger = logging.getLogger(__name__)

WATCH_S = 0.5
"""How often the watchdog looks."""
SLOW_FACTOR = 10
"""A batch is not stuck before it has taken this many times as long as the longest one so far."""
EXIT_S = 2.0
"""How long a stuck replica lives on, so that its health checks and Describe can say so."""
STOP_GRACE_S = 0.5
"""Of mallopt(3)."""


class Replica:
    """Serves one teacher.

    `await start()` returns the port; `await drain(seconds)` answers what was read and stops. A
    forward that is stuck for `stuck_after_s` ends the process: nothing less frees the device. So
    does a port that cannot be opened again.
    """

    def __init__(
        self,
        model: TeacherModel,
        *,
        limits: Limits,
        max_batch_tokens: int,
        head_chunk_nbytes: int,
        service_id: str = "",
        stuck_after_s: float = 120.0,
        accounts: Accounts | None = None,
        teams: Path | None = None,
        tls: Tls | None = None,
        connection_limits: ConnectionLimits | None = None,
    ) -> None:
        """Raises TeamsError."""
        self.model = model
        self.limits = limits
        self.service_id = service_id or secrets.token_hex(16)
        self.replica_id = secrets.token_hex(4)
        self.metrics = Metrics(lambda: self.why_not_serving)
        self._tls = tls
        self._access = None
        if teams is not None:
            self._access = Access(
                TeamsFile(teams),
                service_id=self.service_id,
                on_refusal=lambda team, reason: self.metrics.rejected.labels(team, reason).inc(),
            )
        self._connections = Connections(
            connection_limits or ConnectionLimits(max_message_nbytes=4 * limits.max_request_nbytes),
            tls=tls is not None,
            on_shutdown=lambda reason: self.metrics.connections_shut_down.labels(reason).inc(),
        )
        self._ports = Ports(
            self._make_server, tls, is_gate_narrow=lambda: self._connections.gate.is_narrow
        )
        self._stuck_after_s = stuck_after_s
        self._address = ""
        self._state, self._stuck = "starting", ""
        self._others: list[teacher_pb2.Replica] = []
        self._batch_since_s: float | None = None
        self._longest_batch_s = 0.0
        self._fingerprint = model.teacher_fingerprint
        self._head = VocabularyHead(model, chunk_nbytes=head_chunk_nbytes)
        self._exactness = "bytes" if self._head.is_exact() else "tolerance"
        self.standing = Standing()
        self.workload = WorkloadCounter()
        self._max_batch_tokens = max_batch_tokens
        costs = CostModel.of(model)
        self._scheduler = Scheduler(
            max_batch_tokens=max_batch_tokens,
            max_batch_reply_nbytes=limits.max_reply_nbytes,
            max_queued_tokens=limits.max_queued_tokens,
            cost=lambda job: costs.cost(job.bucket, len(job.wanted.rows), job.reply_nbytes),
            standing=self.standing,
        )
        self._accounts = accounts or open_accounts(None)
        self._waiting: dict[Job, asyncio.Future[Scored]] = {}
        self._backlog = EncodeBacklog(limits.max_reply_nbytes)
        self._encoder = Encoder(ended=self._backlog.forget)
        self._compute = threading.Thread(target=self._compute_loop, name="compute", daemon=True)

    @classmethod
    def from_config(
        cls,
        config: ServeConfig,
        *,
        service_id: str = "",
        directory: DirectoryLink | None = None,
    ) -> Self:
        """Loads the teacher and makes a replica of it. Raises ModelError, and ServeError.

        directory: by default one in this process.
        """
        # Fresh pages of a chunk of logits cost several times what is done with them, unless they
        # are huge ones; torch reads this at its first large allocation (docs/log.md).
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        keep_freed_memory()
        allow_many_connections()
        if config.threads:
            torch.set_num_threads(config.threads)
        accounts = open_accounts(config.ledger_folder(), directory)
        model = load(
            config.model,
            revision=config.revision,
            device=config.device,
            dtype=config.dtype,
            attention=config.attention,
            max_sequence_tokens=config.admission.max_sequence_tokens,
        )
        admission = config.admission
        limits = Limits(
            max_sequence_tokens=min(model.max_sequence_tokens, admission.max_request_tokens),
            max_request_tokens=admission.max_request_tokens,
            max_request_sequences=admission.max_request_sequences,
            max_request_nbytes=admission.max_request_mib << 20,
            max_top_k=config.targets.max_top_k,
            max_reply_nbytes=config.targets.max_reply_mib << 20,
            max_stream_nbytes=admission.max_stream_mib << 20,
            max_answers_nbytes=admission.max_answers_mib << 20,
            max_queued_tokens=config.batch.max_queued_tokens,
        )
        return cls(
            model,
            limits=limits,
            max_batch_tokens=config.batch.max_tokens,
            head_chunk_nbytes=config.head_chunk_mib << 20,
            service_id=service_id or config.service_id,
            stuck_after_s=config.stuck_after_s,
            accounts=accounts,
            teams=config.teams,
            tls=config.tls(),
            connection_limits=ConnectionLimits(
                max_connections=admission.max_connections,
                max_per_address=admission.max_connections_per_address,
                max_strangers_nbytes=admission.max_strangers_mib << 20,
                max_message_nbytes=4 * limits.max_request_nbytes,
            ),
        )

    async def start(
        self, host: str, port: int, *, entry_port: int | None = None, advertise: str = ""
    ) -> int:
        """Starts to listen and compute; returns the port, port 0 takes a free one.

        The port is this replica's alone; `entry_port` is shared with the other replicas of the
        service on this host. advertise: the host that clients are told, if it is not `host`.
        Raises ServeError if a port is taken, the entry port: by another service.
        """
        self._loop = asyncio.get_running_loop()
        self._service = TeacherService(
            describe=self.describe,
            admission=Admission(self.model, self.limits),
            bucket_length=self.model.bucket_length,
            score=self._score,
            encoded=self._backlog.forget,
            accounts=self._accounts,
            encoder=self._encoder,
            teacher_fingerprint=self._fingerprint,
            id_table=self.model.id_table,
            metrics=self.metrics,
            standing=self.standing,
            status=self._status,
            team_standings=self._team_standings,
            workload=self.workload,
        )
        self._show_gauges()
        self._health = Health("", SERVICE_NAME)
        self._interceptor = Interceptor(self._access, self._connections)
        keep_callers_out_of_the_log()
        bound = self._ports.open(host, port)
        if entry_port is not None:
            await check_entry(host, entry_port, self.service_id, self._tls)
            self._ports.open(host, entry_port, shared=True)
        self._address = f"{advertise or host}:{bound}"
        if self._tls is not None:
            self._tls.warn(advertise or host)
        self._state = "ready"
        self._compute.start()
        await self._ports.start()
        self._connections.start(self._ports.numbers)
        self._watchdogs = [
            asyncio.create_task(self._watch_forwards()),
            asyncio.create_task(self._watch_ports()),
        ]
        self._bookkeeping = asyncio.create_task(self._accounts.run())
        self._access_watch = asyncio.create_task(self._access.watch()) if self._access else None
        return bound

    def _make_server(
        self, shared: bool, on_death: Callable[[BaseException], None]
    ) -> grpc.aio.Server:
        """A server with this replica's services, without a port."""
        options = server_options(self.limits, shared=shared)
        server = make_server(
            [self._interceptor], options, self._interceptor.unknown_method(), on_death
        )
        teacher_pb2_grpc.add_TeacherServicer_to_server(self._service, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        return server

    async def drain(self, seconds: float) -> None:
        """Reads no more requests, answers those it has within `seconds`, then stops for good."""
        if self._state == "ready":
            self._state = "draining"
        self._health.stop_serving()
        self._service.drain()
        for watchdog in self._watchdogs:
            watchdog.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._service.streams_ended()
        if self._access_watch is not None:
            self._access_watch.cancel()
        # What is left are calls without an end of their own, such as health's Watch.
        await self._ports.stop(STOP_GRACE_S)
        self._connections.stop()
        self._backlog.close()
        for job in self._scheduler.close():
            self._resolve(job, RuntimeError("the replica was stopped"))
        # A forward cannot be interrupted; the process may end without it.
        await asyncio.get_running_loop().run_in_executor(None, self._compute.join, seconds)
        await asyncio.get_running_loop().run_in_executor(None, self._encoder.close)
        self._bookkeeping.cancel()
        await self._accounts.close()

    @property
    def queued_tokens(self) -> int:
        """Padded tokens that wait to be scored."""
        return self._scheduler.queued_tokens

    @property
    def trouble(self) -> str:
        """Why this replica has to be replaced, as far as it knows; empty: no reason."""
        if self._state == "stuck":
            return self._stuck
        return f"nobody answers at {self._ports.silent}" if self._ports.silent else ""

    @property
    def why_not_serving(self) -> str:
        """Why nobody should be sent here, as far as it knows; empty: it is ready."""
        return self.trouble or ("" if self._state == "ready" else f"the replica is {self._state}")

    def card(self) -> teacher_pb2.Replica:
        """What the other replicas and the clients are told of this one."""
        since = self._batch_since_s
        busy_s = 0.0 if since is None else time.monotonic() - since
        return teacher_pb2.Replica(
            id=self.replica_id,
            address=self._address,
            state=self._state,
            busy_ms=max(0, int(1000 * busy_s)),
        )

    def _status(self) -> teacher_pb2.ReplicaStatus:
        """How this replica is doing, for Status."""
        card, device = self.card(), self.model.device
        load = self.workload.numbers(computing_s=card.busy_ms / 1e3)
        return teacher_pb2.ReplicaStatus(
            id=card.id,
            address=card.address,
            state=card.state,
            queued_tokens=self.queued_tokens,
            batch_fill=load.pass_tokens / self._max_batch_tokens,
            forward_ms=1e3 * load.forward_s,
            head_ms=1e3 * load.head_s,
            encode_ms=1e3 * load.encode_s,
            tokens_per_second=load.tokens_per_s,
            memory_bytes=resident_nbytes(),
            device_memory_bytes=device_nbytes(device),
            busy=load.busy,
        )

    def _team_standings(self) -> list[TeamStanding]:
        return self.standing.teams(self._scheduler.queued_by_team())

    def _show_gauges(self) -> None:
        """Lets the metrics read what is known here."""
        watch, accounts, tls = self.metrics.watch, self._accounts, self._tls

        def watch_teams(name: str, value: Callable[[TeamStanding], float]) -> None:
            watch(name, lambda: {one.team: value(one) for one in self._team_standings()})

        watch("teacher_queued_tokens", lambda: self.queued_tokens)
        watch("teacher_unencoded_bytes", lambda: self._backlog.nbytes)
        watch("teacher_connections", lambda: self._connections.count)
        watch("teacher_strangers", lambda: self._connections.strangers)
        watch("teacher_gate_share", lambda: self._connections.gate.share)
        watch("teacher_memory_bytes", resident_nbytes)
        watch("teacher_device_memory_bytes", lambda: device_nbytes(self.model.device))
        watch("teacher_directory_away", lambda: float(accounts.is_alone))
        watch("teacher_ledger_sync_age_seconds", lambda: accounts.sync_age_s)
        watch("teacher_journal_segments", lambda: accounts.num_segments)
        watch("teacher_team_quota_left_tokens", accounts.known_left_today)
        if tls is not None:
            watch("teacher_certificate_expires_timestamp_seconds", tls.expires_s)
        watch_teams("teacher_team_share_ratio", lambda one: one.share)
        watch_teams("teacher_team_entitled_ratio", lambda one: one.entitled)
        watch_teams("teacher_team_in_flight_tokens", lambda one: one.tokens_in_flight)
        watch_teams("teacher_team_queued_tokens", lambda one: one.queued_tokens)

    def set_others(self, cards: Iterable[teacher_pb2.Replica]) -> None:
        """Who else lives of this service; the replica's own card among them is left out."""
        self._others = [card for card in cards if card.id != self.replica_id]

    async def _watch_forwards(self) -> None:
        """Ends the process when a forward is stuck; clients go to other replicas."""
        while True:
            await asyncio.sleep(WATCH_S)
            since = self._batch_since_s
            limit = max(self._stuck_after_s, SLOW_FACTOR * self._longest_batch_s)
            if since is not None and time.monotonic() - since > limit:
                await self._end(f"a forward is stuck seconds={time.monotonic() - since:.0f}")

    async def _watch_ports(self) -> None:
        """Ends the process when a port is dead and stays so."""
        await self._end(await self._ports.watch())

    async def _end(self, why: str) -> None:
        """Says that this replica is of no use any more, and ends its process."""
        self._state, self._stuck = "stuck", why
        self._health.stop_serving()
        logger.critical(
            "%s; this process ends in %.0f s and has to be started again (Ray does that)",
            *(why, EXIT_S),
        )
        await asyncio.sleep(EXIT_S)
        os._exit(1)

    def describe(self) -> teacher_pb2.TeacherInfo:
        """Who answers here, for Describe."""
        model, limits = self.model, self.limits
        return describe_model(
            model,
            service_id=self.service_id,
            replica_id=self.replica_id,
            revision=model.revision,
            teacher_fingerprint=self._fingerprint,
            max_sequence_tokens=limits.max_sequence_tokens,
            limits=teacher_pb2.Limits(
                max_request_tokens=limits.max_request_tokens,
                max_request_sequences=limits.max_request_sequences,
                max_request_bytes=limits.max_request_nbytes,
                max_top_k=min(limits.max_top_k, model.effective_vocab_size),
                max_reply_bytes=limits.max_reply_nbytes,
                max_stream_bytes=limits.max_stream_nbytes,
                max_queued_tokens=limits.max_queued_tokens,
                max_part_bytes=limits.max_part_nbytes,
                max_answers_bytes=limits.max_answers_nbytes,
            ),
            exactness=self._exactness,
            replicas=[self.card(), *self._others],
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(model.device),
            attention=model.attention,
            id_tables=[] if model.id_table is None else [model.id_table.digest],
            server_version=metadata.version("logitstream"),
        )

    async def _score(self, job: Job) -> Scored:
        """Submits a job and waits; the job departs if this is cancelled."""
        future = self._loop.create_future()
        self._waiting[job] = future
        try:
            self._scheduler.submit(job)
            self._backlog.look()
            return await future
        finally:
            self._scheduler.cancel(job)
            self._waiting.pop(job, None)

    def _resolve(self, job: Job, result: Scored | Exception) -> None:
        future = self._waiting.get(job)
        if future is None or future.done():
            self._backlog.forget(job)
            return
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)

    def _compute_loop(self) -> None:
        while True:
            if self._backlog.wait(lambda: self._scheduler.has_ahead):
                batch = self._scheduler.next_batch()
                if not batch:
                    return
            else:
                batch = self._scheduler.take_ahead()
            self._accounts.dispatched(batch)
            now = time.monotonic()
            for job in batch:
                waited_s = max(0.0, now - job.submitted_s)
                self.metrics.dispatched(job.team.name, job.bucket, job.cost, waited_s)
            groups: dict[int, list[Job]] = {}  # jobs of one canonical length share a forward pass
            for job in batch:
                groups.setdefault(job.bucket, []).append(job)
            for group in groups.values():
                self._score_group(group)

    def _score_group(self, group: list[Job]) -> None:
        """One forward pass, and what it says to those who wait for it."""
        started = self._batch_since_s = time.monotonic()
        for job, result in self._score_batch(group, started):
            if isinstance(result, Scored):
                self._backlog.add(job)
            self._loop.call_soon_threadsafe(self._resolve, job, result)
        self._batch_since_s = None
        tokens = sum(job.bucket for job in group)
        seconds = time.monotonic() - started
        self.workload.computed(seconds)
        self.metrics.busy_s.inc(seconds)
        self._longest_batch_s = max(self._longest_batch_s, seconds)
        self._scheduler.record_speed(tokens, seconds, sum(job.cost for job in group))
        logger.debug(
            "batch scored sequences=%d tokens=%d ms=%.0f", len(group), tokens, 1e3 * seconds
        )

    def _score_batch(
        self, batch: list[Job], started: float
    ) -> list[tuple[Job, Scored | Exception]]:
        """Each job with its result; a batch that fails is halved until the culprit is alone."""
        try:
            targets, times = self._head.score([job.wanted for job in batch])
        except Exception as error:
            if len(batch) == 1:
                return [(batch[0], _refusal(error))]
            logger.warning("batch of %d failed, halving it: %s", len(batch), type(error).__name__)
            middle = len(batch) // 2
            return [
                *self._score_batch(batch[:middle], started),
                *self._score_batch(batch[middle:], started),
            ]
        tokens = sum(job.bucket for job in batch)
        self.metrics.batch_tokens.observe(tokens)
        self.metrics.forward_s.observe(times.forward_s)
        self.metrics.head_s.observe(times.head_s)
        self.workload.passed(tokens, times.forward_s, times.head_s)
        return [
            (job, Scored(kept, times, len(batch), tokens, started))
            for job, kept in zip(batch, targets, strict=True)
        ]


def _refusal(error: Exception) -> Exception:
    """An error of one sequence's forward; running out of memory is said to the client."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return RequestRefused(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "OUT_OF_MEMORY",
            "the teacher ran out of memory on this sequence alone. Send a shorter one or ask for "
            "fewer rows.",
        )
    return error
