"""The teacher on Ray: placement, membership, health, updates and scaling. The only file with Ray.

No payload enters Ray. Every replica has its own gRPC server (replica.py); Ray Serve starts it,
watches it, replaces it, and carries the small cards by which the replicas know of each other.

`build` makes the Serve application, for `serve deploy` and for `serve`, the launcher below.
Annotations stay real objects here: of a string (`from __future__ import annotations`) Ray 2.60 makes
a plain dict of the builder's argument, silently.
"""

import asyncio
import contextlib
import logging
import math
import os
import sys
import time
from typing import Any, Self

import ray
from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy
from ray.serve.exceptions import RayServeException

from logitstream.command_line import WrongUsage, read_settings
from protos import teacher_pb2
from teacher_server.cluster.ray_directory import (
    RayDirectory,
    service_id,
)
from teacher_server.cluster.ray_settings import QUIETER, _keep_serve_on_loopback, _on_loopback
from teacher_server.config import ServeConfig, is_loopback
from teacher_server.errors import ServeError

logger = logging.getLogger(__name__)

DEPLOYMENT = "Teacher"
TELL_S = 1.0
"""How often a replica tells the others of itself, up to TELL_MOST others; then less often."""
TELL_MOST = 16
FORGET_AFTER = 5
"""Rounds after which a replica that was not heard of is no member any more."""
HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 2.0, 4.0
STOP_MARGIN_S = 5.0
LOOK_BACK_S = 15.0
"""Autoscaling looks at the mean of so long; replicas report every 10 s unless told otherwise."""
METRICS_PORTS = 64


class TeacherReplica:
    """What Serve runs in the process of one replica."""

    async def __init__(self, config: ServeConfig) -> None:  # pyright: ignore
        # Awaited by Serve. The model is loaded in a thread: this loop goes on answering Serve.
        from teacher_server.replica import Replica

        _log_to_stderr()
        _keep_serve_on_loopback()
        context = ray_serve.get_replica_context()
        self._config = config
        self._application = context.app_name
        self._machine = ray.util.get_node_ip_address()
        self._heard: dict[str, tuple[float, teacher_pb2.Replica]] = {}
        self._interval_s = TELL_S
        self._replica: Replica | None = None
        # It hears of the others while it loads: whom it greets as a client shall know of all.
        self._telling = asyncio.create_task(self._tell_for_ever())
        replica = await asyncio.to_thread(
            Replica.from_config,
            config,
            service_id=service_id(self._application),
            directory=RayDirectory(self._application, config.ledger_folder()),
        )
        replica.set_others(card for _, card in self._heard.values())
        await replica.start(
            config.host, 0, entry_port=config.port, advertise=config.advertised_host()
        )
        self._replica = replica
        await self._tell()
        if config.metrics_port is not None:
            port = _serve_metrics(replica, config.host, config.metrics_port)
            logger.info("metrics at http://%s:%d/metrics", config.host, port)
        card = replica.card()
        logger.info("replica ready id=%s address=%s", card.id, card.address)

    async def meet(self, data: bytes, machine: str) -> tuple[bytes, str]:
        """Hears the card of another replica, if it has one yet, and answers with its own."""
        self._hear(data, machine)
        return self._card(), self._machine

    async def known(self) -> list[str]:
        """The addresses of the replicas that this one knows of, its own first: for the launcher."""
        if self._replica is None:
            return []
        own = self._replica.card().address
        return [own, *(card.address for _, card in self._heard.values() if card.address != own)]

    async def check_health(self) -> None:
        """Called by Serve every few seconds; waits for nothing."""
        if self._replica is not None and (trouble := self._replica.trouble):
            raise RuntimeError(f"{trouble}; this replica has to be replaced if that stays so")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve: how many replicas this one's queue is worth."""
        queued_tokens = self._replica.queued_tokens if self._replica is not None else 0
        return {"load": queued_tokens / self._config.target_queued_tokens}

    async def __del__(self) -> None:
        # Awaited by Serve when it stops a replica, for at most graceful_shutdown_timeout_s.
        replica = self._replica
        if replica is None:
            return  # still loading, or failed to
        logger.info("draining id=%s seconds=%s", replica.replica_id, self._config.drain_s)
        draining = asyncio.create_task(replica.drain(self._config.drain_s))
        await asyncio.sleep(0)
        await self._tell()
        await draining
        self._telling.cancel()
        logger.info("stopped id=%s", replica.replica_id)

    def _card(self) -> bytes:
        return b"" if self._replica is None else self._replica.card().SerializeToString()

    def _hear(self, data: bytes, machine: str) -> None:
        card = teacher_pb2.Replica.FromString(data)
        host = card.address.rpartition(":")[0]
        # A loopback address of another machine is of no use to anybody here.
        if card.id and (machine == self._machine or not is_loopback(host)):
            self._heard[card.id] = time.monotonic(), card
        self._remember()

    def _remember(self) -> None:
        oldest = time.monotonic() - FORGET_AFTER * self._interval_s
        self._heard = {i: heard for i, heard in self._heard.items() if heard[0] >= oldest}
        if self._replica is not None:
            self._replica.set_others(card for _, card in self._heard.values())

    async def _tell_for_ever(self) -> None:
        while True:
            await self._tell()
            self._interval_s = TELL_S * max(1.0, len(self._heard) / TELL_MOST)
            await asyncio.sleep(self._interval_s)

    async def _tell(self) -> None:
        """Shows the card of this replica to all others, and takes theirs as far as they answer.

        A frozen member makes the answers of all the others be lost with its own. Their cards come
        all the same, when they tell of themselves.
        """
        handle = ray_serve.get_deployment_handle(DEPLOYMENT, self._application)
        with contextlib.suppress(TimeoutError, RayError, RayServeException):
            answers = await handle.broadcast("meet", self._card(), self._machine).results_async(
                timeout_s=self._interval_s, return_exceptions=True
            )
            for answer in answers:
                if not isinstance(answer, BaseException):
                    self._hear(*answer)
        self._remember()


