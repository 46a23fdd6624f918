"""`teacher-server serve` on Ray: starts or joins a cluster, deploys, waits, and tears down."""

import contextlib
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from typing import Any, TextIO

import ray
from ray import serve as ray_serve
from ray._private import worker as ray_worker
from ray.actor import ActorProxy
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from logitstream.local_ray import LocalRay
from logitstream.logs import first_line
from teacher_server.app import DEPLOYMENT, STOP_MARGIN_S, make_application
from teacher_server.cluster.ray_address import check_ray_address
from teacher_server.cluster.ray_directory import forget_application, last_line, open_directory
from teacher_server.cluster.ray_settings import QUIET
from teacher_server.config import ServeConfig
from teacher_server.errors import ServeError
from teacher_server.ledger.directory import Directory

logger = logging.getLogger(__name__)

POLL_S = 0.2
WATCH_S = 2.0
LOG_WAITING_S = 30.0
"""How often the log says what is waited for."""
LOST_AFTER_S = 30.0
"""Without an answer from the cluster for this time, the launcher gives up."""
OWN_ERROR = re.compile(r"^teacher_server\.errors\.\w+: (.+)$", re.MULTILINE)
"""The line of a replica's traceback that was written for the operator."""


def serve(config: ServeConfig) -> int:
    """Serves on a Ray of its own, or on the cluster at --ray-address; returns the exit code.

    Raises ServeError.
    """
    ready = sys.stdout  # for one line; what replicas print goes to stderr with their logs
    stop = threading.Event()
    with contextlib.redirect_stdout(sys.stderr):
        try:
            _handle_signals(stop)
            with _ray(config), _entry_port(config) as port:
                _handle_signals(stop)  # Ray has replaced the handlers by its own
                return _Launch(config, port, stop, ready).run()
        except (_StoppedEarly, SystemExit):  # Ray's own handler raises the latter
            print("teacher-server: interrupted before it was ready")
            return 130


class _StoppedEarly(Exception):
    """A signal came before the service was ready."""


class _RayLost(ServeError):
    """A part of a Ray of our own has ended."""


def _handle_signals(stop: threading.Event) -> None:
    """Lets the first SIGINT or SIGTERM set `stop`, and a second one end the process at once."""

    def handle(*_: object) -> None:
        if stop.is_set():
            os._exit(1)  # the kernel ends a Ray of our own with it
        stop.set()

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)


@contextlib.contextmanager
def _ray(config: ServeConfig) -> Iterator[None]:
    """Connects to the cluster, or starts a Ray of our own that ends with this block."""
    own = None
    try:
        if config.ray_address:
            check_ray_address(config.ray_address)
            ray.init(config.ray_address, logging_level=logging.WARNING, log_to_driver=False)
        else:
            # Ray starts this many processes in advance, Serve's own included.
            own = LocalRay.start("teacher-", num_cpus=(config.replicas or 1) + 2)
            logger.info("ray started address=%s", ray.get_runtime_context().gcs_address)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        where = f"cannot reach Ray at {config.ray_address}" if config.ray_address else "no Ray"
        raise ServeError(f"{where}: {first_line(error)}") from error
    try:
        yield
    except _RayLost:
        if own is not None:
            own.kill_processes()  # `stop` would wait for a raylet that is frozen
        raise
    finally:
        if own is None:
            ray.shutdown()
        else:
            own.stop()


