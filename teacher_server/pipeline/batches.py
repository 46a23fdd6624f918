"""Scores batches: hands the rows that come to the encoder, and halves a batch that fails.

The launch thread and the complete thread of compute.py call it.
"""

import logging
import time
from collections.abc import Callable, Sequence

from teacher_server.engine.batch import PackTimes
from teacher_server.engine.device import is_broken
from teacher_server.engine.engine import Engine, Launched
from teacher_server.engine.head import ScoredRows
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
from teacher_server.scheduling.job import ForwardPass, SequenceJob
from teacher_server.scheduling.scheduler import Scheduler

logger = logging.getLogger(__name__)


class BatchScorer:
    """Scores batches and deals with their failures.

    suspect: called after each sequence that failed alone. give_up: called with the error of a device
    that is broken. is_over: whether nothing can be computed any more.
    """

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler,
        backlog: EncodeBacklog,
        encoder: Encoder,
        *,
        accounts: Accounts,
        metrics: Metrics,
        replica_stats: ReplicaStats,
        suspect: Callable[[], None],
        give_up: Callable[[Exception], None],
        is_over: Callable[[], bool],
    ) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._backlog = backlog
        self._encoder = encoder
        self._accounts = accounts
        self._metrics = metrics
        self._replica_stats = replica_stats
        self._suspect = suspect
        self._give_up = give_up
        self._is_over = is_over

    def begin(self, batch: Sequence[SequenceJob]) -> None:
        """Charges the teams for a batch and counts its answers, before the next one is chosen."""
        self._charge(batch)
        self._backlog.reserve(batch)

    def launch(self, batch: Sequence[SequenceJob]) -> Launched:
        """Gives a batch to the device, without waiting for it."""
        return self._engine.launch([job.request for job in batch])

    def complete(self, batch: Sequence[SequenceJob], launched: Launched, started_s: float) -> None:
        """Waits for a batch and hands its rows on. Raises the device's error."""
        rows, times = self._engine.result(launched)
        self._deliver(batch, rows, times, started_s)

    def fail(self, jobs: Sequence[SequenceJob], error: Exception) -> None:
        """Ends the answers of some jobs with an error."""
        for job in jobs:
            self._encoder.fail(job, error)

    def _charge(self, batch: Sequence[SequenceJob]) -> None:
        """Charges the teams for a batch, whatever becomes of it."""
        self._accounts.charge(batch)
        now = time.monotonic()
        for job in batch:
            waited_s = max(0.0, now - job.submitted_s)
            self._metrics.dispatched(job.team.name, job.num_tokens, job.cost, waited_s)

    def _deliver(
        self,
        jobs: Sequence[SequenceJob],
        rows: Sequence[ScoredRows],
        times: PackTimes,
        started_s: float,
    ) -> None:
        """Hands the rows of each job to the encoder."""
        tokens = sum(job.num_tokens for job in jobs)
        self._metrics.passed(tokens, times.by_stage())
        self._replica_stats.passed(tokens, times.by_stage())
        forward_pass = ForwardPass(started_s, times, len(jobs), tokens)
        self._backlog.add(jobs)
        for job, scored in zip(jobs, rows, strict=True):
            job.forward_pass = forward_pass
            self._metrics.queue_s.observe(job.waited_s)
            self._encoder.encode(job, scored)

    def recover(self, jobs: Sequence[SequenceJob], error: Exception) -> None:
        """Scores the jobs of a failed batch in halves, until the job at fault is alone.

        Called outside of any `except`: what is handled there keeps the failed batch's tensors alive.
        """
        if is_broken(error):
            self.fail(jobs, refuse_broken())
            self._give_up(error)
            return
        if len(jobs) == 1:
            # Its error keeps its frames: the incident that the client is told of logs them.
            self.fail(jobs, refuse_job(error, self._engine.device))
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
        if self._is_over():
            self.fail(jobs, refuse_broken())
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
        self.recover(jobs, error)
