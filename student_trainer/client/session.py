"""One client's links to the replicas of a service; lives in the io thread.

A link is one channel with one Score stream to one replica. The keeper opens links to every replica
that Describe names and that can be reached, notices the ones that fell silent, and waits, visibly
and up to the patience, when nobody is left. What is asked of whom is decided in `resume.py`.
"""

import asyncio
import contextlib
import logging
import math
import random
import secrets
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc

from logit_codec import CodecError, IdTable
from logitstream.connection import Connection
from logitstream.diagnosis import diagnose, in_short
from protos import teacher_pb2, teacher_pb2_grpc
from student_trainer.client.dispatch import Dispatch, Fate, Pending, assemble
from student_trainer.client.id_table_cache import cache_id_table, cached_id_table
from student_trainer.errors import (
    BY_CODE,
    IncompatibleTeacher,
    ProtocolError,
    TargetsCorrupt,
    TeacherError,
    TeacherInternalError,
    TeacherOverloaded,
    TeacherUnavailable,
)
from student_trainer.teachers.request import Answer

logger = logging.getLogger(__name__)

TRY_S = (2.0, 3.0, 5.0)
"""How long one attempt to connect may take, the first, second and every later time.

A frozen replica still gets connections from the kernel, so an attempt is given up soon; a slow link
needs the longer ones.
"""
TICK_S = 0.25
REFRESH_S = 3.0
"""How often the list of replicas is asked for while requests are outstanding."""
PROBE_AFTER_S = 4.0
"""A link without a message for this long is asked whether it lives."""
PROBE_S = 5.0
FETCH_S = 60.0
"""How long an id table may take; it has about 2.3 bytes per id of the vocabulary."""
STALL_S = 10.0
"""A batch that takes longer than this, and four times as long as any seen, counts as stuck."""
STALL_FACTOR = 4.0
BUSY_FACTOR = 6.0
"""A link without any answer is given up after STALL_S, so many times that while it has work."""
BACKOFF_S = (1.0, 2.0, 5.0, 15.0, 30.0)
"""How long a replica is left alone after the first, second, ... failure to reach it, and how long
others are asked after its first, second, ... INTERNAL."""
FAILED_PAUSE_S = 1.0
"""How long after a failure the same replica is asked again, if there is no other one."""
TELL_S = 5.0
"""How often a wait is logged."""
MAX_ATTEMPTS = 3
"""How often a request whose targets arrive damaged is sent before TargetsCorrupt."""
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", 256 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
]
RETRIED = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""Ends of a stream after which another one is used: transport, drain, restart."""
NO_MESSAGE = "an answer that is no message"
CLOSED = "this teacher was closed while answers were outstanding"
FIRST_SIGN_S = 0.5
"""How long a stream is listened to before the first write where the one before ended INTERNAL.

