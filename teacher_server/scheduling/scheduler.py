"""Queues jobs within bounds and gives them out in batches under a token budget.

fairness.py decides whose job is next; this module decides how many of them make a batch, and how
much may wait. The jobs of a batch are in the order of their turns, and the first one that does not
fit ends it. While more than one team is present, a batch ends after about SHARED_BATCH_S of
computing, because no job can go ahead of the batches that were taken.

Jobs whose client has gone are dropped before they cost anything; those that were dispatched are
charged.
"""

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import grpc

from teacher_server.errors import RequestRefused
from teacher_server.monitoring.team_stats import Dispatched, TeamStats
from teacher_server.scheduling.fairness import FairQueue
from teacher_server.scheduling.job import SequenceJob
from teacher_server.scheduling.speed import Speed
from teacher_server.scheduling.team_queue import TeamQueue

SHARED_BATCH_S = 0.1
"""How long a batch may take, judged by the passes before it, while several teams are present."""
FULL_QUEUES = 4
"""All teams together may queue as much as this many full teams; beyond it, each an equal part."""


@dataclass(slots=True)
class _Space:
    """Tracks what still fits into a batch."""

    tokens: int
    reply_nbytes: int
    cost: float = math.inf
    floor_tokens: int = 0
    """What fits in any case as far as the cost is concerned."""

    def fits(self, job: SequenceJob) -> bool:
        return (
            job.num_tokens <= self.tokens
            and job.reply_nbytes <= self.reply_nbytes
            and (job.cost <= self.cost or job.num_tokens <= self.floor_tokens)
        )

    def take(self, job: SequenceJob) -> None:
        self.tokens -= job.num_tokens
        self.reply_nbytes -= job.reply_nbytes
        self.cost -= job.cost
        self.floor_tokens -= job.num_tokens


