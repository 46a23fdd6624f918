"""Counts how long the stages of a replica took in the last minute, for `Status`.

Thread-safe: the compute threads and the event loop count, and any thread may read.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from teacher_server.monitoring.last_minute import LastMinute


@dataclass(frozen=True, slots=True)
class ReplicaSnapshot:
    """Means and rates of the last minute; 0 where nothing was counted."""

    pass_tokens: float
    """Tokens of one forward pass."""
    stage_s: dict[str, float]
    """Time of one pass in each of its stages."""
    encode_s: float
    """Time to encode one sequence, its wait for an encode thread included."""
    compact_s: float
    """Part of it that was spent making targets of selected rows."""
    tokens_per_s: float
    """Tokens that were scored."""
    busy: float
    """Share of the time in which the teacher was computing."""
    written_per_s: float = 0.0
    """Tokens that were drawn."""


@dataclass(slots=True)
class _Slot:
    second: int
    passes: int = 0
    tokens: int = 0
    stage_s: Counter[str] = field(default_factory=Counter)
    sequences: int = 0
    encode_s: float = 0.0
    compact_s: float = 0.0
    busy_s: float = 0.0
    held_s: float = 0.0
    written: int = 0


class ReplicaStats:
    """Counts the passes, encodings and busy seconds of one replica."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._slots = LastMinute(_Slot, clock)

    def passed(self, tokens: int, stage_s: Mapping[str, float]) -> None:
        """Counts a successful forward pass, and the seconds that it took in each stage."""
        with self._lock:
            slot = self._slots.now()
            slot.passes += 1
            slot.tokens += tokens
            slot.stage_s.update(stage_s)

    def wrote(self, tokens: int) -> None:
        """Counts tokens that were drawn."""
        with self._lock:
            self._slots.now().written += tokens

    def encoded(self, seconds: float, compact_s: float) -> None:
        """Counts a sequence whose targets have been encoded."""
        with self._lock:
            slot = self._slots.now()
            slot.sequences += 1
            slot.encode_s += seconds
            slot.compact_s += compact_s

    def computed(self, seconds: float) -> None:
        """Counts busy time of the compute thread that ends now."""
        with self._lock:
            self._slots.now().busy_s += seconds

    def held(self, seconds: float) -> None:
        """Counts time, up to now, in which work waited only because there was no room for answers."""
        with self._lock:
            self._slots.now().held_s += seconds

    def busy_shares(self, window_s: int, *, computing_s: float = 0.0) -> tuple[float, float]:
        """Returns which shares of the last seconds it was computing, and was held up.

        computing_s: how long the current pass has been running.
        """
        with self._lock:
            since = self._slots.now().second - window_s
            slots = [slot for slot in self._slots if slot.second > since]
            seconds = min(window_s, self._slots.seconds(self._clock()))
            computing = (computing_s + sum(slot.busy_s for slot in slots)) / seconds
            held = sum(slot.held_s for slot in slots) / seconds
            return min(1.0, computing), min(1.0, held)

    def numbers(self, *, computing_s: float = 0.0) -> ReplicaSnapshot:
        """Returns the last minute. computing_s: how long the current pass has been running."""
        with self._lock:
            self._slots.now()
            seconds = self._slots.seconds(self._clock())
            passes = max(1, sum(slot.passes for slot in self._slots))
            tokens = sum(slot.tokens for slot in self._slots)
            sequences = max(1, sum(slot.sequences for slot in self._slots))
            stage_s = sum((slot.stage_s for slot in self._slots), Counter[str]())
            busy_s = computing_s + sum(slot.busy_s for slot in self._slots)
            return ReplicaSnapshot(
                pass_tokens=tokens / passes,
                stage_s={stage: seconds / passes for stage, seconds in stage_s.items()},
                encode_s=sum(slot.encode_s for slot in self._slots) / sequences,
                compact_s=sum(slot.compact_s for slot in self._slots) / sequences,
                tokens_per_s=tokens / seconds,
                busy=min(1.0, busy_s / seconds),
                written_per_s=sum(slot.written for slot in self._slots) / seconds,
            )
