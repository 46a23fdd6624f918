"""A teacher in virtual time: the production scheduler, a machine that takes batches, and teams.

The machine computes one batch and holds the next one already, as a replica does: a batch is taken
while the one before it is computed.

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
MAX_IN_FLIGHT = 2
"""Batches that are taken and not answered: one is computed, one waits for it."""


def cost(job: SequenceJob) -> float:
    """Tokens, a square term and reply bytes, as for a model of 2 * 10^9 weights."""
    return job.num_tokens + job.num_tokens**2 / 50_000 + job.reply_nbytes / 5000


class Queue(Protocol):
    """What the machine takes its batches from."""

    @property
    def queued_tokens(self) -> int: ...
    def submit(self, job: SequenceJob) -> None: ...
    def cancel(self, job: SequenceJob) -> None: ...
    def next_batch(self) -> list[SequenceJob]: ...
    def record_speed(self, tokens: int, seconds: float, cost: float) -> None: ...


class Fifo:
    """The baseline: a level, then the order of arrival, whoever asks."""

    def __init__(self, *, max_batch_tokens: int, **_: object) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._queues: list[deque[SequenceJob]] = [deque() for _ in range(NUM_LEVELS)]
        self.queued_tokens = 0

    def submit(self, job: SequenceJob) -> None:
        job.waiting = True
        self.queued_tokens += job.num_tokens
        self._queues[job.level].append(job)

    def cancel(self, job: SequenceJob) -> None:
        if job.waiting:
            job.waiting = False
            self.queued_tokens -= job.num_tokens
            self._queues[job.level].remove(job)

    def next_batch(self) -> list[SequenceJob]:
        batch: list[SequenceJob] = []
        room = self._max_batch_tokens
        for queue in self._queues:
            while queue and (not batch or queue[0].num_tokens <= room):
                job = queue.popleft()
                job.waiting = False
                room -= job.num_tokens
                self.queued_tokens -= job.num_tokens
                batch.append(job)
            if queue:
                break
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
        self.starts: dict[str, list[float]] = defaultdict(list)
        """Seconds from submission until its batch began to be computed."""
        self.latencies: dict[str, list[float]] = defaultdict(list)
        """Seconds from submission to the end of its forward pass."""
        self.batches: list[list[str]] = []
        """Whose jobs they were, in the order of dispatch."""
        self.passes: list[tuple[float, float]] = []
        """When each forward pass began and ended."""
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
        self._in_flight: deque[list[SequenceJob]] = deque()
        """Batches that were taken; the first one is being computed."""
        self._looking = False
        """Whether the machine is about to look for work."""
        self._answered: dict[SequenceJob, tuple[Team, float, Answered]] = {}

    @property
    def longest_pass_s(self) -> float:
        return max(end - began for began, end in self.passes)

    def at(self, time: float, call: Callable[[], None]) -> None:
        """Plans a call."""
        heapq.heappush(self._events, (max(time, self.now), next(self._tickets), call))

    def submit(
        self,
        team: Team,
        num_tokens: int,
        *,
        answered: Answered = lambda job: None,
        credential: int = 0,
        level: int = 1,
        nbytes_per_token: int = REPLY_NBYTES_PER_TOKEN,
    ) -> SequenceJob | None:
        """One job of a team now; None if it was refused. answered: called when it is scored."""
        job = SequenceJob(
            WANTED,
            num_tokens,
            nbytes_per_token * num_tokens,
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
        if not self._looking and len(self._in_flight) < MAX_IN_FLIGHT:
            self._looking = True
            self.at(self.now, self._take)  # after everything else that comes at this time
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
        """Takes batches until two are in flight, and computes if nothing is computed."""
        self._looking = False
        while self.queue.queued_tokens and len(self._in_flight) < MAX_IN_FLIGHT:
            batch = self.queue.next_batch()
            for job in batch:
                team, since, _ = self._answered[job]
                self.waits[team.name].append(self.now - since)
                self.log.append(Entry(self.now, team.name, -1, cost(job), team.weight))
            self.batches.append([self._answered[job][0].name for job in batch])
            self._in_flight.append(batch)
            if len(self._in_flight) == 1:
                self._compute()

    def _compute(self) -> None:
        """Begins the forward pass of the first batch in flight."""
        batch = self._in_flight[0]
        for job in batch:
            team, since, _ = self._answered[job]
            self.starts[team.name].append(self.now - since)
        seconds = max(FLOOR_S, COST_S * sum(map(cost, batch)))
        self.passes.append((self.now, self.now + seconds))
        self.at(self.now + seconds, partial(self._answer, seconds))

    def _answer(self, seconds: float) -> None:
        """Ends the forward pass, goes on with the batch that was taken, and takes another."""
        batch = self._in_flight.popleft()
        tokens = sum(job.num_tokens for job in batch)
        self.queue.record_speed(tokens, seconds, sum(map(cost, batch)))
        for job in batch:
            team, since, answered = self._answered.pop(job)
            self.latencies[team.name].append(self.now - since)
            answered(job)
        if self._in_flight:
            self._compute()
        self._take()

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


def idle_s(run: Simulation) -> float:
    """Seconds in which work waited and nothing was computed, by the log alone."""
    changes = [(entry.time, entry.work, 0) for entry in run.log]
    changes += [(began, 0, 1) for began, _ in run.passes]
    changes += [(end, 0, -1) for _, end in run.passes if end <= run.now]
    idle = since = 0.0
    waiting = computing = 0
    for time, work, passes in sorted(changes, key=lambda change: change[0]):
        if waiting and not computing:
            idle += time - since
        since = time
        waiting += work
        computing += passes
    return idle + (run.now - since if waiting and not computing else 0.0)


def sizes(*choices: int, seed: int = 0) -> Iterator[int]:
    """Lengths without end, drawn from the choices."""
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
        nbytes_per_token: int = REPLY_NBYTES_PER_TOKEN,
    ) -> None:
        self.team = team
        self._simulation = simulation
        self._lengths = lengths
        self._end = end
        self._credentials = itertools.cycle(range(credentials))
        self._on_s, self._off_s, self._back_s = on_s, off_s, back_s
        self._start = start
        self._level = level
        self._nbytes_per_token = nbytes_per_token
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
            nbytes_per_token=self._nbytes_per_token,
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
