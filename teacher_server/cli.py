"""The command line of `teacher-server`: parse first, then import the rest.

Exit codes: 0 done (also a drained serve), 1 something went wrong, 2 command line or configuration,
130 Ctrl-C in a client.
"""

import asyncio
import json
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from google.protobuf import json_format
from google.protobuf.message import Message

from logitstream.command_line import Group, WrongUsage, parse
from logitstream.connection import Connection
from protos import teacher_pb2
from teacher_server.commands.remote_call import NotAnswered, ask, connection_of, told
from teacher_server.config import (
    CertsConfig,
    DescribeConfig,
    FitIdsConfig,
    ServeConfig,
    StatusConfig,
    TeamAction,
    TeamAdd,
    TeamDisable,
    TeamList,
    TeamRotate,
    UsageConfig,
    is_loopback,
)
from teacher_server.errors import ModelError, ServeError, TeacherServerError
from teacher_server.teams.declaration import read_teams

logger = logging.getLogger(__name__)

TEAM = Group(
    "Edit the file that declares who may use a teacher.",
    {"add": TeamAdd, "list": TeamList, "rotate": TeamRotate, "disable": TeamDisable},
)
COMMANDS = Group(
    "Serve a teacher model for knowledge distillation.",
    {
        "serve": ServeConfig,
        "describe": DescribeConfig,
        "fit-ids": FitIdsConfig,
        "status": StatusConfig,
        "usage": UsageConfig,
        "team": TEAM,
        "certs": CertsConfig,
    },
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    try:
        command = parse("teacher-server", COMMANDS, sys.argv[1:] if argv is None else argv)
    except WrongUsage as error:
        for mistake in error.mistakes:
            print(f"teacher-server: {mistake}", file=sys.stderr)
        return 2
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    if isinstance(command, ServeConfig):
        return serve(command)
    if isinstance(command, FitIdsConfig):
        return fit_ids(command)
    if isinstance(command, StatusConfig):
        from teacher_server.commands.status import show_status

        return show_status(command)
    if isinstance(command, UsageConfig):
        from teacher_server.commands.usage import show_usage

        return show_usage(command)
    if isinstance(command, TeamAction):
        return team(command)
    if isinstance(command, CertsConfig):
        return make_certificates(command)
    return describe(command)


def serve(config: ServeConfig) -> int:
    """Loads the teacher and serves it until a signal; returns the exit code."""
    if problem := config.exposure():
        print(f"teacher-server: {problem}", file=sys.stderr)
        return 2
    config = config.with_absolute_paths()
    try:
        if config.teams is not None:
            read_teams(config.teams)
        if tls := config.tls():
            tls.read()
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
    # Ray reads these when it is imported. The first: a thread that outlives the connection must not
    # start another Ray, as any use of Ray does otherwise.
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
    if not config.ray_address:
        os.environ.update(own_ray_environment())
    else:
        if is_loopback(config.ray_address.rpartition(":")[0]):
            os.environ.update(ONE_MACHINE)
        if any(os.environ.get(name) for name in TOKEN_VARIABLES):
            os.environ.setdefault("RAY_AUTH_MODE", "token")  # else Ray does not send it
    from teacher_server import app

    return app.serve(config)


# All sockets of Ray are on loopback then. It has no other switch for that: a --node-ip-address of
# 127.0.0.1 it replaces by the machine's address.
ONE_MACHINE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
"""Where Ray finds its token."""


def own_ray_environment() -> dict[str, str]:
    """How a Ray that is started here behaves; its processes inherit this."""
    return {
        **ONE_MACHINE,
        # Without the token nobody can make this Ray run anything. It is in no argument and no file.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Of all logs, only those of the replicas come to the launcher.
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_COLOR_PREFIX": "0",
        # A frozen replica keeps its GPU until it is killed.
        "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "2",
        # Ray makes its workers nice (15) to all else on the machine; trainers wait for these.
        "RAY_worker_niceness": os.environ.get("RAY_worker_niceness", "0"),  # noqa: SIM112
    }


async def _serve_standalone(config: ServeConfig) -> int:
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
    watching.cancel()
    await replica.drain(config.drain_s)
    logger.info("stopped")
    return 0


def _stop_or_exit(stop: asyncio.Event) -> None:
    """The first signal drains; a second one ends the process as it is."""
    if stop.is_set():
        os._exit(1)
    stop.set()


def check_port_free(host: str, port: int, flag: str = "--port") -> None:
    """Raises ServeError if somebody listens there, also somebody who shares the port."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ServeError(f"cannot listen on {host}: {error.strerror}") from error
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise ServeError(
                f"cannot listen on {host}:{port}: {error.strerror}. Another service may be "
                f"running there; choose another port with {flag}, or 0 for a free one."
            ) from error


def fit_ids(config: FitIdsConfig) -> int:
    """Fits and writes an id table, and prints what it gained; returns the exit code."""
    import transformers

    from teacher_server.engine import id_table_fit as fit
    from teacher_server.engine.model import ID_TABLE_NAME, load

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        if not Path(config.model).is_dir():
            raise ModelError(f"{config.model} is not a folder; the table is written into it")
        text = config.text.read_text(encoding="utf-8", errors="replace")
        model = load(config.model, device=config.device, dtype=config.dtype)
        found = fit.fit_ids(model, text, max_tokens=config.max_tokens)
        path = Path(config.model) / ID_TABLE_NAME
        fit.save(found.table, path)
    except TeacherServerError as error:
        print(f"teacher-server: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"teacher-server: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(
        f"{path}: fitted on {found.fitted_rows} positions; {fit.SPEC} takes "
        f"{found.fitted_nbytes:.1f} bytes per token instead of {found.identity_nbytes:.1f} on "
        f"{found.measured_rows} others. Start the service anew to use it."
    )
    return 0


def team(action: TeamAction) -> int:
    """Edits a teams file; returns the exit code."""
    from teacher_server.commands import team as team_commands

    try:
        team_commands.run(action)
    except TeacherServerError as error:
        print(f"teacher-server: {error}", file=sys.stderr)
        return 1
    return 0


def make_certificates(config: CertsConfig) -> int:
    """Makes certificates and prints where they are; returns the exit code."""
    from teacher_server.commands import certs

    try:
        paths = certs.make(
            config.out,
            config.host,
            config.client,
            days=config.days,
            replace=config.force,
            with_local=not config.only_these,
        )
    except TeacherServerError as error:
        print(f"teacher-server: {error}", file=sys.stderr)
        return 1
    for path in paths:
        print(path)
    return 0


def describe(config: DescribeConfig) -> int:
    """Prints what a running service says of itself; returns the exit code."""
    try:
        info = ask(connection_of(config), lambda stub: stub.Describe, teacher_pb2.DescribeRequest())
    except NotAnswered as error:
        return told(error)
    except KeyboardInterrupt:
        return 130
    content = json_format.MessageToDict(
        info, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    _numbers_as_numbers(info.limits, content["limits"])
    _numbers_as_numbers(info.caller, content["caller"])
    if config.as_json:
        print(json.dumps(content, indent=2))
        return 0
    for name, value in content.items():
        if name == "limits":
            value = ", ".join(f"{key} {number}" for key, number in value.items())
        elif name == "replicas":
            value = ", ".join(f"{r['id']} {r['address']} {r['state']}" for r in value)
        elif name == "caller":
            value["scopes"] = " ".join(value["scopes"])
            value = ", ".join(f"{key} {v}" for key, v in value.items() if v and key != "team")
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        print(f"{name:22} {value}")
    return 0


def _numbers_as_numbers(message: Message, content: dict[str, object]) -> None:
    """Protobuf's JSON writes 64-bit numbers as strings; ours are small enough to be numbers."""
    for name in content:
        value = getattr(message, name)
        if isinstance(value, int | float):
            content[name] = value


if __name__ == "__main__":
    sys.exit(main())
