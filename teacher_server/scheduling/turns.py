"""Decides what the teacher computes next: a batch of sequences to score, or texts to write.

The team with the smallest start tag decides (fairness.py): if it has both, whichever of them has cost less
lately. While texts are in flight their team still counts as one with work, so sequences are scored beside
them only if it is their turn; otherwise a pack would follow every token. What may go ahead of other teams
goes first, jobs and texts in turns.
"""

import math
from collections.abc import Callable, Iterable
from typing import Literal

import grpc

from teacher_server.errors import RequestRefused
from teacher_server.scheduling.cost import CostModel
from teacher_server.scheduling.generation_job import GenerationJob, TextModel
from teacher_server.scheduling.generations import Generations, TextTurn
from teacher_server.scheduling.job import SequenceJob
from teacher_server.scheduling.scheduler import Scheduler

Turn = list[SequenceJob] | TextTurn
AHEAD_FACTOR = 1.5
"""Up to this multiple of the bounds, jobs that may go ahead of other teams are scored."""


class Turns:
    """Gives out turns. Thread-safe: it shares the scheduler's lock.

    has_room: whether answers that were scored and not encoded are below a multiple of their bound; call
    `look` when that may have changed. max_running: texts that have pages at the same time. on_held: called
    with the seconds for which work waited only because there was no room for answers.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        has_room: Callable[[float], bool],
        *,
        model: TextModel | None = None,
        costs: CostModel | None = None,
        max_running: int = 64,
        clock: Callable[[], float],
        on_held: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._scheduler = scheduler
        self._on_held = on_held
        self._has_room = has_room
        self._changed = scheduler.changed
        self._clock = clock
        self._texts: Generations | None = None
        if model is not None:
            assert costs is not None
            self._texts = Generations(
                model, costs, scheduler.fair, max_running=max_running, clock=clock
            )
        self._last: Literal["score", "write"] = "write"

    @property
    def texts(self) -> Generations:
        """What was let in; its numbers may be read by any thread."""
        assert self._texts is not None
        return self._texts

    def has_work(self) -> bool:
        """Whether there is something to compute that nothing keeps waiting."""
        with self._changed:
            if self._scheduler.fair.num_working and self._has_room(1.0):
                return True
            return self._texts is not None and self._texts.has_work

    def queue_s(self) -> float:
        """Returns how long what waits would take at the rate of the last turns."""
        with self._changed:
            texts_s = 0.0
            if self._texts is not None:
                texts_s = self._texts.forecast.seconds(self._texts.slots.waiting())
            return self._scheduler.queue_s() + texts_s

    def record_speed(self, turn: TextTurn, seconds: float) -> None:
        """Records how long a turn of texts took."""
        with self._changed:
            forecast = self.texts.forecast
            forecast.record_turn(sum(turn.costs), seconds, is_step=turn.is_step)

    def submit(self, job: GenerationJob) -> None:
        """Queues a text. Raises RequestRefused (UNAVAILABLE) when closed."""
        if not job.team.weight > 0:
            raise ValueError(f"the weight of team {job.team.name} must be above 0")
        with self._changed:
            if self._scheduler.closed:
                raise refuse_stopped()
            self.texts.submit(job)
            self._changed.notify()

    def cancel(self, job: GenerationJob) -> None:
        """Ends a text whose client has gone, wherever it is."""
        with self._changed:
            self.texts.cancel(job)
            self._changed.notify()

    def count_flush(self, job: GenerationJob) -> None:
        """Counts a flush that its reader has to read; with MAX_UNREAD of them it pauses."""
        with self._changed:
            self.texts.count_flush(job)

    def count_read(self, job: GenerationJob) -> None:
        """Counts a flush that was read."""
        with self._changed:
            self.texts.count_read(job)
            self._changed.notify()

    def land(self, ended: Iterable[GenerationJob] = ()) -> None:
        """Ends the turn of texts in flight; ended: those that are over with it."""
        with self._changed:
            self.texts.land(list(ended))
            self._changed.notify()

    def look(self) -> None:
        """Makes a waiting thread ask `has_room` again."""
        with self._changed:
            self._changed.notify()

    def next(self) -> Turn | None:
        """Waits for work and returns the next turn; None when closed."""
        with self._changed:
            while not self._scheduler.closed:
                if turn := self.choose():
                    return turn
                is_held = self._scheduler.fair.num_working > 0 and not self._has_room(1.0)
                since_s = self._clock()
                self._changed.wait()
                if is_held:
                    self._on_held(self._clock() - since_s)
            return None

    def close(self) -> list[SequenceJob]:
        """Ends `next` and all texts, and returns the jobs that will not be scored."""
        with self._changed:
            if self._texts is not None:
                self._texts.clear()
            return self._scheduler.close()

    def choose(self) -> Turn | None:
        """Chooses a turn if there is one now; the lock is held."""
        for _ in range(3):  # a text that was chosen may have had to make room for others
            turn = self._choose()
            if not isinstance(turn, TextTurn) or turn.jobs:
                break
        else:
            return None
        if turn:
            self._last = "write" if isinstance(turn, TextTurn) else "score"
        return turn

    def _choose(self) -> Turn | None:
        scheduler, texts = self._scheduler, self._texts
        fair = scheduler.fair
        has_room = self._has_room(1.0)
        scoring = fair.first() if fair.num_working and has_room else None
        others_start = scoring.start if scoring else math.inf
        is_free = texts is not None and texts.in_flight is None
        if texts is not None and is_free:
            texts.slots.let_in()
        writing = texts.first() if texts is not None else None
        ahead = texts.find_ahead() if texts is not None and is_free else None
        scores_ahead = fair.has_ahead and self._has_room(AHEAD_FACTOR)
        if scores_ahead and not (ahead and self._last == "score"):
            first = writing is None or (scoring is not None and scoring.start <= writing.start)
            return scheduler.take(ahead_only=not (has_room and first))
        if ahead is not None:
            return self._compose(others_start, ahead=True)
        if writing is None:
            return scheduler.take() if scoring else None
        if scoring is None:
            writes = True
        elif scoring is writing.queue:
            writes = scoring.written <= scoring.scored
        elif scoring.start == writing.start:
            writes = self._last == "score"
        else:
            writes = writing.start < scoring.start
        if not writes:
            return scheduler.take()
        return self._compose(others_start, ahead=False) if is_free else None

    def _compose(self, others_start: float, *, ahead: bool) -> TextTurn | None:
        """Composes the turn of the texts; an empty one if they had to make room first."""
        texts, scheduler = self.texts, self._scheduler
        lead = texts.find_ahead() if ahead else texts.first()
        assert lead is not None
        turn = texts.compose(
            lead,
            others_start=others_start,
            max_tokens=scheduler.max_batch_tokens,
            max_cost=scheduler.max_shared_cost(),
            ahead=ahead,
        )
        if turn is None:
            return TextTurn(is_step=True)
        now = self._clock()
        for job, count, cost in zip(turn.jobs, turn.counts, turn.costs, strict=True):
            queue = texts.slots.teams[job.team.name].queue
            waited_s = None if job.is_begun else now - job.submitted_s
            job.is_begun = True
            scheduler.report_text(queue, count, cost, waited_s)
        return turn


def refuse_stopped() -> RequestRefused:
    """Refuses a text because this replica ends; another one goes on with it."""
    return RequestRefused(
        grpc.StatusCode.UNAVAILABLE,
        "STOPPED",
        "this replica has stopped; send the request to another one, with the tokens that came.",
    )
