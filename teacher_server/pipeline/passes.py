"""Times the passes in flight, so that one that is stuck is noticed, and work that nobody takes."""

import time

SLOW_FACTOR = 10
"""A pass is not stuck before it has taken this many times as long as the longest one so far."""


class PassClock:
    """Knows which passes are in flight, and for how long.

    The launch thread begins passes and the complete thread ends them, in the same order; any thread
    may look.
    """

    def __init__(self) -> None:
        self._begun_s: dict[object, float] = {}
        """When each pass in flight was begun. Both threads change it, whole keys at a time."""
        self._ended_s = 0.0
        self._longest_s = 0.0
        self._left_since_s: float | None = None
        """Since when work has been seen that nobody takes."""

    def begin(self, one: object) -> float:
        """Begins a pass, which stands for itself; returns the time."""
        self._begun_s[one] = now = time.monotonic()
        return now

    def end(self, one: object) -> float:
        """Ends a pass; returns how long it took alone, without its wait for the one before."""
        now = time.monotonic()
        seconds = now - max(self._begun_s.pop(one), self._ended_s)
        self._ended_s = now
        self._longest_s = max(self._longest_s, seconds)
        return seconds

    @property
    def busy_s(self) -> float:
        """How long the oldest pass in flight has taken so far; 0 without one."""
        begun = list(self._begun_s.values())  # once: a thread may end its pass in between
        if not begun:
            return 0.0
        # A pass that was launched while another computed begins when that one ends.
        return max(0.0, time.monotonic() - max(min(begun), self._ended_s))

    def is_stuck(self, after_s: float) -> bool:
        """Whether a pass takes longer than `after_s`, and far longer than any before."""
        return self.busy_s > max(after_s, SLOW_FACTOR * self._longest_s)

    def is_left_waiting(self, has_work: bool, after_s: float) -> bool:
        """Whether there has been work, and nothing in flight, for longer than `after_s`.

        has_work: whether there is any now, and nothing that would keep it waiting. Call it every
        now and then: it goes by what it saw.
        """
        now = time.monotonic()
        if self._begun_s or not has_work:
            self._left_since_s = None
        elif self._left_since_s is None:
            self._left_since_s = now
        return self._left_since_s is not None and now - self._left_since_s > after_s
