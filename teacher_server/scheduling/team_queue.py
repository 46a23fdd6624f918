"""Queues the jobs of one team, and chooses among them.

More urgent levels go first, and within a level those of a canonical length that the batch already
has, so that they share its forward pass. The oldest job of a level is overtaken like this by at
most one batch's worth of tokens.
"""

import itertools
import math
from collections import deque
from collections.abc import Collection

from teacher_server.scheduling.job import BULK, NUM_LEVELS, TRAINING, SequenceJob

NEAR_S = 10.0
"""How long after its last request a team without work still counts as present."""


class TeamQueue:
    """Holds the jobs of one team, its weight, and its place in virtual time (fairness.py)."""

    def __init__(self, name: str, *, budget: float) -> None:
        self.name = name
        self.weight = 1.0
        self.budget = budget
        """Cost that may go ahead of other teams; below 0 after a job of more than B."""
        self.seen_s = -math.inf
        """When its last job was queued."""
        self.start = 0.0
        """Start tag of the next job; while there is none, where the last one ended."""
        self.listed = False
        """Whether it is in the heap of `FairQueue`."""
        self.waiting = 0
        """Jobs that wait."""
        self.queued_tokens = 0
        self.queued_cost = 0.0
        """Cost of the jobs that wait."""
        self._waiting = [0] * NUM_LEVELS
        self._queues: list[dict[int, deque[SequenceJob]]] = [{} for _ in range(NUM_LEVELS)]
        """For each level, the jobs by canonical length."""
        self._departed = 0
        """Jobs in the queues whose client has gone."""
        self._overtaken_tokens = 0
        """Tokens of jobs that were chosen for their length since the oldest one was chosen."""

    @property
    def level(self) -> int:
        """The most urgent level that has jobs; NUM_LEVELS if there are none."""
        return next((level for level in range(NUM_LEVELS) if self._waiting[level]), NUM_LEVELS)

    def is_near(self, now: float) -> bool:
        """Whether it asked for something lately."""
        return now - self.seen_s < NEAR_S

    def jobs(self) -> list[SequenceJob]:
        """Returns the jobs that wait."""
        queues = itertools.chain.from_iterable(level.values() for level in self._queues)
        return [job for queue in queues for job in queue if job.waiting]

    def add(self, job: SequenceJob) -> None:
        self._queues[job.level].setdefault(job.bucket, deque()).append(job)
        self._count(job, 1)

    def depart(self, job: SequenceJob) -> None:
        """Drops a job whose client has gone."""
        job.waiting = False
        self._count(job, -1)
        # Finding it in its queue takes long, so it stays there until it comes up. Now and then,
        # all of them are swept out: a storm of cancelled requests must not fill the memory.
        self._departed += 1
        if self._departed > 64 + self.waiting or not self.waiting:
            for level in self._queues:
                for bucket, queue in list(level.items()):
                    level[bucket] = deque(job for job in queue if job.waiting)
                    if not level[bucket]:
                        del level[bucket]
            self._departed = 0

    def level_ahead(self, max_budget: float, max_reply_nbytes: int) -> int | None:
        """Returns the level of the job that may go ahead of other teams, if there is one.

        max_budget: what a full budget covers; a job that costs more may go ahead on it.
        """
        level = self.level
        # This first look is all that a flood gets, at each of its jobs.
        if level >= BULK or self.budget <= 0:
            return None
        if level == TRAINING and self.waiting > 1 and self.queued_cost > self.budget:
            return None
        job = self.oldest()
        is_covered = self.budget >= min(job.cost, max_budget)
        return level if is_covered and job.reply_nbytes <= max_reply_nbytes else None

    def choose(
        self, buckets: Collection[int], *, alone: bool, patience: int
    ) -> tuple[SequenceJob | None, bool]:
        """Chooses the next job for a batch that has these canonical lengths.

        Returns it, and whether it was chosen for its length. It is of the most urgent level.
        alone: no other team has work. Then the batch keeps to the lengths that it has, also with
        jobs of lower levels, and None ends it. patience: tokens that may overtake the oldest job.
        """
        level = self.level
        if buckets and self._overtaken_tokens < patience:
            for lower in range(level, NUM_LEVELS if alone else level + 1):
                for bucket in buckets:
                    if (job := self._front(lower, bucket)) is not None:
                        return job, True
            if alone:
                return None, False
        return self.oldest(), False

    def oldest(self) -> SequenceJob:
        """Returns the oldest job of the most urgent level."""
        level = self.level
        fronts = [self._front(level, bucket) for bucket in list(self._queues[level])]
        return min((job for job in fronts if job), key=lambda job: job.order)

    def take(self, job: SequenceJob, *, overtakes: bool) -> None:
        """Removes a job that was chosen."""
        queue = self._queues[job.level][job.bucket]
        assert queue[0] is job
        queue.popleft()
        if not queue:
            del self._queues[job.level][job.bucket]
        job.waiting = False
        self._count(job, -1)
        self._overtaken_tokens = self._overtaken_tokens + job.bucket if overtakes else 0

    def _front(self, level: int, bucket: int) -> SequenceJob | None:
        """Returns the oldest job of a level and length, past those that departed."""
        queue = self._queues[level].get(bucket)
        if queue is None:
            return None
        while queue:
            if queue[0].waiting:
                return queue[0]
            queue.popleft()
            self._departed -= 1
        del self._queues[level][bucket]
        return None

    def _count(self, job: SequenceJob, sign: int) -> None:
        self.waiting += sign
        self._waiting[job.level] += sign
        self.queued_tokens += sign * job.bucket
        # Sums and differences of fractions drift; without jobs the cost is 0.
        self.queued_cost = self.queued_cost + sign * job.cost if self.waiting else 0.0
