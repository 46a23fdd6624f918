"""Queued sequences to batches under a token budget, with fair shares for the teams that queue them.

Start-time fair queueing: every team has a start tag in virtual time, the next job is always one of
the team with the smallest tag, and what the job costs, divided by the team's weight, is added to
it. Virtual time is the tag of the job dispatched last; a team that comes back from idle starts
there at the earliest, so that no share is saved up by waiting. Tokens, streams and requests of a
team share its one tag: having many of them gains nothing.

What a team leaves unused buys it latency instead, not more of the teacher. Each team has a budget:
the virtual time that passed while it had no work, times its weight, up to B, which is the cost of
`max_batch_tokens` tokens. Out of its budget a team goes ahead of the others, whatever the tags:

- with its interactive jobs, each that the budget covers;
- with its training jobs, while the budget covers everything that the team has waiting. This is how
  a light team looks whose client does not say that somebody waits; a flood never looks like it.

A job of more than B may go ahead on a full budget. Jobs of level bulk, and those whose answers
would fill more than half of what a batch may answer, never do. What goes ahead is taken from the
budget and added to the team's tag, while virtual time stands still: the team pays later. So a
team's tag is never further ahead of virtual time than (L + max(B, L)) / w, where w is its weight
and L the cost of its largest job. For every interval in which two teams have work waiting, what was
dispatched for them, per weight, differs by at most the sum of this over both; without budgets it
would be L / w of each. A team that marks everything as interactive gets its share and, once, B.

While more than one team is there, a batch ends after about SHARED_BATCH_S of computing, since
nobody can go ahead of the batch in hand.

Among the jobs of one team the order is free, and used: more urgent levels go first, and in a level
those of a canonical length that the batch already has, so that they share its forward pass. The
oldest job of a level is overtaken like this by at most one batch's worth of tokens.

Jobs whose client has gone are dropped before they cost anything; those that were dispatched are
charged. Thread-safe: the event loop submits, the compute thread takes.
"""

import heapq
import itertools
import math
import threading
import time
from collections.abc import Callable, Collection

import grpc

from teacher_server.errors import RequestRefused
from teacher_server.monitoring.team_stats import Dispatched, TeamStats
from teacher_server.scheduling.job import BULK, TRAINING, Job
from teacher_server.scheduling.team_queue import _Line

SHARED_BATCH_S = 0.1
"""How long a batch may take, going by the passes before it, while more than one team is there."""
FULL_QUEUES = 4
"""All teams together may queue as much as this many teams; beyond it, each an equal part."""


