"""Keeps a link to every replica while requests are outstanding, and gives up those that are lost.

The keeper waits, visibly and up to the patience, when no replica is left. Everything here runs in the
io thread's loop, so that state changes only at an await.
"""

import asyncio
import contextlib
import logging
import random
import time

import grpc

from logitstream.connection import Connection
from protos import teacher_pb2
from student_trainer.client.answers import Answers
from student_trainer.client.counters import Counters
from student_trainer.client.describe import own_card
from student_trainer.client.discovery import Discovery
from student_trainer.client.dispatch import Dispatch
from student_trainer.client.links import Link, SilentReplica
from student_trainer.client.pending import Pending
from student_trainer.client.side_tasks import SideTasks, unexpected
from student_trainer.client.stalls import Stalls
from student_trainer.client.streams import Streams
from student_trainer.client.texts import Texts
from student_trainer.errors import TeacherError

logger = logging.getLogger(__name__)

TICK_S = 0.25
"""How often links are checked while requests are outstanding."""
REFRESH_S = 3.0
"""How often a replica is asked for the list of replicas in that time."""
LOG_WAIT_S = 5.0
"""How often a wait for the teacher is logged."""


class Keeper:
    """Owns the links to the replicas of one service."""

    def __init__(
        self,
        connection: Connection,
        dispatch: Dispatch,
        answers: Answers,
        texts: Texts,
        stalls: Stalls,
        tasks: SideTasks,
        counters: Counters,
        *,
        patience_s: float,
    ) -> None:
        self.links: dict[str, Link] = {}
        """By the id of their replica."""
        self.discovery = Discovery(connection, self.links.keys(), stalls)
        self.wake = asyncio.Event()
        """Set when there is something to do at once; the keeper sleeps while nothing is asked."""
        self._connection = connection
        self._dispatch = dispatch
        self._answers = answers
        self._texts = texts
        self.streams = Streams(
            dispatch,
            answers,
            texts,
            lose=self._lose,
            fail_all=self._fail_all,
            note_answer=self._note_answer,
        )
        self._stalls = stalls
        self._tasks = tasks
        self._counters = counters
        self._patience_s = patience_s
        self._opening: set[str] = set()
        """Addresses of listed replicas that are being connected to."""
        self._quiet_since_s: float | None = None
        """When the first link since the last answer was lost."""

    @property
    def _is_needed(self) -> bool:
        """Whether a caller waits for an answer."""
        return self._dispatch.num_unanswered + self._answers.num_paused > 0

    async def run(self) -> None:
        """Keeps links to all replicas while anything is outstanding."""
        refreshed_s = time.monotonic()
        while True:
            # Not wait_for: before Python 3.12 it loses a cancellation that comes with the event, and
            # closing would wait for this task for ever.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S if self._is_needed else None):
                    await self.wake.wait()
            self.wake.clear()
            try:
                if not self._is_needed:
                    continue
                if not self.links:
                    await self._wait_for_a_link()
                now = time.monotonic()
                if now - refreshed_s > REFRESH_S and self.links:
                    refreshed_s = now
                    self._tasks.spawn(self._refresh(random.choice(list(self.links.values()))))
                for address in self.discovery.missing():
                    if address not in self._opening:
                        self._opening.add(address)
                        self._tasks.spawn(self._connect_on_the_side(address))
                for link in list(self.links.values()):
                    self._check(link)
            except Exception as error:
                self._fail_all(error)

    async def _wait_for_a_link(self) -> None:
        """Reconnects to any replica. Raises TeacherUnavailable after the patience."""
        started_s = logged_s = time.monotonic()
        self._quiet_since_s = self._quiet_since_s or started_s
        delay_s = 0.05
        while not await self.reach():
            now = time.monotonic()
            quiet_s = now - self._quiet_since_s
            if quiet_s > self._patience_s:
                raise self.discovery.make_unavailable(quiet_s, await self.discovery.diagnose())
            if now - logged_s > LOG_WAIT_S:
                logged_s = now
                logger.warning(
                    "waiting for the teacher at %s for %.0f s (up to %.0f s), %d requests: %s",
                    self.discovery.where,
                    quiet_s,
                    self._patience_s,
                    self._dispatch.num_unanswered,
                    self.discovery.last_error,
                )
            await asyncio.sleep(delay_s)
            delay_s = min(1.0, 1.5 * delay_s)
        if logged_s != started_s:
            back = ", ".join(link.address for link in self.links.values())
            logger.warning("the teacher is back at %s", back)

    async def reach(self) -> bool:
        """Tries every known address once, until one answers. Raises as `Discovery.find` does."""
        for address, is_given in self.discovery.known_addresses():
            if await self._connect(address, required=is_given):
                return True
        return False

    async def _connect(self, address: str, *, required: bool) -> bool:
        """Opens a link to the replica at an address; False if there is none that can be used.

        Raises as `Discovery.find` does.
        """
        replica = await self.discovery.find(address, required=required)
        if replica is None:
            return False
        if replica.channel is None:
            return True  # there is a link to this replica already
        self.learn(replica.info)
        link = Link(
            replica.info.replica_id,
            address,
            replica.channel,
            self._connection.metadata,
            self._counters,
        )
        self.links[link.replica_id] = link
        self.streams.open(link)
        self._dispatch.add_link(link)
        return True

    async def _connect_on_the_side(self, address: str) -> None:
        """Opens a link to a listed replica; failures are logged and tried again later."""
        try:
            await self._connect(address, required=False)
        except Exception:
            logger.exception("the client failed to connect to %s", address)
        finally:
            self._opening.discard(address)

    def learn(self, info: teacher_pb2.TeacherInfo) -> None:
        """Takes over which replicas there are; those that drain get no more requests."""
        self.discovery.learn(info)
        for card in info.replicas:
            if link := self.links.get(card.id):
                self._dispatch.set_paused(link, card.state != "ready")

    async def _refresh(self, link: Link) -> None:
        """Asks one replica which others there are."""
        try:
            info = await link.describe()
        except grpc.aio.AioRpcError:
            return  # if the link is broken, its stream will end
        if not self.discovery.explain_refusal(info, link.address):
            self.learn(info)

    def _check(self, link: Link) -> None:
        """Lets a link's replica show that it lives, and gives the link up if nothing else helps."""
        now = time.monotonic()
        if link.regains_trust(now):
            self._dispatch.set_trusted(link, True)
        oldest = self._dispatch.oldest(link)
        if oldest is None:
            link.rest(now)
            return
        if link.needs_probe(now):
            link.probing = self._tasks.spawn(self._probe(link))
        self._texts.check(link, now, self._stalls.batch_s)
        scored = self._dispatch.oldest(link, Pending)
        passed_s = scored and scored.passed_s
        if scored and passed_s is not None and now - passed_s > self._stalls.batch_s:
            logger.warning("no answer to one request while later ones are answered, asking again")
            self._counters.resent += 1
            self._dispatch.resend(scored)
        silent_s = now - link.last_answer_s
        if silent_s > self._stalls.answer_s(idle=link.is_idle):
            # Requests or answers were lost on the way: a flipped bit in a number is enough. When the
            # stream ends, the replica forgets those of them that it may still have.
            self._stalls.count_unanswered()
            why = f"its replica lives but has answered nothing for {silent_s:.0f} s"
            self._lose(link, why, stalled=True)

    async def _probe(self, link: Link) -> None:
        """Gives up a link whose replica is frozen, or stuck in a batch while others are ready."""
        try:
            info = await link.probe()
        except SilentReplica as silence:
            self._lose(link, str(silence), stalled=True)
            return
        if info is None:
            return
        self.learn(info)
        busy_s = own_card(info).busy_ms / 1000
        link.is_idle = busy_s == 0
        # Where no other replica is left, the stuck one may still finish: better late than never.
        if busy_s > self._stalls.batch_s and len(self.links) > 1:
            self._stalls.count_stuck(busy_s)
            self._lose(link, f"its batch has taken {busy_s:.0f} s", stalled=True)

    def _note_answer(self) -> None:
        """The service works: patience starts again at the next loss."""
        self._quiet_since_s = None

    def _lose(self, link: Link, why: str, *, stalled: bool = False) -> None:
        """Gives a link up and sends its unanswered requests to the others."""
        if self.links.get(link.replica_id) is not link:
            return  # lost already, and perhaps replaced
        del self.links[link.replica_id]
        self.discovery.report_loss(link.replica_id, link.address, why)
        num_resent = self._dispatch.resend_lost(link)
        self._tasks.spawn(link.hang_up())
        if not num_resent:
            return
        now = time.monotonic()
        self._quiet_since_s = self._quiet_since_s or now
        self._counters.reconnects += 1
        self._counters.stalled += stalled
        self._counters.resent += num_resent
        move = _describe_move(num_resent, len(self.links))
        logger.warning("lost the teacher at %s: %s; %s", link.address, why, move)
        quiet_s = now - self._quiet_since_s
        if quiet_s > self._patience_s:
            self._fail_all(self.discovery.make_unavailable(quiet_s, ()))
        self.wake.set()

    def _fail_all(self, error: Exception, *, texts_only: bool = False) -> None:
        """Ends every request with an error; one that is not a TeacherError is a bug of this client."""
        if not isinstance(error, TeacherError):
            logger.error("the client failed", exc_info=error)
            error = unexpected(error)
        self._quiet_since_s = None  # later requests have the whole patience again
        self._dispatch.fail_all(error, texts_only=texts_only)


def _describe_move(num_requests: int, num_replicas: int) -> str:
    """Says where the requests of a lost link go."""
    requests = "1 request" if num_requests == 1 else f"{num_requests} requests"
    if num_replicas == 0:
        return f"{requests} waiting for a replica"
    replicas = "1 other replica" if num_replicas == 1 else f"{num_replicas} other replicas"
    return f"moving {requests} to {replicas}"
