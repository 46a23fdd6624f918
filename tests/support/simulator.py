"""A teacher in virtual time: the production scheduler, a machine that takes batches, and teams.

Deterministic: events at one time happen in the order in which they were planned, and every team
that draws has a seed. What was dispatched and who had work is logged, and `worst_gap` reads the log
without knowing anything of the scheduler.
"""

import heapq
import itertools
import math
import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch

from logit_codec import TopKSpec
from teacher_server.engine.batch import RowRequest
from teacher_server.errors import RequestRefused
from teacher_server.scheduling.job import NUM_LEVELS, SequenceJob
from teacher_server.scheduling.scheduler import Scheduler
from teacher_server.teams.declaration import Team

NOTHING = torch.empty(0, dtype=torch.int64)
WANTED = RowRequest(NOTHING, NOTHING, TopKSpec(k=1))
BATCH_TOKENS = 4096
COST_S = 1 / 50_000
"""Seconds of the machine per unit of cost."""
FLOOR_S = 400 * COST_S
"""A forward pass takes at least this long: weights are read, kernels launched. Both overlap with
the arithmetic of a larger pass, so it is no addition to its time."""
REPLY_NBYTES_PER_TOKEN = 150


def cost(job: SequenceJob) -> float:
    """Tokens, a square term and reply bytes, as for a model of 2 * 10^9 weights."""
    return job.bucket + job.bucket**2 / 50_000 + job.reply_nbytes / 5000


class Queue(Protocol):
    """What the machine takes its batches from."""

    @property
    def queued_tokens(self) -> int: ...
    def submit(self, job: SequenceJob) -> None: ...
    def cancel(self, job: SequenceJob) -> None: ...
    def next_batch(self) -> list[SequenceJob]: ...
    def record_speed(self, tokens: int, seconds: float, cost: float) -> None: ...


class Fifo:
    """The baseline: batches of one canonical length, which the oldest job chooses.

    As `Scheduler` was before it knew of teams.
    """

    def __init__(self, *, max_batch_tokens: int, **_: object) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._queues: dict[tuple[int, int], deque[SequenceJob]] = {}
        self._order = itertools.count()
        self.queued_tokens = 0

    def submit(self, job: SequenceJob) -> None:
        job.order = next(self._order)
        job.waiting = True
        self.queued_tokens += job.bucket
        self._queues.setdefault((job.level, job.bucket), deque()).append(job)

    def cancel(self, job: SequenceJob) -> None:
        if job.waiting:
            job.waiting = False
            self.queued_tokens -= job.bucket
            queue = self._queues[job.level, job.bucket]
            queue.remove(job)
            if not queue:
                del self._queues[job.level, job.bucket]

    def next_batch(self) -> list[SequenceJob]:
        first = min(self._queues, key=lambda key: (key[0], self._queues[key][0].order))
        batch: list[SequenceJob] = []
        room = self._max_batch_tokens
        for level in range(NUM_LEVELS):
            queue = self._queues.get((level, first[1]), deque())
            while queue and (not batch or queue[0].bucket <= room):
                job = queue.popleft()
                job.waiting = False
                room -= job.bucket
                self.queued_tokens -= job.bucket
                batch.append(job)
            if not queue:
                self._queues.pop((level, first[1]), None)
        return batch

    def record_speed(self, tokens: int, seconds: float, cost: float) -> None:
        """Nothing follows from it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the log: `work` of a team came (+1) or went (-1), dispatched if it has a cost."""

    time: float
    team: str
    work: int
    cost: float = 0.0
    weight: float = 1.0


Answered = Callable[[SequenceJob], None]
Identify = Callable[[Team, int], Team]


def by_team(team: Team, credential: int) -> Team:
    """Whom the queue takes a job's owner for: the team, whatever credential it used."""
    return team


def by_credential(team: Team, credential: int) -> Team:
    """Each credential, stream or user as one of its own: what the service must not do."""
    return replace(team, name=f"{team.name}/{credential}")


