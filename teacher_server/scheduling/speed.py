"""Measures how fast work is done lately, by its cost (cost.py)."""

KEPT = 0.8
"""Weight that earlier turns keep with each new one: the last five or so count."""


class Speed:
    """Follows the cost and the seconds of turns; its callers hold a lock."""

    def __init__(self) -> None:
        self._cost = self._seconds = 0.0

    def record(self, cost: float, seconds: float) -> None:
        """Counts a turn; seconds: without the time in which it waited for the one before."""
        self._cost = KEPT * self._cost + cost
        self._seconds = KEPT * self._seconds + seconds

    @property
    def cost_per_s(self) -> float:
        """What is done in a second; 0 until something was."""
        return self._cost / max(self._seconds, 1e-6)

    def seconds(self, cost: float) -> float:
        """Returns how long work of a cost takes; 0 as long as nobody can know."""
        return cost / self.cost_per_s if self._cost else 0.0
