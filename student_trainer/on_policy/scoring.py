"""Asks a teacher about written texts, while the student writes the next or takes its step."""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from logit_codec import Targets
from student_trainer.on_policy.writing import WrittenTexts
from student_trainer.teachers.batch_targets import Taken
from student_trainer.teachers.layout import spread_columns
from student_trainer.teachers.request import ScoreOptions
from student_trainer.teachers.several import split_teachers
from student_trainer.teachers.view import TeacherView

NUM_THREADS = 4
"""Batches that the teacher is asked for at a time."""


class Scorer:
    """Gets the targets of written batches.

    A served teacher is asked in threads. One in this process answers at once, in the caller's thread:
    a model that two threads use at a time is safe only if nothing in it changes, and it would compete
    with the student for the same device.
    """

    def __init__(self, teacher: Any, view: TeacherView | None = None) -> None:
        self._teacher = teacher
        self._view = view
        self._threads: ThreadPoolExecutor | None = None
        if all(getattr(one, "is_remote", False) for one in split_teachers(teacher).values()):
            self._threads = ThreadPoolExecutor(NUM_THREADS, "scoring")
        self._lock = threading.Lock()
        self._num_asked = 0
        self._began_s = 0.0
        self._busy_s = 0.0
        self._num_tokens = 0

    def ask(
        self, taken: Taken, texts: WrittenTexts, untrained: Tensor, options: ScoreOptions
    ) -> "Future[Targets | None]":
        """Asks for the targets of the batch that was made of the texts; None if nothing is trained."""
        future: Future[Targets | None] = Future()
        if not taken.is_trained:
            future.set_result(None)
            return future

        def score() -> Targets:
            self._begin()
            num_tokens = 0
            try:
                targets = self._score(taken.batch, texts, untrained, options)
                num_tokens = texts.num_tokens
                return targets
            finally:
                self._end(num_tokens)

        if self._threads is not None:
            return self._threads.submit(score)  # type: ignore[return-value]
        future.set_result(score())
        return future

    def take_counts(self) -> tuple[int, float]:
        """Returns the tokens that were answered, and the seconds in which the teacher had something to
        answer, since the last time."""
        with self._lock:
            if self._num_asked:
                now = time.perf_counter()
                self._busy_s += now - self._began_s
                self._began_s = now
            found = self._num_tokens, self._busy_s
            self._num_tokens, self._busy_s = 0, 0.0
        return found

    def close(self) -> None:
        """Gives up what is not asked for yet; what is, ends in its own time."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _score(
        self, batch: Any, texts: WrittenTexts, untrained: Tensor, options: ScoreOptions
    ) -> Targets:
        more: dict[str, Any] = {} if self._view is None else {"teacher_view": self._view}
        if options.spec.needs_given_ids:
            given = texts.give_ids(untrained)
            more["given_ids"] = lambda _: given
        stream = self._teacher.stream_batches(
            iter([spread_columns(batch)]),
            targets=str(options.spec),
            temperature=options.temperature,
            seed=options.seed,
            epoch=options.epoch,
            ahead=1,
            **more,
        )
        _, targets = next(iter(stream))
        return targets

    def _begin(self) -> None:
        with self._lock:
            if not self._num_asked:
                self._began_s = time.perf_counter()
            self._num_asked += 1

    def _end(self, num_tokens: int) -> None:
        with self._lock:
            self._num_asked -= 1
            self._num_tokens += num_tokens
            if not self._num_asked:
                self._busy_s += time.perf_counter() - self._began_s