class Simulation:
    """One replica. identify: what the queue takes a team and a credential of it for."""

    def __init__(
        self,
        make: Callable[..., Queue] = Scheduler,
        *,
        identify: Identify = by_team,
        max_batch_tokens: int = BATCH_TOKENS,
        max_queued_tokens: int = 1 << 40,
    ) -> None:
        self.now = 0.0
        self.log: list[Entry] = []
        self.waits: dict[str, list[float]] = defaultdict(list)
        """Seconds from submission to dispatch of each job of a team."""
        self.latencies: dict[str, list[float]] = defaultdict(list)
        """Seconds from submission to the end of its forward pass."""
        self.batches: list[list[str]] = []
        """Whose jobs they were, in the order of dispatch."""
        self.longest_batch_s = 0.0
        self.refused: Counter[str] = Counter()
        self.queue = make(
            max_batch_tokens=max_batch_tokens,
            max_batch_reply_nbytes=64 << 20,
            max_queued_tokens=max_queued_tokens,
            cost=cost,
            clock=lambda: self.now,
        )
        self._identify = identify
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._tickets = itertools.count()
        self._busy = False
        self._answered: dict[SequenceJob, tuple[Team, float, Answered]] = {}

    def at(self, time: float, call: Callable[[], None]) -> None:
        """Plans a call."""
        heapq.heappush(self._events, (max(time, self.now), next(self._tickets), call))

    def submit(
        self,
        team: Team,
        bucket: int,
        *,
        answered: Answered = lambda job: None,
        credential: int = 0,
        level: int = 1,
    ) -> SequenceJob | None:
        """One job of a team now; None if it was refused. answered: called when it is scored."""
        job = SequenceJob(
            WANTED,
            bucket,
            REPLY_NBYTES_PER_TOKEN * bucket,
            level,
            self._identify(team, credential),
        )
        try:
            self.queue.submit(job)
        except RequestRefused:
            self.refused[team.name] += 1
            return None
        self._answered[job] = (team, self.now, answered)
        self.log.append(Entry(self.now, team.name, 1))
        if not self._busy:
            self._busy = True
            self.at(self.now, self._take)
        return job

    def cancel(self, job: SequenceJob) -> None:
        """The client goes; what was taken is computed all the same."""
        if job.waiting:
            team, _, _ = self._answered.pop(job)
            self.log.append(Entry(self.now, team.name, -1))
        elif job in self._answered:
            team, since, _ = self._answered[job]
            self._answered[job] = (team, since, lambda job: None)
        self.queue.cancel(job)

    def run(self, seconds: float) -> "Simulation":
        """Until that time; returns itself."""
        while self._events and self._events[0][0] <= seconds:
            self.now, _, call = heapq.heappop(self._events)
            call()
        self.now = seconds
        return self

    def _take(self) -> None:
        if not self.queue.queued_tokens:
            self._busy = False
            return
        batch = self.queue.next_batch()
        passes: dict[int, list[SequenceJob]] = {}
        for job in batch:
            team, since, _ = self._answered[job]
            self.waits[team.name].append(self.now - since)
            self.log.append(Entry(self.now, team.name, -1, cost(job), team.weight))
            passes.setdefault(job.bucket, []).append(job)
        self.batches.append([self._answered[job][0].name for job in batch])
        began = end = self.now
        for jobs in passes.values():  # one forward pass after the other, each answered at its end
            seconds = max(FLOOR_S, COST_S * sum(map(cost, jobs)))
            end += seconds
            self.at(end, partial(self._answer, jobs, seconds))
        self.longest_batch_s = max(self.longest_batch_s, end - began)
        self.at(end, self._take)

    def _answer(self, jobs: list[SequenceJob], seconds: float) -> None:
        tokens = sum(job.bucket for job in jobs)
        self.queue.record_speed(tokens, seconds, sum(map(cost, jobs)))
        for job in jobs:
            team, since, answered = self._answered.pop(job)
            self.latencies[team.name].append(self.now - since)
            answered(job)

    def dispatched(self, team: str, since: float = 0.0, until: float = math.inf) -> float:
        """Cost of what a team got in a time."""
        return sum(e.cost for e in self.log if e.team == team and since <= e.time < until)

    def total(self) -> float:
        return sum(entry.cost for entry in self.log)