@contextlib.contextmanager
def _entry_port(config: ServeConfig) -> Iterator[int]:
    """Yields the entry port. On a Ray of our own it stays bound, also while no replica listens."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if not config.ray_address or not config.port:
            held.bind((config.host.strip("[]"), config.port))
        port = config.port or held.getsockname()[1]
        if config.ray_address:
            held.close()
        yield port


class _Launch:
    """One application on a Ray that this process is connected to, from deployment to removal."""

    def __init__(
        self, config: ServeConfig, port: int, stop: threading.Event, ready: TextIO
    ) -> None:
        """stop: set by a signal. ready: where one line says that the service is ready."""
        self._config = config
        self._port = port
        self._stop = stop
        self._ready = ready
        self._name = config.name or "teacher"
        self._ray_lost = threading.Event()
        """Set when Ray has ended, and calls to it would never return."""
        self._directory: ActorProxy[Directory] | None = None
        """Held until this process ends: Ray ends the directory with its maker's last handle."""

    def run(self) -> int:
        """Deploys, serves and removes the application; returns the exit code. Raises ServeError.

        All calls to Ray are made in a thread: after Ray's end they would never return.
        """
        serving: Future[int] = Future()

        def serve() -> None:
            try:
                serving.set_result(self._serve())
            except BaseException as error:  # SystemExit too, which Ray raises
                serving.set_exception(error)

        threading.Thread(target=serve, name="serve", daemon=True).start()
        while not wait([serving], WATCH_S).done:
            ended = None if self._config.ray_address else _ended_part()
            if ended:
                # In this order: the thread must not begin to remove what cannot be reached.
                self._ray_lost.set()
                self._stop.set()
                raise _RayLost(
                    f"{ended}, and the service with it. Start it again; if memory ran out, the "
                    "kernel's log (dmesg) names what it killed."
                )
        return serving.result()

    def _serve(self) -> int:
        config = self._config
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        ray_serve.start(proxy_location="Disabled", logging_config=QUIET)
        self._check_name()
        try:
            host = self._deploy()
            print(f"ready {host}:{self._port}", file=self._ready, flush=True)
            if not config.update:
                self._wait_for_stop()
                if self._ray_lost.is_set():
                    return 1
                logger.info("draining seconds=%s (again to stop at once)", config.drain_s)
        except ValueError as error:
            raise ServeError(first_line(error)) from error
        finally:
            if not config.update and not self._ray_lost.is_set():
                self._remove(2 * config.drain_s + 2 * STOP_MARGIN_S)
        logger.info("updated" if config.update else "stopped")
        return 0

    def _check_name(self) -> None:
        """Raises ServeError if the name is taken, or to be updated and not there."""
        names = ray_serve.status().applications.keys()
        if self._name in names and not self._config.update:
            raise ServeError(
                f'this cluster already has a service called "{self._name}". Choose another --name, '
                "or replace it with --update."
            )
        if self._config.update and self._name not in names:
            existing = ", ".join(names) or "none"
            raise ServeError(
                f'no service called "{self._name}" to update on this cluster (there: {existing})'
            )

    def _deploy(self) -> str:
        """Deploys the application and waits until it is ready; returns the host for clients."""
        folder = self._config.ledger_folder()
        folder = None if folder is None else folder.resolve()
        update = {"port": self._port, "name": None, "ray_address": None, "update": False}
        application = make_application(self._config.model_copy(update={**update, "ledger": folder}))
        # It starts while the replicas load.
        self._directory = open_directory(self._name, folder)
        opened = self._directory.usage.remote(None, 0)  # pyright: ignore[reportFunctionMemberAccess]
        if self._stop.is_set():
            raise _StoppedEarly
        target = ray_serve.RunTarget(application, self._name, route_prefix=None)
        ray_serve.run_many([target], wait_for_applications_running=False)
        host = self._wait_until_ready()
        try:
            ray.get(opened, timeout=LOST_AFTER_S)
        except RayError as error:
            raise ServeError(f"cannot keep a ledger in {folder}: {last_line(error)}") from error
        return host

    def _wait_until_ready(self) -> str:
        """Waits for all replicas; returns the host that clients are given. Raises ServeError."""
        logged = time.monotonic()
        while True:
            if self._stop.wait(POLL_S):
                raise _StoppedEarly
            application = ray_serve.status().applications[self._name]
            messages = [application.message, *(d.message for d in application.deployments.values())]
            for message in messages:
                if match := OWN_ERROR.search(message):
                    raise ServeError(match[1])
            if application.status == ApplicationStatus.DEPLOY_FAILED:
                lines = " ".join(messages).strip().splitlines() or ["Ray does not say why"]
                raise ServeError(f"the replicas cannot be started: {lines[-1].strip()}")
            if application.status == ApplicationStatus.RUNNING and (host := self._host()):
                return host
            if time.monotonic() - logged > LOG_WAITING_S:
                logged = time.monotonic()
                waiting_for = " ".join(filter(None, messages)) or "loading"
                logger.info("waiting for replicas: %s", waiting_for)

    def _host(self) -> str:
        """Returns the host of the replicas; empty while they do not all know of each other."""
        handle = ray_serve.get_deployment_handle(DEPLOYMENT, self._name)
        with contextlib.suppress(TimeoutError, RayError, RayServeException):
            known = handle.broadcast("known").results(timeout_s=5.0)
            if min(len(known), *map(len, known)) >= (self._config.replicas or 1):
                return min(own.rpartition(":")[0] for own, *_ in known)
        return ""

    def _wait_for_stop(self) -> None:
        """Returns after a signal. Raises ServeError if the service or its cluster goes away."""
        answered, before = time.monotonic(), ""
        while not self._stop.wait(WATCH_S):
            try:
                application = ray_serve.status().applications.get(self._name)
                if application is None:
                    raise ServeError(f'the service "{self._name}" was removed from the cluster')
                states = application.deployments[DEPLOYMENT].replica_states.items()
                now = " ".join(f"{str(state).lower()}={count}" for state, count in states if count)
                if now != before:
                    logger.info("replicas %s", now)
                answered, before = time.monotonic(), now
            except (RayError, RayServeException) as error:
                if time.monotonic() - answered > LOST_AFTER_S:
                    raise ServeError(f"the Ray cluster is lost: {first_line(error)}") from error

    def _remove(self, seconds: float) -> None:
        """Removes this application and no other, when its replicas have drained."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(RayError, RayServeException, ValueError):
            ray_serve.delete(self._name, _blocking=False)
            while self._name in ray_serve.status().applications:
                if time.monotonic() > deadline:
                    logger.warning("the replicas did not stop in %.0f s", seconds)
                    break
                time.sleep(POLL_S)
            forget_application(self._name)


def _ended_part() -> str | None:
    """Says which part of a Ray of our own has ended, of those that it cannot be without."""
    node: Any = ray_worker._global_node
    if node is None:
        return None
    ended = {name for name, _ in node.dead_processes()}
    for name in ("gcs_server", "raylet"):
        if name in ended:
            return f"Ray's {name} has ended unexpectedly"
    # A frozen raylet still counts as alive for a minute, and until then everything else works.
    alive = [info["Alive"] for info in ray.nodes() if info["NodeID"] == node.node_id]
    return None if all(alive) else "Ray's raylet does not answer any more"
