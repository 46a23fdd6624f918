"""Queues the jobs of one team, and keeps the team's place in virtual time."""

import itertools
import math
from collections import deque
from collections.abc import Collection

from teacher_server.scheduling.job import NUM_LEVELS, Job

NEAR_S = 10.0
"""A team is there while it has work, and for so long after its last request."""


class _Line:
    """The jobs of one team, and where the team is in virtual time."""

    def __init__(self, name: str, *, budget: float) -> None:
        self.name = name
        self.weight = 1.0
        self.budget = budget
        """What it may cost to go ahead of other teams; below 0 after a job of more than B."""
        self.seen_s = -math.inf
        """When its last job was queued."""
        self.start = 0.0
        """Start tag of the next job; while there is none, where the last one ended."""
        self.listed = False
        """Whether it is in the scheduler's heap."""
        self.waiting = 0
        """Jobs that are queued and have not departed."""
        self.queued_tokens = 0
        self.queued_cost = 0.0
        """Of these jobs."""
        self._waiting = [0] * NUM_LEVELS
        self._queues: list[dict[int, deque[Job]]] = [{} for _ in range(NUM_LEVELS)]
        """Of each level, by canonical length."""
        self._departed = 0
        self._overtaken_tokens = 0
        """Of jobs that were chosen for their length since the oldest one was."""

    @property
    def level(self) -> int:
        """The most urgent level that has jobs; NUM_LEVELS if there are none."""
        return next((level for level in range(NUM_LEVELS) if self._waiting[level]), NUM_LEVELS)

    def is_near(self, now: float) -> bool:
        """Whether it asked for something lately."""
        return now - self.seen_s < NEAR_S

    def jobs(self) -> list[Job]:
        """Those that wait."""
        queues = itertools.chain.from_iterable(level.values() for level in self._queues)
        return [job for queue in queues for job in queue if job.waiting]

    def add(self, job: Job) -> None:
        self._queues[job.level].setdefault(job.bucket, deque()).append(job)
        self._count(job, 1)

    def depart(self, job: Job) -> None:
        """The job's client has gone; it is skipped when it comes up, or swept out before."""
        job.waiting = False
        self._count(job, -1)
        self._departed += 1
        if self._departed > 64 + self.waiting or not self.waiting:
            for level in self._queues:
                for bucket, queue in list(level.items()):
                    level[bucket] = deque(job for job in queue if job.waiting)
                    if not level[bucket]:
                        del level[bucket]
            self._departed = 0

    def choose(
        self, buckets: Collection[int], *, alone: bool, patience: int
    ) -> tuple[Job | None, bool]:
        """The job to take next for a batch that has these canonical lengths, and whether it was
        chosen for its length.

        It is of the most urgent level. alone: no other team has work. Then the batch is left to the
        lengths that it has, also with jobs of lower levels, and None ends it.
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

    def oldest(self) -> Job:
        """The oldest job of its most urgent level."""
        level = self.level
        fronts = [self._front(level, bucket) for bucket in list(self._queues[level])]
        return min((job for job in fronts if job), key=lambda job: job.order)

    def take(self, job: Job, *, overtakes: bool) -> None:
        """Removes what was chosen."""
        queue = self._queues[job.level][job.bucket]
        assert queue[0] is job
        queue.popleft()
        if not queue:
            del self._queues[job.level][job.bucket]
        job.waiting = False
        self._count(job, -1)
        self._overtaken_tokens = self._overtaken_tokens + job.bucket if overtakes else 0

    def _front(self, level: int, bucket: int) -> Job | None:
        """The oldest job of a level and length."""
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

    def _count(self, job: Job, sign: int) -> None:
        self.waiting += sign
        self._waiting[job.level] += sign
        self.queued_tokens += sign * job.bucket
        # Sums and differences of fractions drift; without jobs it is 0.
        self.queued_cost = self.queued_cost + sign * job.cost if self.waiting else 0.0
