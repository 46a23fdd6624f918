"""`teacher-server serve` on Ray: starts or joins a cluster, deploys, waits, and tears down."""

import contextlib
import logging
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, TextIO

import grpc
import ray
from ray import serve as ray_serve
from ray._private import services
from ray._private import worker as ray_worker
from ray._raylet import AuthenticationTokenLoader  # pyright: ignore[reportAttributeAccessIssue]
from ray.exceptions import RayError
from ray.experimental import internal_kv
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from teacher_server.app import DEPLOYMENT, STOP_MARGIN_S, _application
from teacher_server.cluster.ray_directory import (
    ASK_S,
    NAMESPACE,
    _directory_key,
    _service_key,
    directory,
)
from teacher_server.cluster.ray_settings import QUIET, _first_line, _last_line
from teacher_server.config import ServeConfig
from teacher_server.errors import ServeError

logger = logging.getLogger(__name__)


STORE_NBYTES = 100 << 20
"""Ray's object store, of which nothing is used here."""


POLL_S = 0.2


WATCH_S = 2.0


TELL_WAITING_S = 30.0


LOST_AFTER_S = 30.0
"""Without an answer from the cluster for so long, the launcher gives up."""


OWN_ERROR = re.compile(r"^teacher_server\.errors\.\w+: (.+)$", re.MULTILINE)


def serve(config: ServeConfig) -> int:
    """Serves on a Ray of its own, or on the cluster at --ray-address; returns the exit code.

    Raises ServeError.
    """
    ready = sys.stdout  # for one line; what replicas print goes to stderr with their logs
    stop = threading.Event()
    with contextlib.redirect_stdout(sys.stderr):
        try:
            _on_signals(stop)
            with _ray(config), _entry_port(config) as port:
                _on_signals(stop)  # Ray has put its own in their place
                return _serve_while_ray_lives(config, port, stop, ready)
        except (_StoppedEarly, SystemExit):  # Ray's own handler raises the latter
            print("teacher-server: interrupted before it was ready")
            return 130


class _StoppedEarly(Exception):
    """A signal came before the service was ready."""


class _RayLost(ServeError):
    """A Ray of our own is not whole any more."""


def _on_signals(stop: threading.Event) -> None:
    """The first SIGINT or SIGTERM sets `stop`, a second one ends the process as it is."""

    def handle(*_: object) -> None:
        if stop.is_set():
            os._exit(1)  # the kernel takes a Ray of our own along
        stop.set()

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)


def _check_cluster(given: str) -> None:
    """Raises ServeError if no Ray answers at --ray-address, or none that takes this token.

    Ray itself tries for a minute or more, and says each time in lines of its own why it failed.
    """
    try:
        address = services.canonicalize_bootstrap_address(given)
        if address is None:
            return  # auto, and Ray knows of none: it says so at once
        host, _, port = address.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), ASK_S).close()
    except (OSError, ValueError) as error:
        raise ServeError(
            f"no Ray answers at --ray-address {given}: {error}. It is auto, or the HOST:PORT of the "
            "cluster's GCS: what `ray start --head` prints, or a launcher in its first log line."
        ) from None
    token = os.environ.get("RAY_AUTH_MODE") == "token" and _ray_token()
    metadata = (("authorization", token),) if token else ()
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
        try:
            call(b"", timeout=ASK_S, metadata=metadata)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.UNAUTHENTICATED:  # pyright: ignore
                return
            told = "refuses the token in RAY_AUTH_TOKEN" if token else "asks for a token"
            raise ServeError(
                f"the Ray at {address} {told}: set RAY_AUTH_TOKEN to the one that it was started with "
                "(and leave RAY_AUTH_MODE unset, or set it to token). Of a launcher's own Ray it is "
                "random, and nobody knows it, unless RAY_AUTH_TOKEN was set before `serve` started it."
            ) from None


def _ray_token() -> str:
    """What Ray sends, "Bearer ..."; empty if it finds none."""
    found = AuthenticationTokenLoader.instance().get_token_for_http_header()
    return next(iter(found.values()), "")


