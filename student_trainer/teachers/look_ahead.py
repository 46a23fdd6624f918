"""Decides how much to ask for ahead of the trainer: a number of items, or seconds and bytes.

A look-ahead in seconds begins with a few items. Until the first answer comes it doubles while the
trainer waits; from then on it follows what was measured. It grows at once to twice what the trainer
consumes during a round trip, and by one with every item up to what the trainer consumes in the given
time. Three things limit it: bytes of items and their targets, tokens that the teacher may have in its
queue, and 1,024 items.
"""

import math
import re
import threading
import time
from collections.abc import Collection
from concurrent.futures import Future
from concurrent.futures import wait as wait_for

from logit_codec import TargetSpec
from protos import teacher_pb2
from student_trainer.errors import InvalidRequest
from student_trainer.teachers.request import Answer

MAX_NBYTES = 512 << 20
"""Default limit for the items and targets that a look-ahead in seconds holds."""
MAX_ITEMS = 1024
NO_LIMIT = 2**31
MIN_ITEMS = 2
FIRST_ITEMS = 4
MAX_UNMEASURED = 64
"""Items asked for before the first answer, however long it takes."""
GROWTH_S = 0.1
"""How long to wait for the first answer before the number of items is doubled."""
FIRST_INTERVAL_S = 0.05
FIRST_WEIGHT = 4.0
"""The average starts as if the trainer had consumed this many items at this interval: a prefetch
takes its first ones all at once."""
KEPT = 0.95
"""Weight that earlier intervals keep with each new one: the average covers about the last 20, and so
several steps of a trainer that accumulates gradients."""
LEAST_KEPT = 0.99
"""The estimate of bytes per row falls by at most 1 % per answer and rises at once."""


class Clock:
    """Tells the time and waits; tests replace it."""

    def now(self) -> float:
        """Returns the seconds since some moment."""
        return time.monotonic()

    def wait(self, futures: Collection["Future[Answer]"], timeout_s: float | None) -> bool:
        """Waits until all futures are done; False after the timeout."""
        return all(future.done() for future in futures) or not wait_for(futures, timeout_s).not_done


class LookAhead:
    """Allows a number of items in flight, whatever their size."""

    def __init__(self, size: int) -> None:
        self.size = size

    def has_room(self, num_tokens: int, num_rows: int, nbytes: int = 0) -> bool:
        """Whether an item of this size may be asked for beside those in flight."""
        return True

    def room_for(self, num_rows: int, nbytes: int) -> int:
        """Returns how many more items of this size may be held."""
        return NO_LIMIT

    def hold(self, nbytes: int) -> None:
        """Adds to the bytes of the items that are held; a negative number takes away."""

    def add_request(self, future: "Future[Answer]", num_tokens: int, num_rows: int) -> None:
        """Counts a piece of an item that was just asked for."""

    def wait(self, futures: Collection["Future[Answer]"]) -> bool:
        """Waits for the next item; False if more may be asked for before it is there."""
        return True

    def hand_out(self, nbytes: int) -> None:
        """Counts an item that goes to the trainer, with targets of this many bytes."""


