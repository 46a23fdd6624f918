"""Bounds the answers that are scored and not encoded yet: how far computing may run ahead.

Without a bound, answers that take long to encode (dense ones) would pile up in front of the
encoders. So the launcher waits here before it takes a batch, and then takes the jobs whose turn it
is at that moment: at most MAX_PACKS packs wait to be encoded, and at most a stated number of bytes,
judged by upper bounds. For jobs that may go ahead of other teams it waits only until the backlog is
below one and a half times the bounds: the encoders take turns, so their answers do not queue after
the answers of others. A batch of such jobs answers with at most half of the bound; either way the
backlog never exceeds twice the bound by what one pack adds.
"""

import threading
from collections.abc import Callable, Sequence

from teacher_server.pipeline.encoding import Answer
from teacher_server.scheduling.job import SequenceJob

MAX_PACKS = 2
"""Packs whose answers wait, beside those that go ahead."""
AHEAD_FACTOR = 1.5
"""Up to this multiple of the bounds, jobs that may go ahead of other teams are computed."""


class EncodeBacklog:
    """Counts answers from when they are computed until they are encoded or dropped.

    Their bytes count from the launch on: what is in flight will be added to what waits. Packs count
    once they are scored. Thread-safe. Forgetting an answer that is not counted does nothing.
    """

    def __init__(self, max_nbytes: int) -> None:
        self._max_nbytes = max_nbytes
        self._changed = threading.Condition()
        self._nbytes = 0
        self._packs: dict[Answer, set[SequenceJob] | None] = {}
        """Of each answer, those of its pack that wait to be encoded; None while it is in flight."""
        self._num_packs = 0
        self._closed = False

    @property
    def nbytes(self) -> int:
        """Upper bound of the answers that are in flight or wait."""
        return self._nbytes

    def reserve(self, jobs: Sequence[SequenceJob]) -> None:
        """Counts the answers of a pack that is about to be launched."""
        with self._changed:
            self._packs.update(dict.fromkeys(jobs))
            self._nbytes += sum(job.reply_nbytes for job in jobs)

    def add(self, jobs: Sequence[SequenceJob]) -> None:
        """Counts a pack whose rows have been selected, as far as its answers are still wanted."""
        with self._changed:
            pack = {job for job in jobs if job in self._packs}
            self._packs.update(dict.fromkeys(pack, pack))
            self._num_packs += bool(pack)

    def forget(self, job: Answer) -> None:
        """Stops counting an answer: it is encoded, or its client has gone."""
        with self._changed:
            # Encoding, failing and cancelling may each report the same job.
            if job not in self._packs:
                return
            pack = self._packs.pop(job)
            self._nbytes -= job.reply_nbytes
            if pack is not None:
                pack.remove(job)
                self._num_packs -= not pack
            self._changed.notify()

    def wait(self, has_ahead: Callable[[], bool] = lambda: False) -> bool:
        """Waits for room. Returns whether any job may be computed, or only those that go ahead.

        has_ahead: whether a job waits that may go ahead of other teams; call `look` when its answer
        may have changed. After `close` any job may be computed.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._has_room(1.0) or (self._has_room(AHEAD_FACTOR) and has_ahead())
            )
            return self._has_room(1.0)

    def has_room(self) -> bool:
        """Whether any job may be computed."""
        with self._changed:
            return self._has_room(1.0)

    def look(self) -> None:
        """Makes a waiting thread ask `has_ahead` again."""
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        """Ends all waiting."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _has_room(self, factor: float) -> bool:
        if self._closed:
            return True
        return self._nbytes <= factor * self._max_nbytes and self._num_packs < factor * MAX_PACKS