@contextlib.contextmanager
def _ray(config: ServeConfig) -> Iterator[None]:
    """A connection to the cluster, or a Ray of our own that ends with this block."""
    folder = ""
    try:
        if config.ray_address:
            _check_cluster(config.ray_address)
            ray.init(config.ray_address, logging_level=logging.WARNING, log_to_driver=False)
        else:
            # Its sockets have paths, which have to be short: not in TMPDIR.
            folder = tempfile.mkdtemp(prefix="teacher-", dir="/tmp")
            ray.init(
                "local",
                num_cpus=(config.replicas or 1) + 2,  # so many processes it starts in advance
                object_store_memory=STORE_NBYTES,
                include_dashboard=False,
                logging_level=logging.WARNING,
                _temp_dir=folder,
            )
            logger.info("ray started address=%s", ray.get_runtime_context().gcs_address)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        where = f"cannot reach Ray at {config.ray_address}" if config.ray_address else "no Ray"
        shutil.rmtree(folder, ignore_errors=True)
        raise ServeError(f"{where}: {_first_line(error)}") from error
    try:
        yield
    except _RayLost:
        _kill_rest(folder)  # a raylet that is frozen would be waited for
        raise
    finally:
        ray.shutdown()
        if folder:
            _kill_rest(folder)
            shutil.rmtree(folder, ignore_errors=True)


def _kill_rest(folder: str) -> None:
    """Ends what is left of a Ray of our own: actors outlive a raylet that was killed, with their ports.

    Ray's processes are known by the logs that they keep open in its folder.
    """
    deadline = time.monotonic() + STOP_MARGIN_S
    while (pids := list(_processes_of(folder))) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S)


def _processes_of(folder: str) -> Iterator[int]:
    """The processes of the Ray with this folder, but for this one. Others may read its logs too."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is somebody else's
            command = (process / "cmdline").read_bytes()
            if process.name == str(os.getpid()) or not (
                command.startswith(b"ray::") or b"/ray/" in command
            ):
                continue
            opened = [os.readlink(file) for file in (process / "fd").iterdir()]
            if any(path.startswith(f"{folder}/") for path in opened):
                yield int(process.name)


@contextlib.contextmanager
def _entry_port(config: ServeConfig) -> Iterator[int]:
    """The entry port. On a Ray of our own it stays ours, also while no replica listens there."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if not config.ray_address or not config.port:
            held.bind((config.host.strip("[]"), config.port))
        port = config.port or held.getsockname()[1]
        if config.ray_address:
            held.close()
        yield port


def _serve_while_ray_lives(
    config: ServeConfig, port: int, stop: threading.Event, ready: TextIO
) -> int:
    """Serves in a thread: what is asked of a Ray that has died waits for ever. Raises ServeError."""
    serving: Future[int] = Future()
    lost = threading.Event()

    def serve() -> None:
        try:
            serving.set_result(_serve_application(config, port, stop, lost, ready))
        except BaseException as error:  # SystemExit too, which Ray raises
            serving.set_exception(error)

    threading.Thread(target=serve, name="serve", daemon=True).start()
    while not wait([serving], WATCH_S).done:
        ended = None if config.ray_address else _ended_part()
        if ended:
            lost.set()
            stop.set()
            raise _RayLost(
                f"{ended}, and the service with it. Start it again; if memory ran out, the kernel's log "
                "(dmesg) names what it killed."
            )
    return serving.result()


def _ended_part() -> str | None:
    """What has ended of a Ray of our own, of the parts that it cannot be without."""
    node: Any = ray_worker._global_node
    if node is None:
        return None
    ended = {name for name, _ in node.dead_processes()}
    for name in ("gcs_server", "raylet"):
        if name in ended:
            return f"Ray's {name} has ended unexpectedly"
    # One that is frozen is still alive for a minute, as Ray sees it; until then all goes on.
    alive = [one["Alive"] for one in ray.nodes() if one["NodeID"] == node.node_id]
    return None if all(alive) else "Ray's raylet does not answer any more"


