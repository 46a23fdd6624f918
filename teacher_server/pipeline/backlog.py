"""Bounds the answers that are scored and not encoded yet: how far computing may run ahead.

Without a bound, answers that take long to encode (dense ones) would pile up in front of the
encoders. So no batch is taken while there is no room here, and then the jobs whose turn it is at
that moment: at most MAX_PACKS packs wait to be encoded, and at most a stated number of bytes,
judged by upper bounds. Jobs that may go ahead of other teams wait only until the backlog is
below one and a half times the bounds (scheduling/turns.py): the encoders take turns, so their answers
do not queue after the answers of others. A batch of such jobs answers with at most half of the bound; either way the
backlog never exceeds twice the bound by what one pack adds.
"""

import threading
from collections.abc import Callable, Sequence

from teacher_server.pipeline.encoding import Answer
from teacher_server.scheduling.job import SequenceJob

MAX_PACKS = 2
"""Packs whose answers wait, beside those that go ahead."""


class EncodeBacklog:
    """Counts answers from when they are computed until they are encoded or dropped.

    Their bytes count from the launch on: what is in flight will be added to what waits. Packs count
    once they are scored. Thread-safe. Forgetting an answer that is not counted does nothing.
    """

    def __init__(self, max_nbytes: int, on_room: Callable[[], None] = lambda: None) -> None:
        """on_room: called, in any thread, when there may be more room."""
        self._on_room = on_room
        self._max_nbytes = max_nbytes
        self._lock = threading.Lock()
        self._nbytes = 0
        self._packs: dict[Answer, set[Answer] | None] = {}
        """Of each answer, those of its pack that wait to be encoded; None while it is in flight."""
        self._num_packs = 0
        self._closed = False

    @property
    def nbytes(self) -> int:
        """Upper bound of the answers that are in flight or wait."""
        return self._nbytes

    def reserve(self, jobs: Sequence[SequenceJob]) -> None:
        """Counts the answers of a pack that is about to be launched."""
        with self._lock:
            self._packs.update(dict.fromkeys(jobs))
            self._nbytes += sum(job.reply_nbytes for job in jobs)

    def add(self, jobs: Sequence[SequenceJob]) -> None:
        """Counts a pack whose rows have been selected, as far as its answers are still wanted."""
        with self._lock:
            pack: set[Answer] = {job for job in jobs if job in self._packs}
            self._packs.update(dict.fromkeys(pack, pack))
            self._num_packs += bool(pack)

    def forget(self, job: Answer) -> None:
        """Stops counting an answer: it is encoded, or its client has gone."""
        with self._lock:
            # Encoding, failing and cancelling may each report the same job.
            if job not in self._packs:
                return
            pack = self._packs.pop(job)
            self._nbytes -= job.reply_nbytes
            if pack is not None:
                pack.remove(job)
                self._num_packs -= not pack
        self._on_room()

    def has_room(self, factor: float = 1.0) -> bool:
        """Whether less waits than this multiple of the bounds. After `close` there is room."""
        with self._lock:
            if self._closed:
                return True
            return (
                self._nbytes <= factor * self._max_nbytes and self._num_packs < factor * MAX_PACKS
            )

    def close(self) -> None:
        """Ends all waiting."""
        self._closed = True
        self._on_room()
