"""Holds the settings of Ray Serve that replicas and the launcher share."""

import ray
from ray.serve._private import replica as serve_replica
from ray.serve.schema import LoggingConfig

from logitstream.connection import is_loopback

QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
QUIETER = LoggingConfig(log_level="ERROR", enable_access_log=False)
"""Of replicas, which would warn of every exchange of cards that takes longer than 0.1 s."""


def is_on_loopback() -> bool:
    """Whether this Ray is of one machine, as the one that `serve` starts is."""
    return ray.is_initialized() and is_loopback(ray.util.get_node_ip_address())


def keep_serve_on_loopback() -> None:
    """Makes Serve open the port of each replica on loopback, on a Ray that is on loopback itself.

    Serve would open it on all addresses. The port is for handles that use gRPC; there are none here.
    """
    bind = serve_replica.__dict__.get("add_port_to_grpc_server")
    if bind is not None and is_on_loopback():
        serve_replica.__dict__["add_port_to_grpc_server"] = lambda server, address: bind(
            server, address.replace("[::]", "127.0.0.1")
        )
