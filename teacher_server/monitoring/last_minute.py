"""Counts the last minute in slots of one second, for team_stats.py and replica_stats.py."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

WINDOW_S = 60


class Slot(Protocol):
    """Counts of one second."""

    second: int


S = TypeVar("S", bound=Slot)


class LastMinute(Generic[S]):
    """The slots of the last minute, the oldest first. Its callers hold a lock."""

    def __init__(self, make: Callable[[int], S], clock: Callable[[], float]) -> None:
        """make: makes the slot of a second."""
        self._make = make
        self._clock = clock
        self._started_s = clock()
        self._slots: deque[S] = deque()

    def now(self) -> S:
        """Returns the slot of this second, and drops those older than a minute."""
        second = math.floor(self._clock())
        while self._slots and self._slots[0].second <= second - WINDOW_S:
            self._slots.popleft()
        if not self._slots or self._slots[-1].second != second:
            self._slots.append(self._make(second))
        return self._slots[-1]

    def seconds(self, until_s: float) -> float:
        """Returns how long has been counted, from 1 s to a minute."""
        return min(WINDOW_S, max(1.0, until_s - self._started_s))

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[S]:
        return iter(self._slots)
