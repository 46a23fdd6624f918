"""Wires the stages of one replica together, starts and drains it, and ends it when it is stuck.

A request takes one way: rpc/service.py -> rpc/score.py -> pipeline/ -> logit_codec -> the stream.
This module knows nothing of Ray. A replica has a port of its own, and may share an entry port with
the other replicas of its service on this host. It learns of the others from outside
(`set_others`): from Ray, or from cluster/peers.py.
"""

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Self

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from logitstream.messages import describe_model
from protos import teacher_pb2, teacher_pb2_grpc
from teacher_server.admission.access import Access
from teacher_server.admission.generation import GenerationAdmission
from teacher_server.admission.limits import Limits
from teacher_server.admission.requests import Admission
from teacher_server.config import ServeConfig
from teacher_server.engine.engine import Engine
from teacher_server.engine.generate import CannotGenerate, Generator
from teacher_server.engine.model import TeacherModel
from teacher_server.engine.probe import KnownAnswer, is_exact
from teacher_server.engine.threads import compute_apart
from teacher_server.ledger.accounts import Accounts, open_accounts
from teacher_server.ledger.lease import DirectoryLink
from teacher_server.monitoring.memory import device_nbytes, resident_nbytes
from teacher_server.monitoring.metrics import Metrics
from teacher_server.monitoring.team_stats import TeamStats
from teacher_server.pipeline import Pipeline
from teacher_server.ranks.group import RankGroup, start_ranks
from teacher_server.rpc.connections import ConnectionLimiter, ConnectionLimits
from teacher_server.rpc.description import Description
from teacher_server.rpc.entry_port import check_entry
from teacher_server.rpc.grpc_log import keep_callers_out_of_the_log
from teacher_server.rpc.health import Health
from teacher_server.rpc.interceptor import Interceptor
from teacher_server.rpc.ports import Ports
from teacher_server.rpc.score import PART_SLACK_NBYTES
from teacher_server.rpc.server import (
    SERVICE_NAME,
    allow_many_connections,
    make_server,
    server_options,
)
from teacher_server.rpc.service import TeacherService
from teacher_server.rpc.tls import Tls
from teacher_server.scheduling.cost import CostModel
from teacher_server.scheduling.scheduler import Scheduler
from teacher_server.startup import load_engine, prepare_process
from teacher_server.teams.declaration import TeamsFile

logger = logging.getLogger(__name__)

WATCH_S = 0.5
"""How often the watchdog looks for a stuck forward pass."""
EXIT_S = 1.0
"""How long a stuck replica keeps running, so that its health checks and Describe can report it."""
STOP_GRACE_S = 0.5
"""How long calls without an end of their own, such as health's Watch, may take to stop."""


