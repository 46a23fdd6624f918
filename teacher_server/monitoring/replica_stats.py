"""How busy a replica is: what its stages took in the last minute, for `Status`.

Counted in slots of one second, as `standing` does. Thread-safe: the compute thread and the event
loop count, whoever asks reads.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from teacher_server.monitoring.last_minute import LastMinute


@dataclass(frozen=True, slots=True)
class ReplicaSnapshot:
    """Means and rates of the last minute; 0 where there was nothing."""

    pass_tokens: float
    """Padded tokens of one forward pass."""
    forward_s: float
    """The base model, one pass."""
    head_s: float
    """Vocabulary head and selection, one pass."""
    encode_s: float
    """One sequence, its wait for the encode thread included."""
    tokens_per_s: float
    """Padded tokens that were scored."""
    busy: float
    """Part of the time that the teacher was computing."""


@dataclass(slots=True)
class _Slot:
    second: int
    passes: int = 0
    tokens: int = 0
    forward_s: float = 0.0
    head_s: float = 0.0
    sequences: int = 0
    encode_s: float = 0.0
    busy_s: float = 0.0


class ReplicaStats:
    """Counts what the stages of one replica take."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._slots = LastMinute(_Slot, clock)

    def passed(self, tokens: int, forward_s: float, head_s: float) -> None:
        """A forward pass of so many padded tokens has ended well."""
        with self._lock:
            slot = self._slots.now()
            slot.passes += 1
            slot.tokens += tokens
            slot.forward_s += forward_s
            slot.head_s += head_s

    def encoded(self, seconds: float) -> None:
        """A sequence's targets are bytes."""
        with self._lock:
            slot = self._slots.now()
            slot.sequences += 1
            slot.encode_s += seconds

    def computed(self, seconds: float) -> None:
        """The compute thread was busy for so long, until now."""
        with self._lock:
            self._slots.now().busy_s += seconds

    def numbers(self, *, computing_s: float = 0.0) -> ReplicaSnapshot:
        """Of the last minute. computing_s: how long the pass in hand has been going on."""
        with self._lock:
            self._slots.now()
            seconds = self._slots.seconds(self._clock())
            passes = max(1, sum(slot.passes for slot in self._slots))
            tokens = sum(slot.tokens for slot in self._slots)
            sequences = max(1, sum(slot.sequences for slot in self._slots))
            busy_s = computing_s + sum(slot.busy_s for slot in self._slots)
            return ReplicaSnapshot(
                pass_tokens=tokens / passes,
                forward_s=sum(slot.forward_s for slot in self._slots) / passes,
                head_s=sum(slot.head_s for slot in self._slots) / passes,
                encode_s=sum(slot.encode_s for slot in self._slots) / sequences,
                tokens_per_s=tokens / seconds,
                busy=min(1.0, busy_s / seconds),
            )
