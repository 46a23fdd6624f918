"""Targets to bytes on one thread, piece by piece, in fair turns of the teams.

An answer is encoded one part of at most 1 MiB at a time, and before each part the thread chooses
again whose turn it is. It does so by start-time fair queueing as in scheduler.py, with the bytes of
a part for its cost: a team whose answer comes while others have long ones under way waits for the
part in hand, and at most one of each team that came back before it. Among the answers of one team,
more urgent levels go first, then older ones, so that what was begun is finished and its tensors are
freed.

Encoding never waits for whoever takes the parts: a reader that stopped holds bytes, not tensors.
"""

import asyncio
import heapq
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

from teacher_server.scheduling.job import Job

CLOSE_S = 5.0
"""How long closing waits for the part in hand."""

Parts = Iterator[tuple[int, int, bytes]]
"""What `encode_parts` yields: first row, number of rows, container."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A container of some rows of an answer."""

    first_row: int
    num_rows: int
    payload: bytes
    seconds: float
    """From the moment when the whole answer was there to be encoded."""


class Encoding:
    """An answer on its way through the encoder: an async iterator of its parts, in row order.

    It raises what encoding raised. Whoever does not iterate to the end calls `close`.
    """

    def __init__(self, encoder: "Encoder", job: Job, make: Callable[[], Parts], order: int) -> None:
        self.job = job
        self.order = order
        self.waiting = False
        """Whether it is among the answers of its team that the thread has to go on with."""
        self._encoder = encoder
        self._make: Callable[[], Parts] | None = make
        self._parts: Parts | None = None
        self._began = time.perf_counter()
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Queue[Part | Exception | None] = asyncio.Queue()

    def __lt__(self, other: Self) -> bool:
        return (self.job.level, self.order) < (other.job.level, other.order)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Part:
        found = await self._ready.get()
        if found is None:
            raise StopAsyncIteration
        if isinstance(found, Exception):
            raise found
        return found

    def close(self) -> None:
        """What is not encoded yet is not wanted any more."""
        self._encoder._drop(self)

    def _encode_next(self) -> Part | Exception | None:
        """In the thread: the next part, or None when there are no more. Errors are results too."""
        try:
            if self._parts is None:
                assert self._make is not None
                self._parts, self._make = self._make(), None
            first_row, num_rows, payload = next(self._parts)
        except StopIteration:
            return None
        except Exception as error:
            return error
        return Part(first_row, num_rows, payload, time.perf_counter() - self._began)

    def _forget(self) -> None:
        """Lets go of the tensors."""
        self._make = self._parts = None

    def _deliver(self, found: Part | Exception | None) -> None:
        self._loop.call_soon_threadsafe(self._ready.put_nowait, found)


class Encoder:
    """The thread, and the answers that wait for it.

    ended: called once for each answer, when all of it is encoded or never will be; in any thread.
    """

    def __init__(self, ended: Callable[[Job], None]) -> None:
        self._ended = ended
        self._changed = threading.Condition()
        self._lines: dict[str, _Line] = {}
        self._virtual_time = 0.0
        self._order = itertools.count()
        self._in_hand: Encoding | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="encode", daemon=True)

    def encode(self, job: Job, make: Callable[[], Parts]) -> Encoding:
        """Queues an answer; `make` is called in the thread. Called in an event loop."""
        with self._changed:
            encoding = Encoding(self, job, make, next(self._order))
            if self._closed:
                encoding._deliver(RuntimeError("the replica was stopped"))
                self._ended(job)
                return encoding
            line = self._lines.get(job.team.name) or self._new_line(job.team.name)
            line.weight = job.team.weight
            if not line.waiting:
                line.start = max(line.start, self._virtual_time)
            encoding.waiting = True
            heapq.heappush(line.waiting, encoding)
            if self._thread.ident is None:
                self._thread.start()
            self._changed.notify()
        return encoding

    def close(self) -> None:
        """Ends the thread, after the part in hand; what is left fails, so that nobody waits for it.

        Waits for that part: an interpreter that ends under a running thread may crash.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
            for line in self._lines.values():
                for encoding in line.waiting:
                    encoding._deliver(RuntimeError("the replica was stopped"))
                    self._finish(encoding)
            self._lines.clear()
        if self._thread.ident is not None:
            self._thread.join(CLOSE_S)

    def _new_line(self, name: str) -> "_Line":
        # Who is idle and whose tag was reached would start where a new line does.
        self._lines = {
            name: line
            for name, line in self._lines.items()
            if line.waiting or line.start > self._virtual_time
        }
        line = self._lines[name] = _Line()
        return line

    def _drop(self, encoding: Encoding) -> None:
        with self._changed:
            if encoding.waiting:  # else it is encoded, or has failed
                self._remove(encoding)
                self._finish(encoding)

    def _remove(self, encoding: Encoding) -> None:
        waiting = self._lines[encoding.job.team.name].waiting
        if waiting[0] is encoding:
            heapq.heappop(waiting)
        else:
            waiting.remove(encoding)
            heapq.heapify(waiting)

    def _finish(self, encoding: Encoding) -> None:
        """The thread is not to go on with this answer; called with the lock."""
        encoding.waiting = False
        if encoding is not self._in_hand:  # else the thread itself, after the part in hand
            encoding._forget()
        self._ended(encoding.job)

    def _run(self) -> None:
        while (encoding := self._next()) is not None:
            found = encoding._encode_next()
            self._took(encoding, found)

    def _next(self) -> Encoding | None:
        """Waits for the answer whose part is next; None when closed."""
        with self._changed:
            while True:
                if self._closed:
                    return None
                working = [line for line in self._lines.values() if line.waiting]
                if working:
                    break
                self._changed.wait()
            line = min(working, key=lambda line: line.start)
            self._virtual_time = line.start
            self._in_hand = line.waiting[0]
            return self._in_hand

    def _took(self, encoding: Encoding, found: Part | Exception | None) -> None:
        """Hands on what came of a turn, and charges it."""
        with self._changed:
            self._in_hand = None
            if not encoding.waiting:  # dropped, or all is closed, meanwhile
                encoding._forget()
                return
            if isinstance(found, Part):
                line = self._lines[encoding.job.team.name]
                line.start += len(found.payload) / line.weight
            else:
                self._remove(encoding)
                self._finish(encoding)
            # With the lock: once closed, there may be no loop any more to deliver to.
            encoding._deliver(found)


class _Line:
    """The answers of one team, and where it is in virtual time."""

    def __init__(self) -> None:
        self.weight = 1.0
        self.start = 0.0
        self.waiting: list[Encoding] = []
        """A heap, the next one first."""