class Replica:
    """Serves one teacher.

    `await start()` returns the port; `await drain(seconds)` finishes accepted requests and stops. A
    forward pass that is stuck ends the process: nothing less frees the device. So does a port that
    cannot be opened again.
    """

    def __init__(
        self,
        engine: Engine,
        config: ServeConfig,
        accounts: Accounts,
        *,
        service_id: str = "",
        ranks: RankGroup | None = None,
    ) -> None:
        """ranks: the others of a divided teacher. Raises TeamsError."""
        model = engine.model
        self.service_id = service_id or config.service_id or secrets.token_hex(16)
        self.metrics = Metrics(lambda: self.why_not_serving)
        self._model = model
        self._limits = limits = _limit_requests(config, model)
        self._stuck_after_s = config.stuck_after_s
        self._stuck = ""
        """Why this replica is stuck; empty if it is not."""
        self._tls = _open_tls(config)
        self._access = None
        if config.teams is not None:
            self._access = Access(
                TeamsFile(config.teams),
                service_id=self.service_id,
                on_refusal=lambda team, reason: self.metrics.rejected.labels(team, reason).inc(),
            )
        self._connections = ConnectionLimiter(
            _limit_connections(config, limits),
            tls=self._tls is not None,
            on_shutdown=lambda reason: self.metrics.connections_shut_down.labels(reason).inc(),
        )
        self._ports = Ports(
            self._make_server,
            self._tls,
            may_drop_connections=lambda: self._connections.throttle.is_active,
        )
        self._woken = asyncio.Event()
        """Set when the pipeline has failed."""
        self._loop: asyncio.AbstractEventLoop
        team_stats = TeamStats()
        self._accounts = accounts
        self._engine = engine
        self._ranks = ranks
        generator, why_not = _open_generator(engine, config)
        self._pipeline = _make_pipeline(
            engine,
            config,
            limits,
            accounts=accounts,
            metrics=self.metrics,
            team_stats=team_stats,
            generator=generator,
            on_failure=self._wake_watchdog,
        )
        teacher = _describe(model, limits)
        teacher.max_generation_tokens = 0 if generator is None else generator.max_tokens
        teacher.service_id = self.service_id
        teacher.exactness = "bytes" if is_exact(engine, generator) else "tolerance"
        self.description = Description(teacher, self._pipeline, model.device)
        admission = Admission(model, limits)
        self._service = TeacherService(
            description=self.description,
            admission=admission,
            generation=GenerationAdmission(
                admission, model, max_tokens=teacher.max_generation_tokens, why_not=why_not
            ),
            pipeline=self._pipeline,
            accounts=accounts,
            metrics=self.metrics,
            team_stats=team_stats,
            head=model.client_head,
        )

    @classmethod
    def from_config(
        cls,
        config: ServeConfig,
        *,
        service_id: str = "",
        directory: DirectoryLink | None = None,
    ) -> Self:
        """Loads the teacher and makes a replica of it. Raises ModelError, ServeError, TeamsError.

        directory: by default one in this process.
        """
        prepare_process(config)
        allow_many_connections()
        accounts = open_accounts(config.ledger_folder(), directory)

        config, ranks = start_ranks(config)

        def make() -> Self:
            rank = None if ranks is None else ranks.rank
            engine = load_engine(config, rank, ranks)
            return cls(engine, config, accounts, service_id=service_id, ranks=ranks)

        try:
            # Apart, so that the launch thread will be the only one with OpenMP threads.
            return compute_apart(make, name="load")
        except BaseException:
            if ranks is not None:
                ranks.kill()
            raise

    async def start(
        self, host: str, port: int, *, entry_port: int | None = None, advertise: str = ""
    ) -> int:
        """Starts to listen and compute; returns the port, where port 0 takes a free one.

        The port is this replica's alone; `entry_port` is shared with the other replicas of the
        service on this host. advertise: the host that clients are sent to, if it is not `host`.
        Raises ServeError if a port is taken; the entry port, if another service has it.
        """
        _export_gauges(self.metrics, self._connections, self._accounts, self._model, self._tls)
        self._health = Health("", SERVICE_NAME)
        self._interceptor = Interceptor(self._access, self._connections)
        keep_callers_out_of_the_log()
        bound = self._ports.open(host, port)
        if entry_port is not None:
            await check_entry(host, entry_port, self.service_id, self._tls)
            self._ports.open(host, entry_port, shared=True)
        self.description.address = f"{advertise or host}:{bound}"
        if self._tls is not None:
            self._tls.warn(advertise or host)
        # Ready before the ports accept: the first Describe must not call it starting.
        self.description.state = "ready"
        self._loop = asyncio.get_running_loop()
        self._pipeline.start()
        if self._ranks is not None:
            self._ranks.watch(self._pipeline.fail)
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
        """Returns a server with this replica's services, without a port."""
        options = server_options(self._limits, shared=shared)
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
        if self.description.state == "ready":
            self.description.state = "draining"
        self._health.stop_serving()
        self._service.drain()
        for watchdog in self._watchdogs:
            watchdog.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._service.streams_ended()
        # Only now: until its stream ends, a caller whose token was revoked must be found.
        if self._access_watch is not None:
            self._access_watch.cancel()
        await self._ports.stop(STOP_GRACE_S)
        self._connections.stop()
        await self._pipeline.close(seconds)
        if self._ranks is not None:
            await asyncio.to_thread(self._ranks.close)
        # Nothing is dispatched any more: what the ledger is sent now is complete.
        self._bookkeeping.cancel()
        await self._accounts.close()

    @property
    def replica_id(self) -> str:
        return self.description.replica_id

    def load(self) -> tuple[float, float]:
        """Returns how long what waits would take here, and how busy it was in the last seconds, 0 to 1."""
        return self._pipeline.load()

    @property
    def trouble(self) -> str:
        """Why this replica has to be replaced, as far as it knows; empty: no reason."""
        if self._stuck:
            return self._stuck
        return f"no answer at {self._ports.silent}" if self._ports.silent else ""

    @property
    def why_not_serving(self) -> str:
        """Why no client should be sent here, as far as it knows; empty: it is ready."""
        state = self.description.state
        return self.trouble or ("" if state == "ready" else f"the replica is {state}")

    def card(self) -> teacher_pb2.Replica:
        """Returns what clients and the other replicas know of this one."""
        return self.description.card()

    def set_others(self, cards: Iterable[teacher_pb2.Replica]) -> None:
        """Replaces the cards of the service's other replicas; its own among them is left out."""
        self.description.set_others(cards)

    async def _watch_forwards(self) -> None:
        """Ends the process when a forward pass is stuck; clients move to other replicas."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WATCH_S):
                    await self._woken.wait()
            if trouble := self._pipeline.find_trouble(self._stuck_after_s):
                await self._end(trouble)

    def _wake_watchdog(self) -> None:
        """Makes the watchdog look now; called in any thread."""
        self._loop.call_soon_threadsafe(self._woken.set)

    async def _watch_ports(self) -> None:
        """Ends the process when a port is dead and cannot be opened again."""
        await self._end(await self._ports.watch())

    async def _end(self, why: str) -> None:
        """Reports that this replica is stuck, then ends its process."""
        self.description.state, self._stuck = "stuck", why
        self._health.stop_serving()
        logger.critical(
            "%s; this process ends in %.0f s and has to be started again (Ray does that)",
            why,
            EXIT_S,
        )
        await asyncio.sleep(EXIT_S)
        if self._ranks is not None:
            self._ranks.kill()
        # Not sys.exit: a stuck thread would keep the process, and with it the device.
        os._exit(1)


def _open_generator(engine: Engine, config: ServeConfig) -> tuple[Generator | None, str]:
    """Returns what writes texts, or None and why nothing does."""
    if not config.generation.pool_mib:
        return None, "its operator has set --generation.pool-mib 0"
    try:
        return engine.open_generation(config.generation.pool_mib << 20), ""
    except (CannotGenerate, ValueError) as error:
        logger.warning("this teacher writes no texts: %s", error)
        return None, str(error)


def _export_gauges(
    metrics: Metrics,
    connections: ConnectionLimiter,
    accounts: Accounts,
    model: TeacherModel,
    tls: Tls | None,
) -> None:
    """Connects the gauges of what is wired here; the other stages export their own."""
    watch = metrics.watch
    watch("teacher_connections", lambda: connections.count)
    watch("teacher_strangers", lambda: connections.strangers)
    watch("teacher_gate_share", lambda: connections.throttle.share)
    watch("teacher_memory_bytes", resident_nbytes)
    watch("teacher_device_memory_bytes", lambda: device_nbytes(model.device))
    watch("teacher_directory_away", lambda: float(accounts.is_directory_away))
    watch("teacher_ledger_sync_age_seconds", lambda: accounts.sync_age_s)
    watch("teacher_journal_segments", lambda: accounts.num_segments)
    watch("teacher_team_quota_left_tokens", accounts.known_left_today)
    if tls is not None:
        watch("teacher_certificate_expires_timestamp_seconds", tls.expires_s)


def _make_pipeline(
    engine: Engine,
    config: ServeConfig,
    limits: Limits,
    *,
    accounts: Accounts,
    metrics: Metrics,
    team_stats: TeamStats,
    generator: Generator | None,
    on_failure: Callable[[], None],
) -> Pipeline:
    """Returns what turns requests into bytes."""
    costs = CostModel.of(engine.model.causal_lm)
    scheduler = Scheduler(
        max_batch_tokens=engine.pack_tokens,
        min_batch_tokens=engine.min_pack_tokens,
        max_batch_reply_nbytes=limits.max_reply_nbytes,
        max_queued_tokens=limits.max_queued_tokens,
        cost=lambda job: costs.cost(job.num_tokens, job.num_projected, job.reply_nbytes),
        standing=team_stats,
    )
    return Pipeline(
        scheduler,
        engine,
        accounts=accounts,
        metrics=metrics,
        max_unencoded_nbytes=limits.max_reply_nbytes,
        max_payload_nbytes=limits.max_part_nbytes - PART_SLACK_NBYTES,
        repeats_known_answer=KnownAnswer(engine).repeats,
        on_failure=on_failure,
        generator=generator,
        costs=costs,
        max_running=config.generation.max_running,
    )


def _limit_requests(config: ServeConfig, model: TeacherModel) -> Limits:
    """Returns what one request and one stream may ask for."""
    admission = config.admission
    return Limits(
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


def _limit_connections(config: ServeConfig, limits: Limits) -> ConnectionLimits:
    admission = config.admission
    return ConnectionLimits(
        max_connections=admission.max_connections,
        max_per_address=admission.max_connections_per_address,
        max_strangers_nbytes=admission.max_strangers_mib << 20,
        max_message_nbytes=4 * limits.max_request_nbytes,
    )


def _open_tls(config: ServeConfig) -> Tls | None:
    if config.tls_cert is None or config.tls_key is None:
        return None
    return Tls(config.tls_cert, config.tls_key, config.tls_client_ca)


def _describe(model: TeacherModel, limits: Limits) -> teacher_pb2.TeacherInfo:
    """Describes the teacher and the limits: what stays the same as long as the replica lives."""
    return describe_model(
        model,
        revision=model.revision,
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
        dtype=str(model.dtype).removeprefix("torch."),
        quantization=model.quantization,
        device=str(model.device),
        attention=model.attention,
        layout="packed" if model.is_packed else "padded",
        id_tables=[] if model.id_table is None else [model.id_table.digest],
        server_version=metadata.version("logitstream"),
    )
