"""Answers that are scored and not encoded yet: a bound for how far computing may run ahead.

One thread encodes. Without a bound, answers that take long to encode (dense ones) would pile up
before it. So the compute thread waits here before it takes a batch, and takes whoever's turn it is
then. Jobs that may go ahead of other teams wait here no longer than until half as much again as the
bound is held: what others have to be encoded is not before theirs, since the encoder takes turns.
A batch of them answers with half of the bound at most, so that no more than twice the bound is held
either way.
"""

import threading
from collections.abc import Callable

from teacher_server.scheduling.job import Job


class EncodeBacklog:
    """Counts the bytes of scored answers up to the moment when they are encoded, or never will be.

    Thread-safe. Each answer is counted once, and forgetting one that is not here does nothing.
    """

    def __init__(self, max_nbytes: int) -> None:
        self._max_nbytes = max_nbytes
        self._changed = threading.Condition()
        self._nbytes = 0
        self._jobs: set[Job] = set()
        self._closed = False

    @property
    def nbytes(self) -> int:
        """Of the answers that wait, at most."""
        return self._nbytes

    def add(self, job: Job) -> None:
        """Its targets are there."""
        with self._changed:
            self._jobs.add(job)
            self._nbytes += job.reply_nbytes

    def forget(self, job: Job) -> None:
        """Its targets are encoded, or nobody wants them any more."""
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)
                self._nbytes -= job.reply_nbytes
                self._changed.notify()

    def wait(self, has_ahead: Callable[[], bool] = lambda: False) -> bool:
        """Until no more than the bound waits, or until closed: True. False if only what goes ahead
        may be computed; `has_ahead` says whether there is any, and `look` that it may have changed.
        """

        def has_room() -> bool:
            return self._closed or self._nbytes <= self._max_nbytes

        with self._changed:
            self._changed.wait_for(
                lambda: has_room() or (self._nbytes <= 1.5 * self._max_nbytes and has_ahead())
            )
            return has_room()

    def look(self) -> None:
        """Whoever waits asks `has_ahead` again."""
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
