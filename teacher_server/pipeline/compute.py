"""Runs the teacher: takes batches from the scheduler and scores them on one thread."""

import asyncio
import logging
import threading
import time
from collections.abc import Sequence

import grpc
import torch

from logit_codec import Targets
from teacher_server.engine.head import VocabularyHead
from teacher_server.errors import RequestRefused
from teacher_server.ledger.accounts import Accounts
from teacher_server.monitoring.metrics import Metrics
from teacher_server.monitoring.replica_stats import ReplicaStats
from teacher_server.pipeline.backlog import EncodeBacklog
from teacher_server.scheduling.job import ForwardPass, SequenceJob
from teacher_server.scheduling.scheduler import Scheduler

logger = logging.getLogger(__name__)

SLOW_FACTOR = 10
"""A pass is not stuck before it has taken this many times as long as the longest one so far."""

Result = tuple[SequenceJob, Targets | Exception]


class ComputeThread:
    """Scores one batch after another and hands each job its targets, in the event loop."""

    def __init__(
        self,
        scheduler: Scheduler,
        head: VocabularyHead,
        backlog: EncodeBacklog,
        *,
        accounts: Accounts,
        metrics: Metrics,
        replica_stats: ReplicaStats,
    ) -> None:
        self._scheduler = scheduler
        self._head = head
        self._backlog = backlog
        self._accounts = accounts
        self._metrics = metrics
        self._replica_stats = replica_stats
        self._loop: asyncio.AbstractEventLoop
        self._pass_since_s: float | None = None
        self._longest_pass_s = 0.0
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)

    def start(self) -> None:
        """Begins to take batches; call it in the event loop that waits for the jobs."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def busy_s(self) -> float:
        """How long the pass in hand has taken so far; 0 without one."""
        since = self._pass_since_s  # once: the thread may end its pass in between
        return 0.0 if since is None else max(0.0, time.monotonic() - since)

    def is_stuck(self, after_s: float) -> bool:
        """Whether the pass in hand takes longer than `after_s`, and far longer than any before."""
        return self.busy_s > max(after_s, SLOW_FACTOR * self._longest_pass_s)

    def close(self) -> None:
        """Takes no more batches; the jobs that still wait fail."""
        self._backlog.close()
        self._hand_over(
            [(job, RuntimeError("the replica was stopped")) for job in self._scheduler.close()]
        )

    def join(self, seconds: float) -> None:
        """Waits for the pass in hand: it cannot be interrupted, but the process may end without it."""
        self._thread.join(seconds)

    def _run(self) -> None:
        while True:
            # While too much waits to be encoded, only jobs that may go ahead are computed.
            if self._backlog.wait(lambda: self._scheduler.has_ahead):
                batch = self._scheduler.next_batch()
                if not batch:
                    return
            else:
                batch = self._scheduler.take_ahead()
            self._charge(batch)
            groups: dict[int, list[SequenceJob]] = {}
            for job in batch:
                length = self._head.model.bucket_length(job.num_tokens)
                groups.setdefault(length, []).append(job)
            for group in groups.values():  # jobs of one canonical length share a forward pass
                self._score_group(group)

    def _charge(self, batch: Sequence[SequenceJob]) -> None:
        """Charges the teams for a batch, whatever becomes of it."""
        self._accounts.charge(batch)
        now = time.monotonic()
        for job in batch:
            waited_s = max(0.0, now - job.submitted_s)
            self._metrics.dispatched(job.team.name, job.num_tokens, job.cost, waited_s)

    def _score_group(self, group: list[SequenceJob]) -> None:
        """Runs one forward pass and sends its results to the event loop."""
        started_s = self._pass_since_s = time.monotonic()
        results = self._score(group, started_s)
        for job, result in results:
            if not isinstance(result, Exception):
                # Before the loop knows of it: the next batch must find this one counted.
                self._backlog.add(job)
        self._loop.call_soon_threadsafe(self._hand_over, results)
        self._pass_since_s = None
        seconds = time.monotonic() - started_s
        self._longest_pass_s = max(self._longest_pass_s, seconds)
        self._replica_stats.computed(seconds)
        self._metrics.busy_s.inc(seconds)
        tokens = sum(job.num_tokens for job in group)
        self._scheduler.record_speed(tokens, seconds, sum(job.cost for job in group))
        logger.debug(
            "batch scored sequences=%d tokens=%d ms=%.0f", len(group), tokens, 1e3 * seconds
        )

    def _score(self, group: list[SequenceJob], started_s: float) -> list[Result]:
        """Scores the jobs; a pass that fails is halved until the job at fault is alone."""
        try:
            targets, times = self._head.score([job.request for job in group])
        except Exception as error:
            if len(group) == 1:
                return [(group[0], _to_refusal(error))]
            logger.warning("batch of %d failed, halving it: %s", len(group), type(error).__name__)
            middle = len(group) // 2
            return [
                *self._score(group[:middle], started_s),
                *self._score(group[middle:], started_s),
            ]
        tokens = sum(job.num_tokens for job in group)
        self._metrics.batch_tokens.observe(tokens)
        self._metrics.forward_s.observe(times.forward_s)
        self._metrics.head_s.observe(times.head_s)
        self._replica_stats.passed(tokens, times.forward_s, times.head_s)
        forward_pass = ForwardPass(started_s, times, len(group), tokens)
        for job in group:
            job.forward_pass = forward_pass
        return list(zip(group, targets, strict=True))

    def _hand_over(self, results: list[Result]) -> None:
        """Resolves what the tasks of the jobs wait for; runs in the event loop."""
        for job, result in results:
            scored = job.scored
            if scored is None or scored.done():
                self._backlog.forget(job)  # its client left while it was computed
            elif isinstance(result, Exception):
                scored.set_exception(result)
            else:
                scored.set_result(result)


def _to_refusal(error: Exception) -> Exception:
    """Turns running out of memory on one sequence into a refusal that its client can act on."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return RequestRefused(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "OUT_OF_MEMORY",
            "the teacher ran out of memory on this sequence alone. Send a shorter one or ask for "
            "fewer rows.",
        )
    return error
