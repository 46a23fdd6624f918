"""Encodes selected rows on a few threads, part by part, in fair turns of the teams.

An answer is encoded in parts of at most 1 MiB, and before each part a thread chooses again whose
turn it is. It does so by start-time fair queueing as in scheduling/fairness.py, where the cost is
the bytes of a part: a team whose answer arrives while other teams have long ones in progress waits
for the parts in hand, and for at most one part of each team that returned before it. Among the
answers of one team, more urgent levels go first, then older ones, so that an answer that was begun
is finished and its tensors are freed. The parts of one answer are encoded one after the other.

Encoding never waits for the reader: a reader that stopped holds bytes, not tensors.
"""

import asyncio
import heapq
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Protocol, Self

from logit_codec import IdTable, TargetSpec, encode_parts
from teacher_server.engine.head import ScoredRows
from teacher_server.teams.declaration import Team

logger = logging.getLogger(__name__)

NUM_THREADS = min(4, max(2, (os.cpu_count() or 1) // 4))
"""Threads that encode. Most of their time is spent in torch and numpy, without the lock of Python."""
CLOSE_S = 5.0
"""How long closing waits for the parts in hand."""


class Answer(Protocol):
    """Says what encoding needs of what it answers: a sequence, or some tokens of a text."""

    team: Team
    level: int
    reply_nbytes: int
    id_table: IdTable | None

    @property
    def spec(self) -> TargetSpec | None: ...


Parts = Iterator[tuple[int, int, bytes]]
"""What `encode_parts` yields: first row, number of rows, container."""
MakeParts = Callable[[Any, ScoredRows], Parts]
"""Compacts the rows of a job at once, and encodes them as they are asked for."""


def make_parts(job: Answer, rows: ScoredRows, *, max_nbytes: int) -> Parts:
    """Makes targets of the rows of a job, and encodes them in parts of at most `max_nbytes`."""
    assert job.spec is not None
    targets = rows.compact()
    return encode_parts(targets, job.spec, max_nbytes=max_nbytes, id_table=job.id_table)


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Holds the container of some rows of an answer."""

    first_row: int
    num_rows: int
    payload: bytes
    seconds: float
    """Since the answer was queued for encoding."""
    compact_s: float
    """How long its rows were compacted, which is done before the first part."""


class State(Enum):
    """Says where an answer is."""

    SCORING = auto()
    """It has no rows yet."""
    WAITING = auto()
    """It waits for a thread."""
    IN_HAND = auto()
    """A thread encodes a part of it."""
    ENDED = auto()
    """It is encoded, or failed, or was dropped."""


class Encoding:
    """Iterates over the parts of one answer, in row order, as they are encoded.

    Raises what scoring or encoding raised. A reader that does not iterate to the end calls `close`.
    """

    def __init__(
        self,
        job: Answer,
        on_close: Callable[[Any], None],
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """on_close: called with the job by `close`. loop: the reader's, by default the running one."""
        self.job = job
        self.order = 0
        self.state = State.SCORING
        """Changed by the encoder alone, under its lock."""
        self._on_close = on_close
        self._rows: ScoredRows | None = None
        self._parts: Parts | None = None
        self._compact_s = 0.0
        self._began = 0.0
        self._loop = loop or asyncio.get_running_loop()
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
        """Drops what is not scored or encoded yet."""
        self._on_close(self.job)

    def take(self, rows: ScoredRows, order: int) -> None:
        """Takes the rows that were selected, which it encodes from now on."""
        self._rows, self.order = rows, order
        self._began = time.perf_counter()

    def encode_next(self, make_parts: MakeParts) -> Part | Exception | None:
        """Encodes the next part, in a thread; returns None after the last one, and errors too."""
        try:
            if self._parts is None:
                assert self._rows is not None
                began = time.perf_counter()
                self._parts = make_parts(self.job, self._rows)
                self._rows = None
                self._compact_s = time.perf_counter() - began
            first_row, num_rows, payload = next(self._parts)
        except StopIteration:
            return None
        except Exception as error:
            return error
        seconds = time.perf_counter() - self._began
        return Part(first_row, num_rows, payload, seconds, self._compact_s)

    def release(self) -> None:
        """Lets go of the rows."""
        self._rows = self._parts = None

    def deliver(self, result: Part | Exception | None) -> None:
        """Gives the reader a part, an error, or the end."""
        self._loop.call_soon_threadsafe(self._ready.put_nowait, result)


class _TeamAnswers:
    """Holds the answers of one team that wait, and the team's place in virtual time."""

    def __init__(self) -> None:
        self.weight = 1.0
        self.start = 0.0
        """Start tag of its next part."""
        self.waiting: list[Encoding] = []
        """A heap, the next one first."""
        self.num_in_hand = 0

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.num_in_hand

    def remove(self, encoding: Encoding) -> None:
        self.waiting.remove(encoding)
        heapq.heapify(self.waiting)


class Encoder:
    """Runs the threads that encode, and queues the answers that wait for them.

    make_parts: encodes an answer. on_end: called once per answer, in any thread, when it is encoded
    or dropped. on_start: called by each thread when it begins. on_failure: called when a thread ends
    that should not.
    """

    def __init__(
        self,
        make_parts: MakeParts,
        *,
        on_end: Callable[[Answer], None],
        on_start: Callable[[], None] = lambda: None,
        on_failure: Callable[[str], None],
        num_threads: int = NUM_THREADS,
    ) -> None:
        self._make_parts = make_parts
        self._on_end = on_end
        self._on_start = on_start
        self._on_failure = on_failure
        self._changed = threading.Condition()
        """Guards everything below, and the state of every answer."""
        self._answers: dict[Answer, Encoding] = {}
        """Those that have not ended."""
        self._teams: dict[str, _TeamAnswers] = {}
        self._virtual_time = 0.0
        self._order = itertools.count()
        self._closed = False
        self._begun_s: dict[Encoding, float] = {}
        """When each part in hand was begun."""
        self._threads = [
            threading.Thread(target=self._guard, name=f"encode-{number}", daemon=True)
            for number in range(num_threads)
        ]

    def start(self) -> None:
        """Begins to encode."""
        for thread in self._threads:
            thread.start()

    def expect(
        self,
        job: Answer,
        on_close: Callable[[Any], None],
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> Encoding:
        """Returns what the parts of a job will come through.

        Call it in the reader's event loop, or give it that one.
        """
        encoding = Encoding(job, on_close, loop)
        with self._changed:
            self._answers[job] = encoding
        return encoding

    def encode(self, job: Answer, rows: ScoredRows) -> None:
        """Queues the rows of an answer."""
        with self._changed:
            encoding = self._answers.get(job)
            if encoding is None:  # its client left while it was scored
                self._on_end(job)
                return
            if self._closed:
                self._end(encoding, RuntimeError("the replica was stopped"))
                return
            encoding.take(rows, next(self._order))
            team = self._teams.get(job.team.name) or self._add_team(job.team.name)
            team.weight = job.team.weight
            if team.is_idle:
                # A team that was idle has saved nothing up.
                team.start = max(team.start, self._virtual_time)
            encoding.state = State.WAITING
            heapq.heappush(team.waiting, encoding)
            self._changed.notify()

    def fail(self, job: Answer, error: Exception) -> None:
        """Ends an answer with an error."""
        with self._changed:
            if (encoding := self._answers.get(job)) is not None:
                self._end(encoding, error)
            else:  # its client has left
                self._on_end(job)

    def fail_unscored(self, error: Exception) -> None:
        """Ends all answers that have no rows yet with an error."""
        with self._changed:
            for encoding in list(self._answers.values()):
                if encoding.state is State.SCORING:
                    self._end(encoding, error)

    def drop(self, job: Answer) -> None:
        """Ends an answer that nobody waits for any more."""
        with self._changed:
            if (encoding := self._answers.get(job)) is not None:
                self._end(encoding, None)

    def close(self) -> None:
        """Ends the threads after the parts in hand; the remaining answers fail at once.

        Waits for those parts: an interpreter that exits under a running thread may crash.
        """
        with self._changed:
            self._closed = True
            for encoding in list(self._answers.values()):
                self._end(encoding, RuntimeError("the replica was stopped"))
            self._changed.notify_all()
        deadline = time.monotonic() + CLOSE_S
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))

    @property
    def busy_s(self) -> float:
        """How long the oldest part in hand has taken so far; 0 without one."""
        with self._changed:
            return max((time.monotonic() - begun for begun in self._begun_s.values()), default=0.0)

    def has_died(self) -> bool:
        """Whether a thread has ended although nothing was closed."""
        return not self._closed and any(t.ident and not t.is_alive() for t in self._threads)

    def _add_team(self, name: str) -> _TeamAnswers:
        # An idle team whose tag was reached would start where a new one does: it may go.
        self._teams = {
            name: team
            for name, team in self._teams.items()
            if not team.is_idle or team.start > self._virtual_time
        }
        team = self._teams[name] = _TeamAnswers()
        return team

    def _end(self, encoding: Encoding, result: Exception | None) -> None:
        """Delivers the end of an answer and forgets it; called with the lock."""
        if encoding.state is State.WAITING:
            self._teams[encoding.job.team.name].remove(encoding)
        if encoding.state is not State.IN_HAND:  # else its thread reads the rows, and releases them
            encoding.release()
        encoding.state = State.ENDED
        del self._answers[encoding.job]
        self._on_end(encoding.job)
        # With the lock: after close() there may be no event loop to deliver to.
        encoding.deliver(result)

    def _guard(self) -> None:
        """Encodes until closed; anything else that ends the thread is a failure of the replica."""
        try:
            self._on_start()
            while (encoding := self._choose()) is not None:
                # Without the lock: this takes long; answers may be queued and dropped meanwhile.
                self._end_turn(encoding, encoding.encode_next(self._make_parts))
                del encoding
        except BaseException as error:
            logger.exception("an encode thread ended")
            self._on_failure(f"an encode thread ended error={type(error).__name__}")

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
            encoding = heapq.heappop(team.waiting)
            encoding.state = State.IN_HAND
            team.num_in_hand += 1
            self._begun_s[encoding] = time.monotonic()
            return encoding

    def _end_turn(self, encoding: Encoding, result: Part | Exception | None) -> None:
        """Delivers the result of a turn and charges its team."""
        with self._changed:
            team = self._teams[encoding.job.team.name]
            team.num_in_hand -= 1
            del self._begun_s[encoding]
            if encoding.state is State.ENDED:  # it was dropped, or the encoder closed, meanwhile
                encoding.release()
            elif isinstance(result, Part):
                team.start += len(result.payload) / team.weight
                encoding.state = State.WAITING
                heapq.heappush(team.waiting, encoding)
                encoding.deliver(result)
                self._changed.notify()
            else:
                encoding.release()
                self._end(encoding, result)