def _serve_metrics(replica, host: str, port: int) -> int:
    """The first free port from `port` on: replicas of one host cannot share it."""
    for candidate in range(port, port + METRICS_PORTS if port else 1):
        with contextlib.suppress(OSError):
            return replica.metrics.serve(host, candidate)
    raise ServeError(f"no free port for metrics from {port} on. Choose another --metrics-port.")


def _log_to_stderr() -> None:
    """Ray hands the stderr of a replica to the launcher, or keeps it in a file of the cluster."""
    handler = logging.StreamHandler(sys.__stderr__)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    ours = logging.getLogger("teacher_server")
    ours.handlers = [handler]
    ours.setLevel(logging.INFO)
    ours.propagate = False

    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def replicas_for_load(context: AutoscalingContext) -> tuple[int, dict]:
    """The autoscaling policy: as many replicas as there are targets of tokens waiting."""
    loads = (context.aggregated_metrics or {}).get("load", {})
    return math.ceil(sum(loads.values())), {}


class ArgumentsRefused(RayServeException, ValueError):
    """`args:` that make no application. Of its own errors Serve shows the text, of others a traceback."""


class Arguments(ServeConfig):
    """What stands under `args:` in the YAML of Serve, which has it checked by `model_validate`."""

    @classmethod
    def model_validate(cls, obj: Any, **_: Any) -> Self:
        """A ServeConfig. Raises ArgumentsRefused, with a line for each mistake."""
        try:
            found = read_settings("teacher-server", "serve", ServeConfig, obj, "args")
        except WrongUsage as error:
            raise ArgumentsRefused(str(error)) from None
        return found  # replicas get the class that they know


def build(config: Arguments) -> ray_serve.Application:
    """The Serve application of a teacher: `import_path: teacher_server.app:build`."""
    return _application(config)


def _application(config: ServeConfig) -> ray_serve.Application:
    _check(config)
    most = config.max_replicas or config.replicas or 1
    gpus = _gpus_per_replica(config)
    # All replicas compute with the same number of threads: another number may round differently.
    threads = config.threads or _cores_per_machine(gpus, most)
    make = ray_serve.deployment(
        name=DEPLOYMENT,
        ray_actor_options={"num_cpus": 0 if _on_loopback() else 1, "num_gpus": gpus},
        max_ongoing_requests=1000,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.1,
        # Draining may wait for the streams, and then for the forward in hand.
        graceful_shutdown_timeout_s=2 * config.drain_s + STOP_MARGIN_S,
        max_constructor_retry_count=3,
        # An update starts the new replica before it stops an old one, if there is a place for it.
        max_surge_percent=1 if _has_room(gpus) else 0,  # of a replica, rounded up
        logging_config=QUIETER,
    )
    deployment: ray_serve.Deployment = make(TeacherReplica)
    if config.max_replicas is None:
        deployment = deployment.options(num_replicas=config.replicas or 1)
    else:
        deployment = deployment.options(autoscaling_config=_scaling(config, config.max_replicas))
    return deployment.bind(config.model_copy(update={"threads": threads}))


def _scaling(config: ServeConfig, max_replicas: int) -> AutoscalingConfig:
    return AutoscalingConfig(
        min_replicas=config.replicas or 1,
        max_replicas=max_replicas,
        upscale_delay_s=config.scale_up_after_s,
        downscale_delay_s=config.scale_down_after_s,
        look_back_period_s=LOOK_BACK_S,
        policy=AutoscalingPolicy(policy_function=replicas_for_load),
    )


def _check(config: ServeConfig) -> None:
    """Raises ArgumentsRefused if this cannot be an application."""
    if config.standalone or config.ray_address or config.name or config.update:
        raise ArgumentsRefused(
            "standalone, ray_address, name and update are for the command line; an application "
            "gets its name from Serve"
        )
    if not config.port:
        raise ArgumentsRefused(
            "an application needs a port that is the same on all machines, not 0"
        )
    folder = config.ledger_folder()
    if folder is not None and not folder.is_absolute():
        raise ArgumentsRefused(
            f"an application needs an absolute path for its ledger, not {folder}"
        )
    if problem := config.exposure():
        raise ArgumentsRefused(problem)


def _gpus_per_replica(config: ServeConfig) -> float:
    if config.gpus_per_replica is not None:
        return config.gpus_per_replica
    if config.device == "cpu":
        return 0.0
    cluster_has = ray.is_initialized() and ray.cluster_resources().get("GPU", 0.0) > 0
    return 1.0 if config.device == "cuda" or cluster_has else 0.0


def _has_room(gpus: float) -> bool:
    return not gpus or (ray.is_initialized() and ray.available_resources().get("GPU", 0.0) >= gpus)


def _cores_per_machine(gpus: float, replicas: int) -> int:
    """Threads of one replica, if those of a machine share its cores."""
    cores, machines = [len(os.sched_getaffinity(0))], 1
    if ray.is_initialized():
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        usable = [r for r in alive if not gpus or r.get("GPU", 0.0) >= min(gpus, 1.0)] or alive
        machines = len(usable)
        if machines > 1:  # a launcher's own Ray is told of more than there are
            cores = [int(resources.get("CPU", 1)) for resources in usable]
    return max(1, min(cores) // math.ceil(replicas / machines))


# The launcher: what `teacher-server serve` does without --standalone.
