"""Counts how a replica served each team in the last minute, for `Status` and metrics.

Thread-safe: the event loop and the compute thread count, and any thread may read.
"""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from teacher_server.monitoring.last_minute import LastMinute

SHORTEST_WAIT_S = 1e-4
WAIT_STEP = 1.1
"""Waiting times are counted in classes; each is this many times as high as the one before."""


@dataclass(frozen=True, slots=True)
class Dispatched:
    """A job that was dispatched to the teacher."""

    team: str
    tokens: int
    cost: float
    waited_s: float | None
    """None: it is a later piece of what has waited before."""


@dataclass(frozen=True, slots=True)
class TeamSnapshot:
    """The last minute of one team."""

    team: str
    weight: float
    tokens_in_flight: int
    """Tokens of sequences that were admitted and are not answered yet."""
    queued_tokens: int
    """Of these, tokens that wait for a batch."""
    tokens_per_s: float
    """Rate of dispatched tokens."""
    cost: float
    """Cost dispatched in the whole minute."""
    share: float
    """Its part of the cost dispatched for all teams."""
    entitled: float
    """What its share would be if each second's cost had been divided by weight among the teams that
    had work in that second."""
    waiting_p95_s: float
    """How long its sequences waited for a batch, up to 10 % too high; 0 if none was dispatched."""
    rejected: int
    """Requests answered with an error."""


@dataclass(slots=True)
class _Counts:
    """The counts of one team in one second."""

    tokens: int = 0
    cost: float = 0.0
    rejected: int = 0
    waits: Counter[int] = field(default_factory=Counter)


@dataclass(slots=True)
class _Slot:
    second: int
    counts: dict[str, _Counts] = field(default_factory=dict)
    working: dict[str, float] = field(default_factory=dict)
    """Weights of the teams that had work."""


def idle(team: str) -> TeamSnapshot:
    """Returns the snapshot of a team that did nothing in the last minute."""
    return TeamSnapshot(team, 1.0, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0)


class TeamStats:
    """Counts what happens to each team's requests."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._lock = threading.Lock()
        self._slots = LastMinute(_Slot, clock)
        self._in_flight: Counter[str] = Counter()
        self._weights: dict[str, float] = {}

    def admitted(self, team: str, tokens: int) -> None:
        """Counts a sequence that entered."""
        with self._lock:
            self._in_flight[team] += tokens

    def answered(self, team: str, tokens: int) -> None:
        """Counts a sequence that was answered, or has failed or been cancelled since it entered."""
        with self._lock:
            self._in_flight[team] -= tokens
            if not self._in_flight[team]:
                del self._in_flight[team]

    def rejected(self, team: str) -> None:
        """Counts a request that was answered with an error."""
        with self._lock:
            self._slots.now().counts.setdefault(team, _Counts()).rejected += 1

    def dispatched(self, jobs: Sequence[Dispatched], working: Mapping[str, float]) -> None:
        """Counts a dispatched batch. working: weights of the teams that had work at that moment."""
        with self._lock:
            slot = self._slots.now()
            slot.working.update(working)
            self._weights.update(working)
            for job in jobs:
                counts = slot.counts.setdefault(job.team, _Counts())
                counts.tokens += job.tokens
                counts.cost += job.cost
                if job.waited_s is not None:
                    counts.waits[_wait_class(job.waited_s)] += 1

    def teams(self, queued_tokens: Mapping[str, int]) -> list[TeamSnapshot]:
        """Returns the teams with work now or in the last minute, by name.

        queued_tokens: tokens that wait, by team.
        """
        with self._lock:
            now = self._slots.now().second
            totals: dict[str, _Counts] = {}
            entitled: Counter[str] = Counter()
            for slot in self._slots:
                for team, counts in slot.counts.items():
                    total = totals.setdefault(team, _Counts())
                    total.tokens += counts.tokens
                    total.cost += counts.cost
                    total.rejected += counts.rejected
                    total.waits += counts.waits
                slot_cost = sum(counts.cost for counts in slot.counts.values())
                weights = sum(slot.working.values())
                for team, weight in slot.working.items():
                    entitled[team] += slot_cost * weight / weights  # type: ignore[assignment]
            cost = sum(total.cost for total in totals.values()) or 1.0
            seconds = self._slots.seconds(now)
            names = sorted({*totals, *queued_tokens, *self._in_flight, *entitled})
            self._weights = {team: self._weights[team] for team in names if team in self._weights}
            nothing = _Counts()
            return [
                TeamSnapshot(
                    team=team,
                    weight=self._weights.get(team, 1.0),
                    tokens_in_flight=self._in_flight[team],
                    queued_tokens=queued_tokens.get(team, 0),
                    tokens_per_s=totals.get(team, nothing).tokens / seconds,
                    cost=totals.get(team, nothing).cost,
                    share=totals.get(team, nothing).cost / cost,
                    entitled=entitled[team] / cost,
                    waiting_p95_s=_percentile(totals.get(team, nothing).waits, 0.95),
                    rejected=totals.get(team, nothing).rejected,
                )
                for team in names
            ]


def _wait_class(seconds: float) -> int:
    return math.ceil(math.log(max(seconds, SHORTEST_WAIT_S) / SHORTEST_WAIT_S, WAIT_STEP))


def _percentile(waits: Counter[int], fraction: float) -> float:
    """Returns the upper end of the class that `fraction` of all waits do not exceed."""
    wanted = math.ceil(fraction * waits.total())
    seen = 0
    for number in sorted(waits):
        seen += waits[number]
        if seen >= wanted:
            return SHORTEST_WAIT_S * WAIT_STEP**number
    return 0.0
