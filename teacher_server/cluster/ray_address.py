"""Checks an address of a Ray cluster before Ray itself tries to join it."""

import os
import socket

import grpc
from ray._private import services
from ray._raylet import AuthenticationTokenLoader  # pyright: ignore[reportAttributeAccessIssue]

from teacher_server.errors import ServeError

ANSWER_S = 5.0
"""How long a cluster may take for its first answer."""


def check_ray_address(given: str) -> None:
    """Raises ServeError if no Ray answers at --ray-address, or one that refuses our token.

    Ray itself tries for a minute or more, and logs each time why it failed.
    """
    try:
        address = services.canonicalize_bootstrap_address(given)
        if address is None:
            return  # auto, and Ray knows of none: `ray.init` raises at once
        host, _, port = address.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()
    except (OSError, ValueError) as error:
        raise ServeError(
            f"no Ray answers at --ray-address {given}: {error}. It is auto, or the HOST:PORT of the "
            "cluster's GCS: what `ray start --head` prints, or a launcher in its first log line."
        ) from None
    _check_token(address)


def _check_token(address: str) -> None:
    """Raises ServeError if the Ray at this address wants a token and ours is not it."""
    token = os.environ.get("RAY_AUTH_MODE") == "token" and _authorization()
    metadata = (("authorization", token),) if token else ()
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
        try:
            call(b"", timeout=ANSWER_S, metadata=metadata)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.UNAUTHENTICATED:  # pyright: ignore
                return
            problem = "refuses the token in RAY_AUTH_TOKEN" if token else "asks for a token"
            raise ServeError(
                f"the Ray at {address} {problem}: set RAY_AUTH_TOKEN to the one that it was started "
                "with (and leave RAY_AUTH_MODE unset, or set it to token). A launcher's own Ray has a "
                "random token that nothing shows, unless RAY_AUTH_TOKEN was set before `serve` "
                "started it."
            ) from None


def _authorization() -> str:
    """Returns what Ray sends, "Bearer ..."; empty if it finds no token."""
    headers = AuthenticationTokenLoader.instance().get_token_for_http_header()
    return next(iter(headers.values()), "")
