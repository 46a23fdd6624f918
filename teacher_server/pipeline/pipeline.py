"""Turns queued jobs into encoded answers: queue -> batch -> scored -> bytes.

Three threads share the work. The event loop queues jobs and takes the encoded parts; the compute
thread (compute.py) runs the model on one batch after another; the encode thread (encoding.py) turns
targets into bytes while the next batch is computed. The backlog (backlog.py) bounds how far the
compute thread may run ahead of the encode thread.
"""

import asyncio
from functools import partial

from logit_codec import encode_parts
from teacher_server.engine.head import VocabularyHead
from teacher_server.ledger.accounts import Accounts
from teacher_server.monitoring.metrics import Metrics
from teacher_server.monitoring.replica_stats import ReplicaSnapshot, ReplicaStats
from teacher_server.pipeline.backlog import EncodeBacklog
from teacher_server.pipeline.compute import ComputeThread
from teacher_server.pipeline.encoding import Encoder, Encoding
from teacher_server.scheduling.job import SequenceJob
from teacher_server.scheduling.scheduler import Scheduler


class Pipeline:
    """Scores and encodes the sequences of one replica.

    max_unencoded_nbytes: bound of the answers that are scored and not encoded. max_payload_nbytes:
    of one encoded part.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        head: VocabularyHead,
        *,
        accounts: Accounts,
        metrics: Metrics,
        max_unencoded_nbytes: int,
        max_payload_nbytes: int,
    ) -> None:
        self._scheduler = scheduler
        self._metrics = metrics
        self._max_payload_nbytes = max_payload_nbytes
        self._replica_stats = ReplicaStats()
        self._backlog = EncodeBacklog(max_unencoded_nbytes)
        self._encoder = Encoder(on_end=self._backlog.forget)
        self._compute = ComputeThread(
            scheduler,
            head,
            self._backlog,
            accounts=accounts,
            metrics=metrics,
            replica_stats=self._replica_stats,
        )
        metrics.watch("teacher_queued_tokens", lambda: scheduler.queued_tokens)
        metrics.watch("teacher_unencoded_bytes", lambda: self._backlog.nbytes)

    def start(self) -> None:
        """Begins to compute; call it in the event loop that will score."""
        self._compute.start()

    async def score(self, job: SequenceJob) -> Encoding:
        """Queues a job, waits for its targets and returns its parts, which are being encoded.

        Cancelling it takes the job out of the queue. Raises RequestRefused if the queue is full or
        the replica has stopped, and the error of the forward pass.
        """
        job.scored = asyncio.get_running_loop().create_future()
        try:
            self._scheduler.submit(job)
            # The job may go ahead of other teams, which the compute thread may be waiting for.
            self._backlog.look()
            targets = await job.scored
        except BaseException:
            # It may still be queued, or be scored already and about to be handed over.
            self._scheduler.cancel(job)
            self._backlog.forget(job)
            raise
        job.scored = None  # it holds the tensors, which are to go as soon as they are encoded
        self._metrics.queue_s.observe(job.waited_s)
        make = partial(
            encode_parts,
            targets,
            job.request.spec,
            max_nbytes=self._max_payload_nbytes,
            id_table=job.id_table,
        )
        return self._encoder.encode(job, make)

    def record_encoded(self, seconds: float) -> None:
        """Counts a sequence whose last part has come, and the time since it was scored."""
        self._metrics.encode_s.observe(seconds)
        self._replica_stats.encoded(seconds)

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait to be scored."""
        return self._scheduler.queued_tokens

    def queued_by_team(self) -> dict[str, int]:
        """Returns the tokens that wait, for each team that has any."""
        return self._scheduler.queued_by_team()

    @property
    def busy_s(self) -> float:
        """How long the forward pass in hand has taken so far; 0 without one."""
        return self._compute.busy_s

    def is_stuck(self, after_s: float) -> bool:
        """Whether the forward pass in hand takes longer than it ever should."""
        return self._compute.is_stuck(after_s)

    def workload(self) -> ReplicaSnapshot:
        """Returns the means and rates of the last minute."""
        return self._replica_stats.numbers(computing_s=self.busy_s)

    @property
    def max_batch_tokens(self) -> int:
        """Tokens of a full batch."""
        return self._scheduler.max_batch_tokens

    async def close(self, seconds: float) -> None:
        """Fails the jobs that wait and ends both threads, or leaves them after `seconds`."""
        self._compute.close()
        await asyncio.to_thread(self._compute.join, seconds)
        await asyncio.to_thread(self._encoder.close)