class Scheduler:
    """A bounded queue that gives out batches.

    A batch holds at most `max_batch_tokens` padded tokens and `max_batch_reply_nbytes` of answers,
    unless one job alone is larger; its jobs are in the order in which they were dispatched and may
    have several canonical lengths. max_queued_tokens: of one team. cost: what a job is charged, by
    default its padded tokens. standing: told of every batch.
    """

    def __init__(
        self,
        *,
        max_batch_tokens: int,
        max_batch_reply_nbytes: int,
        max_queued_tokens: int,
        cost: Callable[[Job], float] = lambda job: job.bucket,
        standing: TeamStats | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._max_batch_reply_nbytes = max_batch_reply_nbytes
        self._max_queued_tokens = max_queued_tokens
        self._max_budget = float(max_batch_tokens)
        """B of the docstring."""
        self._cost = cost
        self._standing = standing
        self._clock = clock
        self._changed = threading.Condition()
        self._lines: dict[str, _Line] = {}
        self._forget_at = 64
        self._heap: list[tuple[float, int, _Line]] = []
        """Lines with work, and some without; a line is in it once, its tag may have grown since."""
        self._tickets = itertools.count()
        self._virtual_time = 0.0
        self._num_working = 0
        """Lines with work."""
        self._order = itertools.count()
        self._closed = False
        self._queued_tokens = 0
        self._tokens_per_s = 0.0
        self._recent_cost = self._recent_s = 0.0
        """Of the passes before, the later ones counting more."""
        self._ahead: tuple[dict[str, _Line], dict[str, _Line]] = ({}, {})
        """Lines that may go ahead with an interactive job, and with a training job, in turns."""

    @property
    def has_ahead(self) -> bool:
        """Whether a job waits that may go ahead of other teams."""
        return any(self._ahead)

    @property
    def queued_tokens(self) -> int:
        """Padded tokens of the jobs that wait."""
        return self._queued_tokens

    def queued_by_team(self) -> dict[str, int]:
        """Padded tokens of the jobs that wait, of the teams that have any."""
        with self._changed:
            return {name: line.queued_tokens for name, line in self._lines.items() if line.waiting}

    def submit(self, job: Job) -> None:
        """Queues a job.

        Raises RequestRefused: RESOURCE_EXHAUSTED with a hint when its team's part of the queue is
        full, UNAVAILABLE when closed.
        """
        if not job.team.weight > 0:
            raise ValueError(f"the weight of team {job.team.name} must be above 0")
        with self._changed:
            if self._closed:
                raise RequestRefused(
                    grpc.StatusCode.UNAVAILABLE,
                    "STOPPED",
                    "this replica has stopped; send the request to another one.",
                )
            line = self._lines.get(job.team.name) or self._new_line(job.team.name)
            self._check_room(line, job)
            job.order = next(self._order)
            job.submitted_s = self._clock()
            job.cost = self._cost(job)
            job.waiting = True
            line.weight = job.team.weight  # as declared now, also for the jobs that wait
            line.seen_s = job.submitted_s
            if not line.waiting:
                self._return_from_idle(line)
            line.add(job)
            self._queued_tokens += job.bucket
            self._review(line)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Its client has gone: the job is dropped if it has not been taken yet."""
        with self._changed:
            if not job.waiting:
                return
            line = self._lines[job.team.name]
            line.depart(job)
            self._queued_tokens -= job.bucket
            if not line.waiting:
                self._num_working -= 1
            self._review(line)

    def next_batch(self) -> list[Job]:
        """Waits for work; empty only when closed."""
        with self._changed:
            while True:
                if self._closed:
                    return []
                if self._num_working:
                    return self._take()
                self._changed.wait()

    def take_ahead(self) -> list[Job]:
        """A batch of those jobs that may go ahead of other teams; empty if there are none."""
        with self._changed:
            return self._take(ahead_only=True) if self.has_ahead else []

    def record_speed(self, tokens: int, seconds: float, cost: float = 0.0) -> None:
        """Tells how long a pass took; the retry hint and the length of batches are made from it."""
        rate = tokens / max(seconds, 1e-6)
        with self._changed:
            self._recent_cost = 0.8 * self._recent_cost + cost
            self._recent_s = 0.8 * self._recent_s + seconds
            self._tokens_per_s = (
                0.8 * self._tokens_per_s + 0.2 * rate if self._tokens_per_s else rate
            )

    def close(self) -> list[Job]:
        """Ends `next_batch`; returns the jobs that nobody will score."""
        with self._changed:
            self._closed = True
            left = [job for line in self._lines.values() for job in line.jobs()]
            for job in left:
                job.waiting = False
            self._lines.clear()
            self._heap.clear()
            for lines in self._ahead:
                lines.clear()
            self._num_working = 0
            self._queued_tokens = 0
            self._changed.notify_all()
            return left

    def _new_line(self, name: str) -> "_Line":
        if len(self._lines) >= self._forget_at:
            # An idle line may go when a new one would stand where it stands: virtual time has
            # reached its tag, and has gone on for long enough to fill its budget.
            self._lines = {
                name: line
                for name, line in self._lines.items()
                if line.waiting or line.listed or self._budget_on_return(line) < self._max_budget
            }
            self._forget_at = 64 + 2 * len(self._lines)
        line = self._lines[name] = _Line(name, budget=self._max_budget)
        return line

    def _check_room(self, line: "_Line", job: Job) -> None:
        """Raises RequestRefused. A team without a job may always have one."""
        if not line.waiting:
            return
        limit = self._max_queued_tokens
        if self._queued_tokens + job.bucket > FULL_QUEUES * limit:
            limit = min(limit, FULL_QUEUES * limit // self._num_working)
        queued = line.queued_tokens
        if queued + job.bucket <= limit:
            return
        weights = sum(other.weight for other in self._lines.values() if other.waiting)
        rate = self._tokens_per_s * line.weight / weights
        seconds = queued / rate if rate else 1.0
        raise RequestRefused(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "QUEUE_FULL",
            f"{queued} tokens of team {line.name} are queued, the limit is {limit}; send the same "
            "request again after the hint. The operator sets the limit with "
            "--batch.max-queued-tokens.",
            retry_after_ms=int(1000 * min(30.0, max(0.05, seconds / 2))),
        )

    def _budget_on_return(self, line: "_Line") -> float:
        """The budget of an idle line if it came back now: with what it left unused meanwhile."""
        if line.start > self._virtual_time:
            return line.budget  # it has had more than its share, and pays that back first
        return min(self._max_budget, line.budget + line.weight * (self._virtual_time - line.start))

    def _return_from_idle(self, line: "_Line") -> None:
        """Puts a line in the race, no earlier than the others have come."""
        line.budget = self._budget_on_return(line)
        line.start = max(self._virtual_time, line.start)
        self._num_working += 1
        if not line.listed:
            line.listed = True
            heapq.heappush(self._heap, (line.start, next(self._tickets), line))

    def _review(self, line: "_Line") -> None:
        """Lists a line with those that may go ahead, or does not, after anything changed in it."""
        level = self._level_ahead(line)
        for number, lines in enumerate(self._ahead):
            if number == level:
                lines.setdefault(line.name, line)
            else:
                lines.pop(line.name, None)

    def _level_ahead(self, line: "_Line") -> int | None:
        """The level of the job with which a line may go ahead of other teams, if there is one."""
        level = line.level
        # The first look is all that a flood gets, at each of its jobs.
        if level >= BULK or line.budget <= 0:
            return None
        if level == TRAINING and line.waiting > 1 and line.queued_cost > line.budget:
            return None
        job = line.oldest()
        is_covered = line.budget >= min(job.cost, self._max_budget)
        is_small = job.reply_nbytes <= self._max_batch_reply_nbytes // 2
        return level if is_covered and is_small else None

    def _first(self) -> "_Line | None":
        """The line with the smallest start tag of those with work; ties take turns."""
        while self._heap:
            start, _, line = self._heap[0]
            if not line.waiting:
                heapq.heappop(self._heap)
                line.listed = False
            elif start < line.start:
                heapq.heapreplace(self._heap, (line.start, next(self._tickets), line))
            else:
                return line
        return None

    def _turn(
        self, buckets: Collection[int], *, ahead_only: bool
    ) -> "tuple[_Line, Job, bool, bool] | None":
        """The line whose turn it is, its job, whether that was chosen for its length, and whether
        it goes ahead; None ends the batch."""
        first = self._first()
        if first is None:
            return None
        line = next((one for lines in self._ahead for one in lines.values()), None)
        if line is not None:
            ahead = line.start > first.start  # the smallest tag needs no budget
            if ahead or ahead_only:
                return line, line.oldest(), False, ahead
        if ahead_only:
            return None
        line = line or first
        job, overtakes = line.choose(
            buckets, alone=self._num_working == 1, patience=self._max_batch_tokens
        )
        return None if job is None else (line, job, overtakes, False)

    def _take(self, *, ahead_only: bool = False) -> list[Job]:
        now = self._clock()
        working = {name: line.weight for name, line in self._lines.items() if line.waiting}
        batch: list[Job] = []
        buckets: dict[int, None] = {}
        room = self._max_batch_tokens
        reply_room = self._max_batch_reply_nbytes
        cost_room = math.inf
        near = sum(1 for line in self._lines.values() if line.waiting or line.is_near(now))
        if ahead_only or near > 1:
            # Half, so that there is room for who goes ahead while the other half is encoded.
            reply_room //= 2
            if self._recent_cost:
                cost_room = SHARED_BATCH_S * self._recent_cost / self._recent_s
        while (turn := self._turn(buckets, ahead_only=ahead_only)) is not None:
            line, job, overtakes, ahead = turn
            fits = job.bucket <= room and job.reply_nbytes <= reply_room and job.cost <= cost_room
            if batch and not fits:
                break
            line.take(job, overtakes=overtakes)
            if ahead:
                self._charge_ahead(line, job)
            else:
                self._charge(line, job)
            self._queued_tokens -= job.bucket
            if not line.waiting:
                self._num_working -= 1
            self._review(line)
            room -= job.bucket
            reply_room -= job.reply_nbytes
            cost_room -= job.cost
            buckets[job.bucket] = None
            batch.append(job)
        if self._standing is not None:
            self._standing.dispatched(
                [
                    Dispatched(job.team.name, job.bucket, job.cost, now - job.submitted_s)
                    for job in batch
                ],
                working,
            )
        return batch

    def _charge(self, line: "_Line", job: Job) -> None:
        """A job is dispatched: virtual time comes to its line's tag, and the tag moves on."""
        self._virtual_time = line.start
        line.start += job.cost / line.weight

    def _charge_ahead(self, line: "_Line", job: Job) -> None:
        """A job is dispatched ahead of others: the tag moves on, and virtual time stands still."""
        line.budget -= job.cost
        line.start += job.cost / line.weight
        for lines in self._ahead:  # the next of those that may go ahead has the next turn
            if lines.pop(line.name, None):
                lines[line.name] = line
