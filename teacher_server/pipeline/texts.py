"""Writes texts: launches their turns, takes the tokens that were drawn, and flushes them to readers.

The launch thread and the complete thread of compute.py call it. A turn that fails is halved until the text at
fault is alone, as batches are; what was not at fault goes on as if nothing had happened, because a launch
that failed leaves no trace in the texts.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from teacher_server.engine.batch import PackTimes
from teacher_server.engine.engine import Engine
from teacher_server.engine.generate import Generator, LaunchedChunks, LaunchedStep
from teacher_server.engine.head import ScoredRows
from teacher_server.ledger.accounts import Accounts
from teacher_server.monitoring.metrics import Metrics
from teacher_server.monitoring.replica_stats import ReplicaStats
from teacher_server.pipeline.encoding import Encoder
from teacher_server.pipeline.failures import forget_frames, is_out_of_memory, refuse_job
from teacher_server.pipeline.written import Flush, WrittenParts
from teacher_server.scheduling.generation_job import MAX_UNREAD, Finish, GenerationJob
from teacher_server.scheduling.generations import TextTurn
from teacher_server.scheduling.turns import Turns

logger = logging.getLogger(__name__)

FLUSH_TOKENS = 64
FLUSH_S = 0.25
FLUSH_NBYTES = 1 << 20
"""A flush is made of so many tokens, or after so long, or when its answer may be as large as this."""
NO_TIMES = PackTimes(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)

LaunchedTexts = LaunchedChunks | LaunchedStep


@dataclass(slots=True, eq=False)
class _Writing:
    """Holds what was drawn of a text and not flushed."""

    parts: WrittenParts
    flush_tokens: int
    token_ids: list[int] = field(default_factory=list)
    rows: list[ScoredRows] = field(default_factory=list)
    since_s: float = 0.0
    """When the first of these tokens was drawn."""
    times: PackTimes = NO_TIMES
    step_texts: int = 0

    def is_due(self, now: float) -> bool:
        """Whether it is time for a flush."""
        count = len(self.token_ids)
        return count >= self.flush_tokens or (count > 0 and now - self.since_s >= FLUSH_S)


class TextWriter:
    """Computes the turns of texts and delivers what they give.

    suspect: called after each text that failed alone.
    """

    def __init__(
        self,
        engine: Engine,
        generator: Generator,
        turns: Turns,
        encoder: Encoder,
        *,
        accounts: Accounts,
        metrics: Metrics,
        replica_stats: ReplicaStats,
        suspect: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._generator = generator
        self._turns = turns
        self._encoder = encoder
        self._accounts = accounts
        self._metrics = metrics
        self._replica_stats = replica_stats
        self._suspect = suspect
        self._writings: dict[GenerationJob, _Writing] = {}
        """Of the texts that are not over. The event loop adds, any thread removes."""
        self._flushing = threading.Lock()
        self._num_preemptions = 0
        slots = turns.texts.slots
        metrics.watch("teacher_texts_running", lambda: slots.num_running)
        metrics.watch("teacher_texts_waiting", lambda: slots.num_waiting)
        metrics.watch("teacher_key_pages", lambda: generator.pool.num_pages)
        metrics.watch("teacher_free_key_pages", lambda: generator.pool.num_free)

    def write(self, job: GenerationJob) -> WrittenParts:
        """Queues a text and returns what is written of it; see `Pipeline.generate`."""
        parts = WrittenParts(job, on_read=self._turns.count_read, on_close=self._drop)
        tokens = min(FLUSH_TOKENS, max(1, FLUSH_NBYTES // max(1, job.row_nbytes)))
        writing = _Writing(parts, tokens)
        if job.text.new_ids and (finish := job.stop_rule.check(job.text)):
            # Another replica wrote all of it, and was lost before it said so.
            self._flush(job, writing, finish, time.monotonic())
            return parts
        self._writings[job] = writing
        try:
            self._turns.submit(job)
        except BaseException:
            del self._writings[job]
            raise
        return parts

    def fail_all(self, error: Exception) -> None:
        """Ends all texts with an error."""
        for job in list(self._writings):
            self._fail(job, error)

    # The launch thread.

    def charge(self, turn: TextTurn) -> None:
        """Charges the teams for a turn, whatever becomes of it."""
        charges = turn.charges()
        self._accounts.charge_parts(charges)
        now = time.monotonic()
        for (job, tokens, is_first), cost in zip(charges, turn.costs, strict=True):
            waited_s = max(0.0, now - job.submitted_s) if is_first else None
            self._metrics.dispatched(job.team.name, tokens, cost, waited_s)
        preemptions = self._turns.texts.slots.num_preemptions
        self._metrics.preemptions.inc(preemptions - self._num_preemptions)
        self._num_preemptions = preemptions

    def launch(self, turn: TextTurn) -> LaunchedTexts:
        """Gives a turn to the device, without waiting for it."""
        return self._launch(turn, turn.jobs, turn.counts)

    # The complete thread.

    def complete(self, turn: TextTurn, launched: LaunchedTexts) -> None:
        """Waits for a turn and delivers what it gives. Raises the device's error."""
        self._turns.land(self._take(turn.jobs, turn.counts, launched))

    def recover(self, turn: TextTurn, error: Exception, is_over: Callable[[], bool]) -> None:
        """Computes a turn that failed in halves, until the text at fault is alone.

        is_over: whether nothing can be computed any more. Call it outside of any `except`.
        """
        ended: list[GenerationJob] = []
        try:
            self._halve(turn, turn.jobs, turn.counts, error, ended, is_over)
        finally:
            self._turns.land(ended)

    def abandon(self, turn: TextTurn, error: Exception) -> None:
        """Ends the texts of a turn with an error."""
        for job in turn.jobs:
            self._fail(job, error)
        self._turns.land(turn.jobs)

    def flush_old(self) -> None:
        """Flushes what was drawn a while ago of texts whose turn does not come."""
        now = time.monotonic()
        for job, writing in list(self._writings.items()):
            if writing.is_due(now):
                self._flush(job, writing, "", now)

    def _launch(
        self, turn: TextTurn, jobs: Sequence[GenerationJob], counts: Sequence[int]
    ) -> LaunchedTexts:
        texts = [job.text for job in jobs]
        with self._engine.launching():
            while turn.copies:
                self._generator.copy_page(*turn.copies[0])
                del turn.copies[0]
            if turn.is_step:
                return self._generator.launch_step(texts)
            return self._generator.launch_chunks(list(zip(texts, counts, strict=True)))

    def _take(
        self, jobs: Sequence[GenerationJob], counts: Sequence[int], launched: LaunchedTexts
    ) -> list[GenerationJob]:
        """Waits for a launch and delivers its tokens; returns the texts that are over."""
        if isinstance(launched, LaunchedChunks):
            times = self._generator.result_of_chunks(launched)
            self._replica_stats.passed(sum(counts), times.by_stage())
            self._metrics.passed(sum(counts), times.by_stage())
            return []
        token_ids, rows, times = self._generator.result_of_step(launched)
        self._metrics.steps.inc()
        self._replica_stats.wrote(len(jobs))
        now = time.monotonic()
        return [
            job
            for job, token_id, row in zip(jobs, token_ids, rows, strict=True)
            if self._append(job, token_id, row, times, len(jobs), now)
        ]

    def _append(
        self,
        job: GenerationJob,
        token_id: int,
        row: ScoredRows | None,
        times: PackTimes,
        step_texts: int,
        now: float,
    ) -> bool:
        """Appends a token to a text; returns whether the text is over with it."""
        job.text.new_ids.append(token_id)
        writing = self._writings.get(job)
        if writing is None:
            return True  # its client has left
        if not job.has_drawn:
            job.first_token_s = now
            self._metrics.first_token_s.observe(now - job.submitted_s)
        self._metrics.written.labels(job.team.name).inc()
        if not writing.token_ids:
            writing.since_s = now
        writing.token_ids.append(token_id)
        if row is not None:
            writing.rows.append(row)
        writing.times, writing.step_texts = times, step_texts
        try:
            finish = job.stop_rule.check(job.text)
        except Exception as error:  # of a tokenizer that is not ours
            self._fail(job, error)
            return True
        if finish:
            self._writings.pop(job, None)
        if finish or writing.is_due(now):
            self._flush(job, writing, finish, now)
        return bool(finish)

    def _flush(self, job: GenerationJob, writing: _Writing, finish: Finish, now: float) -> None:
        """Hands what was drawn to the encoder, and through it to the reader."""
        with self._flushing:  # a replica that fails may flush in another thread
            token_ids, writing.token_ids = writing.token_ids, []
            rows, writing.rows = writing.rows, []
        if not token_ids and not finish:
            return
        flush = _make_flush(job, writing, token_ids, finish, now)
        self._turns.count_flush(job)
        if rows:
            flush.encoding = self._encoder.expect(flush, lambda _: None, writing.parts.loop)
        writing.parts.deliver(flush)
        if rows:
            pieces = tuple(piece for row in rows for piece in row.pieces)
            self._encoder.encode(flush, ScoredRows(pieces))

    def _halve(
        self,
        turn: TextTurn,
        jobs: Sequence[GenerationJob],
        counts: Sequence[int],
        error: Exception,
        ended: list[GenerationJob],
        is_over: Callable[[], bool],
    ) -> None:
        """Deals with a launch that failed; appends the texts that are over."""
        if len(jobs) == 1:
            self._fail(jobs[0], refuse_job(error, self._engine.device))
            ended.append(jobs[0])
            self._suspect()
            return
        logger.warning("turn of %d texts failed, halving it", len(jobs), exc_info=error)
        forget_frames(error)
        if is_out_of_memory(error):
            self._engine.device.release_memory()
        middle = len(jobs) // 2
        for half in (slice(0, middle), slice(middle, None)):
            self._again(turn, jobs[half], counts[half], ended, is_over)

    def _again(
        self,
        turn: TextTurn,
        jobs: Sequence[GenerationJob],
        counts: Sequence[int],
        ended: list[GenerationJob],
        is_over: Callable[[], bool],
    ) -> None:
        """Computes a part of a turn that failed, while this thread waits."""
        if is_over():
            return  # all texts have been refused
        try:
            ended += self._take(jobs, counts, self._launch(turn, jobs, counts))
        except Exception as failed:
            error = failed
        else:
            return
        self._halve(turn, jobs, counts, error, ended, is_over)

    def _fail(self, job: GenerationJob, error: Exception) -> None:
        """Ends a text with an error, after what was written of it before."""
        if (writing := self._writings.pop(job, None)) is None:
            return
        if writing.token_ids:
            with contextlib.suppress(RuntimeError):  # its event loop may have ended
                self._flush(job, writing, "", time.monotonic())
        with contextlib.suppress(RuntimeError):
            writing.parts.deliver(error)

    def _drop(self, parts: WrittenParts) -> None:
        """Gives a text up: it may be waiting, in flight, or about to be encoded."""
        self._writings.pop(parts.job, None)
        self._turns.cancel(parts.job)
        for flush in list(parts.flushes):
            self._encoder.drop(flush)


def bound_unread(job: GenerationJob) -> int:
    """Returns an upper bound of what is delivered of a text and not read yet, in bytes."""
    flush = min(FLUSH_TOKENS * job.row_nbytes, FLUSH_NBYTES + job.row_nbytes)
    return MAX_UNREAD * flush


def _make_flush(
    job: GenerationJob, writing: _Writing, token_ids: list[int], finish: Finish, now: float
) -> Flush:
    """Describes some new tokens of a text; one that was over before it was queued has waited for nothing."""
    began_s = job.submitted_s or now
    return Flush(
        first=job.text.num_tokens - len(token_ids),
        token_ids=token_ids,
        finish=finish,
        seconds=now - began_s,
        waited_s=job.first_token_s - began_s if job.has_drawn else 0.0,
        times=writing.times,
        step_texts=writing.step_texts,
        spec=job.text.spec,
        team=job.team,
        level=job.level,
        reply_nbytes=len(token_ids) * job.row_nbytes,
        id_table=job.id_table,
    )
