"""Bytes of unfinished answers, bounded per stream and per process, and fair among teams.

A request waits here before it is scored, so that what a slow reader does not read is never made.
When the process is full, a team may still take up to its equal part of the room: readers that
stopped, however many streams they have, can fill the room for their own team and for nobody else.
A team that holds nothing may always take one answer, larger than its room or not; its streams share
that one. Where readers that stopped keep others of their own team waiting, the one that stopped first
loses its stream after a while, and can ask again on another one.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Self

logger = logging.getLogger(__name__)

PATIENCE_S = 5.0
"""How long a stream waits for room in the process before somebody of its team may have to go."""
STOPPED_S = 30.0
"""A stream that has not been read for so long may have to go."""


class ProcessRoom:
    """What all streams of a replica may hold together; use one `stream` of it per stream.

    copies_nbytes: what a stream holds beside its answers, at most, while one of their parts is
    written: the message and its bytes, in Python and in gRPC.
    """

    def __init__(self, nbytes: int, copies_nbytes: int = 0) -> None:
        self.nbytes = nbytes
        self.copies_nbytes = copies_nbytes
        self.taken_nbytes = 0
        self.empty = asyncio.Event()
        """Set while there is no stream."""
        self.empty.set()
        self._streams: set[StreamRoom] = set()
        self._teams: dict[str, _TeamRoom] = {}
        """Of the teams that hold or want something."""

    def stream(self, nbytes: int) -> "StreamRoom":
        """The room of a new stream, which may hold `nbytes`; a context manager."""
        return StreamRoom(self, nbytes)

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    @property
    def fullest_nbytes(self) -> int:
        """What the stream holds that holds most."""
        return max((room.taken_nbytes for room in tuple(self._streams)), default=0)

    def _team(self, name: str) -> "_TeamRoom":
        return self._teams.setdefault(name, _TeamRoom())

    def _fits(self, team: "_TeamRoom", nbytes: int) -> bool:
        return (
            not team.taken_nbytes
            or self.taken_nbytes + nbytes <= self.nbytes
            or team.taken_nbytes + nbytes <= self.nbytes // len(self._teams)
        )

    def _move(self, name: str, nbytes: int) -> None:
        """Counts what a team took, or with a minus gave back, and wakes who may go on."""
        team = self._team(name)
        team.taken_nbytes += nbytes
        self.taken_nbytes += nbytes
        self._forget(name)
        if nbytes < 0:
            # One of each team looks whether it fits now; if so, it wakes the next of its team.
            for other in self._teams.values():
                other.wake()

    def _send_one_away(self, name: str) -> None:
        """Ends the stream of a team that has been waiting longest to be read, if it stopped."""
        streams = [room for room in self._streams if room.team == name and room.blocked_s]
        first = min(streams, key=lambda room: room.blocked_s, default=None)
        if first is None or time.monotonic() - first.blocked_s < STOPPED_S:
            return
        first.blocked_s = time.monotonic()  # it ends in a moment; not twice
        logger.warning(
            "a stream of team %s was not read for %.0f s while others of the team had no room; it "
            "was ended",
            *(name, STOPPED_S),
        )
        first.end()

    def _forget(self, name: str) -> None:
        team = self._teams[name]
        if not team.taken_nbytes and not team.waiting:
            del self._teams[name]


class _TeamRoom:
    """What the streams of one team hold, and which of them wait for the process to have room."""

    def __init__(self) -> None:
        self.taken_nbytes = 0
        self.waiting: deque[asyncio.Event] = deque()

    def wake(self) -> None:
        if self.waiting:
            self.waiting[0].set()


class StreamRoom:
    """What one stream may hold. One task takes, any may give."""

    def __init__(self, process: ProcessRoom, nbytes: int) -> None:
        self.nbytes = nbytes
        self.taken_nbytes = 0
        self.team = ""
        """Whose answer it took last."""
        self.blocked_s = 0.0
        """Since when a part waits to be read, as of time.monotonic(); 0: none does."""
        self.end: Callable[[], object] = lambda: None
        """Called where the stream has to go."""
        self._copies_nbytes = 0
        self._process = process
        self._given = asyncio.Event()

    def __enter__(self) -> Self:
        self._process._streams.add(self)
        self._process.empty.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self._process._streams.discard(self)
        if not self._process._streams:
            self._process.empty.set()

    async def take(self, nbytes: int, team: str) -> None:
        """Waits until `nbytes` fit, or until this stream, and in the process its team, holds nothing."""
        process, self.team = self._process, team
        while self.taken_nbytes and self.taken_nbytes + nbytes > self.nbytes:
            self._given.clear()
            await self._given.wait()
        mine = process._team(team)
        if mine.waiting or not process._fits(mine, nbytes):
            self._given.clear()
            mine.waiting.append(self._given)
            try:
                while not (mine.waiting[0] is self._given and process._fits(mine, nbytes)):
                    self._given.clear()
                    try:
                        async with asyncio.timeout(PATIENCE_S):
                            await self._given.wait()
                    except TimeoutError:
                        if mine.waiting[0] is self._given:
                            process._send_one_away(team)
            finally:
                mine.waiting.remove(self._given)
                mine.wake()
                process._forget(team)
        self.taken_nbytes += nbytes
        process._move(team, nbytes + self._count_copies(nbytes))

    def give(self, nbytes: int, team: str) -> None:
        """Gives back what was taken."""
        self.taken_nbytes -= nbytes
        self._given.set()
        copies, self._copies_nbytes = self._copies_nbytes, 0
        if self.taken_nbytes:
            copies, self._copies_nbytes = 0, copies
        self._process._move(team, -nbytes - copies)

    def _count_copies(self, nbytes: int) -> int:
        """How much more the copies may take, now that an answer of so many bytes is there."""
        before = self._copies_nbytes
        self._copies_nbytes = max(before, min(2 * nbytes, self._process.copies_nbytes))
        return self._copies_nbytes - before