def _serve_application(
    config: ServeConfig, port: int, stop: threading.Event, lost: threading.Event, ready: TextIO
) -> int:
    """lost: set when there is no Ray any more that could be asked for anything."""
    name = config.name or "teacher"
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray_serve.start(proxy_location="Disabled", logging_config=QUIET)
    names = ray_serve.status().applications.keys()
    if name in names and not config.update:
        raise ServeError(
            f'this cluster already has a service called "{name}". Choose another --name, or '
            "replace it with --update."
        )
    if config.update and name not in names:
        there = ", ".join(names) or "none"
        raise ServeError(f'no service called "{name}" to update on this cluster (there: {there})')
    folder = config.ledger_folder()
    folder = None if folder is None else folder.resolve()
    try:
        application = _application(
            config.model_copy(
                update={
                    **{"port": port, "name": None, "ray_address": None, "update": False},
                    "ledger": folder,
                }
            )
        )
        # It starts while the replicas load; Ray ends it when nobody has this handle any more.
        books = directory(name, folder)
        opened = books.usage.remote(None, 0)  # pyright: ignore[reportFunctionMemberAccess]
        if stop.is_set():
            raise _StoppedEarly
        target = ray_serve.RunTarget(application, name, route_prefix=None)
        ray_serve.run_many([target], wait_for_applications_running=False)
        host = _wait_until_ready(name, config, stop)
        try:
            ray.get(opened, timeout=LOST_AFTER_S)
        except RayError as error:
            raise ServeError(f"cannot keep a ledger in {folder}: {_last_line(error)}") from error
        print(f"ready {host}:{port}", file=ready, flush=True)
        if not config.update:
            _wait_for_the_end(name, stop)
            if lost.is_set():
                return 1
            logger.info("draining seconds=%s (again to stop at once)", config.drain_s)
    except ValueError as error:
        raise ServeError(_first_line(error)) from error
    finally:
        if not config.update and not lost.is_set():
            _delete(name, 2 * config.drain_s + 2 * STOP_MARGIN_S)
    logger.info("updated" if config.update else "stopped")
    return 0


def _wait_until_ready(name: str, config: ServeConfig, stop: threading.Event) -> str:
    """Waits for all replicas; returns the host that clients are told. Raises ServeError."""
    told = time.monotonic()
    while True:
        if stop.wait(POLL_S):
            raise _StoppedEarly
        application = ray_serve.status().applications[name]
        messages = [application.message, *(d.message for d in application.deployments.values())]
        for message in messages:
            if found := OWN_ERROR.search(message):
                raise ServeError(found[1])
        if application.status == ApplicationStatus.DEPLOY_FAILED:
            lines = " ".join(messages).strip().splitlines() or ["Ray does not say why"]
            raise ServeError(f"the replicas cannot be started: {lines[-1].strip()}")
        if application.status == ApplicationStatus.RUNNING:
            handle = ray_serve.get_deployment_handle(DEPLOYMENT, name)
            with contextlib.suppress(TimeoutError, RayError, RayServeException):
                known = handle.broadcast("known").results(timeout_s=5.0)
                if min(len(known), *map(len, known)) >= (config.replicas or 1):
                    return min(own.rpartition(":")[0] for own, *_ in known)
        if time.monotonic() - told > TELL_WAITING_S:
            told = time.monotonic()
            logger.info("waiting for replicas: %s", " ".join(filter(None, messages)) or "loading")


def _wait_for_the_end(name: str, stop: threading.Event) -> None:
    """Returns after a signal. Raises ServeError if the service or its cluster goes away."""
    answered, before = time.monotonic(), ""
    while not stop.wait(WATCH_S):
        try:
            application = ray_serve.status().applications.get(name)
            if application is None:
                raise ServeError(f'somebody removed the service "{name}" from the cluster')
            states = application.deployments[DEPLOYMENT].replica_states.items()
            now = " ".join(f"{str(state).lower()}={number}" for state, number in states if number)
            if now != before:
                logger.info("replicas %s", now)
            answered, before = time.monotonic(), now
        except (RayError, RayServeException) as error:
            if time.monotonic() - answered > LOST_AFTER_S:
                raise ServeError(f"the Ray cluster is lost: {_first_line(error)}") from error


def _delete(name: str, seconds: float) -> None:
    """Removes this application and no other, when its replicas have drained."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(RayError, RayServeException, ValueError):
        ray_serve.delete(name, _blocking=False)
        while name in ray_serve.status().applications:
            if time.monotonic() > deadline:
                logger.warning("the replicas did not stop in %.0f s", seconds)
                break
            time.sleep(POLL_S)
        books = ray.get_actor(name, NAMESPACE)
        with contextlib.suppress(RayError):
            ray.get(books.close.remote(), timeout=STOP_MARGIN_S)
        ray.kill(books)
        for key in (_service_key(name), _directory_key(name)):
            internal_kv._internal_kv_del(key)
