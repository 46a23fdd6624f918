"""Texts beside sequences to score, in virtual time: the production policy, and a machine without a model.

Prices are the production prices of a made-up model, and a launch takes what it costs. A launch of rows
takes as long as a full one. One launch is computed at a time, as on a CPU.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable

import torch

from teacher_server.engine.continuation import Continuation, DrawRule
from teacher_server.engine.generate import Generator
from teacher_server.engine.key_pool import PAGE_TOKENS, KeyPool, KeyShape
from teacher_server.engine.stops import StopRule
from teacher_server.scheduling.cost import CostModel
from teacher_server.scheduling.generation_job import GenerationJob
from teacher_server.scheduling.generations import TextTurn
from teacher_server.scheduling.job import SequenceJob
from teacher_server.scheduling.scheduler import Scheduler
from teacher_server.scheduling.turns import Turns
from teacher_server.teams.declaration import Team
from tests.support.simulator import COST_S, WANTED

PACK_TOKENS = 2048
COSTS = CostModel(per_token_pair=2e-5, per_row=0.5, per_reply_byte=1e-4)
Ended = Callable[[GenerationJob], None]


class Texts:
    """What the scheduler sees of a generator, with the real pool and the real chunks."""

    decode_rows = 8
    next_chunk = Generator.next_chunk

    def __init__(self, pages: int) -> None:
        nbytes = pages * PAGE_TOKENS * 2 * 4
        self.pool = KeyPool([KeyShape(1, 1, 1)], torch.float32, torch.device("cpu"), nbytes)
        assert self.pool.num_pages == pages


class Machine:
    """One replica. Everything that comes is planned with `at`; time passes by launches alone."""

    def __init__(self, *, pages: int = 1000, max_running: int = 64) -> None:
        self.now = 0.0
        self.model = Texts(pages)
        self.scheduler = Scheduler(
            max_batch_tokens=PACK_TOKENS,
            max_batch_reply_nbytes=64 << 20,
            max_queued_tokens=1 << 40,
            cost=lambda job: COSTS.cost(job.num_tokens, job.num_tokens, job.reply_nbytes),
            clock=lambda: self.now,
        )
        self.turns = Turns(
            self.scheduler,
            lambda factor: True,
            model=self.model,  # type: ignore[arg-type]
            costs=COSTS,
            max_running=max_running,
            clock=lambda: self.now,
        )
        self.first_s: dict[str, list[float]] = defaultdict(list)
        """Of each team, seconds from each text's submission to its first token."""
        self.scored: dict[str, float] = defaultdict(float)
        self.written: dict[str, float] = defaultdict(float)
        """Cost that was dispatched, by team."""
        self.tokens: dict[str, int] = defaultdict(int)
        self.ended: list[GenerationJob] = []
        self.longest_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._tickets = itertools.count()
        self._on_end: dict[GenerationJob, Ended] = {}
        self._on_scored: dict[SequenceJob, Callable[[], None]] = {}
        self._prompts: dict[int, torch.Tensor] = {}

    @property
    def slots(self):
        return self.turns.texts.slots

    def at(self, time: float, call: Callable[[], None]) -> None:
        self._events.append((time, next(self._tickets), call))

    def write(
        self,
        team: Team,
        prompt: int,
        new: int,
        *,
        level: int = 1,
        ended: Ended = lambda job: None,
    ) -> GenerationJob:
        ids = self._prompts.setdefault(prompt, torch.zeros(prompt, dtype=torch.int64))
        text = Continuation(ids, DrawRule())
        job = GenerationJob(
            text, StopRule((), (), new, None), new, row_nbytes=100, level=level, team=team
        )
        self._on_end[job] = ended
        self.turns.submit(job)
        return job

    def score(self, team: Team, tokens: int, done: Callable[[], None] = lambda: None) -> None:
        job = SequenceJob(WANTED, tokens, 100 * tokens, team=team)
        self._on_scored[job] = done
        self.scheduler.submit(job)

    def flood(self, team: Team, tokens: int, window: int = 200) -> None:
        """A team that always has so many sequences to score."""

        def again() -> None:
            self.score(team, tokens, again)

        for _ in range(window):
            again()

    def run(self, seconds: float) -> "Machine":
        while self.now < seconds:
            self._happen()
            with self.scheduler.changed:
                turn = self.turns.choose()
            if turn is None:
                later = [time for time, _, _ in self._events]
                if not later:
                    break
                self.now = max(self.now, min(later))
                continue
            began = self.now
            if isinstance(turn, TextTurn):
                self._write(turn)
            else:
                self._score(turn)
            self.longest_s = max(self.longest_s, self.now - began)
            assert 0 <= self.slots.num_running <= self.slots.max_running
            self.check_pages()
        return self

    def check_pages(self) -> None:
        """No page is lost, and none is used twice but by texts that share it."""
        used = {
            page
            for team in self.slots.teams.values()
            for j in team.running
            for page in j.text.pages
        }
        assert len(used) + self.model.pool.num_free == self.model.pool.num_pages

    def _happen(self) -> None:
        due = sorted(event for event in self._events if event[0] <= self.now)
        self._events = [event for event in self._events if event[0] > self.now]
        for _, _, call in due:
            call()

    def _score(self, jobs: list[SequenceJob]) -> None:
        cost = sum(job.cost for job in jobs)
        self.now += cost * COST_S
        self.scheduler.record_speed(sum(j.num_tokens for j in jobs), cost * COST_S, cost)
        for job in jobs:
            self.scored[job.team.name] += job.cost
            self._on_scored.pop(job)()

    def _write(self, turn: TextTurn) -> None:
        rows = -(-len(turn.jobs) // 8) * 8
        least = rows * COSTS.empty_row if turn.is_step else 0.0
        seconds = max(sum(turn.costs), least) * COST_S
        self.now += seconds
        self.turns.record_speed(turn, seconds)
        self._happen()  # what comes while it is computed
        ended = []
        for job, count, cost in zip(turn.jobs, turn.counts, turn.costs, strict=True):
            self.written[job.team.name] += cost
            text = job.text
            assert len(text.pages) * PAGE_TOKENS >= text.num_cached + count
            text.num_cached += count
            if turn.is_step:
                text.new_ids.append(0)
                self.tokens[job.team.name] += 1
                if not job.has_drawn:
                    job.first_token_s = self.now
                    self.first_s[job.team.name].append(self.now - job.submitted_s)
                if len(text.new_ids) >= job.max_new_tokens and job.state == "running":
                    ended.append(job)
        self.turns.land(ended)
        for job in ended:
            self.ended.append(job)
            self._on_end.pop(job)(job)
