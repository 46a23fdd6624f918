"""Queued sequences to batches of one canonical length under a token budget.

A batch starts with the oldest job of the most urgent level and is filled with jobs of the same
canonical length, so that no sequence is padded to its neighbours. Jobs whose client has gone are
dropped before they cost anything. Thread-safe: the event loop submits, the compute thread takes.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc

from teacher_server.errors import RequestRefused
from teacher_server.head import WantedRows
from teacher_server.teams import DEFAULT_TEAM, Team

NUM_LEVELS = 3
"""Interactive, training, bulk: a lower level goes first."""


@dataclass(slots=True, eq=False)
class Job:
    """One sequence waiting to be scored."""

    wanted: WantedRows
    bucket: int
    """Its canonical padded length, in tokens: what it costs."""
    reply_nbytes: int
    """Upper bound of its answer."""
    level: int = 1
    team: Team = DEFAULT_TEAM
    held: int = 0
    """Tokens that accounts.py has reserved for it."""
    waiting: bool = field(default=False, init=False)
    """Queued and not departed: it counts towards the queue's tokens."""
    order: int = field(default=0, init=False)
    submitted_s: float = field(default=0.0, init=False)


class Scheduler:
    """A bounded queue that gives out batches.

    A batch holds at most `max_batch_tokens` padded tokens and `max_batch_reply_nbytes` of answers,
    unless one job alone is larger.
    """

    def __init__(
        self,
        *,
        max_batch_tokens: int,
        max_batch_reply_nbytes: int,
        max_queued_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._max_batch_reply_nbytes = max_batch_reply_nbytes
        self._max_queued_tokens = max_queued_tokens
        self._clock = clock
        self._changed = threading.Condition()
        self._queues: dict[tuple[int, int], deque[Job]] = {}
        self._order = itertools.count()
        self._closed = False
        self._departed = 0
        self._queued_tokens = 0
        self._tokens_per_s = 0.0

    @property
    def queued_tokens(self) -> int:
        """Padded tokens of the jobs that wait."""
        return self._queued_tokens

    def submit(self, job: Job) -> None:
        """Queues a job. Raises RequestRefused (RESOURCE_EXHAUSTED, with a hint) when full."""
        with self._changed:
            if self._closed:
                raise RequestRefused(
                    grpc.StatusCode.UNAVAILABLE,
                    "STOPPED",
                    "this replica has stopped; send the request to another one.",
                )
            waiting = self._queued_tokens
            if waiting and waiting + job.bucket > self._max_queued_tokens:
                seconds = waiting / self._tokens_per_s if self._tokens_per_s else 1.0
                raise RequestRefused(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    "QUEUE_FULL",
                    f"the queue holds {waiting} tokens, the limit is {self._max_queued_tokens}; "
                    "send the same request again after the hint. The operator sets the limit "
                    "with --batch.max-queued-tokens.",
                    retry_after_ms=int(1000 * min(30.0, max(0.05, seconds / 2))),
                )
            job.order = next(self._order)
            job.submitted_s = self._clock()
            job.waiting = True
            self._queues.setdefault((job.level, job.bucket), deque()).append(job)
            self._queued_tokens += job.bucket
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Its client has gone: the job is dropped if it has not been taken yet."""
        with self._changed:
            if not job.waiting:
                return
            job.waiting = False
            self._queued_tokens -= job.bucket
            self._departed += 1
            # Those at the front go when they come up; too many behind others are swept out.
            if self._departed > 64 + sum(map(len, self._queues.values())) // 2:
                self._sweep()

    def next_batch(self) -> list[Job]:
        """Waits for work; empty only when closed."""
        with self._changed:
            while True:
                if self._closed:
                    return []
                self._drop_departed()
                if self._queues:
                    return self._take()
                self._changed.wait()

    def record_speed(self, tokens: int, seconds: float) -> None:
        """Tells how long a batch took; the retry hint is made from it."""
        rate = tokens / max(seconds, 1e-6)
        with self._changed:
            self._tokens_per_s = (
                0.8 * self._tokens_per_s + 0.2 * rate if self._tokens_per_s else rate
            )

    def close(self) -> list[Job]:
        """Ends `next_batch`; returns the jobs that nobody will score."""
        with self._changed:
            self._closed = True
            self._sweep()
            left = [job for queue in self._queues.values() for job in queue]
            for job in left:
                job.waiting = False
            self._queues.clear()
            self._queued_tokens = 0
            self._changed.notify_all()
            return left

    def _drop_departed(self) -> None:
        """Removes departed jobs from the front of every queue; the rest go when they come up."""
        for key, queue in list(self._queues.items()):
            while queue and not queue[0].waiting:
                queue.popleft()
                self._departed -= 1
            if not queue:
                del self._queues[key]

    def _sweep(self) -> None:
        """Removes every departed job."""
        for key, queue in list(self._queues.items()):
            self._queues[key] = deque(job for job in queue if job.waiting)
            if not self._queues[key]:
                del self._queues[key]
        self._departed = 0

    def _take(self) -> list[Job]:
        first = min(self._queues, key=lambda key: (key[0], self._queues[key][0].order))
        bucket = first[1]
        batch: list[Job] = []
        room = self._max_batch_tokens
        reply_room = self._max_batch_reply_nbytes
        for level in range(NUM_LEVELS):
            queue = self._queues.get((level, bucket), ())
            while queue:
                job = queue[0]
                if not job.waiting:
                    self._departed -= 1
                else:
                    if batch and (job.bucket > room or job.reply_nbytes > reply_room):
                        return batch
                    job.waiting = False
                    self._queued_tokens -= job.bucket
                    room -= job.bucket
                    reply_room -= job.reply_nbytes
                    batch.append(job)
                queue.popleft()
            self._queues.pop((level, bucket), None)
        return batch
