"""Sends the requests of one client to a service and keeps them until they have an answer."""

import asyncio
import logging
import secrets
import time
from collections.abc import Iterable
from typing import BinaryIO

from logit_codec import IdTable
from logitstream.connection import Connection
from protos import teacher_pb2
from student_trainer.client.answers import Answers
from student_trainer.client.counters import Counters
from student_trainer.client.dispatch import Dispatch, Unanswered
from student_trainer.client.head_fetch import fetch_head
from student_trainer.client.id_table_cache import load_id_table
from student_trainer.client.keeper import Keeper
from student_trainer.client.pending import PendingTexts
from student_trainer.client.side_tasks import CLOSED, SideTasks, unexpected
from student_trainer.client.stalls import Stalls
from student_trainer.client.texts import Texts
from student_trainer.errors import TeacherError

logger = logging.getLogger(__name__)


class Session:
    """Connects to a service and takes requests for it; every method runs in the io thread's loop."""

    def __init__(self, connection: Connection, patience_s: float) -> None:
        self.counters = Counters()
        self.session_id = secrets.token_bytes(16)
        self._connection = connection
        self._patience_s = patience_s
        self._tasks = SideTasks()
        self._dispatch = Dispatch(lambda link, number: self._keeper.streams.send(link, number))  # type: ignore[arg-type]
        stalls = Stalls()
        self._answers = Answers(
            self._dispatch,
            stalls,
            self._tasks,
            self.counters,
            patience_s=patience_s,
            where=", ".join(connection.addresses),
        )
        self._texts = Texts(self._dispatch, self._answers, self._tasks, self.counters)
        self._keeper = Keeper(
            connection,
            self._dispatch,
            self._answers,
            self._texts,
            stalls,
            self._tasks,
            self.counters,
            patience_s=patience_s,
        )
        self._closed = False

    @property
    def replicas(self) -> list[str]:
        """The addresses of the replicas that this client has a stream to."""
        return [link.address for link in self._keeper.links.values()]

    @property
    def id_tables(self) -> list[IdTable]:
        """What answers may be coded with, beside the built-in identity."""
        return self._answers.id_tables

    async def open(self, patience_s: float) -> teacher_pb2.TeacherInfo:
        """Connects to the first address that answers in time, and checks the others.

        Raises TeacherUnavailable, at once where waiting cannot help.
        """
        await self._reach_within(patience_s)
        discovery, addresses = self._keeper.discovery, self._connection.addresses
        info = discovery.info
        assert info is not None
        if len(addresses) > 1:
            for other in await asyncio.gather(*map(discovery.check_same_service, addresses)):
                if other is not None:
                    self._keeper.learn(other)
        if info.id_tables:
            link = next(iter(self._keeper.links.values()))
            table = await load_id_table(
                info.id_tables[0], link.stub, self._connection.metadata, discovery.where
            )
            self.id_tables.append(table)
        self._tasks.spawn(self._keeper.run())
        return info

    async def _reach_within(self, patience_s: float) -> None:
        """Tries all addresses until one answers; gives up early where none ever will."""
        started_s = time.monotonic()
        was_hopeless = False
        while not await self._keeper.reach():
            waited_s = time.monotonic() - started_s
            diagnoses = await self._keeper.discovery.diagnose()
            is_hopeless = all(diagnoses)
            # Twice, with an attempt between: the service may have started between the two looks.
            if (was_hopeless and is_hopeless) or waited_s >= patience_s:
                raise self._keeper.discovery.make_unavailable(waited_s, diagnoses)
            was_hopeless = is_hopeless
            if not is_hopeless:
                await asyncio.sleep(0.1)

    async def close(self) -> None:
        """Ends all links; requests without an answer fail."""
        self._closed = True
        # The tasks first: the keeper would replace the links that are hung up here.
        await self._tasks.cancel()
        links = list(self._keeper.links.values())
        self._keeper.links.clear()
        await asyncio.gather(*(link.hang_up() for link in links))
        self._dispatch.fail_all(TeacherError(CLOSED))
        self._answers.close()

    async def fetch_head(self, fingerprint: str, file: BinaryIO) -> None:
        """Appends to a file what it lacks of the vocabulary head. Raises as `fetch_head` does."""
        await fetch_head(
            fingerprint,
            file,
            self._connection,
            self._keeper.discovery,
            lambda: self.replicas,
            self.counters,
            self._patience_s,
        )

    def give_up(self, texts: Iterable[PendingTexts]) -> None:
        """Stops waiting for texts that nobody wants any more, and tells the replicas."""
        for pending in texts:
            self._texts.give_up(pending)

    def submit(self, pending: Unanswered) -> None:
        """Sends a request, now or as soon as there is a link."""
        try:
            self._submit(pending)
        except BaseException as error:  # the io thread calls this: there is no caller to raise to
            logger.error("the client failed", exc_info=error)
            pending.resolve(unexpected(error))

    def _submit(self, pending: Unanswered) -> None:
        if self._closed:  # by another thread, after the caller looked
            pending.resolve(TeacherError(CLOSED))
            return
        self.counters.requests += 1
        links = self._keeper.links
        if not self._dispatch.num_unanswered:
            # The keeper slept, so the links' clocks stand where the last answer left them.
            now = time.monotonic()
            for link in links.values():
                link.rest(now)
        self._dispatch.submit(pending)
        if not links or self._dispatch.num_unanswered == 1:
            self._keeper.wake.set()
