"""`teacher-server serve`: serves on Ray or standalone."""

import asyncio
import logging
import os
import signal
import socket
import sys

from logitstream.connection import Connection
from logitstream.local_ray import TOKEN_VARIABLES, set_ray_environment
from teacher_server.config import ServeConfig
from teacher_server.engine.quantization import check_packages
from teacher_server.environment import set_environment
from teacher_server.errors import ServeError, TeacherServerError
from teacher_server.rpc.tls import Tls
from teacher_server.teams.declaration import read_teams

logger = logging.getLogger(__name__)

OWN_RAY = {
    # Of all logs, only those of the replicas come to the launcher.
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # A frozen replica keeps its GPU until it is killed.
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "2",
}
"""Environment of a Ray that `serve` starts."""


def serve(config: ServeConfig) -> int:
    """Loads the teacher and serves it until a signal; returns the exit code."""
    if problem := config.exposure():
        print(f"teacher-server: {problem}", file=sys.stderr)
        return 2
    config = config.with_absolute_paths()
    try:
        if not config.ray_address:  # else the machines of the cluster need them, not this one
            check_packages(config.quantization, config.model)
        if config.teams is not None:
            read_teams(config.teams)
        if config.tls_cert is not None and config.tls_key is not None:
            Tls(config.tls_cert, config.tls_key, config.tls_client_ca).read()
        if config.peers:
            Connection.to(config.peers)  # what replicas need to ask each other
    except (TeacherServerError, OSError, ValueError) as error:
        print(f"teacher-server: {error}", file=sys.stderr)
        return 2
    try:
        if not config.ray_address:
            check_port_free(config.host, config.port)
        if config.standalone:
            if config.metrics_port is not None:
                check_port_free(config.host, config.metrics_port, "--metrics-port")
            return asyncio.run(_serve_standalone(config))
        return _serve_on_ray(config)
    except TeacherServerError as error:
        print(f"teacher-server: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("teacher-server: interrupted before it was ready", file=sys.stderr)
        return 130


def _serve_on_ray(config: ServeConfig) -> int:
    # Ray makes its workers nice (15) to all else on the machine; trainers wait for these.
    niceness = {"RAY_worker_niceness": os.environ.get("RAY_worker_niceness", "0")}  # noqa: SIM112
    set_ray_environment(config.ray_address, {**OWN_RAY, **niceness})
    if config.ray_address and any(os.environ.get(name) for name in TOKEN_VARIABLES):
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # without it Ray does not send the token
    from teacher_server.commands import launch  # imports Ray, which reads its environment then

    return launch.serve(config)


async def _serve_standalone(config: ServeConfig) -> int:
    set_environment()
    import transformers

    from teacher_server.cluster.peers import watch_peers
    from teacher_server.replica import Replica

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    replica = Replica.from_config(config)
    if config.metrics_port is not None:
        port = replica.metrics.serve(config.host, config.metrics_port)
        logger.info("metrics at http://%s:%d/metrics", config.host, port)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signal_number, _stop_or_exit, stop)
    host = config.advertised_host()
    port = await replica.start(config.host, config.port, advertise=host)
    watching = asyncio.create_task(watch_peers(replica, config.peers))
    print(f"ready {host}:{port}", flush=True)
    await stop.wait()
    logger.info("draining seconds=%s (again to stop at once)", config.drain_s)
    # A replica that drains needs no peers: its clients already know of the others.
    watching.cancel()
    await replica.drain(config.drain_s)
    logger.info("stopped")
    return 0


def _stop_or_exit(stop: asyncio.Event) -> None:
    """Drains at the first signal; ends the process at once at the second."""
    if stop.is_set():
        os._exit(1)
    stop.set()


def check_port_free(host: str, port: int, flag: str = "--port") -> None:
    """Raises ServeError if any process listens there, even one that would share the port."""
    try:
        addresses = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ServeError(f"cannot listen on {host}: {error.strerror}") from error
    family, kind, protocol, _, address = addresses[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise ServeError(
                f"cannot listen on {host}:{port}: {error.strerror}. Another service may be "
                f"running there; choose another port with {flag}, or 0 for a free one."
            ) from error
