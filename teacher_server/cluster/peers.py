"""Keeps replicas that were given each other's addresses informed about each other, without Ray.

On Kubernetes this is one replica per pod and the name of a headless Service; on two machines it is
`--peers other:50051`. On a Ray cluster app.py does the same through Serve.
To its peers a replica is a client like any other: with TLS and teams it needs TEACHER_CA and
TEACHER_TOKEN (or TEACHER_CERT and TEACHER_KEY) in its environment.
"""

import asyncio
import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from logitstream.connection import Connection
from logitstream.diagnosis import diagnose
from protos import teacher_pb2, teacher_pb2_grpc
from teacher_server.replica import Replica

logger = logging.getLogger(__name__)

ROUND_S = 1.0
ANSWER_S = 2.0
REFUSALS = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


async def watch_peers(replica: Replica, peers: Sequence[str]) -> None:
    """Keeps `replica.set_others` up to date for ever; a peer is HOST:PORT, of one address or many."""
    if peers:
        await _Peers(replica, peers).watch()


@dataclass(slots=True)
class _Peer:
    """One address of a peer."""

    name: str
    """HOST:PORT as it was given."""
    channel: grpc.aio.Channel
    is_failure_logged: bool = False


class _Peers:
    """All addresses that the peers of one replica have had, and a channel to each."""

    def __init__(self, replica: Replica, names: Sequence[str]) -> None:
        self._replica = replica
        self._names = names
        self._connection = Connection.to(names)
        self._peers: dict[str, _Peer] = {}
        """By address."""

    async def watch(self) -> None:
        """Asks all addresses for their cards, once per round, for ever."""
        try:
            while True:
                await self._resolve_names()
                cards = await asyncio.gather(*map(self._ask, self._peers))
                self._replica.set_others([card for card in cards if card is not None])
                await asyncio.sleep(ROUND_S)
        finally:
            await asyncio.gather(*(peer.channel.close() for peer in self._peers.values()))

    async def _resolve_names(self) -> None:
        """Opens a channel to each address that is new."""
        resolved = await asyncio.gather(*map(_resolve, self._names))
        for name, addresses in zip(self._names, resolved, strict=True):
            for address in addresses - self._peers.keys():
                self._peers[address] = _Peer(name, self._open_channel(name, address))

    def _open_channel(self, name: str, address: str) -> grpc.aio.Channel:
        # A peer that comes after a long absence is reached at once, rather than after gRPC's pause,
        # which grows to two minutes.
        options: list[tuple[str, int | str]] = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_reconnect_backoff_ms", int(1000 * ROUND_S)),
        ]
        if self._connection.ca is not None:  # its certificate has the name, not the address
            host = name.rpartition(":")[0].strip("[]")
            options.append(("grpc.ssl_target_name_override", host))
        return self._connection.channel(address, options)

    async def _ask(self, address: str) -> teacher_pb2.Replica | None:
        """Returns the card of the replica at `address`, if one answers and is of this service."""
        peer = self._peers[address]
        stub = teacher_pb2_grpc.TeacherStub(peer.channel)
        try:
            info = await stub.Describe(
                teacher_pb2.DescribeRequest(), timeout=ANSWER_S, metadata=self._connection.metadata
            )
        except grpc.aio.AioRpcError as error:
            await self._log_failure(address, peer, error)
            return None
        if info.service_id != self._replica.service_id:
            logger.warning(
                "the peer at %s belongs to another service id=%s", address, info.service_id
            )
            return None
        return next((card for card in info.replicas if card.id == info.replica_id), None)

    async def _log_failure(self, address: str, peer: _Peer, error: grpc.aio.AioRpcError) -> None:
        """Logs, once for each address, why a peer that is there does not answer this replica."""
        details = error.details() or ""
        if peer.is_failure_logged or "connection refused" in details.lower():  # nothing listens
            return
        if error.code() in REFUSALS:
            why = details
        elif error.code() == grpc.StatusCode.UNAVAILABLE:
            why = await asyncio.to_thread(diagnose, peer.name, self._connection)
        else:
            return
        # Also where no reason was found: the diagnosis would open connections in every round.
        peer.is_failure_logged = True
        if why:
            logger.warning("the peer at %s does not answer this replica: %s", address, why)


async def _resolve(name: str) -> set[str]:
    """Returns every address of HOST:PORT; none while the name is unknown."""
    host, _, port = name.rpartition(":")
    try:
        entries = await asyncio.get_running_loop().getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM
        )
    except OSError:
        return set()
    return {
        f"[{entry[4][0]}]:{port}" if entry[0] == socket.AF_INET6 else f"{entry[4][0]}:{port}"
        for entry in entries
    }