def worst_gap(
    log: Sequence[Entry], one: str, other: str, budget: float = BATCH_TOKENS
) -> tuple[float, float]:
    """The largest difference of dispatched cost per weight between two teams, over all intervals in
    which both have work; and what it may be: of each, per weight, a largest job, and what it may
    dispatch ahead of others, which is the budget or one job that is larger.

    The difference over an interval is that of a running sum at its ends, so over all intervals of
    one period it is the sum's highest value minus its lowest.
    """
    waiting = {one: 0, other: 0}
    largest = {one: 0.0, other: 0.0}
    ahead = {one: 0.0, other: 0.0}
    both = False
    worst = balance = low = high = 0.0
    for entry in log:
        if entry.team not in waiting:
            continue
        if both and entry.cost:
            balance += entry.cost / entry.weight * (1 if entry.team == one else -1)
            low, high = min(low, balance), max(high, balance)
            worst = max(worst, high - low)
        largest[entry.team] = max(largest[entry.team], entry.cost / entry.weight)
        most = max(budget, entry.cost) if budget else 0.0
        ahead[entry.team] = max(ahead[entry.team], most / entry.weight)
        waiting[entry.team] += entry.work
        before, both = both, all(waiting.values())
        if both and not before:
            balance = low = high = 0.0
    return worst, sum(largest.values()) + sum(ahead.values())


def sizes(*choices: int, seed: int = 0) -> Iterator[int]:
    """Canonical lengths without end, drawn from the choices."""
    draw = random.Random(seed)
    while True:
        yield draw.choice(choices)


class Closed:
    """A team that keeps `window` jobs in flight, from `start` to `end`; a flood if that is many.

    credentials: it uses them in turns. on_s, off_s: it pauses. back_s: from an answer to the next
    request.
    """

    def __init__(
        self,
        simulation: Simulation,
        team: Team,
        lengths: Iterator[int],
        *,
        window: int,
        start: float = 0.0,
        end: float = math.inf,
        credentials: int = 1,
        on_s: float = math.inf,
        off_s: float = 0.0,
        back_s: float = 0.002,
        level: int = 1,
    ) -> None:
        self.team = team
        self._simulation = simulation
        self._lengths = lengths
        self._end = end
        self._credentials = itertools.cycle(range(credentials))
        self._on_s, self._off_s, self._back_s = on_s, off_s, back_s
        self._start = start
        self._level = level
        for _ in range(window):
            simulation.at(start, self._next)

    def _next(self) -> None:
        now = self._simulation.now
        if now >= self._end:
            return
        if math.isfinite(self._on_s):
            period_s = self._on_s + self._off_s
            cycle = math.floor((now - self._start) / period_s + 1e-9)
            if now >= self._start + cycle * period_s + self._on_s:
                self._simulation.at(self._start + (cycle + 1) * period_s, self._next)
                return
        job = self._simulation.submit(
            self.team,
            next(self._lengths),
            answered=lambda job: self._simulation.at(
                self._simulation.now + self._back_s, self._next
            ),
            credential=next(self._credentials),
            level=self._level,
        )
        if job is None:
            self._simulation.at(now + 0.05, self._next)


class Open:
    """A team that sends `count` jobs every `period_s`, whatever comes back: drops or bursts."""

    def __init__(
        self,
        simulation: Simulation,
        team: Team,
        lengths: Iterator[int],
        *,
        period_s: float,
        count: int = 1,
        start: float = 0.0,
        level: int = 1,
    ) -> None:
        def send() -> None:
            for _ in range(count):
                simulation.submit(team, next(lengths), level=level)
            simulation.at(simulation.now + period_s, send)

        simulation.at(start, send)


class CancelStorm:
    """A team that submits `count` jobs again and again and cancels all of them `after_s` later,
    those that are being computed too."""

    def __init__(
        self,
        simulation: Simulation,
        team: Team,
        lengths: Iterator[int],
        *,
        count: int = 100,
        after_s: float = 0.03,
    ) -> None:
        def storm() -> None:
            jobs = [simulation.submit(team, next(lengths)) for _ in range(count)]

            def go() -> None:
                for job in jobs:
                    if job is not None:
                        simulation.cancel(job)
                storm()

            simulation.at(simulation.now + after_s, go)

        simulation.at(0.0, storm)


class Quitter:
    """A team that cancels each of its `count` jobs as soon as it is computed, and sends another."""

    def __init__(
        self, simulation: Simulation, team: Team, lengths: Iterator[int], *, count: int = 100
    ) -> None:
        jobs: list[SequenceJob | None] = []

        def look() -> None:
            for job in jobs:
                if job is not None and not job.waiting:
                    simulation.cancel(job)
            jobs[:] = [job for job in jobs if job is not None and job.waiting]
            jobs.extend(simulation.submit(team, next(lengths)) for _ in range(count - len(jobs)))
            simulation.at(simulation.now + 0.02, look)

        simulation.at(0.0, look)