class Scheduler:
    """Queues jobs and gives out batches. Thread-safe: one thread submits, another takes.

    A batch holds at most `max_batch_tokens` tokens and `max_batch_reply_nbytes` of answers, unless
    one job alone is larger. min_batch_tokens: up to here a batch is not ended for its time, since a
    smaller one would take as long. max_queued_tokens: of one team. cost: what a job is charged, by
    default its tokens. standing: counts every batch.
    """

    def __init__(
        self,
        *,
        max_batch_tokens: int,
        max_batch_reply_nbytes: int,
        max_queued_tokens: int,
        min_batch_tokens: int = 1,
        cost: Callable[[SequenceJob], float] = lambda job: job.num_tokens,
        standing: TeamStats | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_batch_tokens = max_batch_tokens
        self._max_batch_reply_nbytes = max_batch_reply_nbytes
        self._max_queued_tokens = max_queued_tokens
        self._min_batch_tokens = min_batch_tokens
        self._cost = cost
        self._standing = standing
        self._clock = clock
        self.changed = threading.Condition()
        """Guards everything below."""
        self.fair = FairQueue(
            max_batch_tokens=max_batch_tokens, max_batch_reply_nbytes=max_batch_reply_nbytes
        )
        self.closed = False
        self._queued_tokens = 0
        self._tokens_per_s = 0.0
        self._speed = Speed()

    @property
    def has_ahead(self) -> bool:
        """Whether a job waits that may go ahead of other teams."""
        return self.fair.has_ahead

    @property
    def queued_tokens(self) -> int:
        """Tokens of the jobs that wait."""
        return self._queued_tokens

    def queue_s(self) -> float:
        """Returns how long the jobs that wait would take; `changed` is held."""
        return self._speed.seconds(sum(team.queued_cost for team in self.fair.working()))

    def queued_by_team(self) -> dict[str, int]:
        """Returns the tokens that wait, for each team that has any."""
        with self.changed:
            return {team.name: team.queued_tokens for team in self.fair.working() if team.waiting}

    def submit(self, job: SequenceJob) -> None:
        """Queues a job.

        Raises RequestRefused: RESOURCE_EXHAUSTED with a hint when its team's part of the queue is
        full, UNAVAILABLE when closed.
        """
        if not job.team.weight > 0:
            raise ValueError(f"the weight of team {job.team.name} must be above 0")
        with self.changed:
            if self.closed:
                raise RequestRefused(
                    grpc.StatusCode.UNAVAILABLE,
                    "STOPPED",
                    "this replica has stopped; send the request to another one.",
                )
            team = self.fair.team(job.team.name)
            self._check_space(team, job)
            job.submitted_s = self._clock()
            job.cost = self._cost(job)
            job.waiting = True
            team.weight = job.team.weight  # as declared now, also for the jobs that wait
            team.seen_s = job.submitted_s
            self.fair.add(team, job)
            self._queued_tokens += job.num_tokens
            self.changed.notify()

    def cancel(self, job: SequenceJob) -> None:
        """Drops a job whose client has gone, if it has not been taken yet."""
        with self.changed:
            if job.waiting:
                self.fair.depart(job)
                self._queued_tokens -= job.num_tokens

    def next_batch(self) -> list[SequenceJob]:
        """Waits for work and returns a batch; empty only when closed."""
        with self.changed:
            while True:
                if self.closed:
                    return []
                if self.fair.num_working:
                    return self.take()
                self.changed.wait()

    def take_ahead(self) -> list[SequenceJob]:
        """Returns a batch of jobs that may go ahead of other teams; empty if there are none."""
        with self.changed:
            return self.take(ahead_only=True) if self.has_ahead else []

    def record_speed(self, tokens: int, seconds: float, cost: float = 0.0) -> None:
        """Records how long a pass took; the retry hint and the length of batches follow it.

        seconds: of this pass alone, without the time in which it waited for the one before.
        """
        rate = tokens / max(seconds, 1e-6)
        with self.changed:
            self._speed.record(cost, seconds)
            self._tokens_per_s = (
                0.8 * self._tokens_per_s + 0.2 * rate if self._tokens_per_s else rate
            )

    def lower_budget(self, max_batch_tokens: int) -> None:
        """Makes batches smaller for good: one of more tokens did not fit into memory."""
        with self.changed:
            self.max_batch_tokens = max(1, min(self.max_batch_tokens, max_batch_tokens))

    def close(self) -> list[SequenceJob]:
        """Ends `next_batch` and returns the jobs that will not be scored."""
        with self.changed:
            self.closed = True
            self._queued_tokens = 0
            self.changed.notify_all()
            return self.fair.clear()

    def _check_space(self, team: TeamQueue, job: SequenceJob) -> None:
        """Raises RequestRefused if the queue is full. A team without a job may always queue one."""
        if not team.waiting:
            return
        limit = self._max_queued_tokens
        if self._queued_tokens + job.num_tokens > FULL_QUEUES * limit:
            limit = min(limit, FULL_QUEUES * limit // self.fair.num_working)
        queued = team.queued_tokens
        if queued + job.num_tokens <= limit:
            return
        weights = sum(other.weight for other in self.fair.working())
        rate = self._tokens_per_s * team.weight / weights
        seconds = queued / rate if rate else 1.0
        raise RequestRefused(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "QUEUE_FULL",
            f"{queued} tokens of team {team.name} are queued, the limit is {limit}; send the same "
            "request again after the hint. The operator sets the limit with "
            "--batch.max-queued-tokens.",
            retry_after_ms=int(1000 * min(30.0, max(0.05, seconds / 2))),
        )

    def take(self, *, ahead_only: bool = False) -> list[SequenceJob]:
        """Takes jobs in their turns until the batch is full; `changed` is held."""
        now = self._clock()
        weights = {team.name: team.weight for team in self.fair.working()}
        space = self._measure_space(now, ahead_only=ahead_only)
        batch: list[SequenceJob] = []
        while (turn := self.fair.choose(ahead_only=ahead_only)) is not None:
            job = turn.job
            # The first one may be larger than a batch: it would never fit.
            if batch and not space.fits(job):
                break
            self.fair.take(turn)
            self._queued_tokens -= job.num_tokens
            space.take(job)
            batch.append(job)
        self._report(batch, weights, now)
        return batch

    def max_shared_cost(self) -> float:
        """Returns what a launch may cost while several teams are present; `changed` is held."""
        return self._measure_space(self._clock(), ahead_only=False).cost

    def report_text(
        self, team: TeamQueue, tokens: int, cost: float, waited_s: float | None
    ) -> None:
        """Counts a piece of a text that was dispatched; `changed` is held.

        waited_s: how long the text waited for its first one; None for a later one.
        """
        if self._standing is not None:
            weights = {team.name: team.weight for team in self.fair.working()}
            self._standing.dispatched([Dispatched(team.name, tokens, cost, waited_s)], weights)

    def _measure_space(self, now: float, *, ahead_only: bool) -> _Space:
        """Returns what fits into an empty batch."""
        space = _Space(self.max_batch_tokens, self._max_batch_reply_nbytes)
        if ahead_only or self.fair.is_shared(now):
            # Half, so that a team that goes ahead can be answered while the other half is encoded.
            space.reply_nbytes //= 2
            if self._speed.cost_per_s:
                space.cost = SHARED_BATCH_S * self._speed.cost_per_s
                space.floor_tokens = self._min_batch_tokens
        return space

    def _report(self, batch: list[SequenceJob], weights: Mapping[str, float], now: float) -> None:
        if self._standing is None:
            return
        self._standing.dispatched(
            [
                Dispatched(job.team.name, job.num_tokens, job.cost, now - job.submitted_s)
                for job in batch
            ],
            weights,
        )
