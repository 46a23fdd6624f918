"""One replica: wires the stages together and owns its gRPC server. Knows nothing of Ray.

Three kinds of thread: the event loop (messages), one compute thread (forward and head, one batch
after the other), one encode thread (targets to bytes while the next batch is computed).
"""

import asyncio
import logging
import secrets
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from logit_codec import FORMAT_VERSION
from logit_codec.spec import KINDS
from protos import teacher_pb2, teacher_pb2_grpc
from teacher_server.admission import Admission, Limits
from teacher_server.errors import RequestRefused, ServeError
from teacher_server.head import VocabularyHead
from teacher_server.model import TeacherModel
from teacher_server.scheduler import Job, Scheduler
from teacher_server.service import Scored, TeacherService

logger = logging.getLogger(__name__)

SERVICE_NAME = teacher_pb2.DESCRIPTOR.services_by_name["Teacher"].full_name


class Replica:
    """Serves one teacher on one port.

    `await start()` returns the port; `await drain(seconds)` answers what was read and stops.
    """

    def __init__(
        self,
        model: TeacherModel,
        *,
        limits: Limits,
        max_batch_tokens: int,
        head_chunk_nbytes: int,
    ) -> None:
        self.model = model
        self.limits = limits
        self._service_id = secrets.token_hex(16)
        self._replica_id = secrets.token_hex(4)
        self._address = ""
        self._state = "ready"
        self._fingerprint = model.teacher_fingerprint
        self._head = VocabularyHead(model, chunk_nbytes=head_chunk_nbytes)
        self._exactness = "bytes" if self._head.is_exact() else "tolerance"
        self._scheduler = Scheduler(
            max_batch_tokens=max_batch_tokens,
            max_batch_reply_nbytes=limits.max_reply_nbytes,
            max_queued_tokens=limits.max_queued_tokens,
        )
        self._waiting: dict[Job, asyncio.Future[Scored]] = {}
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._compute = threading.Thread(target=self._compute_loop, name="compute", daemon=True)

    async def start(self, host: str, port: int) -> int:
        """Starts to listen and compute; port 0 takes a free one. Raises ServeError."""
        self._loop = asyncio.get_running_loop()
        self._service = TeacherService(
            describe=self.describe,
            admission=Admission(self.model, self.limits),
            bucket_length=self.model.bucket_length,
            score=self._score,
            encoder=self._encoder,
            teacher_fingerprint=self._fingerprint,
        )
        self._server = grpc.aio.server(options=server_options(self.limits))
        teacher_pb2_grpc.add_TeacherServicer_to_server(self._service, self._server)
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        try:
            bound = self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise ServeError(f"cannot listen on {host}:{port}: {error}") from error
        self._address = f"{host}:{bound}"
        await self._server.start()
        self._compute.start()
        for name in ("", SERVICE_NAME):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return bound

    async def drain(self, seconds: float) -> None:
        """Reads no more requests, answers those it has within `seconds`, then stops for good."""
        self._state = "draining"
        await self._health.enter_graceful_shutdown()
        self._service.drain()
        await self._server.stop(seconds)
        for job in self._scheduler.close():
            self._resolve(job, RuntimeError("the replica was stopped"))
        # A forward cannot be interrupted; the process may end without it.
        await asyncio.get_running_loop().run_in_executor(None, self._compute.join, seconds)
        self._encoder.shutdown(wait=False, cancel_futures=True)

    def describe(self) -> teacher_pb2.TeacherInfo:
        """Who answers here, for Describe."""
        model, limits = self.model, self.limits
        return teacher_pb2.TeacherInfo(
            service_id=self._service_id,
            model=model.name,
            revision=model.revision,
            weights_fingerprint=model.weights_fingerprint,
            tokenizer_fingerprint=model.tokenizer_fingerprint,
            teacher_fingerprint=self._fingerprint,
            vocab_size=model.vocab_size,
            effective_vocab_size=model.effective_vocab_size,
            max_sequence_tokens=limits.max_sequence_tokens,
            limits=teacher_pb2.Limits(
                max_request_tokens=limits.max_request_tokens,
                max_request_sequences=limits.max_request_sequences,
                max_request_bytes=limits.max_request_nbytes,
                max_top_k=min(limits.max_top_k, model.effective_vocab_size),
                max_reply_bytes=limits.max_reply_nbytes,
                max_stream_bytes=limits.max_stream_nbytes,
                max_queued_tokens=limits.max_queued_tokens,
                max_part_bytes=limits.max_part_nbytes,
            ),
            kinds=KINDS,
            exactness=self._exactness,
            replicas=[
                teacher_pb2.Replica(id=self._replica_id, address=self._address, state=self._state)
            ],
            team="default",
            architecture=model.architecture,
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(model.device),
            attention=model.attention,
            format_versions=[FORMAT_VERSION],
            server_version=metadata.version("logitstream"),
        )

    async def _score(self, job: Job) -> Scored:
        """Submits a job and waits; the job departs if this is cancelled."""
        future = self._loop.create_future()
        self._waiting[job] = future
        try:
            self._scheduler.submit(job)
            return await future
        finally:
            self._scheduler.cancel(job)
            self._waiting.pop(job, None)

    def _resolve(self, job: Job, result: Scored | Exception) -> None:
        future = self._waiting.get(job)
        if future is None or future.done():
            return
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)

    def _compute_loop(self) -> None:
        while batch := self._scheduler.next_batch():
            started = time.monotonic()
            for job, result in self._score_batch(batch, started):
                self._loop.call_soon_threadsafe(self._resolve, job, result)
            tokens = sum(job.bucket for job in batch)
            seconds = time.monotonic() - started
            self._scheduler.record_speed(tokens, seconds)
            logger.debug(
                "batch scored sequences=%d tokens=%d ms=%.0f", len(batch), tokens, 1e3 * seconds
            )

    def _score_batch(
        self, batch: list[Job], started: float
    ) -> list[tuple[Job, Scored | Exception]]:
        """Each job with its result; a batch that fails is halved until the culprit is alone."""
        try:
            targets, times = self._head.score([job.wanted for job in batch])
        except Exception as error:
            if len(batch) == 1:
                return [(batch[0], _refusal(error))]
            logger.warning("batch of %d failed, halving it: %s", len(batch), type(error).__name__)
            middle = len(batch) // 2
            return [
                *self._score_batch(batch[:middle], started),
                *self._score_batch(batch[middle:], started),
            ]
        tokens = sum(job.bucket for job in batch)
        return [
            (job, Scored(kept, times, len(batch), tokens, started))
            for job, kept in zip(batch, targets, strict=True)
        ]


def _refusal(error: Exception) -> Exception:
    """An error of one sequence's forward; running out of memory is said to the client."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return RequestRefused(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "OUT_OF_MEMORY",
            "the teacher ran out of memory on this sequence alone. Send a shorter one or ask for "
            "fewer rows.",
        )
    return error


def server_options(limits: Limits) -> list[tuple[str, int]]:
    """gRPC settings of a replica's server."""
    return [
        # Two services on one port would answer in turns; grpc shares ports unless told not to.
        ("grpc.so_reuseport", 0),
        # Refused by a message up to here; beyond, the transport ends the stream.
        ("grpc.max_receive_message_length", 4 * limits.max_request_nbytes),
        ("grpc.max_send_message_length", 2 * max(limits.max_part_nbytes, limits.max_reply_nbytes)),
        # A peer that answers no ping is gone: noticed after about 10 + 5 s.
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.http2.ping_timeout_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ]