class AdaptiveLookAhead(LookAhead):
    """Allows what the trainer consumes in some seconds, within limits of bytes and tokens."""

    def __init__(
        self,
        seconds: float,
        *,
        max_row_nbytes: float,
        max_nbytes: int = MAX_NBYTES,
        max_tokens: float = math.inf,
        clock: Clock | None = None,
    ) -> None:
        """max_row_nbytes: the largest decoded row, assumed before the first answer. max_tokens: limit
        for tokens that are asked for and not answered."""
        super().__init__(FIRST_ITEMS)
        self._seconds = seconds
        self._max_nbytes = max_nbytes
        self._max_tokens = max_tokens
        self._clock = clock or Clock()
        self._last_s: float | None = None
        """When the last item was handed out."""
        self._intervals_s = FIRST_WEIGHT * FIRST_INTERVAL_S
        self._num_intervals = FIRST_WEIGHT
        self._lock = threading.Lock()
        """Guards what follows: answers arrive in another thread."""
        self._row_nbytes = max_row_nbytes
        self._measured = False
        self._ready_nbytes = 0
        self._items_nbytes = 0
        self._unanswered_rows = 0
        self._unanswered_tokens = 0
        self._round_trip_s = 0.0
        """The shortest so far: longer ones come from what this object itself put into the queue."""

    @property
    def nbytes(self) -> float:
        """What is held: items, decoded targets, and an estimate of targets that are under way."""
        with self._lock:
            targets_nbytes = self._ready_nbytes + self._unanswered_rows * self._row_nbytes
            return self._items_nbytes + targets_nbytes

    def has_room(self, num_tokens: int, num_rows: int, nbytes: int = 0) -> bool:
        with self._lock:
            num_tokens += self._unanswered_tokens
        return self.room_for(num_rows, nbytes) >= 1 and num_tokens <= self._max_tokens

    def room_for(self, num_rows: int, nbytes: int) -> int:
        free = self._max_nbytes - self.nbytes
        each = nbytes + num_rows * self._row_nbytes
        return min(NO_LIMIT, int(free // each)) if each else (NO_LIMIT if free >= 0 else 0)

    def hold(self, nbytes: int) -> None:
        with self._lock:
            self._items_nbytes += nbytes

    def add_request(self, future: "Future[Answer]", num_tokens: int, num_rows: int) -> None:
        asked_s = self._clock.now()
        with self._lock:
            self._unanswered_rows += num_rows
            self._unanswered_tokens += num_tokens

        def count_answer(future: "Future[Answer]") -> None:
            round_trip_s = self._clock.now() - asked_s
            failed = future.cancelled() or future.exception() is not None
            nbytes = 0 if failed else future.result().nbytes
            with self._lock:
                self._unanswered_rows -= num_rows
                self._unanswered_tokens -= num_tokens
                if failed:
                    return
                self._ready_nbytes += nbytes
                row_nbytes = nbytes / num_rows
                if self._measured:
                    row_nbytes = max(row_nbytes, LEAST_KEPT * self._row_nbytes)
                    round_trip_s = min(round_trip_s, self._round_trip_s)
                self._row_nbytes, self._round_trip_s = row_nbytes, round_trip_s
                self._measured = True

        future.add_done_callback(count_answer)

    def wait(self, futures: Collection["Future[Answer]"]) -> bool:
        pause_s = None
        if self._last_s is None and self.size < MAX_UNMEASURED:
            pause_s = GROWTH_S * self.size / FIRST_ITEMS
        if self._clock.wait(futures, pause_s):
            return True
        self.size *= 2
        return False

    def hand_out(self, nbytes: int) -> None:
        now = self._clock.now()
        with self._lock:
            self._ready_nbytes -= nbytes
            round_trip_s = self._round_trip_s
        if self._last_s is not None:
            self._intervals_s = KEPT * self._intervals_s + now - self._last_s
            self._num_intervals = KEPT * self._num_intervals + 1
            interval_s = max(self._intervals_s / self._num_intervals, 1e-4)
            enough = math.ceil(2 * round_trip_s / interval_s)
            # Less than two round trips would starve the trainer, and it would then consume less.
            most = max(math.ceil(self._seconds / interval_s), enough, MIN_ITEMS)
            self.size = min(max(self.size + 1, enough), most, MAX_ITEMS)
        self._last_s = now


def parse_ahead(ahead: int | str) -> int | tuple[float, int]:
    """Parses a number of items, or "30s,2048MiB" into seconds and bytes. Raises InvalidRequest."""
    if isinstance(ahead, int):
        if ahead < 1:
            raise InvalidRequest(f"ahead must be at least 1 batch, got {ahead}")
        return ahead
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*s(?:\s*,\s*([1-9]\d*)\s*MiB)?", ahead.strip())
    if match is None or not float(match.group(1)) > 0:
        raise InvalidRequest(
            f"ahead must be a number of batches, '30s' or '30s,2048MiB', got {ahead!r}"
        )
    return float(match.group(1)), int(match.group(2)) << 20 if match.group(2) else MAX_NBYTES


def make_look_ahead(
    ahead: int | str | LookAhead, spec: TargetSpec, info: teacher_pb2.TeacherInfo
) -> LookAhead:
    """Makes the look-ahead that `ahead` stands for; see `parse_ahead`. Raises InvalidRequest."""
    if isinstance(ahead, LookAhead):
        return ahead
    parsed = parse_ahead(ahead)
    if isinstance(parsed, int):
        return LookAhead(parsed)
    seconds, max_nbytes = parsed
    queue = info.limits.max_queued_tokens * max(1, len(info.replicas))
    return AdaptiveLookAhead(
        seconds,
        max_row_nbytes=spec.max_decoded_row_nbytes(info.vocab_size),
        max_nbytes=max_nbytes,
        # Half of the teacher's queue: more than all of it is refused, and other clients need room.
        max_tokens=queue // 2 if queue else math.inf,
    )
