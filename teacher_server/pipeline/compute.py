"""Runs the teacher: one thread takes batches and launches them, another waits for what they give.

On a GPU a launch returns at once, so that one pack computes while the next is laid out; at most
MAX_IN_FLIGHT are launched and not complete. On a CPU launching is computing.

Nothing here dies quietly. A batch that fails is halved until the sequence at fault is alone. An
error of the device, a few failures of single sequences in a row after which a known answer does not
come out any more, and any error of the threads themselves are a failure of the replica: it takes no
more work, refuses what it has so that clients send it elsewhere, and reports why.
"""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from logitstream.logs import first_line
from teacher_server.engine.batch import PackTimes
from teacher_server.engine.device import is_broken
from teacher_server.engine.engine import Engine, Launched
from teacher_server.engine.head import ScoredRows
from teacher_server.engine.threads import compute_apart
from teacher_server.ledger.accounts import Accounts
from teacher_server.monitoring.metrics import Metrics
from teacher_server.monitoring.replica_stats import ReplicaStats
from teacher_server.pipeline.backlog import EncodeBacklog
from teacher_server.pipeline.encoding import Encoder
from teacher_server.pipeline.failures import (
    forget_frames,
    is_out_of_memory,
    refuse_broken,
    refuse_job,
)
from teacher_server.pipeline.passes import PassClock
from teacher_server.scheduling.job import ForwardPass, SequenceJob
from teacher_server.scheduling.scheduler import Scheduler

logger = logging.getLogger(__name__)

MAX_IN_FLIGHT = 2
"""Packs that are launched and not complete."""
SUSPICIOUS_FAILURES = 3
"""After this many failures of single sequences in a row, a known answer is computed again."""


@dataclass(slots=True, eq=False)
class _Flight:
    """Holds a batch that was launched."""

    jobs: list[SequenceJob]
    started_s: float = 0.0
    launched: Launched | Exception | None = None
    """What the device was given, or why it was not."""


