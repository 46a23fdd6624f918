"""Finds the replicas of one service, checks that they belong to it, and spares failing addresses."""

import asyncio
import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import grpc

from logitstream.connection import Connection
from logitstream.diagnosis import diagnose
from protos import teacher_pb2
from student_trainer.client.describe import RETRIED, confirm, describe, explain, own_card
from student_trainer.client.stalls import Stalls
from student_trainer.errors import (
    BY_CODE,
    IncompatibleTeacher,
    ProtocolError,
    TeacherUnavailable,
)

logger = logging.getLogger(__name__)

TRY_S = (2.0, 3.0, 5.0)
"""How long one attempt to connect may take: the first, the second and every later one.

The kernel still accepts connections to a frozen replica, so the first attempts are short; a slow
network needs the longer ones.
"""
BACKOFF_S = (1.0, 2.0, 5.0, 15.0, 30.0)
"""How long a replica is left alone after its first, second, ... failure."""
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", 256 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
]


def backoff_s(num_failures: int) -> float:
    """Returns how long to wait after a failure, given the number of failures before it."""
    return BACKOFF_S[min(num_failures, len(BACKOFF_S) - 1)]


@dataclass(slots=True)
class Failures:
    """Records why an address is left alone for a while."""

    count: int = 0
    until_s: float = 0.0
    code: grpc.StatusCode | None = None
    """How the last attempt ended; None: well, or with an answer that was refused."""


@dataclass(frozen=True, slots=True)
class FoundReplica:
    """Holds a ready replica of the service."""

    info: teacher_pb2.TeacherInfo
    channel: grpc.aio.Channel | None
    """Open, for the caller to use and close; None if there is a link to this replica already."""


