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
import re
import secrets
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
from typing import Any, Self, TextIO

import grpc
import ray
from ray import serve as ray_serve
from ray._private import services
from ray._private import worker as ray_worker
from ray._raylet import AuthenticationTokenLoader  # pyright: ignore[reportAttributeAccessIssue]
from ray.actor import ActorProxy
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError
from ray.experimental import internal_kv
from ray.serve._private import replica as serve_replica
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, LoggingConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from logitstream.command_line import WrongUsage, read_settings
from protos import teacher_pb2
from teacher_server.config import ServeConfig, is_loopback
from teacher_server.errors import ServeError
from teacher_server.ledger.directory import Directory, DirectoryAway, Grant, UsageRow, Wish

logger = logging.getLogger(__name__)

DEPLOYMENT = "Teacher"
NAMESPACE = "logitstream"
"""Of the directories; an application's has its name."""
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
STORE_NBYTES = 100 << 20
"""Ray's object store, of which nothing is used here."""
POLL_S = 0.2
WATCH_S = 2.0
TELL_WAITING_S = 30.0
ASK_S = 5.0
"""How long a cluster may take for its first sign of life."""
LOST_AFTER_S = 30.0
"""Without an answer from the cluster for so long, the launcher gives up."""
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
QUIETER = LoggingConfig(log_level="ERROR", enable_access_log=False)
"""Of replicas: they warn of every look at another one that takes longer than 0.1 s."""
OWN_ERROR = re.compile(r"^teacher_server\.errors\.\w+: (.+)$", re.MULTILINE)


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


class RayDirectory:
    """The way to the directory of an application; makes one if there is none."""

    def __init__(self, application: str, folder: Path | None) -> None:
        self._application = application
        self._folder = folder
        self._actor: ActorProxy[Directory] | None = None

    async def sync(
        self,
        holder: str,
        segment: tuple[int, bytes] | None,
        wishes: dict[str, Wish],
        *,
        ended: bool = False,
    ) -> dict[str, Grant]:
        return await self._ask("sync", holder, segment, wishes, ended=ended)

    async def usage(self, team: str | None, since: int) -> list[UsageRow]:
        return await self._ask("usage", team, since)

    async def close(self) -> None:
        self._actor = None

    async def _ask(self, method: str, *arguments: object, **options: object):
        try:
            if self._actor is None:
                self._actor = await asyncio.to_thread(directory, self._application, self._folder)
            return await getattr(self._actor, method).remote(*arguments, **options)
        except (RayError, ValueError) as error:
            # It restarts by itself; one that is dead for good is made anew.
            if not isinstance(error, RayTaskError | ActorUnavailableError):
                self._actor = None
            raise DirectoryAway(_last_line(error)) from error


def directory(application: str, folder: Path | None) -> ActorProxy[Directory]:
    """The directory of an application, which is made if there is none; may block for a while.

    It stays on the node that has the folder: that of whoever asked first. It ends when the process
    that made it has no handle of it any more; whoever asks next makes it anew.
    """
    key = _directory_key(application)
    here = ray.get_runtime_context().get_node_id()
    internal_kv._internal_kv_put(key, here, overwrite=False)
    node = internal_kv._internal_kv_get(key).decode()
    if not any(one["NodeID"] == node and one["Alive"] for one in ray.nodes()):
        if folder is not None:
            logger.error("the node with the ledger is gone; another one begins here, in %s", folder)
        internal_kv._internal_kv_put(key, here, overwrite=True)
        node = here
    make = ray.remote(Directory).options(
        num_cpus=0,
        max_restarts=-1,
        name=application,
        namespace=NAMESPACE,
        get_if_exists=True,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
    )
    return make.remote(folder)


def _directory_key(application: str) -> str:
    return f"logitstream/directory-node/{application}"


def service_id(application: str) -> str:
    """What all replicas of an application have in common, for as long as it is on the cluster."""
    key = _service_key(application)
    internal_kv._internal_kv_put(key, secrets.token_hex(16), overwrite=False)
    return internal_kv._internal_kv_get(key).decode()


def _service_key(application: str) -> str:
    return f"logitstream/service-id/{application}"


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


def _keep_serve_on_loopback() -> None:
    """On a Ray that is on loopback, so is the port that Serve opens in each replica.

    Serve would open it on all addresses. It is for handles that use gRPC; here there are none.
    """
    bind = serve_replica.__dict__.get("add_port_to_grpc_server")
    if bind is not None and _on_loopback():
        serve_replica.__dict__["add_port_to_grpc_server"] = lambda server, address: bind(
            server, address.replace("[::]", "127.0.0.1")
        )


def _on_loopback() -> bool:
    """Whether this Ray is of one machine, as the one is that `serve` starts."""
    return ray.is_initialized() and is_loopback(ray.util.get_node_ip_address())


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


def _last_line(error: BaseException) -> str:
    """Of an error that was raised in an actor: the others are its traceback."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