class Compute:
    """Scores one batch after another and hands each job's rows to the encoder.

    repeats_known_answer: whether a known answer still comes out; it may raise. on_failure: called
    once, in any thread, when the replica cannot compute any more.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        engine: Engine,
        backlog: EncodeBacklog,
        encoder: Encoder,
        *,
        accounts: Accounts,
        metrics: Metrics,
        replica_stats: ReplicaStats,
        repeats_known_answer: Callable[[], bool],
        on_failure: Callable[[], None],
    ) -> None:
        self._scheduler = scheduler
        self._engine = engine
        self._backlog = backlog
        self._encoder = encoder
        self._accounts = accounts
        self._metrics = metrics
        self._replica_stats = replica_stats
        self._on_failure = on_failure
        self.failure = ""
        """Why nothing can be computed any more; empty if it can."""
        self._repeats_known_answer = repeats_known_answer
        self._slots = threading.Semaphore(MAX_IN_FLIGHT)
        self._flights: queue.SimpleQueue[_Flight | None] = queue.SimpleQueue()
        self.clock = PassClock()
        self._failures = 0
        """Sequences that failed alone, in a row."""
        self._threads = [
            threading.Thread(target=self._guard, args=(run,), name=name, daemon=True)
            for name, run in (("launch", self._launch_all), ("complete", self._complete_all))
        ]

    def start(self) -> None:
        """Begins to take batches."""
        for thread in self._threads:
            thread.start()

    def find_trouble(self, after_s: float) -> str:
        """Says why nothing is computed, or is for too long; empty if all is well.

        That is a failure, a thread that has ended, work that nobody takes for `after_s`, or a pass
        that takes longer than that and far longer than any before. Call it every now and then.
        """
        if self.failure:
            return self.failure
        if any(thread.ident and not thread.is_alive() for thread in self._threads):
            return "a compute thread has ended"
        has_work = self._scheduler.queued_tokens > 0 and self._backlog.has_room()
        if self.clock.is_left_waiting(has_work, after_s):
            return f"queued work has not been taken for {after_s:.0f} s"
        if self.clock.is_stuck(after_s):
            return f"a forward is stuck seconds={self.clock.busy_s:.0f}"
        return ""

    def close(self) -> None:
        """Takes no more batches; the jobs that still wait fail."""
        self._backlog.close()
        for job in self._scheduler.close():
            self._encoder.fail(job, RuntimeError("the replica was stopped"))

    def join(self, seconds: float) -> None:
        """Waits for the pass in hand: it cannot be interrupted, but the process may end without it."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))

    def fail(self, why: str) -> None:
        """Gives up: what waits is refused so that clients send it to another replica."""
        if self.failure:
            return
        self.failure = why
        logger.critical("%s", why)
        self._backlog.close()
        self._scheduler.close()
        self._encoder.fail_unscored(refuse_broken())
        self._on_failure()

    def _guard(self, run: Callable[[], None]) -> None:
        """Runs a thread; whatever ends it but its own return is a failure."""
        try:
            run()
        except BaseException as error:
            logger.exception("a compute thread ended")
            self.fail(f"a compute thread ended error={type(error).__name__}")

    # The launch thread.

    def _launch_all(self) -> None:
        self._engine.device.use_cores()
        try:
            while batch := self._next_batch():
                self._charge(batch)
                # Before the next batch is chosen: it must find this one counted.
                self._backlog.reserve(batch)
                self._slots.acquire()
                flight = _Flight(batch)
                flight.started_s = self.clock.begin(flight)
                try:
                    flight.launched = self._engine.launch([job.request for job in batch])
                except Exception as error:
                    flight.launched = error
                self._flights.put(flight)
                del flight, batch  # while this thread waits for work, nothing holds on to the last
        finally:
            self._flights.put(None)

    def _next_batch(self) -> list[SequenceJob]:
        """Waits for a batch; empty only when closed."""
        while True:
            # While too much waits to be encoded, only jobs that may go ahead are computed.
            if self._backlog.wait(lambda: self._scheduler.has_ahead):
                return self._scheduler.next_batch()
            if batch := self._scheduler.take_ahead():
                return batch

    def _charge(self, batch: Sequence[SequenceJob]) -> None:
        """Charges the teams for a batch, whatever becomes of it."""
        self._accounts.charge(batch)
        now = time.monotonic()
        for job in batch:
            waited_s = max(0.0, now - job.submitted_s)
            self._metrics.dispatched(job.team.name, job.num_tokens, job.cost, waited_s)

    # The complete thread.

    def _complete_all(self) -> None:
        while (flight := self._flights.get()) is not None:
            try:
                self._complete(flight)
            finally:
                flight.launched = None  # this thread may wait long for the next one
                self._count_time(flight.jobs, self.clock.end(flight))
                self._slots.release()

    def _complete(self, flight: _Flight) -> None:
        """Waits for a batch and hands its rows on, or deals with its failure."""
        error = flight.launched if isinstance(flight.launched, Exception) else None
        if isinstance(flight.launched, Launched):
            try:
                rows, times = self._engine.result(flight.launched)
            except Exception as failed:
                error = failed
            else:
                self._deliver(flight.jobs, rows, times, flight.started_s)
        if error is not None:
            # Nothing may hold on to what the failed batch allocated.
            flight.launched = None
            compute_apart(partial(self._recover, flight.jobs, error), name="recover")

    def _count_time(self, jobs: Sequence[SequenceJob], seconds: float) -> None:
        """Counts how long a batch took, whatever became of it."""
        self._replica_stats.computed(seconds)
        self._metrics.busy_s.inc(seconds)
        tokens = sum(job.num_tokens for job in jobs)
        self._scheduler.record_speed(tokens, seconds, sum(job.cost for job in jobs))
        logger.debug(
            "batch scored sequences=%d tokens=%d ms=%.0f", len(jobs), tokens, 1e3 * seconds
        )

    def _deliver(
        self,
        jobs: Sequence[SequenceJob],
        rows: Sequence[ScoredRows],
        times: PackTimes,
        started_s: float,
    ) -> None:
        """Hands the rows of each job to the encoder."""
        self._failures = 0
        tokens = sum(job.num_tokens for job in jobs)
        self._metrics.passed(tokens, times.by_stage())
        self._replica_stats.passed(tokens, times.by_stage())
        forward_pass = ForwardPass(started_s, times, len(jobs), tokens)
        self._backlog.add(jobs)
        for job, scored in zip(jobs, rows, strict=True):
            job.forward_pass = forward_pass
            self._metrics.queue_s.observe(job.waited_s)
            self._encoder.encode(job, scored)

    def _recover(self, jobs: Sequence[SequenceJob], error: Exception) -> None:
        """Scores the jobs of a failed batch in halves, until the job at fault is alone.

        Called outside of any `except`: what is handled there keeps the failed batch's tensors alive.
        """
        if is_broken(error):
            self._fail_jobs(jobs, refuse_broken())
            self.fail(f"the device is broken error={type(error).__name__}: {first_line(error)}")
            return
        if len(jobs) == 1:
            # Its error keeps its frames: the incident that the client is told of logs them.
            self._fail_jobs(jobs, refuse_job(error, self._engine.device))
            self._suspect()
            return
        logger.warning("batch of %d failed, halving it", len(jobs), exc_info=error)
        forget_frames(error)
        if is_out_of_memory(error):
            self._engine.device.release_memory()
            self._scheduler.lower_budget(sum(job.num_tokens for job in jobs) // 2)
        middle = len(jobs) // 2
        self._score_again(jobs[:middle])
        self._score_again(jobs[middle:])

    def _score_again(self, jobs: Sequence[SequenceJob]) -> None:
        """Scores a part of a failed batch, while this thread waits."""
        if self.failure:
            self._fail_jobs(jobs, refuse_broken())
            return
        started_s = time.monotonic()
        try:
            launched = self._engine.launch([job.request for job in jobs])
            rows, times = self._engine.result(launched)
        except Exception as failed:
            error = failed
        else:
            self._deliver(jobs, rows, times, started_s)
            return
        launched = None
        self._recover(jobs, error)

    def _suspect(self) -> None:
        """Counts a sequence that failed alone; after a few, sees whether anything still works."""
        self._failures += 1
        if self._failures < SUSPICIOUS_FAILURES:
            return
        self._failures = 0
        with contextlib.suppress(Exception):  # failing is an answer too
            if self._repeats_known_answer():
                return
        self.fail("a known answer does not come out any more")

    def _fail_jobs(self, jobs: Sequence[SequenceJob], error: Exception) -> None:
        for job in jobs:
            self._encoder.fail(job, error)
