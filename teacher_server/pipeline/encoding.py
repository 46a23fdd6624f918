"""Encodes targets on one thread, part by part, in fair turns of the teams.

An answer is encoded in parts of at most 1 MiB, and before each part the thread chooses again whose
turn it is. It does so by start-time fair queueing as in scheduling/fairness.py, where the cost is
the bytes of a part: a team whose answer arrives while other teams have long ones in progress waits
for the part in hand, and for at most one part of each team that returned before it. Among the
answers of one team, more urgent levels go first, then older ones, so that an answer that was begun
is finished and its tensors are freed.

Encoding never waits for the reader: a reader that stopped holds bytes, not tensors.
"""

import asyncio
import heapq
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

from teacher_server.scheduling.job import SequenceJob

CLOSE_S = 5.0
"""How long closing waits for the part in hand."""

Parts = Iterator[tuple[int, int, bytes]]
"""What `encode_parts` yields: first row, number of rows, container."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Holds the container of some rows of an answer."""

    first_row: int
    num_rows: int
    payload: bytes
    seconds: float
    """Since the answer was queued for encoding."""


class Encoding:
    """Iterates over the parts of one answer, in row order, as they are encoded.

    Raises the error of the encoder. A reader that does not iterate to the end calls `close`.
    """

    def __init__(
        self, encoder: "Encoder", job: SequenceJob, make: Callable[[], Parts], order: int
    ) -> None:
        self.job = job
        self.order = order
        self.waiting = False
        """Whether the thread still has parts of it to encode."""
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
        result = await self._ready.get()
        if result is None:
            raise StopAsyncIteration
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        """Drops the parts that are not encoded yet."""
        self._encoder._drop(self)

    def _encode_next(self) -> Part | Exception | None:
        """Encodes the next part, in the thread; returns None after the last one, and errors too."""
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

    def _release_tensors(self) -> None:
        self._make = self._parts = None

    def _deliver(self, result: Part | Exception | None) -> None:
        self._loop.call_soon_threadsafe(self._ready.put_nowait, result)


class _TeamAnswers:
    """Holds the answers of one team that wait, and the team's place in virtual time."""

    def __init__(self) -> None:
        self.weight = 1.0
        self.start = 0.0
        """Start tag of its next part."""
        self.waiting: list[Encoding] = []
        """A heap, the next one first."""

    def remove(self, encoding: Encoding) -> None:
        if self.waiting[0] is encoding:
            heapq.heappop(self.waiting)
        else:
            self.waiting.remove(encoding)
            heapq.heapify(self.waiting)


class Encoder:
    """Runs the thread that encodes, and queues the answers that wait for it.

    on_end: called once per answer, in any thread, when it is encoded or dropped.
    """

    def __init__(self, on_end: Callable[[SequenceJob], None]) -> None:
        self._on_end = on_end
        self._changed = threading.Condition()
        self._teams: dict[str, _TeamAnswers] = {}
        self._virtual_time = 0.0
        self._order = itertools.count()
        self._in_hand: Encoding | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="encode", daemon=True)

    def encode(self, job: SequenceJob, make: Callable[[], Parts]) -> Encoding:
        """Queues an answer; `make` is called in the thread. Call it in an event loop."""
        with self._changed:
            encoding = Encoding(self, job, make, next(self._order))
            if self._closed:
                encoding._deliver(RuntimeError("the replica was stopped"))
                self._on_end(job)
                return encoding
            team = self._teams.get(job.team.name) or self._add_team(job.team.name)
            team.weight = job.team.weight
            if not team.waiting:
                # A team that was idle has saved nothing up.
                team.start = max(team.start, self._virtual_time)
            encoding.waiting = True
            heapq.heappush(team.waiting, encoding)
            if self._thread.ident is None:
                self._thread.start()
            self._changed.notify()
        return encoding

    def close(self) -> None:
        """Ends the thread after the part in hand; the remaining answers fail at once.

        Waits for that part: an interpreter that exits under a running thread may crash.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
            for team in self._teams.values():
                for encoding in team.waiting:
                    encoding._deliver(RuntimeError("the replica was stopped"))
                    self._finish(encoding)
            self._teams.clear()
        if self._thread.ident is not None:
            self._thread.join(CLOSE_S)

    def _add_team(self, name: str) -> _TeamAnswers:
        # An idle team whose tag was reached would start where a new one does: it may go.
        self._teams = {
            name: team
            for name, team in self._teams.items()
            if team.waiting or team.start > self._virtual_time
        }
        team = self._teams[name] = _TeamAnswers()
        return team

    def _drop(self, encoding: Encoding) -> None:
        with self._changed:
            if encoding.waiting:  # else it is encoded, or has failed
                self._teams[encoding.job.team.name].remove(encoding)
                self._finish(encoding)

    def _finish(self, encoding: Encoding) -> None:
        """Marks an answer as one that the thread has left; called with the lock."""
        encoding.waiting = False
        if encoding is not self._in_hand:  # else the thread still reads its tensors, and frees them
            encoding._release_tensors()
        self._on_end(encoding.job)

    def _run(self) -> None:
        while (encoding := self._choose()) is not None:
            # Without the lock: this takes long, and answers may be queued and dropped meanwhile.
            result = encoding._encode_next()
            self._end_turn(encoding, result)

    def _choose(self) -> Encoding | None:
        """Waits for the answer whose part is next; returns None when closed."""
        with self._changed:
            while True:
                if self._closed:
                    return None
                working = [team for team in self._teams.values() if team.waiting]
                if working:
                    break
                self._changed.wait()
            team = min(working, key=lambda team: team.start)
            self._virtual_time = team.start
            self._in_hand = team.waiting[0]
            return self._in_hand

    def _end_turn(self, encoding: Encoding, result: Part | Exception | None) -> None:
        """Delivers the result of a turn and charges its team."""
        with self._changed:
            self._in_hand = None
            if not encoding.waiting:  # it was dropped, or the encoder closed, during the turn
                encoding._release_tensors()
                return
            team = self._teams[encoding.job.team.name]
            if isinstance(result, Part):
                team.start += len(result.payload) / team.weight
            else:
                team.remove(encoding)
                self._finish(encoding)
            # With the lock: after close() there may be no event loop to deliver to.
            encoding._deliver(result)
