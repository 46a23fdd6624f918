"""Answers that are scored and not encoded yet: a bound for how far computing may run ahead.

One thread encodes. Without a bound, answers that take long to encode (dense ones) would pile up
before it, and with them the next answer of every other team. So the compute thread waits here
before it takes a batch, and takes whoever's turn it is then.
"""

import threading

from teacher_server.scheduler import Job


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

    def wait(self) -> None:
        """Until no more than the bound waits, or until closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._nbytes <= self._max_nbytes)

    def close(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
