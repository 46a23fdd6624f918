"""Turns the teacher into a Ray Serve application: placement, health, updates and scaling.

No payload enters Ray. Every replica has its own gRPC server (replica.py); Ray Serve starts it,
watches it, replaces it, and carries the small cards by which the replicas know of each other
(cluster/membership.py).

`build` makes the application, for `serve deploy` and for the launcher (commands/launch.py).
Annotations stay real objects here: where they are strings (`from __future__ import annotations`),
Ray 2.60 silently turns the builder's argument into a plain dict.
"""

import asyncio
import contextlib
import logging
import math
import os
import sys
from typing import Any, Self

import ray
from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.exceptions import RayServeException

from logitstream.command_line import WrongUsage, read_settings
from logitstream.logs import log_to_stderr
from teacher_server.cluster.autoscaling import Autoscaler, Load
from teacher_server.cluster.membership import Card, Membership
from teacher_server.cluster.ray_directory import RayDirectory, service_id
from teacher_server.cluster.ray_settings import QUIETER, is_on_loopback, keep_serve_on_loopback
from teacher_server.config import ServeConfig
from teacher_server.environment import set_environment
from teacher_server.errors import ServeError

logger = logging.getLogger(__name__)

DEPLOYMENT = "Teacher"
HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 2.0, 4.0
STOP_MARGIN_S = 5.0
"""Added to the time that a replica may take to drain."""
METRICS_PORTS = 64
"""How many ports are tried for metrics, from the configured one on."""


