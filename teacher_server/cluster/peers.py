"""Membership without Ray: replicas that were told of each other ask each other who lives.

On Kubernetes this is one replica per pod and the name of a headless Service; on two machines it is
`--peers other:50051`. On a Ray cluster app.py does the same through Serve.
To its peers a replica is a client as any other: with TLS and teams it needs TEACHER_CA and
TEACHER_TOKEN (or TEACHER_CERT and TEACHER_KEY) in its environment.
"""

import asyncio
import logging
import socket
from collections.abc import Sequence

import grpc

from logitstream.connection import Connection
from logitstream.diagnosis import diagnose
from protos import teacher_pb2, teacher_pb2_grpc
from teacher_server.replica import Replica

logger = logging.getLogger(__name__)

INTERVAL_S = 1.0
ASK_TIMEOUT_S = 2.0
REFUSALS = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


async def watch_peers(replica: Replica, peers: Sequence[str]) -> None:
    """Keeps `replica.set_others` up to date for ever; `peers` are HOST:PORT, names of several too."""
    channels: dict[str, grpc.aio.Channel] = {}
    names: dict[str, str] = {}
    told: set[str] = set()
    connection = Connection.to(peers) if peers else None
    try:
        while connection is not None:
            found = dict(zip(peers, await asyncio.gather(*map(_resolve, peers)), strict=True))
            for peer, addresses in found.items():
                for address in addresses - channels.keys():
                    # Whoever comes after a long absence is found at once, not after gRPC's pause,
                    # which grows to two minutes.
                    options: list[tuple[str, int | str]] = [
                        ("grpc.use_local_subchannel_pool", 1),
                        ("grpc.max_reconnect_backoff_ms", int(1000 * INTERVAL_S)),
                    ]
                    if connection.ca is not None:  # its certificate has the name, not the address
                        name = peer.rpartition(":")[0].strip("[]")
                        options.append(("grpc.ssl_target_name_override", name))
                    channels[address] = connection.channel(address, options)
                    names[address] = peer
            answers = await asyncio.gather(
                *(
                    _ask(address, channel, replica, connection, names[address], told)
                    for address, channel in channels.items()
                )
            )
            replica.set_others([card for card in answers if card is not None])
            await asyncio.sleep(INTERVAL_S)
    finally:
        await asyncio.gather(*(channel.close() for channel in channels.values()))


async def _resolve(peer: str) -> set[str]:
    """Every address behind HOST:PORT; none while the name is not known."""
    host, _, port = peer.rpartition(":")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM
        )
    except OSError:
        return set()
    return {
        f"[{entry[4][0]}]:{port}" if entry[0] == socket.AF_INET6 else f"{entry[4][0]}:{port}"
        for entry in found
    }


async def _ask(
    address: str,
    channel: grpc.aio.Channel,
    replica: Replica,
    connection: Connection,
    peer: str,
    told: set[str],
) -> teacher_pb2.Replica | None:
    """The card of the replica at `address`, if it lives and is of this service."""
    stub = teacher_pb2_grpc.TeacherStub(channel)
    try:
        info = await stub.Describe(
            teacher_pb2.DescribeRequest(), timeout=ASK_TIMEOUT_S, metadata=connection.metadata
        )
    except grpc.aio.AioRpcError as error:
        await _tell_why(address, error, connection, peer, told)
        return None
    if info.service_id != replica.service_id:
        logger.warning("the peer at %s is of another service id=%s", address, info.service_id)
        return None
    return next((card for card in info.replicas if card.id == info.replica_id), None)


async def _tell_why(
    address: str,
    error: grpc.aio.AioRpcError,
    connection: Connection,
    peer: str,
    told: set[str],
) -> None:
    """Logs, once for each address, why somebody who is there does not answer this replica."""
    details = error.details() or ""
    if address in told or "connection refused" in details.lower():  # nobody is there
        return
    if error.code() in REFUSALS:
        why = details
    elif error.code() == grpc.StatusCode.UNAVAILABLE:
        why = await asyncio.to_thread(diagnose, peer, connection)
    else:
        return
    told.add(address)
    if why:
        logger.warning("the peer at %s does not answer this replica: %s", address, why)
