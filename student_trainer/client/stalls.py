"""Decides when a batch counts as stuck and a link as lost, from what the service has shown."""

import math

STALL_S = 10.0
"""A batch that takes longer than this, and four times as long as any seen, counts as stuck."""
STALL_FACTOR = 4.0
BUSY_FACTOR = 6.0
"""A link without any answer is given up after STALL_S, times this while its replica has work."""
MAX_BATCH_S = 600.0
"""The most that one batch can raise the limit by."""


class Stalls:
    """Learns how long batches take; the limits double each time that one was exceeded."""

    def __init__(self) -> None:
        self._longest_batch_s = 0.0
        self._num_stuck = 0
        self._num_unanswered = 0
        """Links given up because a live replica left all their requests unanswered."""
        self._shortest_stuck_s = math.inf
        """Until a stuck batch has ended, replicas with one as old as this are left alone."""

    @property
    def batch_s(self) -> float:
        """How long a batch may take before it counts as stuck."""
        return max(STALL_S * 2**self._num_stuck, STALL_FACTOR * self._longest_batch_s)

    def answer_s(self, *, idle: bool) -> float:
        """How long a link may bring no answer; `idle` if its replica says that it has no work."""
        factor = 1.0 if idle else BUSY_FACTOR
        return self.batch_s * factor * 2**self._num_unanswered

    def is_still_stuck(self, busy_s: float) -> bool:
        """Whether a replica is best avoided, given the age of its current batch."""
        return busy_s > self._shortest_stuck_s

    def observe_batch(self, seconds: float) -> None:
        """Takes note of a batch that ended."""
        self._longest_batch_s = min(MAX_BATCH_S, max(self._longest_batch_s, seconds))

    def count_stuck(self, busy_s: float) -> None:
        """Takes note of a batch that counted as stuck at this age."""
        self._num_stuck += 1
        self._shortest_stuck_s = min(self._shortest_stuck_s, busy_s)

    def count_unanswered(self) -> None:
        """Takes note of a link that was given up although its replica lives."""
        self._num_unanswered += 1