class Discovery:
    """Remembers what is known of a service: who it is, its replicas, addresses that failed."""

    def __init__(self, connection: Connection, linked: Collection[str], stalls: Stalls) -> None:
        """linked: a live view of the ids of the replicas that have a link."""
        self.info: teacher_pb2.TeacherInfo | None = None
        """The service as it described itself last; the run is bound to its fingerprint."""
        self.where = ", ".join(connection.addresses)
        self.last_error = ""
        self._connection = connection
        self._given = connection.addresses
        self._linked = linked
        self._stalls = stalls
        self._members: dict[str, str] = {}
        """Ready replicas by id, with their addresses."""
        self._failures: dict[str, Failures] = {}

    def known_addresses(self) -> list[tuple[str, bool]]:
        """Lists addresses, and whether the user gave them; those come first."""
        learned = [address for address in self._members.values() if address not in self._given]
        return [(address, True) for address in self._given] + [
            (address, False) for address in learned
        ]

    def missing(self) -> list[str]:
        """Lists the addresses of replicas that have no link and may be tried now."""
        now = time.monotonic()
        return [
            address
            for replica_id, address in self._members.items()
            if replica_id not in self._linked
            and now >= self._failures.get(address, Failures()).until_s
        ]

    async def find(self, address: str, *, required: bool) -> FoundReplica | None:
        """Looks for a replica of the service at an address; None, with a backoff, if that fails.

        required: a given address, to be reported to the user if it can never work. Raises
        IncompatibleTeacher, AccessDenied or ProtocolError then.
        """
        failures = self._failures.setdefault(address, Failures())
        failures.code = None
        channel = self._connection.channel(address, CHANNEL_OPTIONS)
        keeps_channel = False
        try:
            timeout_s = TRY_S[min(failures.count, len(TRY_S) - 1)]
            info, refusal = await self._examine(address, channel, timeout_s, required=required)
            keeps_channel = not refusal and info.replica_id not in self._linked
        except grpc.aio.AioRpcError as error:
            if required and error.code() not in RETRIED:
                kind = BY_CODE.get(error.code().value[0], ProtocolError)
                raise kind(f"{address}: {explain(error)}") from None
            failures.code = error.code()
            self._report_failure(address, explain(error))
            return None
        finally:
            if not keeps_channel:
                await channel.close()
        if refusal:
            self._report_failure(address, refusal)
            return None
        failures.count = 0
        if not keeps_channel:
            return FoundReplica(info, None)
        # No await from here to the caller's new link: otherwise a second one could come between.
        if self._is_new(info):
            if self.info is not None:
                logger.warning("the service at %s was restarted", address)
            self.info = info
        return FoundReplica(info, channel)

    async def _examine(
        self, address: str, channel: grpc.aio.Channel, timeout_s: float, *, required: bool
    ) -> tuple[teacher_pb2.TeacherInfo, str]:
        """Asks a replica who it is; returns the answer and why it cannot be used now, if so."""
        metadata = self._connection.metadata
        info = await describe(channel, metadata, timeout_s)
        refusal = self.explain_refusal(info, address, may_be_new=required)
        ends_run = bool(refusal) and required and not self._linked
        if ends_run or (not refusal and self._is_new(info)):
            info = await confirm(info, address, channel, metadata, timeout_s)
            refusal = self.explain_refusal(info, address, may_be_new=required)
            if refusal and required and not self._linked:
                raise IncompatibleTeacher(refusal)
        card = own_card(info)
        busy_s = card.busy_ms / 1000
        if card.state != "ready":
            refusal = refusal or f"the replica is {card.state}"
        elif self._linked and self._stalls.is_still_stuck(busy_s):
            refusal = refusal or f"its batch has taken {busy_s:.0f} s"
        return info, refusal

    async def check_same_service(self, address: str) -> teacher_pb2.TeacherInfo | None:
        """Returns what a given address answers, if it does; IncompatibleTeacher if it is foreign."""
        metadata = self._connection.metadata
        async with self._connection.channel(address, CHANNEL_OPTIONS) as channel:
            try:
                info = await describe(channel, metadata, TRY_S[0])
                if self.explain_refusal(info, address):
                    info = await confirm(info, address, channel, metadata, TRY_S[0])
            except grpc.aio.AioRpcError:
                return None  # it may come up later
        if refusal := self.explain_refusal(info, address):
            raise IncompatibleTeacher(refusal)
        return info

    def _is_new(self, info: teacher_pb2.TeacherInfo) -> bool:
        """Whether this replaces what is known of the service."""
        return self.info is None or info.service_id != self.info.service_id

    def explain_refusal(
        self, info: teacher_pb2.TeacherInfo, address: str, *, may_be_new: bool = False
    ) -> str:
        """Explains why this is not the teacher that the run began with; empty if it is."""
        if self.info is None:
            return ""
        if info.teacher_fingerprint != self.info.teacher_fingerprint:
            return (
                f"the teacher at {address} was changed: its fingerprint is "
                f"{info.teacher_fingerprint}, this run began with "
                f"{self.info.teacher_fingerprint}. Connect again to train with the new one."
            )
        # With no replica of the old service left, a new id means that it was restarted.
        restarted = may_be_new and not self._linked
        if info.service_id != self.info.service_id and not restarted:
            return (
                f"{address} is another service ({info.service_id}) than this client is connected "
                f"to ({self.info.service_id}), with the same teacher. Give addresses of one "
                "service, or start its replicas with one --service-id."
            )
        return ""

    def learn(self, info: teacher_pb2.TeacherInfo) -> None:
        """Takes over the list of ready replicas.

        One that is not listed may only be out of sight of the one that was asked.
        """
        self._members = {card.id: card.address for card in info.replicas if card.state == "ready"}

    def report_loss(self, replica_id: str, address: str, why: str) -> None:
        """Takes note of a link that was lost: its replica is left alone for a while."""
        for known in {address, self._members.get(replica_id, address)}:
            self._leave_alone(known)
        self.last_error = f"{address}: {why}"

    def _report_failure(self, address: str, why: str) -> None:
        self.last_error = f"{address}: {why}"
        self._leave_alone(address)
        logger.debug("cannot use %s", self.last_error)

    def _leave_alone(self, address: str) -> None:
        failures = self._failures.setdefault(address, Failures())
        pause_s = backoff_s(failures.count)
        failures.count += 1
        failures.until_s = time.monotonic() + pause_s

    async def diagnose(self) -> list[str]:
        """Returns for each given address why it will not answer; empty where it still may."""

        async def look(address: str) -> str:
            if self._failures[address].code is not grpc.StatusCode.UNAVAILABLE:
                return ""
            return await asyncio.to_thread(diagnose, address, self._connection)

        return await asyncio.gather(*map(look, self._given))

    def make_unavailable(self, waited_s: float, diagnoses: Sequence[str]) -> TeacherUnavailable:
        """Makes the error for a service that does not answer. diagnoses: see `diagnose`."""
        known = zip(self._given, diagnoses, strict=False)
        reasons = [
            reason if len(diagnoses) == 1 else f"{address}: {reason}"
            for address, reason in known
            if reason
        ]
        why = " ".join(reasons) or "Is the address right, and has the service printed 'ready'?"
        after = f" after {waited_s:.0f} s" if waited_s >= 1 else ""
        return TeacherUnavailable(
            f"no teacher answers at {self.where}{after}. {why} (last attempt: {self.last_error})"
        )
