"""Decides whose job is next: the fairness rule among teams.

Start-time fair queueing: every team has a start tag in virtual time, and the next job is always one
of the team with the smallest tag. What the job costs, divided by the team's weight, is then added
to the tag. Virtual time is the tag of the job dispatched last; a team that returns from being idle
starts there at the earliest, so that no share is saved up by waiting. Tokens, streams and requests
of a team share its one tag: having many of them gains nothing.

What a team leaves unused buys it latency instead, not more of the teacher. Each team has a budget:
the virtual time that passed while it had no work, times its weight, up to B, which is the cost of
`max_batch_tokens` tokens. Out of its budget a team goes ahead of the others, whatever the tags:

- with its interactive jobs, each that the budget covers;
- with its training jobs, while the budget covers everything that the team has waiting. A light team
  looks like this when its client does not say that a person waits; a flood never does.

A job of more than B may go ahead on a full budget. Jobs of level bulk, and those whose answers
would fill more than half of what a batch may answer, never do. What goes ahead is taken from the
budget and added to the team's tag, while virtual time stands still: the team pays later. So a
team's tag is never further ahead of virtual time than (L + max(B, L)) / w, where w is its weight
and L the cost of its largest job. For every interval in which two teams have work waiting, what was
dispatched for them, per weight, differs by at most the sum of this over both; without budgets it
would be L / w of each. A team that marks everything as interactive gets its share and, once, B.

All of this is about what is dispatched, which is charged at once, whatever becomes of it. A replica
dispatches one batch while it computes the one before. So a light team's jobs are in the next batch,
and beyond its own backlog it waits for two at most: the one that is computed, and the one that was
taken.
"""

import heapq
import itertools
from typing import NamedTuple

from teacher_server.scheduling.job import SequenceJob
from teacher_server.scheduling.team_queue import TeamQueue


class Turn(NamedTuple):
    """Names the job to take next, and how its team pays for it."""

    team: TeamQueue
    job: SequenceJob
    ahead: bool
    """It goes ahead of teams with smaller tags, and is paid for out of the budget."""


