"""Starts a Ray of its own on this machine: the environment that such a Ray needs."""

import os
import secrets

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
