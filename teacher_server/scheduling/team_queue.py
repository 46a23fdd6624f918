"""Queues the jobs of one team: more urgent levels go first, and within a level older jobs."""

import math
from collections import deque

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
        self.texts = 0
        """Texts that are to be written and could go on."""
        self.scored = 0.0
        self.written = 0.0
        """Cost of the jobs and of the texts that were dispatched, which take turns within the team."""
        self.queued_tokens = 0
        self.queued_cost = 0.0
        """Cost of the jobs that wait."""
        self._queues: list[deque[SequenceJob]] = [deque() for _ in range(NUM_LEVELS)]
        """For each level, its jobs, the oldest first. Some may have departed, never the first."""

    @property
    def has_work(self) -> bool:
        """Whether anything of it waits, or is being written."""
        return self.waiting > 0 or self.texts > 0

    @property
    def level(self) -> int:
        """The most urgent level that has jobs; NUM_LEVELS if there are none."""
        return next((level for level, queue in enumerate(self._queues) if queue), NUM_LEVELS)

    def is_near(self, now: float) -> bool:
        """Whether it asked for something lately."""
        return now - self.seen_s < NEAR_S

    def jobs(self) -> list[SequenceJob]:
        """Returns the jobs that wait."""
        return [job for queue in self._queues for job in queue if job.waiting]

    def next_job(self) -> SequenceJob:
        """Returns the oldest job of the most urgent level."""
        return self._queues[self.level][0]

    def add(self, job: SequenceJob) -> None:
        self._queues[job.level].append(job)
        self._count(job, 1)

    def take(self, job: SequenceJob) -> None:
        """Removes the next job."""
        assert job is self.next_job()
        self._remove(job)

    def depart(self, job: SequenceJob) -> None:
        """Drops a job whose client has gone."""
        self._remove(job)
        # Finding it in its queue takes long, so it stays there until it comes up. Now and then,
        # all of them are swept out: a storm of cancelled requests must not fill the memory.
        if sum(map(len, self._queues)) > 64 + 2 * self.waiting:
            self._queues = [deque(job for job in queue if job.waiting) for queue in self._queues]

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
        job = self.next_job()
        is_covered = self.budget >= min(job.cost, max_budget)
        return level if is_covered and job.reply_nbytes <= max_reply_nbytes else None

    def _remove(self, job: SequenceJob) -> None:
        job.waiting = False
        self._count(job, -1)
        queue = self._queues[job.level]
        while queue and not queue[0].waiting:
            queue.popleft()

    def _count(self, job: SequenceJob, sign: int) -> None:
        self.waiting += sign
        self.queued_tokens += sign * job.num_tokens
        # Sums and differences of fractions drift; without jobs the cost is 0.
        self.queued_cost = self.queued_cost + sign * job.cost if self.waiting else 0.0
