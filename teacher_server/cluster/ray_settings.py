"""Holds settings of Ray Serve that replicas and the launcher share."""

import ray
from ray.serve._private import replica as serve_replica
from ray.serve.schema import LoggingConfig

from teacher_server.config import is_loopback

QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)


QUIETER = LoggingConfig(log_level="ERROR", enable_access_log=False)
"""Of replicas: they warn of every look at another one that takes longer than 0.1 s."""


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


def _last_line(error: BaseException) -> str:
    """Of an error that was raised in an actor: the others are its traceback."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
