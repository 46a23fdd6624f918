"""Lets texts in and has them leave again: slots for texts, and pages for their keys.

A text enters with pages for its prompt, what was written of it, and ENTRY_TOKENS more at most, and takes
one page after another as it grows. Texts that wait enter in the order of their teams' start tags, but
none beyond its team's part of the slots while another team waits that has less than its own. A part is
by weight, among the teams that have texts here.

Where there is no room, texts are dropped: their pages are given back, and they wait again, to be
computed from their tokens so far. Nobody sees it but by the time it takes. First go texts whose readers are
behind. Then, of the teams that are further ahead than the one that needs room, the youngest text of the
one that is furthest ahead, if

- that team has more than its part of the slots and one text, or more than its part of the pages and more
  than one text, and the other one stays within its part; or
- the other team has no text that runs, and is behind by more than PATIENCE_STEPS steps, and the text has
  drawn as many tokens since it entered.

The last rule lets two teams whose texts do not fit side by side take turns, each long enough that the
turns are worth what dropping costs. A text that grows has the youngest text of the team furthest ahead
dropped, which may be itself; so the oldest one of any team always ends.
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from teacher_server.engine.key_pool import PAGE_TOKENS, pages_for
from teacher_server.scheduling.generation_job import MAX_UNREAD, GenerationJob, Pool
from teacher_server.scheduling.team_queue import TeamQueue

ENTRY_TOKENS = 256
"""Tokens after those it has that a text finds pages for when it enters."""
PATIENCE_STEPS = 32
"""Steps by which a team without a text may be behind one whose texts leave it no room."""


@dataclass(slots=True, eq=False)
class TeamTexts:
    """Holds the texts of one team."""

    queue: TeamQueue
    running: list[GenerationJob] = field(default_factory=list)
    parked: set[GenerationJob] = field(default_factory=set)
    """Those that were dropped and wait for their readers."""
    num_waiting: int = 0
    heap: list[tuple[int, int, GenerationJob]] = field(default_factory=list)
    """(level, order, text) of those that wait, and of some that do not any more."""
    was_chunk: bool = False
    """Whether its last turn computed a prompt: then it is the turn of its texts that are ready."""

    @property
    def start(self) -> float:
        return self.queue.start

    @property
    def num_pages(self) -> int:
        """Pages of its texts; one that several share counts for each."""
        return sum(len(job.text.pages) for job in self.running)

    def push(self, job: GenerationJob) -> None:
        """Lets a text wait."""
        job.state = "waiting"
        self.num_waiting += 1
        heapq.heappush(self.heap, (job.level, job.order, job))

    def remove_waiting(self) -> None:
        """Counts a text less that waited; its state has changed already."""
        self.num_waiting -= 1
        # A storm of cancelled texts must not fill the memory.
        if len(self.heap) > 64 + 2 * self.num_waiting:
            self.heap = [entry for entry in self.heap if entry[2].state == "waiting"]
            heapq.heapify(self.heap)

    def first_waiting(self) -> GenerationJob | None:
        """Returns the text that enters next."""
        while self.heap and self.heap[0][2].state != "waiting":
            heapq.heappop(self.heap)
        return self.heap[0][2] if self.heap else None


def is_paused(job: GenerationJob) -> bool:
    """Whether its reader is behind."""
    return job.unread >= MAX_UNREAD


class Slots:
    """Holds the texts of all teams and decides which of them have pages. Not thread-safe.

    Texts are let in and dropped only while none of them is in flight. patience: cost of PATIENCE_STEPS
    steps.
    """

    def __init__(self, pool: Pool, *, max_running: int, patience: float) -> None:
        self.pool = pool
        self.max_running = max_running
        self.teams: dict[str, TeamTexts] = {}
        """Those with texts that run or wait."""
        self.num_running = 0
        self.num_preemptions = 0
        self.copies: list[tuple[int, int]] = []
        """Pages that a text which entered needs a copy of, and where; done before the next launch."""
        self._patience = patience

    @property
    def num_waiting(self) -> int:
        return sum(team.num_waiting for team in self.teams.values())

    def waiting(self) -> Iterator[GenerationJob]:
        """The texts that wait for a slot or for pages."""
        for team in self.teams.values():
            yield from (job for _, _, job in team.heap if job.state == "waiting")

    def let_in(self) -> None:
        """Gives slots and pages to texts that wait, as long as there are any for them."""
        stuck: set[str] = set()
        while True:
            teams = [t for t in self.teams.values() if t.num_waiting and t.queue.name not in stuck]
            if not teams:
                return
            team = min(teams, key=lambda t: (self._is_full(t), t.start))
            job = team.first_waiting()
            assert job is not None
            if self._enter(team, job):
                continue
            if not team.running:
                return  # nobody who comes after it may take what it waits for
            stuck.add(team.queue.name)

    def grow(self, job: GenerationJob, taken: Sequence[GenerationJob]) -> bool:
        """Sees to a page for the next token of a text; False if it must do without for now.

        taken: texts that cannot be dropped.
        """
        text = job.text
        while pages_for(text.num_cached + 1) > len(text.pages):
            if (pages := self.pool.take(1)) is not None:
                text.pages += pages
                continue
            running = [one for team in self.teams.values() for one in team.running]
            others = [one for one in running if one not in taken]
            if paused := [one for one in others if is_paused(one)]:
                self.drop(max(paused, key=lambda one: one.order))
                continue
            teams = [t for t in self.teams.values() if any(one not in taken for one in t.running)]
            furthest = max(teams, key=lambda t: t.start)
            victim = max(
                (one for one in furthest.running if one not in taken), key=lambda one: one.order
            )
            if victim is job and taken:
                return False  # those that were taken may end, and leave their pages
            self.drop(victim)
            if victim is job:
                return False
        return True

    def drop(self, job: GenerationJob) -> None:
        """Takes slot and pages from a text, which waits for both again."""
        self.num_preemptions += 1
        self.release(job)
        job.text.num_cached = 0
        team = self.teams[job.team.name]
        if is_paused(job):
            job.state = "parked"
            team.parked.add(job)
        else:
            team.push(job)

    def release(self, job: GenerationJob) -> None:
        """Takes slot and pages from a text for good."""
        self.teams[job.team.name].running.remove(job)
        job.group.running.remove(job)
        self.num_running -= 1
        self.pool.give_back(job.text.pages)
        job.text.pages = []

    def _part(self, team: TeamTexts) -> float:
        """Returns the part of a team of everything, from 0 to 1."""
        others = (one for one in self.teams.values() if one.running or one.num_waiting)
        return team.queue.weight / sum(one.queue.weight for one in others)

    def _is_full(self, team: TeamTexts) -> bool:
        """Whether a team has all of its part of the slots."""
        return bool(team.running) and len(team.running) + 1 > self._part(team) * self.max_running

    def _enter(self, team: TeamTexts, job: GenerationJob) -> bool:
        """Gives a text a slot and pages; False if it has to wait."""
        text, prefilled = job.text, len(job.text.prompt_ids) - 1
        sibling = next((one for one in job.group.running), None)
        if sibling is not None:
            # What a sample computes of the prompt counts for the others too: they wait for it.
            sibling = next((s for s in job.group.running if s.text.num_cached >= prefilled), None)
            if sibling is None:
                return False
        shared = sibling.text.pages[: prefilled // PAGE_TOKENS] if sibling else []
        most = min(text.num_tokens + ENTRY_TOKENS, job.num_tokens)
        needed = pages_for(most) - len(shared)
        victims = self._find_victims(team, needed)
        if victims is None:
            return False
        source = sibling.text.pages[len(shared)] if sibling and prefilled % PAGE_TOKENS else None
        self.pool.share(shared)
        for victim in victims:
            self.drop(victim)
        own = self.pool.take(needed)
        if own is None:  # pages that the victims shared with others are still in use
            self.pool.give_back(shared)
            return False
        text.pages = [*shared, *own]
        if sibling is not None:
            text.num_cached = prefilled
            job.num_charged = max(job.num_charged, prefilled)
            if source is not None:
                self.copies.append((source, own[0]))
        job.state = "running"
        job.entered_with = len(text.new_ids)
        team.remove_waiting()
        team.running.append(job)
        job.group.running.append(job)
        self.num_running += 1
        return True

    def _find_victims(self, team: TeamTexts, needed: int) -> list[GenerationJob] | None:
        """Finds whom to drop for a text that needs a slot and pages; None if it has to wait."""
        free_slots, free_pages = self.max_running - self.num_running, self.pool.num_free
        victims: list[GenerationJob] = []
        while free_slots < 1 or free_pages < needed:
            victim = self._find_victim(team, needed, victims, for_slot=free_slots < 1)
            if victim is None:
                return None
            victims.append(victim)
            free_slots += 1
            free_pages += len(victim.text.pages)
        return victims

    def _find_victim(
        self, team: TeamTexts, needed: int, victims: Sequence[GenerationJob], *, for_slot: bool
    ) -> GenerationJob | None:
        """Finds the next text to drop in favour of a team."""
        best: tuple[float, int] = (-math.inf, 0)
        found: GenerationJob | None = None
        for other in self.teams.values():
            left = [job for job in other.running if job not in victims]
            if not left:
                continue
            if paused := [job for job in left if is_paused(job)]:
                return max(paused, key=lambda job: job.order)
            if other is team or not self._may_take(team, other, left, needed, for_slot=for_slot):
                continue
            youngest = max(left, key=lambda job: job.order)
            if (other.start, youngest.order) > best:
                best, found = (other.start, youngest.order), youngest
        return found

    def _may_take(
        self,
        team: TeamTexts,
        other: TeamTexts,
        left: Sequence[GenerationJob],
        needed: int,
        *,
        for_slot: bool,
    ) -> bool:
        """Whether the youngest text of `other`, of those that are left, may go in favour of a team."""
        behind = other.start - team.start
        youngest = max(left, key=lambda job: job.order)
        drawn = len(youngest.text.new_ids) - youngest.entered_with
        is_patient = behind > self._patience / other.queue.weight and drawn >= PATIENCE_STEPS
        if not team.running and is_patient:
            return True  # each stay brings a text on, whatever computing it again costs
        part, others_part = self._part(team), self._part(other)
        if team.running and len(team.running) + 1 > part * self.max_running:
            return False
        if for_slot:
            return len(left) > others_part * self.max_running + 1
        pages = sum(len(job.text.pages) for job in left)
        is_within = team.num_pages + needed <= max(1, part * self.pool.num_pages)
        return is_within and len(left) > 1 and pages > others_part * self.pool.num_pages
