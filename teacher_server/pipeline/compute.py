"""Runs the teacher: one thread takes turns and launches them, another waits for what they give.

A turn is a batch of sequences to score, or texts to write (texts.py).

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
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from logitstream.logs import first_line
from teacher_server.engine.device import is_broken
from teacher_server.engine.engine import Engine, Launched
from teacher_server.engine.generate import Generator, LaunchedChunks, LaunchedStep
from teacher_server.engine.threads import compute_apart
from teacher_server.ledger.accounts import Accounts
from teacher_server.monitoring.metrics import Metrics
from teacher_server.monitoring.replica_stats import ReplicaStats
from teacher_server.pipeline.backlog import EncodeBacklog
from teacher_server.pipeline.batches import BatchScorer
from teacher_server.pipeline.encoding import Encoder
from teacher_server.pipeline.failures import refuse_broken
from teacher_server.pipeline.passes import PassClock
from teacher_server.pipeline.texts import LaunchedTexts, TextWriter
from teacher_server.scheduling.cost import CostModel
from teacher_server.scheduling.generations import TextTurn
from teacher_server.scheduling.scheduler import Scheduler
from teacher_server.scheduling.turns import Turn, Turns, refuse_stopped

logger = logging.getLogger(__name__)

MAX_IN_FLIGHT = 2
"""Packs that are launched and not complete."""
SUSPICIOUS_FAILURES = 3
"""After this many failures of single sequences in a row, a known answer is computed again."""


@dataclass(slots=True, eq=False)
class _Flight:
    """Holds a turn that was launched: a batch, or texts."""

    turn: Turn
    started_s: float = 0.0
    launched: Launched | LaunchedTexts | Exception | None = None
    """What the device was given, or why it was not."""


class Compute:
    """Computes one turn after another: scores batches, whose rows go to the encoder, and writes texts.

    generator: what writes texts, with the prices that they are charged; None: none are written.
    max_running: texts that are written at the same time.
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
        generator: Generator | None = None,
        costs: CostModel | None = None,
        max_running: int = 64,
    ) -> None:
        self._scheduler = scheduler
        self.turns = Turns(
            scheduler,
            backlog.has_room,
            model=generator,
            costs=costs,
            max_running=max_running,
            clock=time.monotonic,
            on_held=replica_stats.held,
        )
        self._scorer = BatchScorer(
            engine,
            scheduler,
            backlog,
            encoder,
            accounts=accounts,
            metrics=metrics,
            replica_stats=replica_stats,
            suspect=self._suspect,
            give_up=self._fail_broken,
            is_over=lambda: bool(self.failure),
        )
        self.writer: TextWriter | None = None
        if generator is not None:
            self.writer = TextWriter(
                engine,
                generator,
                self.turns,
                encoder,
                accounts=accounts,
                metrics=metrics,
                replica_stats=replica_stats,
                suspect=self._suspect,
            )
        self._engine = engine
        self._backlog = backlog
        self._encoder = encoder
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
        if self.clock.is_left_waiting(self.turns.has_work(), after_s):
            return f"queued work has not been taken for {after_s:.0f} s"
        if self.clock.is_stuck(after_s):
            return f"a forward is stuck seconds={self.clock.busy_s:.0f}"
        return ""

    def close(self) -> None:
        """Takes no more batches; the jobs that still wait fail."""
        self._backlog.close()
        for job in self.turns.close():
            self._encoder.fail(job, RuntimeError("the replica was stopped"))
        if self.writer is not None:
            self.writer.fail_all(refuse_stopped())

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
        self.turns.close()
        self._encoder.fail_unscored(refuse_broken())
        if self.writer is not None:
            self.writer.fail_all(refuse_broken())
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
            while (turn := self.turns.next()) is not None:
                if isinstance(turn, TextTurn):
                    self._writing.charge(turn)
                else:
                    self._scorer.begin(turn)
                self._slots.acquire()
                flight = _Flight(turn)
                flight.started_s = self.clock.begin(flight)
                try:
                    flight.launched = self._launch(turn)
                except Exception as error:
                    flight.launched = error
                self._flights.put(flight)
                del flight, turn  # while this thread waits for work, nothing holds on to the last
        finally:
            self._flights.put(None)

    @property
    def _writing(self) -> TextWriter:
        assert self.writer is not None, "nobody queues texts where none are written"
        return self.writer

    def _launch(self, turn: Turn) -> Launched | LaunchedTexts:
        if isinstance(turn, TextTurn):
            return self._writing.launch(turn)
        return self._scorer.launch(turn)

    # The complete thread.

    def _complete_all(self) -> None:
        while (flight := self._flights.get()) is not None:
            try:
                self._complete(flight)
            finally:
                flight.launched = None  # this thread may wait long for the next one
                self._count_time(flight.turn, self.clock.end(flight))
                self._slots.release()
            if self.writer is not None:
                self.writer.flush_old()

    def _complete(self, flight: _Flight) -> None:
        """Waits for a turn and hands on what it gives, or deals with its failure."""
        turn, launched = flight.turn, flight.launched
        error = launched if isinstance(launched, Exception) else None
        try:
            if isinstance(turn, TextTurn):
                if isinstance(launched, LaunchedChunks | LaunchedStep):
                    self._writing.complete(turn, launched)
            elif isinstance(launched, Launched):
                self._scorer.complete(turn, launched, flight.started_s)
        except Exception as failed:
            error = failed
        if error is None:
            self._failures = 0
        else:
            # Nothing may hold on to what the failed batch allocated.
            flight.launched = launched = None
            compute_apart(partial(self._recover_turn, turn, error), name="recover")

    def _recover_turn(self, turn: Turn, error: Exception) -> None:
        """Deals with the failure of a turn; called outside of any `except`."""
        if not isinstance(turn, TextTurn):
            self._scorer.recover(turn, error)
        elif is_broken(error):
            self._writing.abandon(turn, refuse_broken())
            self._fail_broken(error)
        else:
            self._writing.recover(turn, error, lambda: bool(self.failure))

    def _fail_broken(self, error: Exception) -> None:
        self.fail(f"the device is broken error={type(error).__name__}: {first_line(error)}")

    def _count_time(self, jobs: Turn, seconds: float) -> None:
        """Counts how long a turn took, whatever became of it."""
        self._replica_stats.computed(seconds)
        self._metrics.busy_s.inc(seconds)
        if isinstance(jobs, TextTurn):
            self.turns.record_speed(jobs, seconds)
            return  # how long a batch takes does not follow from it
        tokens = sum(job.num_tokens for job in jobs)
        self._scheduler.record_speed(tokens, seconds, sum(job.cost for job in jobs))
        logger.debug(
            "batch scored sequences=%d tokens=%d ms=%.0f", len(jobs), tokens, 1e3 * seconds
        )

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