A write that fails because the service has just refused the stream makes grpc.aio report INTERNAL
instead of the refusal, nearly always where the refusal comes at once (grpc/grpc issue 36066).
"""


@dataclass(slots=True)
class Counters:
    """What a client has received and how often it had to ask again."""

    requests: int = 0
    rows: int = 0
    payload_nbytes: int = 0
    sent_nbytes: int = 0
    """Of requests as messages, asked again ones included; HTTP/2 adds its frames."""
    received_nbytes: int = 0
    """Of answers as messages."""
    resent: int = 0
    reconnects: int = 0
    """Streams that were lost while answers were outstanding."""
    stalled: int = 0
    """Of these, streams to replicas that had fallen silent or were stuck."""
    corrupt: int = 0


@dataclass(eq=False)
class _Link:
    """One stream to one replica."""

    replica_id: str
    address: str
    channel: grpc.aio.Channel
    heard_s: float
    """When it last gave any sign of life."""
    answered_s: float
    """When its stream last brought a message, or nothing was outstanding."""
    idle: bool = False
    """Whether the replica said since then that it has nothing in hand."""
    failures: int = 0
    """How often it was distrusted since the last good answer."""
    distrusted_until_s: float | None = None
    """Until when others are asked, because its replica failed on a request."""
    outbox: "asyncio.Queue[int]" = field(default_factory=asyncio.Queue)
    tasks: list["asyncio.Task[None]"] = field(default_factory=list)
    probe: "asyncio.Task[None] | None" = None

    @property
    def stub(self) -> teacher_pb2_grpc.TeacherStub:
        return teacher_pb2_grpc.TeacherStub(self.channel)


@dataclass(slots=True)
class _Failures:
    """Why an address is left alone for a while."""

    count: int = 0
    until_s: float = 0.0
    code: grpc.StatusCode | None = None
    """How the last attempt ended; None: well, or with an answer that did not fit."""


class Session:
    """Sends requests to whoever can answer them; every method runs in the io thread's loop."""

    def __init__(self, connection: Connection, patience_s: float) -> None:
        self.counters = Counters()
        self.session_id = secrets.token_bytes(16)
        self.id_tables: list[IdTable] = []
        """What answers may be coded with, beside the built-in identity."""
        self._connection = connection
        self._addresses = list(connection.addresses)
        self._patience_s = patience_s
        self._info: teacher_pb2.TeacherInfo | None = None
        self._links: dict[str, _Link] = {}
        self._members: dict[str, str] = {}
        """Ready replicas by id, with their addresses."""
        self._failures: dict[str, _Failures] = {}
        self._opening: dict[str, asyncio.Task[None]] = {}
        self._dispatch = Dispatch(lambda link, number: link.outbox.put_nowait(number))  # type: ignore[attr-defined]
        self._wake = asyncio.Event()
        self._closed = False
        self._keeper: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._decoder = ThreadPoolExecutor(1, thread_name_prefix="decode")
        self._quiet_since_s: float | None = None
        """The first loss of a link since the last answer."""
        self._last_error = ""
        self._stuck = 0
        self._stuck_s = math.inf
        """The shortest time for which a batch counted as stuck: until it ends, others are asked."""
        self._left_waiting = 0
        """How often a replica that lives left all its requests without an answer."""
        self._pausing = 0
        """Requests that wait before they are sent again, and that dispatch does not know of."""
        self._longest_batch_s = 0.0
        self._refused = 0
        """Streams since the last answer that ended with a status that is not retried."""
        self._listen_first = False
        """Whether the last stream ended in a way that may hide a refusal."""

    @property
    def replicas(self) -> list[str]:
        """The addresses of the replicas that this client has a stream to."""
        return [link.address for link in self._links.values()]

    async def open(self, patience_s: float) -> teacher_pb2.TeacherInfo:
        """Finds the first address that answers within the time given, and checks the others.

        Raises TeacherUnavailable, at once where waiting is of no use.
        """
        started = time.monotonic()
        hopeless = False
        while not await self._reach():
            waited_s = time.monotonic() - started
            found = await self._diagnose()
            # Twice, with an attempt between: the service may have come between the two looks.
            if (hopeless and all(found)) or waited_s >= patience_s:
                raise self._gone(waited_s, found)
            hopeless = all(found)
            if not hopeless:
                await asyncio.sleep(0.1)
        assert self._info is not None
        if len(self._addresses) > 1:
            await asyncio.gather(*(self._check_same_service(one) for one in self._addresses))
        if self._info.id_tables:
            self.id_tables = [await self._id_table(self._info.id_tables[0])]
        self._keeper = asyncio.create_task(self._keep())
        return self._info

    async def _id_table(self, digest: bytes) -> IdTable:
        """The table with this digest, from the cache or from the teacher."""
        if (table := cached_id_table(digest)) is not None:
            return table
        link = next(iter(self._links.values()))
        request = teacher_pb2.FetchIdTableRequest(digest=digest)
        problem = ""
        for _ in range(MAX_ATTEMPTS):
            try:
                response = await link.stub.FetchIdTable(
                    request, timeout=FETCH_S, metadata=self._connection.metadata
                )
                if response is None:  # gRPC's way to hand out bytes that are no message
                    problem = NO_MESSAGE
                    continue
                table = IdTable.from_bytes(response.data)
            except (grpc.aio.AioRpcError, CodecError) as error:
                problem = str(error)
                continue
            if table.digest == digest:
                cache_id_table(table)
                return table
            problem = f"another table came, {table.digest.hex()}"
        raise ProtocolError(
            f"the id table {digest.hex()} of {self._where()} did not come in {MAX_ATTEMPTS} attempts: "
            f"{problem}"
        )

    async def close(self) -> None:
        self._closed = True
        tasks = [*self._tasks, *self._opening.values(), *([self._keeper] if self._keeper else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        links = list(self._links.values())
        self._links.clear()
        await asyncio.gather(*map(_hang_up, links))
        self._fail_all(TeacherError(CLOSED))
        self._decoder.shutdown(wait=False, cancel_futures=True)

    def submit(self, pending: Pending) -> None:
        """Sends a request, now or as soon as there is a link."""
        try:
            self._submit(pending)
        except BaseException as error:  # of a call that nobody waits for
            logger.error("the client failed", exc_info=error)
            _resolve(pending, _bug(error))

    def _submit(self, pending: Pending) -> None:
        if self._closed:  # by another thread, since the caller looked
            _resolve(pending, TeacherError(CLOSED))
            return
        self.counters.requests += 1
        if not self._dispatch.unanswered:
            now = time.monotonic()
            for link in self._links.values():  # the keeper slept, nobody asked them anything
                link.heard_s = link.answered_s = now
        self._dispatch.submit(pending)
        if not self._links or self._dispatch.unanswered == 1:
            self._wake.set()  # the keeper sleeps while nothing is outstanding

    @property
    def _wanted(self) -> int:
        """Requests whose answer somebody waits for."""
        return self._dispatch.unanswered + self._pausing

    # Links: who is there, and whether it still answers.

    async def _keep(self) -> None:
        """Keeps links to all replicas while anything is outstanding."""
        refreshed_s = time.monotonic()
        while True:
            # Not wait_for: before Python 3.12 it loses a cancellation that comes with the event, and
            # closing would wait for this task for ever.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S if self._wanted else None):
                    await self._wake.wait()
            self._wake.clear()
            try:
                if not self._wanted:
                    continue
                if not self._links:
                    await self._wait_for_a_link()
                now = time.monotonic()
                if now - refreshed_s > REFRESH_S and self._links:
                    refreshed_s = now
                    self._spawn(self._refresh(random.choice(list(self._links.values()))))
                self._open_missing()
                for link in list(self._links.values()):
                    self._watch(link)
            except TeacherError as error:
                self._fail_all(error)
            except Exception as error:
                self._give_up(error)

    async def _wait_for_a_link(self) -> None:
        """Reconnects to anybody. Raises TeacherUnavailable after the patience."""
        started = told = time.monotonic()
        self._quiet_since_s = self._quiet_since_s or started
        delay = 0.05
        while not await self._reach():
            now = time.monotonic()
            if now - self._quiet_since_s > self._patience_s:
                raise self._gone(now - self._quiet_since_s, await self._diagnose())
            if now - told > TELL_S:
                told = now
                logger.warning(
                    "waiting for the teacher at %s since %.0f s (up to %.0f s), %d requests: %s",
                    self._where(),
                    now - self._quiet_since_s,
                    self._patience_s,
                    self._dispatch.unanswered,
                    self._last_error,
                )
            await asyncio.sleep(delay)
            delay = min(1.0, 1.5 * delay)
        if told != started:
            logger.warning("the teacher is back at %s", ", ".join(self.replicas))

    async def _reach(self) -> bool:
        """Tries the given addresses, then those of replicas known from before, once each."""
        known = [one for one in self._members.values() if one not in self._addresses]
        for address in (*self._addresses, *known):
            if await self._open(address, given=address in self._addresses):
                return True
        return False

    async def _open(self, address: str, *, given: bool) -> bool:
        """Opens a link to whoever answers at an address; False, with a backoff, if that fails.

        Raises IncompatibleTeacher or AccessDenied where it makes no sense to try again.
        """
        failures = self._failures.setdefault(address, _Failures())
        failures.code = None
        channel = self._connection.channel(address, CHANNEL_OPTIONS)
        link = None
        try:
            timeout_s = TRY_S[min(failures.count, len(TRY_S) - 1)]
            info = await self._describe(channel, timeout_s)
            refusal = self._refusal(info, address, given)
            is_end = bool(refusal) and given and not self._links
            if is_end or (not refusal and self._is_new(info)):
                info = await self._confirmed(info, address, channel, timeout_s)
                refusal = self._refusal(info, address, given)
                if refusal and given and not self._links:
                    raise IncompatibleTeacher(refusal)
            card = _own_card(info)
            if card.state != "ready":
                refusal = refusal or f"the replica is {card.state}"
            elif self._links and card.busy_ms / 1000 > self._stuck_s:
                refusal = refusal or f"its batch has taken {card.busy_ms / 1000:.0f} s"
            if not refusal and info.replica_id not in self._links:
                now = time.monotonic()
                link = _Link(info.replica_id, address, channel, now, now)
        except grpc.aio.AioRpcError as error:
            if given and error.code() not in RETRIED:
                kind = BY_CODE.get(error.code().value[0], ProtocolError)
                raise kind(f"{address}: {_explain(error)}") from None
            failures.code = error.code()
            return self._left_out(address, _explain(error))
        finally:
            if link is None:
                await channel.close()
        if refusal:
            return self._left_out(address, refusal)
        failures.count = 0
        if link is None:
            return True  # there is a link to this replica already
        if self._is_new(info):
            if self._info is not None:
                logger.warning("the service at %s was started anew", address)
            self._info = info
        self._learn(info)
        self._links[link.replica_id] = link
        link.tasks.append(asyncio.create_task(self._converse(link)))
        self._dispatch.open(link)
        return True

    async def _describe(
        self, channel: grpc.aio.Channel, timeout_s: float
    ) -> teacher_pb2.TeacherInfo:
        """Asks twice before an error that ends a training run: plain TCP delivers flipped bits."""
        stub = teacher_pb2_grpc.TeacherStub(channel)
        for attempt in (1, 2):
            try:
                info = await stub.Describe(
                    teacher_pb2.DescribeRequest(),
                    timeout=timeout_s,
                    metadata=self._connection.metadata,
                )
            except grpc.aio.AioRpcError as error:
                if attempt == 2 or error.code() in RETRIED:
                    raise
                continue
            if info is not None:  # gRPC's way to hand out bytes that are no message
                return info
        nothing = grpc.aio.Metadata()
        raise grpc.aio.AioRpcError(grpc.StatusCode.UNKNOWN, nothing, nothing, NO_MESSAGE)

    async def _confirmed(
        self,
        first: teacher_pb2.TeacherInfo,
        address: str,
        channel: grpc.aio.Channel,
        timeout_s: float,
    ) -> teacher_pb2.TeacherInfo:
        """What a replica says of itself twice; `first` is what it said once.

        Plain TCP delivers flipped bits, and a whole run is built on this answer or ended by it.
        """
        second = await self._describe(channel, timeout_s)
        if _lasting(second) == _lasting(first):
            return second
        third = await self._describe(channel, timeout_s)
        if _lasting(third) in (_lasting(first), _lasting(second)):
            return third
        raise ProtocolError(
            f"{address} was asked three times to describe its teacher and gave three different "
            "answers: the network between damages what it carries. Use TLS, which notices damage, "
            "or another way to the service."
        )

    def _is_new(self, info: teacher_pb2.TeacherInfo) -> bool:
        """Whether this is to be what is known of the service from now on."""
        return self._info is None or info.service_id != self._info.service_id

    def _refusal(self, info: teacher_pb2.TeacherInfo, address: str, given: bool) -> str:
        """Why this is not the teacher that the run began with; empty if it is."""
        if self._info is None:
            return ""
        if info.teacher_fingerprint != self._info.teacher_fingerprint:
            return (
                f"the teacher at {address} was changed: its fingerprint is "
                f"{info.teacher_fingerprint}, this run began with "
                f"{self._info.teacher_fingerprint}. Connect again to train with the new one."
            )
        restarted = given and not self._links  # a service that nobody else is left of
        if info.service_id != self._info.service_id and not restarted:
            return (
                f"{address} is another service ({info.service_id}) than this client is connected "
                f"to ({self._info.service_id}), with the same teacher. Give addresses of one "
                "service, or start its replicas with one --service-id."
            )
        return ""

    async def _check_same_service(self, address: str) -> None:
        """Raises IncompatibleTeacher if another service answers at a given address."""
        async with self._connection.channel(address, CHANNEL_OPTIONS) as channel:
            try:
                info = await self._describe(channel, TRY_S[0])
                if self._refusal(info, address, given=False):
                    info = await self._confirmed(info, address, channel, TRY_S[0])
            except grpc.aio.AioRpcError:
                return  # it may come up later
        if refusal := self._refusal(info, address, given=False):
            raise IncompatibleTeacher(refusal)
        self._learn(info)

    def _learn(self, info: teacher_pb2.TeacherInfo) -> None:
        """Takes over who is there; replicas that drain get no more requests.

        One that is not listed may only be out of sight of the one that was asked.
        """
        self._members = {card.id: card.address for card in info.replicas if card.state == "ready"}
        for card in info.replicas:
            if link := self._links.get(card.id):
                (self._dispatch.unpause if card.state == "ready" else self._dispatch.pause)(link)

    async def _refresh(self, link: _Link) -> None:
        """Asks one replica who else is there."""
        try:
            info = await self._describe(link.channel, PROBE_S)
        except grpc.aio.AioRpcError:
            return  # the link itself will tell
        if not self._refusal(info, link.address, given=False):
            self._learn(info)

    def _open_missing(self) -> None:
        """Starts to connect to replicas that are listed and have no link."""
        now = time.monotonic()
        for replica_id, address in self._members.items():
            failures = self._failures.get(address)
            if (
                replica_id in self._links
                or address in self._opening
                or (failures is not None and now < failures.until_s)
            ):
                continue
            task = asyncio.create_task(self._open_listed(address))
            self._opening[address] = task
            task.add_done_callback(lambda _, address=address: self._opening.pop(address))

    async def _open_listed(self, address: str) -> None:
        try:
            await self._open(address, given=False)
        except Exception:
            logger.exception("the client failed to connect to %s", address)

    def _left_out(self, address: str, why: str) -> bool:
        self._last_error = f"{address}: {why}"
        self._leave_alone(address)
        logger.debug("left out %s", self._last_error)
        return False

    def _leave_alone(self, address: str) -> None:
        failures = self._failures.setdefault(address, _Failures())
        backoff_s = BACKOFF_S[min(failures.count, len(BACKOFF_S) - 1)]
        failures.count += 1
        failures.until_s = time.monotonic() + backoff_s

    def _watch(self, link: _Link) -> None:
        """Asks a silent link whether it lives; asks again for a request that was passed over."""
        now = time.monotonic()
        if link.distrusted_until_s is not None and now > link.distrusted_until_s:
            link.distrusted_until_s = None
            self._dispatch.trust(link)
        oldest = next(iter(self._dispatch.outstanding(link).values()), None)
        if oldest is None:
            link.heard_s = link.answered_s = now  # nobody asked it anything
            return
        if now - link.heard_s > PROBE_AFTER_S and (link.probe is None or link.probe.done()):
            link.probe = self._spawn(self._probe(link))
        if oldest.passed_s is not None and now - oldest.passed_s > self._stall_s():
            logger.warning("no answer to one request while later ones are answered, asking again")
            self.counters.resent += 1
            self._dispatch.again(oldest)
        factor = 1.0 if link.idle else BUSY_FACTOR
        if now - link.answered_s > self._stall_s() * factor * 2**self._left_waiting:
            # Requests or answers were lost on the way: a flipped bit in a number is enough. With
            # the stream the replica forgets those that it may still have.
            self._left_waiting += 1
            silent_s = now - link.answered_s
            self._lose(
                link, f"it lives and has answered nothing for {silent_s:.0f} s", stalled=True
            )

    async def _probe(self, link: _Link) -> None:
        """Loses a link whose replica is frozen, or stuck in a forward while others are ready."""
        asked_s = time.monotonic()
        try:
            info = await self._describe(link.channel, PROBE_S)
        except grpc.aio.AioRpcError as error:
            if link.heard_s <= asked_s:  # nothing at all came meanwhile
                silent_s = time.monotonic() - link.heard_s
                self._lose(link, f"silent for {silent_s:.0f} s: {_explain(error)}", stalled=True)
            return
        link.heard_s = time.monotonic()
        self._learn(info)
        busy_s = _own_card(info).busy_ms / 1000
        link.idle = busy_s == 0
        if busy_s > self._stall_s() and len(self._links) > 1:
            self._stuck += 1
            self._stuck_s = min(self._stuck_s, busy_s)
            self._lose(link, f"its batch has taken {busy_s:.0f} s", stalled=True)

    def _stall_s(self) -> float:
        """After how long a batch counts as stuck; longer each time that one did."""
        return max(STALL_S * 2**self._stuck, STALL_FACTOR * self._longest_batch_s)

    def _lose(self, link: _Link, why: str, *, stalled: bool = False) -> None:
        """Gives the link up; its unanswered requests go to the others."""
        if self._links.get(link.replica_id) is not link:
            return
        del self._links[link.replica_id]
        for address in {link.address, self._members.get(link.replica_id, link.address)}:
            self._leave_alone(address)
        count = self._dispatch.close(link)
        self._spawn(_hang_up(link))
        self._last_error = f"{link.address}: {why}"
        if not count:
            return  # nobody waits for it
        now = time.monotonic()
        self._quiet_since_s = self._quiet_since_s or now
        self.counters.reconnects += 1
        self.counters.stalled += stalled
        self.counters.resent += count
        others = f"{len(self._links)} others" if self._links else "nobody else yet"
        logger.warning(
            "lost the teacher at %s; %d requests go to %s", self._last_error, count, others
        )
        if now - self._quiet_since_s > self._patience_s:
            self._fail_all(self._gone(now - self._quiet_since_s, ()))
        self._wake.set()

    # One link: requests out, answers in.

    async def _converse(self, link: _Link) -> None:
        """Sends and receives on one stream until it ends."""
        call = link.stub.Score(metadata=self._connection.metadata)
        sending = asyncio.create_task(self._send(link, call))
        link.tasks.append(sending)
        try:
            async for response in call:
                link.heard_s = link.answered_s = time.monotonic()
                link.idle = False
                if response is None:  # gRPC's way to hand out bytes that are no message
                    self.counters.corrupt += 1
                    code, details = grpc.StatusCode.UNKNOWN, NO_MESSAGE
                    break
                self.counters.received_nbytes += response.ByteSize()
                self._receive(link, response)
            else:
                code, details = await call.code(), await call.details()
        except grpc.aio.AioRpcError as error:
            code, details = error.code(), error.details()
        except Exception as error:
            self._give_up(error)
            code, details = grpc.StatusCode.UNKNOWN, f"the client failed: {error!r}"
        finally:
            sending.cancel()
            call.cancel()
        self._listen_first = code == grpc.StatusCode.INTERNAL
        why = f"{code.name}: {details or 'the service ended the stream'}"
        self._lose(link, why)
        if code in RETRIED or code == grpc.StatusCode.OK:
            return
        self._refused += 1
        # Once may be a flipped bit; a request that cannot be read on the other side always is one.
        flips = MAX_ATTEMPTS if code == grpc.StatusCode.INVALID_ARGUMENT else 1
        if self._refused > flips:
            kind = BY_CODE.get(code.value[0], ProtocolError)
            self._fail_all(kind(f"{link.address}: {why}"))

    async def _send(self, link: _Link, call: Any) -> None:
        """Writes requests; a broken stream is left to the reader to report."""
        if self._listen_first:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FIRST_SIGN_S):
                    await call.initial_metadata()
        try:
            while True:
                pending = self._dispatch.to_write(await link.outbox.get())
                if pending is None:
                    continue
                self.counters.sent_nbytes += pending.request.ByteSize()
                pending.written_s = time.monotonic()
                await call.write(pending.request)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return
        except Exception as error:
            self._give_up(error)
            call.cancel()

    def _receive(self, link: _Link, response: teacher_pb2.ScoreResponse) -> None:
        ended = self._dispatch.receive(link, response)
        if ended is None:
            return
        pending, fate = ended
        try:
            self._take(link, response, pending, fate)
        except BaseException as error:  # nobody else knows of this request any more
            logger.error("the client failed", exc_info=error)
            _resolve(pending, _bug(error))

    def _take(
        self, link: _Link, response: teacher_pb2.ScoreResponse, pending: Pending, fate: Fate
    ) -> None:
        """What follows from the message that ended a request."""
        oldest = next(iter(self._dispatch.outstanding(link).values()), None)
        if oldest is not None and oldest.number < pending.number and oldest.passed_s is None:
            oldest.passed_s = time.monotonic()
        if fate is Fate.DAMAGED:
            self._ask_again(pending, TargetsCorrupt("an answer is not what the teacher wrote"))
            return
        self._quiet_since_s = None
        self._refused = 0
        if fate is Fate.ANSWERED:
            link.failures = 0
            timing = response.part.timing
            batch_s = (timing.forward_us + timing.head_us) / 1e6
            # No batch takes longer than its answers do, whatever a flipped bit says.
            batch_s = min(batch_s, link.answered_s - pending.written_s)
            self._longest_batch_s = min(600.0, max(self._longest_batch_s, batch_s))
            self._spawn(self._finish(pending), pending)
        else:
            self._spawn(self._handle_error(pending, response.error), pending)

    async def _finish(self, pending: Pending) -> None:
        """Checks and decodes a whole answer off the loop; asks again if it is damaged."""
        assert self._info is not None
        loop = asyncio.get_running_loop()
        try:
            decoding = loop.run_in_executor(
                self._decoder, _decoded, pending, self._info.teacher_fingerprint, self.id_tables
            )
        except RuntimeError:  # the thread takes nothing any more: closed, or the interpreter ends
            _resolve(pending, TeacherError(CLOSED))
            return
        try:
            answer = await decoding
        except (CodecError, TargetsCorrupt, IncompatibleTeacher) as error:
            self._ask_again(pending, error)
            return
        except ProtocolError as error:
            _resolve(pending, error)
            return
        self.counters.rows += answer.targets.num_rows
        self.counters.payload_nbytes += sum(len(part.payload) for part in pending.parts.values())
        _resolve(pending, answer)

    def _ask_again(self, pending: Pending, error: Exception) -> None:
        """After a damaged answer, up to MAX_ATTEMPTS times."""
        self.counters.corrupt += 1
        pending.damaged += 1
        if pending.damaged < MAX_ATTEMPTS:
            logger.warning("targets arrived damaged, asking again: %s", error)
            self.counters.resent += 1
            self._dispatch.again(pending)
            return
        kind: type[TeacherError] = TargetsCorrupt
        if isinstance(error, IncompatibleTeacher):
            kind = IncompatibleTeacher
        elif isinstance(error, CodecError) and "digest" not in str(error):
            kind = ProtocolError
        failure = kind(f"{error} ({pending.damaged} times, from {self._where()})")
        failure.__cause__ = error
        _resolve(pending, failure)

    async def _handle_error(self, pending: Pending, error: teacher_pb2.RequestError) -> None:
        """Waits out RESOURCE_EXHAUSTED, asks once more after DATA_LOSS and INTERNAL, raises the rest."""
        kind = BY_CODE.get(error.code, ProtocolError)
        now = time.monotonic()
        if kind is TeacherOverloaded and error.reason != "OUT_OF_MEMORY":
            pending.waited_since_s = pending.waited_since_s or now
            delay = error.retry_after_ms / 1000 or random.uniform(0.5, 1.0)
            if now + delay - pending.waited_since_s <= self._patience_s:
                await self._pause(delay)
                self.counters.resent += 1
                self._dispatch.submit(pending)
                return
        elif kind is TeacherUnavailable or (kind is TargetsCorrupt and pending.damaged == 0):
            pending.damaged += kind is TargetsCorrupt
            self.counters.resent += 1
            self._dispatch.again(pending)
            return
        elif kind is TeacherInternalError:
            failed_before = bool(pending.failed_at)
            self._failed(pending, error.message)
            if not failed_before:
                if not self._dispatch.has_another(pending):
                    await self._pause(FAILED_PAUSE_S)
                self.counters.resent += 1
                self._dispatch.again(pending)
                return
        _resolve(pending, kind(error.message))

    def _failed(self, pending: Pending, why: str) -> None:
        """A replica answered a request with INTERNAL: others are asked for a while."""
        link = pending.link
        assert isinstance(link, _Link)
        pending.failed_at.add(link)
        if link.distrusted_until_s is not None:
            return  # of a request that was sent before the failure that is known of
        logger.warning("the teacher at %s failed, asking once more: %s", link.address, why)
        backoff_s = BACKOFF_S[min(link.failures, len(BACKOFF_S) - 1)]
        link.failures += 1
        link.distrusted_until_s = time.monotonic() + backoff_s
        self._dispatch.distrust(link)

    async def _pause(self, seconds: float) -> None:
        """Before a request is sent again; the keeper looks after the links meanwhile."""
        self._pausing += 1
        try:
            await asyncio.sleep(seconds)
        finally:
            self._pausing -= 1

    # Endings.

    def _spawn(
        self, work: Coroutine[Any, Any, None], pending: Pending | None = None
    ) -> "asyncio.Task[None]":
        """Runs work on the side; a request whose work is cancelled or fails is not left waiting."""
        task = asyncio.create_task(work)
        self._tasks.add(task)

        def ended(task: "asyncio.Task[None]") -> None:
            self._tasks.discard(task)
            failure = TeacherError(CLOSED)
            if not task.cancelled():
                cause = task.exception()
                if cause is None:
                    return
                logger.error("the client failed", exc_info=cause)
                failure = _bug(cause)
            if pending is not None:
                _resolve(pending, failure)

        task.add_done_callback(ended)
        return task

    def _give_up(self, error: Exception) -> None:
        """A bug of ours must not leave the trainer waiting for ever."""
        logger.error("the client failed", exc_info=error)
        self._fail_all(_bug(error))

    def _fail_all(self, error: TeacherError) -> None:
        self._quiet_since_s = None  # what is asked from now on has the whole patience again
        for pending in self._dispatch.take_all():
            own = type(error)(str(error))
            own.__cause__ = error.__cause__
            _resolve(pending, own)

    async def _diagnose(self) -> list[str]:
        """Of each given address, why it will not answer; empty where it may yet."""

        async def look(address: str) -> str:
            if self._failures[address].code is not grpc.StatusCode.UNAVAILABLE:
                return ""
            return await asyncio.to_thread(diagnose, address, self._connection)

        return await asyncio.gather(*map(look, self._addresses))

    def _gone(self, waited_s: float, found: Sequence[str]) -> TeacherUnavailable:
        """What to raise when nobody answers. found: what is known of the given addresses."""
        known = zip(self._addresses, found, strict=False)
        reasons = [why if len(found) == 1 else f"{one}: {why}" for one, why in known if why]
        why = " ".join(reasons) or "Is the address right, and has the service said 'ready'?"
        after = f" after {waited_s:.0f} s" if waited_s >= 1 else ""
        return TeacherUnavailable(
            f"no teacher answers at {self._where()}{after}. {why} (last attempt: {self._last_error})"
        )

    def _where(self) -> str:
        return ", ".join(self._addresses)


def _own_card(info: teacher_pb2.TeacherInfo) -> teacher_pb2.Replica:
    """The card of the replica that answered; one that says nothing of itself counts as ready."""
    own = (card for card in info.replicas if card.id == info.replica_id)
    return next(own, teacher_pb2.Replica(state="ready"))


def _lasting(info: teacher_pb2.TeacherInfo) -> bytes:
    """All that a replica says of its service that stays from one question to the next."""
    lasting = teacher_pb2.TeacherInfo()
    lasting.CopyFrom(info)
    lasting.ClearField("replicas")
    lasting.ClearField("replica_id")  # behind some proxies each question meets another one
    lasting.caller.ClearField("tokens_left_today")
    return lasting.SerializeToString(deterministic=True)


async def _hang_up(link: _Link) -> None:
    for task in link.tasks:
        task.cancel()
    await asyncio.gather(*link.tasks, return_exceptions=True)
    await link.channel.close()


def _decoded(pending: Pending, fingerprint: str, id_tables: Sequence[IdTable]) -> Answer:
    """`assemble` in the decode thread; what it was not made to raise becomes a ProtocolError."""
    try:
        return assemble(pending, fingerprint, id_tables)
    except (CodecError, TargetsCorrupt, IncompatibleTeacher):
        raise
    except BaseException as error:  # StopIteration and SystemExit too, which no loop can carry
        raise _bug(error) from error


def _bug(error: BaseException) -> ProtocolError:
    """What is raised for an exception that nobody expected; it keeps that as its cause."""
    failure = ProtocolError(f"the client failed on an answer: {error!r}")
    failure.__cause__ = error
    return failure


def _resolve(pending: Pending, result: Answer | TeacherError) -> None:
    if pending.future.done() or not pending.future.set_running_or_notify_cancel():
        return
    if isinstance(result, TeacherError):
        pending.future.set_exception(result)
    else:
        pending.future.set_result(result)


def _explain(error: grpc.aio.AioRpcError) -> str:
    """What the service said, whole; what gRPC said, in short."""
    if error.code() in RETRIED:
        return in_short(error.code(), error.details())
    return f"{error.code().name}: {error.details()}"
