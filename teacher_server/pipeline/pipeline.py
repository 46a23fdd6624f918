"""Turns queued jobs into encoded answers: queue -> pack -> rows -> bytes; and prompts into texts.

The event loop queues jobs and takes the encoded parts. One thread launches packs and another waits
for them (compute.py); a few threads turn selected rows into bytes while the next packs are computed
(encoding.py). The backlog (backlog.py) bounds how far computing may run ahead of encoding.
"""

import asyncio
from collections.abc import Callable
from functools import partial

from teacher_server.engine.engine import Engine
from teacher_server.engine.generate import Generator
from teacher_server.ledger.accounts import Accounts
from teacher_server.monitoring.metrics import Metrics
from teacher_server.monitoring.replica_stats import ReplicaSnapshot, ReplicaStats
from teacher_server.pipeline.backlog import EncodeBacklog
from teacher_server.pipeline.compute import Compute
from teacher_server.pipeline.encoding import Encoder, Encoding, Part, make_parts
from teacher_server.pipeline.written import WrittenParts
from teacher_server.scheduling.cost import CostModel
from teacher_server.scheduling.generation_job import GenerationJob
from teacher_server.scheduling.job import SequenceJob
from teacher_server.scheduling.scheduler import Scheduler

LOAD_S = 20
"""How busy a replica is, autoscaling judges by so many seconds."""


class Pipeline:
    """Scores and encodes the sequences of one replica, and writes texts.

    max_unencoded_nbytes: bound of the answers that are scored and not encoded. max_payload_nbytes:
    of one encoded part. repeats_known_answer: whether a known answer still comes out, which is asked
    after failures; it may raise. on_failure: called, in any thread, when it can do neither any more.
    generator: what writes texts, with the prices that teams are charged; None: none are written.
    max_running: texts that are written at the same time.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        engine: Engine,
        *,
        accounts: Accounts,
        metrics: Metrics,
        max_unencoded_nbytes: int,
        max_payload_nbytes: int,
        repeats_known_answer: Callable[[], bool] = lambda: True,
        on_failure: Callable[[], None] = lambda: None,
        generator: Generator | None = None,
        costs: CostModel | None = None,
        max_running: int = 64,
    ) -> None:
        self._scheduler = scheduler
        self._metrics = metrics
        self._replica_stats = ReplicaStats()
        self._backlog = EncodeBacklog(
            max_unencoded_nbytes, on_room=lambda: self._compute.turns.look()
        )
        self._encoder = Encoder(
            partial(make_parts, max_nbytes=max_payload_nbytes),
            on_end=self._backlog.forget,
            on_start=engine.device.spare_cores,
            on_failure=lambda why: self._compute.fail(why),
        )
        self._compute = Compute(
            scheduler,
            engine,
            self._backlog,
            self._encoder,
            accounts=accounts,
            metrics=metrics,
            replica_stats=self._replica_stats,
            repeats_known_answer=repeats_known_answer,
            on_failure=on_failure,
            generator=generator,
            costs=costs,
            max_running=max_running,
        )
        metrics.watch("teacher_queued_tokens", lambda: scheduler.queued_tokens)
        metrics.watch("teacher_queued_work_seconds", lambda: self.load()[0])
        metrics.watch("teacher_unencoded_bytes", lambda: self._backlog.nbytes)

    def start(self) -> None:
        """Begins to compute and to encode."""
        self._encoder.start()
        self._compute.start()

    def score(self, job: SequenceJob) -> Encoding:
        """Queues a job and returns its parts, which come as they are encoded.

        Closing what it returns takes the job out wherever it is. Call it in an event loop. Raises
        RequestRefused if the queue is full or the replica has stopped.
        """
        encoding = self._encoder.expect(job, on_close=self._drop)
        try:
            self._scheduler.submit(job)
        except BaseException:
            self._encoder.drop(job)
            raise
        return encoding

    def generate(self, job: GenerationJob) -> WrittenParts:
        """Queues a text and returns its parts, which come as they are written.

        Its reader calls `mark_read` after each part, and `close` in the end: that frees the text's slot and
        pages before the next launch, wherever it is. Call it in an event loop. Raises RequestRefused if the
        replica has stopped, and ValueError if it writes no texts.
        """
        if self._compute.writer is None:
            raise ValueError("this teacher writes no texts")
        return self._compute.writer.write(job)

    @property
    def num_texts(self) -> tuple[int, int]:
        """Texts that are being written, and texts that wait for a slot or for pages."""
        if self._compute.writer is None:
            return 0, 0
        slots = self._compute.turns.texts.slots
        return slots.num_running, slots.num_waiting

    def record_encoded(self, last: Part) -> None:
        """Counts a sequence whose last part has come."""
        self._metrics.encode_s.observe(last.seconds)
        self._metrics.compact_s.observe(last.compact_s)
        self._replica_stats.encoded(last.seconds, last.compact_s)

    def _drop(self, job: SequenceJob) -> None:
        """Gives a job up: it may be queued, in a pack, or about to be encoded."""
        self._scheduler.cancel(job)
        self._encoder.drop(job)
        self._backlog.forget(job)

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait to be scored."""
        return self._scheduler.queued_tokens

    def load(self) -> tuple[float, float]:
        """Returns how long what waits would take here, and how busy it was in the last seconds, 0 to 1."""
        computing, held = self._replica_stats.busy_shares(LOAD_S, computing_s=self.busy_s)
        # Where answers cannot be encoded as fast as they are computed, the queue waits for that too.
        slower = (computing + held) / computing if computing else 1.0
        return slower * self._compute.turns.queue_s(), min(1.0, computing + held)

    def queued_by_team(self) -> dict[str, int]:
        """Returns the tokens that wait, for each team that has any."""
        return self._scheduler.queued_by_team()

    @property
    def busy_s(self) -> float:
        """How long the forward pass in hand has taken so far; 0 without one."""
        return self._compute.clock.busy_s

    def find_trouble(self, after_s: float) -> str:
        """Says why nothing is computed or encoded any more; empty if all is well.

        after_s: how long a forward pass may take, if no earlier one took nearly as long.
        """
        if self._encoder.has_died():
            return "an encode thread has ended"
        if (busy_s := self._encoder.busy_s) > after_s:
            return f"encoding is stuck seconds={busy_s:.0f}"
        return self._compute.find_trouble(after_s)

    def fail(self, why: str) -> None:
        """Gives up, in any thread: what waits is refused so that clients send it elsewhere."""
        self._compute.fail(why)

    def workload(self) -> ReplicaSnapshot:
        """Returns the means and rates of the last minute."""
        return self._replica_stats.numbers(computing_s=self.busy_s)

    @property
    def max_batch_tokens(self) -> int:
        """Tokens of a full pack."""
        return self._scheduler.max_batch_tokens

    async def close(self, seconds: float) -> None:
        """Fails the jobs that wait and ends the threads, or leaves them after `seconds`."""
        self._compute.close()
        await asyncio.to_thread(self._compute.join, seconds)
        await asyncio.to_thread(self._encoder.close)
