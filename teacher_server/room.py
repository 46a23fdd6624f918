"""Bytes of unfinished answers, bounded per stream and per process, and fair among teams.

A request waits here before it is scored, so that what a slow reader does not read is never made.
When the process is full, a team may still take up to its equal part of the room: readers that
stopped, however many streams they have, can fill the room for their own team and for nobody else.
A stream that holds nothing may always take one answer.
"""

import asyncio
from collections import deque
from typing import Self


class ProcessRoom:
    """What all streams of a replica may hold together; use one `stream` of it per stream."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
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
        return max((room.taken_nbytes for room in self._streams), default=0)

    def _team(self, name: str) -> "_TeamRoom":
        return self._teams.setdefault(name, _TeamRoom())

    def _fits(self, team: "_TeamRoom", nbytes: int) -> bool:
        return (
            self.taken_nbytes + nbytes <= self.nbytes
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
        """Waits until `nbytes` fit, or until this stream holds nothing else."""
        process = self._process
        while self.taken_nbytes and self.taken_nbytes + nbytes > self.nbytes:
            self._given.clear()
            await self._given.wait()
        mine = process._team(team)
        if self.taken_nbytes and (mine.waiting or not process._fits(mine, nbytes)):
            self._given.clear()
            mine.waiting.append(self._given)
            try:
                while self.taken_nbytes and not (
                    mine.waiting[0] is self._given and process._fits(mine, nbytes)
                ):
                    self._given.clear()
                    await self._given.wait()
            finally:
                mine.waiting.remove(self._given)
                mine.wake()
                process._forget(team)
        self.taken_nbytes += nbytes
        process._move(team, nbytes)

    def give(self, nbytes: int, team: str) -> None:
        """Gives back what was taken."""
        self.taken_nbytes -= nbytes
        self._given.set()
        self._process._move(team, -nbytes)