class TeacherReplica:
    """What Serve runs in the process of one replica."""

    async def __init__(self, config: ServeConfig) -> None:  # pyright: ignore
        # Awaited by Serve. The model is loaded in a thread, so that this loop keeps answering Serve.
        set_environment()
        from teacher_server.replica import Replica

        _log_to_stderr(config)
        keep_serve_on_loopback()
        self._config = config
        self._application = ray_serve.get_replica_context().app_name
        self._replica: Replica | None = None
        self._membership = Membership(ray.util.get_node_ip_address(), self._exchange_cards)
        # Cards are collected while it loads: its first clients have to learn of every replica.
        self._announcing = asyncio.create_task(self._membership.run())
        replica = await asyncio.to_thread(
            Replica.from_config,
            config,
            service_id=service_id(self._application),
            directory=RayDirectory(self._application, config.ledger_folder()),
        )
        replica.set_others(self._membership.cards())
        await replica.start(
            config.host, 0, entry_port=config.port, advertise=config.advertised_host()
        )
        # Only now does its card have an address, and Serve's health checks something to look at.
        self._replica = replica
        self._membership.attach(replica)
        await self._membership.announce()
        if config.metrics_port is not None:
            port = _serve_metrics(replica, config.host, config.metrics_port)
            logger.info("metrics at http://%s:%d/metrics", config.host, port)
        card = replica.card()
        logger.info("replica ready id=%s address=%s", card.id, card.address)

    async def meet(self, data: bytes, machine: str) -> Card:
        """Receives the card of another replica and returns this one's; either may be empty."""
        self._membership.receive(data, machine)
        return self._membership.card()

    async def known(self) -> list[str]:
        """Returns the addresses of the replicas that this one knows of, its own first."""
        return self._membership.addresses()

    async def check_health(self) -> None:
        """Raises if this replica has to be replaced. Serve calls it often, so it waits for nothing."""
        if self._replica is not None and (trouble := self._replica.trouble):
            raise RuntimeError(f"{trouble}; this replica has to be replaced if that stays so")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Returns what Serve passes on to the Autoscaler."""
        load = Load(*self._replica.load()) if self._replica is not None else Load(0.0, 0.0)
        return load._asdict()

    async def __del__(self) -> None:
        # Awaited by Serve when it stops a replica, for at most graceful_shutdown_timeout_s.
        replica = self._replica
        if replica is None:
            return  # still loading, or failed to
        logger.info("draining id=%s seconds=%s", replica.replica_id, self._config.drain_s)
        draining = asyncio.create_task(replica.drain(self._config.drain_s))
        await asyncio.sleep(0)  # its card says "draining" from here on
        await self._membership.announce()
        await draining
        self._announcing.cancel()
        logger.info("stopped id=%s", replica.replica_id)

    async def _exchange_cards(self, card: Card, timeout_s: float) -> list[Card]:
        """Shows a card to all replicas of this application; returns those of the ones that answer."""
        handle = ray_serve.get_deployment_handle(DEPLOYMENT, self._application)
        try:
            answers = await handle.broadcast("meet", *card).results_async(
                timeout_s=timeout_s, return_exceptions=True
            )
        except (TimeoutError, RayError, RayServeException):
            return []
        return [answer for answer in answers if not isinstance(answer, BaseException)]


def _serve_metrics(replica, host: str, port: int) -> int:
    """Serves metrics at the first free port from `port` on: replicas of a host cannot share one."""
    for candidate in range(port, port + METRICS_PORTS if port else 1):
        with contextlib.suppress(OSError):
            return replica.metrics.serve(host, candidate)
    raise ServeError(f"no free port for metrics from {port} on. Choose another --metrics-port.")


def _log_to_stderr(config: ServeConfig) -> None:
    """Logs to stderr, which Ray forwards to the launcher or keeps in a file of the cluster."""
    log_to_stderr(config, logging.StreamHandler(sys.__stderr__), name="teacher_server")

    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


class ArgumentsRefused(RayServeException, ValueError):
    """`args:` that make no application. For errors of its own Serve shows no traceback."""


class Arguments(ServeConfig):
    """The settings under `args:` in the YAML of Serve, which calls `model_validate` on them."""

    @classmethod
    def model_validate(cls, obj: Any, **_: Any) -> Self:
        """Returns a ServeConfig, which replicas can unpickle.

        Raises ArgumentsRefused, with a line for each mistake.
        """
        try:
            return read_settings("teacher-server", "serve", ServeConfig, obj, "args")
        except WrongUsage as error:
            raise ArgumentsRefused(str(error)) from None


def build(config: Arguments) -> ray_serve.Application:
    """Makes the application for Serve: `import_path: teacher_server.app:build`."""
    return make_application(config)


def make_application(config: ServeConfig) -> ray_serve.Application:
    """Makes the Serve application of a teacher. Raises ArgumentsRefused."""
    _check(config)
    most = config.max_replicas or config.replicas or 1
    gpus = _gpus_per_replica(config)
    # All replicas compute with the same number of threads: another number may round differently.
    threads = config.threads or _threads_per_replica(gpus, most * config.tensor_parallel_size)
    make = ray_serve.deployment(
        name=DEPLOYMENT,
        ray_actor_options={"num_cpus": 0 if is_on_loopback() else 1, "num_gpus": gpus},
        max_ongoing_requests=1000,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.1,
        # Draining waits for the streams, and then for the current forward pass.
        graceful_shutdown_timeout_s=2 * config.drain_s + STOP_MARGIN_S,
        max_constructor_retry_count=3,
        # An update starts the new replica before it stops an old one, if there is room for it.
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
        # What the Autoscaler decides is done at once: it has waited already.
        upscale_delay_s=0.0,
        downscale_delay_s=0.0,
        policy=AutoscalingPolicy(
            policy_function=Autoscaler,
            policy_kwargs={
                "target_queue_s": config.target_queue_s,
                "up_after_s": config.scale_up_after_s,
                "down_after_s": config.scale_down_after_s,
            },
        ),
    )


def _check(config: ServeConfig) -> None:
    """Raises ArgumentsRefused for settings that make no application."""
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
    return float(config.tensor_parallel_size) if config.device == "cuda" or cluster_has else 0.0


def _has_room(gpus: float) -> bool:
    return not gpus or (ray.is_initialized() and ray.available_resources().get("GPU", 0.0) >= gpus)


def _threads_per_replica(gpus: float, replicas: int) -> int:
    """Returns the threads of one replica where the replicas of a machine share its cores."""
    cores, machines = [len(os.sched_getaffinity(0))], 1
    if ray.is_initialized():
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        usable = [r for r in alive if not gpus or r.get("GPU", 0.0) >= min(gpus, 1.0)] or alive
        machines = len(usable)
        if machines > 1:  # a launcher's own Ray believes in more cores than there are
            cores = [int(resources.get("CPU", 1)) for resources in usable]
    return max(1, min(cores) // math.ceil(replicas / machines))
