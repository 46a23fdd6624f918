"""Bounds the bytes of unfinished answers, per stream and per replica, fairly among teams.

A sequence waits here before it is queued, so that an answer that a slow reader would not read is
never made. When the replica's budget is used up, a team may still take up to its equal part of it:
readers that stopped, however many streams they have, can use up the budget of their own team and of
no other. A team that holds nothing may always take one answer, even one above its part; its streams
share that one. Where readers that stopped keep other streams of their own team waiting, the stream
that stopped first is ended after a while; its client can send the requests again on another one.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Self

import grpc

from teacher_server.errors import RequestRefused

logger = logging.getLogger(__name__)

PATIENCE_S = 5.0
"""How long a stream waits for the replica's budget before a stream of its team may be ended."""
STOPPED_S = 30.0
"""A stream that has not been read for this long may be ended."""


class ReplicaBudget:
    """Counts what all streams of a replica hold together; give each stream a `stream` of it.

    copies_nbytes: upper bound of what a stream holds beside its answers while one of their parts is
    written: the message and its bytes, in Python and in gRPC.
    """

    def __init__(self, nbytes: int, copies_nbytes: int = 0) -> None:
        self.nbytes = nbytes
        self.copies_nbytes = copies_nbytes
        self.taken_nbytes = 0
        self.empty = asyncio.Event()
        """Set while there is no stream."""
        self.empty.set()
        self._streams: set[StreamBudget] = set()
        self._teams: dict[str, _TeamBudget] = {}
        """The teams that hold or wait for bytes."""

    def stream(self, nbytes: int) -> "StreamBudget":
        """Returns the budget of a new stream, which may hold `nbytes`; a context manager."""
        return StreamBudget(self, nbytes)

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    @property
    def fullest_nbytes(self) -> int:
        """What the stream with the most bytes holds."""
        return max((stream.taken_nbytes for stream in tuple(self._streams)), default=0)

    def _team(self, name: str) -> "_TeamBudget":
        return self._teams.setdefault(name, _TeamBudget())

    def _fits(self, team: "_TeamBudget", nbytes: int) -> bool:
        return (
            not team.taken_nbytes
            or self.taken_nbytes + nbytes <= self.nbytes
            or team.taken_nbytes + nbytes <= self.nbytes // len(self._teams)
        )

    def _count(self, name: str, nbytes: int) -> None:
        """Counts bytes that a team took, or below 0 released, and wakes streams that may fit now."""
        team = self._team(name)
        team.taken_nbytes += nbytes
        self.taken_nbytes += nbytes
        self._forget(name)
        if nbytes < 0:
            # One stream of each team looks whether it fits; if so, it wakes the next of its team.
            for other in self._teams.values():
                other.wake()

    def _end_stopped_stream(self, name: str) -> None:
        """Ends the stream of a team that has not been read for longest, if it stopped."""
        blocked = [stream for stream in self._streams if stream.team == name and stream.blocked_s]
        first = min(blocked, key=lambda stream: stream.blocked_s, default=None)
        if first is None or time.monotonic() - first.blocked_s < STOPPED_S:
            return
        first.blocked_s = time.monotonic()  # it ends in a moment; do not end it twice
        logger.warning(
            "a stream of team %s was not read for %.0f s while other streams of the team waited "
            "for its bytes; it was ended",
            name,
            STOPPED_S,
        )
        first.end()

    def _forget(self, name: str) -> None:
        """Drops a team that neither holds nor waits: the others' equal parts grow."""
        team = self._teams[name]
        if not team.taken_nbytes and not team.waiting:
            del self._teams[name]


class _TeamBudget:
    """Counts what the streams of one team hold, and queues those that wait for the replica."""

    def __init__(self) -> None:
        self.taken_nbytes = 0
        self.waiting: deque[asyncio.Event] = deque()

    def wake(self) -> None:
        if self.waiting:
            self.waiting[0].set()


class StreamBudget:
    """Counts what one stream holds. One task acquires, any may release."""

    def __init__(self, replica: ReplicaBudget, nbytes: int) -> None:
        self.nbytes = nbytes
        self.taken_nbytes = 0
        self.team = ""
        """The team that acquired last."""
        self.blocked_s = 0.0
        """time.monotonic() since when a part waits to be read; 0: none does."""
        self.end: Callable[[], object] = lambda: None
        """Called when the stream has to end."""
        self._copies_nbytes = 0
        self._replica = replica
        self._released = asyncio.Event()

    def __enter__(self) -> Self:
        self._replica._streams.add(self)
        self._replica.empty.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self._replica._streams.discard(self)
        if not self._replica._streams:
            self._replica.empty.set()

    @contextlib.contextmanager
    def may_end_task(self) -> Iterator[None]:
        """Lets the budget end what the current task does within. Raises RequestRefused if it did.

        A handler that only raised CancelledError would leave its client without any status: one that reads
        on later would wait for ever.
        """
        task = asyncio.current_task()
        assert task is not None
        is_ended = False

        def end() -> None:
            nonlocal is_ended
            is_ended = True
            task.cancel()

        self.end = end
        try:
            yield
        except asyncio.CancelledError:
            if not is_ended or task.uncancel():
                raise  # its client has left
            raise RequestRefused(
                grpc.StatusCode.UNAVAILABLE,
                "NOT_READ",
                f"this stream was not read for {STOPPED_S:.0f} s while others of its team waited for its "
                "bytes. Send what is not answered again on another one, and read what comes.",
            ) from None
        finally:
            self.end = lambda: None

    async def acquire(self, nbytes: int, team: str) -> None:
        """Waits until `nbytes` fit into the stream's and the replica's budget, and takes them.

        They also fit if the stream, and in the replica its team, holds nothing.
        """
        self.team = team
        while self.taken_nbytes and self.taken_nbytes + nbytes > self.nbytes:
            self._released.clear()
            await self._released.wait()
        own_team = self._replica._team(team)
        if own_team.waiting or not self._replica._fits(own_team, nbytes):
            await self._wait_for_replica(own_team, nbytes)
        self.taken_nbytes += nbytes
        self._replica._count(team, nbytes + self._count_copies(nbytes))

    async def _wait_for_replica(self, own_team: _TeamBudget, nbytes: int) -> None:
        """Queues after the other streams of the team until `nbytes` fit into the replica."""
        replica, turn = self._replica, self._released
        turn.clear()
        own_team.waiting.append(turn)
        try:
            while not (own_team.waiting[0] is turn and replica._fits(own_team, nbytes)):
                turn.clear()
                try:
                    async with asyncio.timeout(PATIENCE_S):
                        await turn.wait()
                except TimeoutError:
                    if own_team.waiting[0] is turn:
                        replica._end_stopped_stream(self.team)
        finally:
            own_team.waiting.remove(turn)
            # Cancelled or not: the next stream must not miss the release that woke this one.
            own_team.wake()
            replica._forget(self.team)

    def release(self, nbytes: int, team: str) -> None:
        """Gives back what was acquired."""
        self.taken_nbytes -= nbytes
        self._released.set()
        copies, self._copies_nbytes = self._copies_nbytes, 0
        if self.taken_nbytes:
            # Other answers of this stream may still be written: their copies stay counted.
            copies, self._copies_nbytes = 0, copies
        self._replica._count(team, -nbytes - copies)

    def _count_copies(self, nbytes: int) -> int:
        """Returns how much the bound of the copies grows with an answer of `nbytes`."""
        before = self._copies_nbytes
        self._copies_nbytes = max(before, min(2 * nbytes, self._replica.copies_nbytes))
        return self._copies_nbytes - before