class FairQueue:
    """Queues the jobs of all teams and chooses whose job is next. Not thread-safe."""

    def __init__(self, *, max_batch_tokens: int, max_batch_reply_nbytes: int) -> None:
        self.num_working = 0
        """Teams with jobs that wait."""
        self.max_budget = float(max_batch_tokens)
        """B of the docstring."""
        self._max_ahead_nbytes = max_batch_reply_nbytes // 2
        self._teams: dict[str, TeamQueue] = {}
        self._forget_at = 64
        self._heap: list[tuple[float, int, TeamQueue]] = []
        """Teams with work, and some without; each is in it once, and its tag may have grown since."""
        self._tickets = itertools.count()
        self._virtual_time = 0.0
        self._ahead: tuple[dict[str, TeamQueue], dict[str, TeamQueue]] = ({}, {})
        """Teams that may go ahead with an interactive job, and with a training job, in turns."""

    @property
    def has_ahead(self) -> bool:
        """Whether a job waits that may go ahead of other teams."""
        return any(self._ahead)

    def working(self) -> list[TeamQueue]:
        """Returns the teams with work."""
        return [team for team in self._teams.values() if team.has_work]

    def is_shared(self, now: float) -> bool:
        """Whether more than one team has work, or asked for something lately."""
        return sum(1 for team in self._teams.values() if team.has_work or team.is_near(now)) > 1

    def team(self, name: str) -> TeamQueue:
        """Returns the queue of a team, a new one if the team is not known."""
        if (team := self._teams.get(name)) is not None:
            return team
        if len(self._teams) >= self._forget_at:
            # An idle team may go when a new one would stand where it stands: virtual time has
            # reached its tag, and has passed it by enough to fill its budget.
            self._teams = {
                name: team
                for name, team in self._teams.items()
                if team.has_work or team.listed or self._budget_on_return(team) < self.max_budget
            }
            self._forget_at = 64 + 2 * len(self._teams)
        team = self._teams[name] = TeamQueue(name, budget=self.max_budget)
        return team

    def add(self, team: TeamQueue, job: SequenceJob) -> None:
        """Queues a job of a team."""
        if not team.waiting:
            if not team.texts:
                self._return_from_idle(team)
            team.scored = max(team.scored, team.written)  # nothing is saved up within a team either
            self.num_working += 1
            if not team.listed:
                team.listed = True
                heapq.heappush(self._heap, (team.start, next(self._tickets), team))
        team.add(job)
        self._review(team)

    def begin_text(self, team: TeamQueue) -> None:
        """Counts a text of a team that can go on from now."""
        if not team.texts:
            if not team.waiting:
                self._return_from_idle(team)
            team.written = max(team.written, team.scored)
        team.texts += 1

    def charge(self, team: TeamQueue, cost: float, *, ahead: bool, in_turn: bool = True) -> None:
        """Charges a team for a piece of a text.

        in_turn: whether it had the smallest tag; else it fills up a launch that is made anyway, and
        virtual time stands still.
        """
        if ahead:
            team.budget -= cost
        elif in_turn:
            self._virtual_time = max(self._virtual_time, team.start)
        team.start += cost / team.weight
        team.written += cost
        self._review(team)

    def depart(self, job: SequenceJob) -> None:
        """Drops a job that waits. It cost nothing, so nothing is given back."""
        team = self._teams[job.team.name]
        team.depart(job)
        if not team.waiting:
            self.num_working -= 1
        self._review(team)

    def choose(self, *, ahead_only: bool = False) -> Turn | None:
        """Chooses the next job; None if there is none.

        ahead_only: only jobs that may go ahead of other teams.
        """
        first = self.first()
        if first is None:
            return None
        team = next((team for teams in self._ahead for team in teams.values()), None)
        if team is not None:
            ahead = team.start > first.start  # the smallest tag needs no budget
            if ahead or ahead_only:
                return Turn(team, team.next_job(), ahead)
        if ahead_only:
            return None
        team = team or first
        return Turn(team, team.next_job(), False)

    def take(self, turn: Turn) -> None:
        """Removes a chosen job and charges its team."""
        team, job = turn.team, turn.job
        team.take(job)
        if turn.ahead:
            self._charge_ahead(team, job)
        else:
            self._charge(team, job)
        if not team.waiting:
            self.num_working -= 1
        self._review(team)

    def clear(self) -> list[SequenceJob]:
        """Removes and returns all jobs that wait."""
        jobs = [job for team in self._teams.values() for job in team.jobs()]
        for job in jobs:
            job.waiting = False
        self._teams.clear()
        self._heap.clear()
        for teams in self._ahead:
            teams.clear()
        self.num_working = 0
        return jobs

    def _budget_on_return(self, team: TeamQueue) -> float:
        """Returns the budget of an idle team if it came back now, with what it left unused."""
        if team.start > self._virtual_time:
            return team.budget  # it has had more than its share, and pays that back first
        return min(self.max_budget, team.budget + team.weight * (self._virtual_time - team.start))

    def _return_from_idle(self, team: TeamQueue) -> None:
        """Lets a team compete again, starting no earlier than where the others are."""
        # The budget first: it is what virtual time has passed the old tag by.
        team.budget = self._budget_on_return(team)
        team.start = max(self._virtual_time, team.start)

    def _review(self, team: TeamQueue) -> None:
        """Lists a team with those that may go ahead, or not, after anything changed in it."""
        level = team.level_ahead(self.max_budget, self._max_ahead_nbytes)
        for number, teams in enumerate(self._ahead):
            if number == level:
                teams.setdefault(team.name, team)
            else:
                teams.pop(team.name, None)

    def first(self) -> TeamQueue | None:
        """Returns the team with the smallest start tag of those with jobs; ties take turns."""
        while self._heap:
            start, _, team = self._heap[0]
            if not team.waiting:
                heapq.heappop(self._heap)
                team.listed = False
            elif start < team.start:
                # Tags only grow, so an entry that is out of date is put right when it comes up.
                heapq.heapreplace(self._heap, (team.start, next(self._tickets), team))
            else:
                return team
        return None

    def _charge(self, team: TeamQueue, job: SequenceJob) -> None:
        """Moves virtual time to the team's tag, and the tag on by the job's cost."""
        # Texts may have moved it: while they are written, jobs that cannot be scored now stand still.
        self._virtual_time = max(self._virtual_time, team.start)
        team.start += job.cost / team.weight
        team.scored += job.cost

    def _charge_ahead(self, team: TeamQueue, job: SequenceJob) -> None:
        """Moves the team's tag on by the job's cost, while virtual time stands still."""
        team.budget -= job.cost
        team.start += job.cost / team.weight
        team.scored += job.cost
        for teams in self._ahead:  # the next of the teams that may go ahead has the next turn
            if teams.pop(team.name, None):
                teams[team.name] = team
