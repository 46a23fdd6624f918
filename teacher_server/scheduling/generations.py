"""Decides which texts are computed next: chunks of their prompts, or a token of each.

Every team's texts are charged to its one start tag (fairness.py), by what they cost: tokens of a prompt as
they are computed, and each token that is drawn with its row of the vocabulary head and its answer. Rows
that only fill a launch up are shared by those who draw. What is computed again after a text was dropped
is charged again, since it takes as long.

A step takes the texts that are ready in the order of their teams' tags, and goes on to a further launch
only while no team that has sequences to score is before them. So it is longer the less else there is to do.
Within a team, chunks and steps take turns, more urgent levels go first, then the texts that have waited
longest.

Out of its budget (fairness.py) a team goes ahead of the others until the first token of a text, unless it is
of level bulk: with an interactive one if the budget covers it, with others if it covers all that the team
has to begin.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from teacher_server.scheduling.cost import CostModel
from teacher_server.scheduling.fairness import FairQueue
from teacher_server.scheduling.forecast import TextForecast
from teacher_server.scheduling.generation_job import GenerationJob, TextModel
from teacher_server.scheduling.job import BULK, INTERACTIVE
from teacher_server.scheduling.slots import PATIENCE_STEPS, Slots, TeamTexts, is_paused


@dataclass(slots=True, eq=False)
class TextTurn:
    """Names the texts to compute next: chunks of prompts, or a token of each."""

    is_step: bool
    jobs: list[GenerationJob] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    """Tokens of each text's chunk, or 1."""
    costs: list[float] = field(default_factory=list)
    """What was charged for each text."""
    copies: list[tuple[int, int]] = field(default_factory=list)
    """Pages to copy before the launch: from, to."""

    def charges(self) -> list[tuple[GenerationJob, int, bool]]:
        """Returns what the quotas are charged: each token of a text once, and whether it is the first
        piece of it. Call it once."""
        parts = []
        for job, count in zip(self.jobs, self.counts, strict=True):
            # The token that is drawn counts with the step that draws it.
            end = job.text.num_cached + count + self.is_step
            parts.append((job, max(0, end - job.num_charged), job.num_charged == 0))
            job.num_charged = max(job.num_charged, end)
        return parts


