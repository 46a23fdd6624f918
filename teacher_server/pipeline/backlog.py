"""Bounds the answers that are scored and not encoded yet: how far computing may run ahead.

One thread encodes. Without a bound, answers that take long to encode (dense ones) would pile up
in front of it. So the compute thread waits here before it takes a batch, and then takes the jobs
whose turn it is at that moment. For jobs that may go ahead of other teams it waits only until the
backlog is below one and a half times the bound: the encoder takes turns, so their answers do not
queue after the answers of others. A batch of such jobs answers with at most half of the bound;
either way the backlog never exceeds twice the bound.
"""

import threading
from collections.abc import Callable

from teacher_server.scheduling.job import SequenceJob

AHEAD_FACTOR = 1.5
"""Up to this multiple of the bound, jobs that may go ahead of other teams are computed."""


class EncodeBacklog:
    """Counts the bytes of scored answers until they are encoded or dropped.

    Thread-safe. Each answer is counted once; forgetting one that is not counted does nothing.
    """

    def __init__(self, max_nbytes: int) -> None:
        self._max_nbytes = max_nbytes
        self._changed = threading.Condition()
        self._nbytes = 0
        self._jobs: set[SequenceJob] = set()
        self._closed = False

    @property
    def nbytes(self) -> int:
        """Upper bound of the answers that wait."""
        return self._nbytes

    def add(self, job: SequenceJob) -> None:
        """Counts an answer whose targets have been computed."""
        with self._changed:
            self._jobs.add(job)
            self._nbytes += job.reply_nbytes

    def forget(self, job: SequenceJob) -> None:
        """Stops counting an answer: it is encoded, or its client has gone."""
        with self._changed:
            # Encoding, failing and cancelling may each report the same job.
            if job in self._jobs:
                self._jobs.remove(job)
                self._nbytes -= job.reply_nbytes
                self._changed.notify()

    def wait(self, has_ahead: Callable[[], bool] = lambda: False) -> bool:
        """Waits for room. Returns whether any job may be computed, or only those that go ahead.

        has_ahead: whether a job waits that may go ahead of other teams; call `look` when its answer
        may have changed. After `close` any job may be computed.
        """

        def has_room() -> bool:
            return self._closed or self._nbytes <= self._max_nbytes

        def has_room_ahead() -> bool:
            return self._nbytes <= AHEAD_FACTOR * self._max_nbytes and has_ahead()

        with self._changed:
            self._changed.wait_for(lambda: has_room() or has_room_ahead())
            return has_room()

    def look(self) -> None:
        """Makes a waiting thread ask `has_ahead` again."""
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        """Ends all waiting."""
        with self._changed:
            self._closed = True
            self._changed.notify()
