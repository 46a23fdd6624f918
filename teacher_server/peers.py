"""Membership without Ray: replicas that were told of each other ask each other who lives.

On Kubernetes this is one replica per pod and the name of a headless Service; on two machines it is
`--peers other:50051`. On a Ray cluster app.py does the same through Serve.
"""

import asyncio
import logging
import socket
from collections.abc import Sequence

import grpc

from protos import teacher_pb2, teacher_pb2_grpc
from teacher_server.replica import Replica

logger = logging.getLogger(__name__)

INTERVAL_S = 1.0
ASK_TIMEOUT_S = 2.0


async def watch_peers(replica: Replica, peers: Sequence[str]) -> None:
    """Keeps `replica.set_others` up to date for ever; `peers` are HOST:PORT, names of several too."""
    channels: dict[str, grpc.aio.Channel] = {}
    try:
        while True:
            found = await asyncio.gather(*map(_resolve, peers))
            for address in sorted(set().union(*found) - set(channels)):
                channels[address] = grpc.aio.insecure_channel(
                    address, options=[("grpc.use_local_subchannel_pool", 1)]
                )
            answers = await asyncio.gather(
                *(_ask(address, channel, replica) for address, channel in channels.items())
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
    address: str, channel: grpc.aio.Channel, replica: Replica
) -> teacher_pb2.Replica | None:
    """The card of the replica at `address`, if it lives and is of this service."""
    stub = teacher_pb2_grpc.TeacherStub(channel)
    try:
        info = await stub.Describe(teacher_pb2.DescribeRequest(), timeout=ASK_TIMEOUT_S)
    except grpc.aio.AioRpcError:
        return None
    if info.service_id != replica.service_id:
        logger.warning("the peer at %s is of another service id=%s", address, info.service_id)
        return None
    return next((card for card in info.replicas if card.id == info.replica_id), None)