class Generations:
    """Holds the texts of all teams and composes turns. Not thread-safe; turns.py guards it.

    max_running: slots. One turn is in flight at most.
    """

    def __init__(
        self,
        model: TextModel,
        costs: CostModel,
        fair: FairQueue,
        *,
        max_running: int,
        clock: Callable[[], float],
    ) -> None:
        self._model = model
        self._costs = costs
        self._fair = fair
        self._clock = clock
        step_cost = model.decode_rows * costs.empty_row
        self.slots = Slots(model.pool, max_running=max_running, patience=PATIENCE_STEPS * step_cost)
        self.in_flight: TextTurn | None = None
        self.forecast = TextForecast(costs)
        self._order = itertools.count(1)
        self._turns = itertools.count(1)

    @property
    def has_work(self) -> bool:
        """Whether a text waits or runs that could go on."""
        return any(team.queue.texts for team in self.slots.teams.values())

    def submit(self, job: GenerationJob) -> None:
        """Queues a text."""
        team = self._team(job)
        job.submitted_s = self._clock()
        job.order = next(self._order)
        self._fair.begin_text(team.queue)
        team.push(job)

    def cancel(self, job: GenerationJob) -> None:
        """Ends a text, wherever it is; one that is in flight keeps its pages until it has landed."""
        if job.state in ("new", "ended"):
            return
        team, before = self.slots.teams[job.team.name], job.state
        job.state = "ended"
        if before != "parked" and not is_paused(job):
            team.queue.texts -= 1
        if before == "parked":
            team.parked.remove(job)
        elif before == "waiting":
            team.remove_waiting()
        elif before == "running" and (not self.in_flight or job not in self.in_flight.jobs):
            self.slots.release(job)
        self._forget(team)

    def count_flush(self, job: GenerationJob) -> None:
        """Counts a flush that was made for a reader; the text may pause."""
        before = is_paused(job)
        job.unread += 1
        if not before and is_paused(job) and job.state == "running":
            self.slots.teams[job.team.name].queue.texts -= 1

    def count_read(self, job: GenerationJob) -> None:
        """Counts a flush that was read; the text goes on if it paused."""
        before = is_paused(job)
        job.unread -= 1
        if not before or is_paused(job) or job.state in ("new", "ended"):
            return
        team = self._team(job)
        self._fair.begin_text(team.queue)
        if job.state == "parked":
            team.parked.remove(job)
            team.push(job)

    def land(self, ended: Sequence[GenerationJob] = ()) -> None:
        """Ends the turn in flight, and texts that it has finished or that failed in it."""
        turn, self.in_flight = self.in_flight, None
        assert turn is not None
        for job in ended:
            self.forecast.record_end(job)
            self.cancel(job)
        for job in turn.jobs:
            if job.state == "ended" and job.text.pages:
                self.slots.release(job)
                self._forget(self.slots.teams[job.team.name])

    def clear(self) -> None:
        """Ends all texts; those in flight keep their pages until they have landed."""
        jobs = [
            job
            for team in list(self.slots.teams.values())
            for job in {*team.running, *team.parked, *(entry[2] for entry in team.heap)}
            if job.state != "ended"
        ]
        for job in jobs:
            self.cancel(job)

    def first(self) -> TeamTexts | None:
        """Returns the team with the smallest tag of those with a text that runs and does not pause."""
        teams = [team for team in self.slots.teams.values() if any(map(_can_go_on, team.running))]
        return min(teams, key=lambda team: team.start, default=None)

    def find_ahead(self) -> TeamTexts | None:
        """Returns a team that may go ahead of the others with the first token of a text."""
        return next((team for team in self.slots.teams.values() if self._next_ahead(team)), None)

    def compose(
        self, lead: TeamTexts, *, others_start: float, max_tokens: int, max_cost: float, ahead: bool
    ) -> TextTurn | None:
        """Composes the next turn, led by a team; None if no text of it can go on without room.

        others_start: the smallest tag of a team with sequences to score. max_tokens, max_cost: of chunks.
        ahead: the lead pays out of its budget for one text.
        """
        number = next(self._turns)
        first = self._next_ahead(lead) if ahead else None
        if first is not None:
            is_step = first.text.is_ready
        else:
            ready = [job.text.is_ready for job in lead.running if _can_go_on(job)]
            is_step = all(ready) or (lead.was_chunk and any(ready))
        lead.was_chunk = not is_step
        turn = TextTurn(is_step)
        if is_step:
            self._take_rows(turn, number, first, others_start)
        else:
            self._take_chunks(turn, number, first, others_start, max_tokens, max_cost)
        turn.copies, self.slots.copies = self.slots.copies, []
        if not turn.jobs:
            assert not turn.copies, "a text that entered can always be computed"
            return None
        self.in_flight = turn
        return turn

    def _take_chunks(
        self,
        turn: TextTurn,
        number: int,
        job: GenerationJob | None,
        others_start: float,
        max_tokens: int,
        max_cost: float,
    ) -> None:
        """Fills a turn with chunks of prompts; job: one that goes ahead."""
        ahead, cost = job is not None, 0.0
        while True:
            job = job or self._next(turn, number, is_step=False, before=others_start)
            if job is None:
                return
            count, at = self._model.next_chunk(job.text), job.text.num_cached
            price = self._costs.chunk(at, at + count)
            if turn.jobs and (sum(turn.counts) + count > max_tokens or cost + price > max_cost):
                return
            cost += price
            self._charge(turn, number, job, count, price, ahead=ahead)
            job, ahead = None, False

    def _take_rows(
        self, turn: TextTurn, number: int, job: GenerationJob | None, others_start: float
    ) -> None:
        """Fills a turn with texts that are ready; job: one that goes ahead."""
        ahead, rows = job is not None, self._model.decode_rows
        while True:
            # A launch that is not full takes as long as a full one: whoever fills it up is welcome.
            before = math.inf if len(turn.jobs) % rows else others_start
            job = job or self._next(turn, number, is_step=True, before=before)
            if job is None:
                break
            if self.slots.grow(job, turn.jobs):
                price = self._costs.row(job.text.num_tokens, job.row_nbytes)
                in_turn = self.slots.teams[job.team.name].start <= others_start
                self._charge(turn, number, job, 1, price, ahead=ahead, in_turn=in_turn)
            else:
                job.last_turn = number  # not again in this turn
            job, ahead = None, False
        if empty := -len(turn.jobs) % rows:
            share = empty * self._costs.empty_row / len(turn.jobs) if turn.jobs else 0.0
            for index, job in enumerate(turn.jobs):
                queue = self.slots.teams[job.team.name].queue
                self._fair.charge(queue, share, ahead=False, in_turn=False)
                turn.costs[index] += share

    def _next(
        self, turn: TextTurn, number: int, *, is_step: bool, before: float
    ) -> GenerationJob | None:
        """Returns the next text for a turn: of the team with the smallest tag; none after `before`.

        The first one is whoever's turn it is.
        """
        best: tuple[float, int, int, int] | None = None
        found = None
        for team in self.slots.teams.values():
            if turn.jobs and team.start > before:
                continue
            for job in team.running:
                if not _can_go_on(job) or job.text.is_ready != is_step or job.last_turn == number:
                    continue
                key = (team.start, job.level, job.last_turn, job.order)
                if best is None or key < best:
                    best, found = key, job
        return found

    def _charge(
        self,
        turn: TextTurn,
        number: int,
        job: GenerationJob,
        count: int,
        cost: float,
        *,
        ahead: bool,
        in_turn: bool = True,
    ) -> None:
        job.last_turn = number
        turn.jobs.append(job)
        turn.counts.append(count)
        turn.costs.append(cost)
        queue = self.slots.teams[job.team.name].queue
        self._fair.charge(queue, cost, ahead=ahead, in_turn=in_turn)

    def _next_ahead(self, team: TeamTexts) -> GenerationJob | None:
        """Returns the text of a team that may go ahead of the others, if there is one."""
        budget = team.queue.budget
        starting = [j for j in team.running if _can_go_on(j) and not j.has_drawn and j.level < BULK]
        if budget <= 0 or not starting:
            return None
        job = min(starting, key=lambda job: (job.level, job.order))
        cost = _cost_to_begin(job, self._costs)
        if job.level != INTERACTIVE:
            if team.num_waiting:
                return None
            others = sum(_cost_to_begin(one, self._costs) for one in starting if one is not job)
            cost += team.queue.queued_cost + others
        return job if budget >= min(cost, self._fair.max_budget) else None

    def _team(self, job: GenerationJob) -> TeamTexts:
        """Returns the texts of a job's team, whose queue may be a new one after it was idle."""
        queue = self._fair.team(job.team.name)
        queue.weight = job.team.weight
        queue.seen_s = self._clock()
        team = self.slots.teams.setdefault(queue.name, TeamTexts(queue))
        team.queue = queue
        return team

    def _forget(self, team: TeamTexts) -> None:
        """Forgets a team without texts."""
        if not team.running and not team.num_waiting and not team.parked:
            self.slots.teams.pop(team.queue.name, None)


def _cost_to_begin(job: GenerationJob, costs: CostModel) -> float:
    """Prices what is left until the first token of a text is drawn."""
    text = job.text
    rest = costs.chunk(text.num_cached, text.num_tokens - 1)
    return rest + costs.row(text.num_tokens, job.row_nbytes)


def _can_go_on(job: GenerationJob) -> bool:
    return job.state == "running" and not is_paused(job)
