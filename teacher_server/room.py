"""Bytes of unfinished answers, bounded per stream and per process.

A request waits here before it is scored, so that what a slow reader does not read is never made.
A stream that holds nothing may always take one answer: readers that stopped can fill the process,
but they cannot shut out the others.
"""

import asyncio
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
        self._freed: list[asyncio.Event] = []

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

    async def _wait(self) -> None:
        freed = asyncio.Event()
        self._freed.append(freed)
        await freed.wait()

    def _wake(self) -> None:
        freed, self._freed = self._freed, []
        for event in freed:
            event.set()


class StreamRoom:
    """What one stream may hold."""

    def __init__(self, process: ProcessRoom, nbytes: int) -> None:
        self.nbytes = nbytes
        self.taken_nbytes = 0
        self._process = process

    def __enter__(self) -> Self:
        self._process._streams.add(self)
        self._process.empty.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self._process._streams.discard(self)
        if not self._process._streams:
            self._process.empty.set()

    async def take(self, nbytes: int) -> None:
        """Waits until `nbytes` fit, or until this stream holds nothing else."""
        while self.taken_nbytes and (
            self.taken_nbytes + nbytes > self.nbytes
            or self._process.taken_nbytes + nbytes > self._process.nbytes
        ):
            await self._process._wait()
        self.taken_nbytes += nbytes
        self._process.taken_nbytes += nbytes

    def give(self, nbytes: int) -> None:
        """Gives back what was taken."""
        self.taken_nbytes -= nbytes
        self._process.taken_nbytes -= nbytes
        self._process._wake()
