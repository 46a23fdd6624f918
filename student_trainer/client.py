"""RemoteTeacher: an address to an iterator of targets.

One background thread per process owns the asyncio loop and every gRPC object; the caller's thread
pulls sequences, submits them and waits for futures. Unanswered requests are kept: when the stream
breaks they are sent again on a new one, and since scoring is a pure function nothing is lost or
counted twice.
"""

import asyncio
import atexit
import itertools
import logging
import os
import random
import secrets
import threading
import time
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

# A forked child must get ForkedClient: gRPC's own fork handlers crash one in ten of them instead.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import grpc
import numpy as np
import xxhash
from torch import Tensor

from logit_codec import (
    FORMAT_VERSION,
    CodecError,
    DenseSpec,
    Targets,
    TargetSpec,
    TopKSpec,
    decode,
    tokenizer_fingerprint,
)
from protos import teacher_pb2, teacher_pb2_grpc
from student_trainer.errors import (
    BY_CODE,
    ForkedClient,
    IncompatibleTeacher,
    ProtocolError,
    TargetsCorrupt,
    TeacherError,
    TeacherOverloaded,
    TeacherUnavailable,
)
from student_trainer.streaming import Wish, stream_loader, stream_sequences

logger = logging.getLogger(__name__)

CONNECT_S = 10.0
"""How long `connect` waits for the first answer, if the patience allows it."""
DESCRIBE_TIMEOUT_S = 5.0
MAX_ATTEMPTS = 3
"""How often a request whose targets arrive damaged is sent before TargetsCorrupt."""
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", 256 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),
]
RETRIED = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""Ends of a stream after which a new one is opened: transport, drain, restart."""

T = TypeVar("T")


def connect(
    address: str | Sequence[str], *, tokenizer: Any = None, patience_s: float = 300.0
) -> "RemoteTeacher":
    """A teacher that is served at `address` (host:port, or several of one service).

    tokenizer: the student's, of transformers or tokenizers; a teacher with another vocabulary is
    refused. patience_s: how long to wait, in all, while nobody answers; the first answer is waited
    for at most 10 s. Raises TeacherUnavailable, IncompatibleTeacher or AccessDenied.
    """
    addresses = [address] if isinstance(address, str) else list(address)
    if not addresses or any(":" not in one for one in addresses):
        raise ValueError(f"an address is host:port, such as teacher.lab:50051; got {address!r}")
    return RemoteTeacher(addresses, tokenizer=tokenizer, patience_s=patience_s)


@dataclass(slots=True)
class Counters:
    """What a client has received and how often it had to ask again."""

    requests: int = 0
    rows: int = 0
    payload_nbytes: int = 0
    resent: int = 0
    reconnects: int = 0
    corrupt: int = 0


class RemoteTeacher:
    """A served teacher; use `connect` to make one, and `with` or `close()` to end it."""

    def __init__(self, addresses: list[str], *, tokenizer: Any, patience_s: float) -> None:
        self._pid = os.getpid()
        self._io = _IoThread.shared()
        self._closed = False
        self._session = _Session(addresses, patience_s)
        try:
            self._info = self._io.run(self._session.open(min(CONNECT_S, patience_s)))
            _check_compatible(self._info, tokenizer)
        except BaseException:
            self.close()
            raise

    @property
    def info(self) -> teacher_pb2.TeacherInfo:
        """What Describe said at connect."""
        return self._info

    @property
    def counters(self) -> Counters:
        """Received and resent so far."""
        return self._session.counters

    def stream(
        self,
        sequences: Iterable[Any],
        *,
        targets: str | TargetSpec = "top_k:64",
        temperature: float = 1.0,
        seed: int = 0,
        epoch: int = 0,
        ahead: int = 16,
    ) -> Iterator[tuple[Tensor, Targets]]:
        """(token_ids, targets) of each sequence, in order, with `ahead` sequences in flight.

        token_ids: (L,) int64; targets: L-1 rows, row i is the teacher's distribution of token i+1.
        Raises InvalidRequest for what the teacher refuses, TeacherUnavailable after the patience.
        """
        self._check_usable()
        wish = Wish.of(targets, temperature, seed, epoch)
        return stream_sequences(self._submit, sequences, wish, ahead)

    def stream_batches(
        self,
        loader: Iterable[Mapping[str, Any]],
        *,
        targets: str | TargetSpec = "top_k:64",
        temperature: float = 1.0,
        seed: int = 0,
        epoch: int = 0,
        ahead: int | str = "30s",
    ) -> Iterator[tuple[Any, Targets]]:
        """(batch, targets) of each batch of a loader, in order.

        A batch is a mapping with input_ids and, if it is padded, packed or masked, attention_mask,
        position_ids or labels; it comes back as it is. The rows of `targets` are its trained
        positions in reading order. ahead: batches in flight, or "30s" for as many as the trainer
        uses up in that time (at most 512 MiB of targets).
        """
        self._check_usable()
        wish = Wish.of(targets, temperature, seed, epoch)
        return stream_loader(self._submit, loader, wish, ahead)

    def close(self) -> None:
        """Ends the stream and the connection; requests in flight are dropped."""
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        self._io.run(self._session.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _submit(self, token_ids: Tensor, rows: Tensor | None, wish: Wish) -> "Future[Targets]":
        self._check_usable()
        request, num_rows = _request(token_ids, rows, wish)
        request.session_id = self._session.session_id
        request.teacher_fingerprint = self._info.teacher_fingerprint
        pending = _Pending(request, num_rows)
        self._io.call(self._session.submit, pending)
        return pending.future

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedClient(
                f"this teacher was connected in process {self._pid} and is used in its fork "
                f"{os.getpid()}: gRPC does not survive a fork. Iterate over the teacher in the "
                "main process, around the DataLoader instead of inside its workers."
            )
        if self._closed:
            raise TeacherError("this teacher is closed; connect again to use it")


def _request(
    token_ids: Tensor, rows: Tensor | None, wish: Wish
) -> tuple[teacher_pb2.ScoreRequest, int]:
    """The message for one sequence, and how many rows it asks for."""
    ids = token_ids.numpy().astype("<i4")
    spec = wish.spec
    message = teacher_pb2.TargetSpec(
        omit_realized_logprob=not spec.realized,
        entropy=spec.entropy,
        omit_log_z=not spec.log_z,
    )
    if isinstance(spec, TopKSpec):
        message.top_k.k, message.top_k.min_p, message.top_k.bits = spec.k, spec.min_p, spec.bits
    elif isinstance(spec, DenseSpec):
        message.dense.bits = spec.bits
    else:
        raise ProtocolError(f"no message for {type(spec).__name__}")
    request = teacher_pb2.ScoreRequest(
        token_ids=ids.tobytes(),
        lengths=[len(ids)],
        targets=message,
        temperature=wish.temperature,
        seed=wish.seed,
        epoch=wish.epoch,
        level=teacher_pb2.LEVEL_TRAINING,
    )
    if rows is None or len(rows) == len(ids) - 1:
        return request, len(ids) - 1
    mask = np.zeros(len(ids) - 1, dtype=np.uint8)
    mask[rows.numpy()] = 1
    request.row_mask = np.packbits(mask, bitorder="little").tobytes()
    return request, len(rows)


def _check_compatible(info: teacher_pb2.TeacherInfo, tokenizer: Any) -> None:
    if FORMAT_VERSION not in info.format_versions:
        raise IncompatibleTeacher(
            f"the teacher writes format versions {list(info.format_versions)}, this client reads "
            f"version {FORMAT_VERSION}. Upgrade the older of the two sides."
        )
    if tokenizer is None:
        return
    ours = tokenizer_fingerprint(tokenizer)
    if not info.tokenizer_fingerprint:
        logger.warning("the teacher has no tokenizer to compare with the student's")
    elif ours != info.tokenizer_fingerprint:
        raise IncompatibleTeacher(
            "teacher and student tokenizers differ: "
            f"{info.effective_vocab_size} and {len(tokenizer.get_vocab())} entries, fingerprints "
            f"{info.tokenizer_fingerprint} and {ours}. Token-level distillation needs one "
            "vocabulary: train the student with the teacher's tokenizer."
        )


@dataclass(slots=True, eq=False)
class _Pending:
    """A request without its answer."""

    request: teacher_pb2.ScoreRequest
    num_rows: int
    future: "Future[Targets]" = field(default_factory=Future)
    parts: list[teacher_pb2.TargetsPart] = field(default_factory=list)
    attempts: int = 0
    """How often its targets arrived damaged."""
    waited_since_s: float | None = None
    """Since when the teacher has been asking to come back later."""


class _Session:
    """Lives in the io thread: one channel, one stream, and the unanswered requests."""

    def __init__(self, addresses: list[str], patience_s: float) -> None:
        self.counters = Counters()
        self.session_id = secrets.token_bytes(16)
        self._addresses = addresses
        self._patience_s = patience_s
        self._channel: grpc.aio.Channel | None = None
        self._info: teacher_pb2.TeacherInfo | None = None
        self._numbers = itertools.count(1)
        self._unanswered: dict[int, _Pending] = {}
        self._outbox: asyncio.Queue[int] = asyncio.Queue()
        self._runner: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._decoder = ThreadPoolExecutor(1, thread_name_prefix="decode")

    async def open(self, patience_s: float) -> teacher_pb2.TeacherInfo:
        """Finds the first address that answers within the time given."""
        self._info = await self._reach(patience_s)
        return self._info

    async def close(self) -> None:
        for task in (*self._tasks, *([self._runner] if self._runner else [])):
            task.cancel()
        await asyncio.gather(
            *self._tasks, *([self._runner] if self._runner else []), return_exceptions=True
        )
        for pending in self._take_unanswered():
            _fail(pending, TeacherError("this teacher was closed while answers were outstanding"))
        await self._hang_up()
        self._decoder.shutdown(wait=False, cancel_futures=True)

    def submit(self, pending: _Pending) -> None:
        """Sends a request, now or as soon as there is a stream."""
        self.counters.requests += 1
        self._enqueue(pending)
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run())

    def _enqueue(self, pending: _Pending) -> None:
        """Gives the request a new number, so that a late answer to the old one finds nobody."""
        number = next(self._numbers)
        pending.request.request_id = number
        pending.parts = []
        self._unanswered[number] = pending
        self._outbox.put_nowait(number)

    async def _run(self) -> None:
        """Keeps a stream open while there are requests; ends by failing them all."""
        quiet_since: float | None = None  # when the last answer came before the stream broke
        try:
            while True:
                if self._channel is None:
                    left = self._patience_s - (time.monotonic() - (quiet_since or time.monotonic()))
                    info = await self._reach(max(0.0, left))
                    self._check_same(info)
                answered = self.counters.rows
                error = await self._converse()
                await self._hang_up()
                if not self._unanswered:
                    return  # nobody waits; the next request opens a new stream
                if error.code() not in RETRIED:
                    kind = BY_CODE.get(error.code().value[0], ProtocolError)
                    raise kind(f"{self._where()}: {_explain(error)}")
                if quiet_since is None or self.counters.rows != answered:
                    quiet_since = time.monotonic()
                if time.monotonic() - quiet_since > self._patience_s:
                    raise TeacherUnavailable(
                        f"no answer from {self._where()} for {self._patience_s:.0f} s: "
                        f"{_explain(error)}"
                    )
                logger.warning(
                    "lost the teacher at %s (%s); %d requests wait for it",
                    self._where(),
                    _explain(error),
                    len(self._unanswered),
                )
                self.counters.reconnects += 1
                for pending in self._take_unanswered():
                    self.counters.resent += 1
                    self._enqueue(pending)
                await asyncio.sleep(random.uniform(0.05, 0.2))
        except TeacherError as error:
            for pending in self._take_unanswered():
                _fail(pending, error)
        except Exception as error:  # a bug of ours must not leave the trainer waiting for ever
            logger.exception("the client failed")
            for pending in self._take_unanswered():
                _fail(pending, ProtocolError(f"the client failed: {error!r}"))

    def _take_unanswered(self) -> list[_Pending]:
        pending = [one for one in self._unanswered.values() if not one.future.cancelled()]
        self._unanswered.clear()
        while not self._outbox.empty():
            self._outbox.get_nowait()
        return pending

    async def _converse(self) -> grpc.aio.AioRpcError:
        """Sends and receives on one stream until it ends; returns how it ended."""
        assert self._channel is not None
        call = teacher_pb2_grpc.TeacherStub(self._channel).Score()
        sending = asyncio.create_task(self._send(call))
        try:
            async for response in call:
                self._receive(response)
            code = await call.code()
            return grpc.aio.AioRpcError(
                grpc.StatusCode.UNAVAILABLE if code == grpc.StatusCode.OK else code,
                await call.initial_metadata(),
                await call.trailing_metadata(),
                await call.details() or "the service ended the stream",
            )
        except grpc.aio.AioRpcError as error:
            return error
        finally:
            sending.cancel()
            call.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def _send(self, call: Any) -> None:
        """Writes requests; a broken stream is left to the reader to report."""
        while True:
            number = await self._outbox.get()
            pending = self._unanswered.get(number)
            if pending is None:
                continue
            if pending.future.cancelled():
                del self._unanswered[number]
                continue
            try:
                await call.write(pending.request)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return

    def _receive(self, response: teacher_pb2.ScoreResponse) -> None:
        pending = self._unanswered.get(response.request_id)
        if pending is None:
            return  # an answer to a request that was given up or sent again
        if pending.future.cancelled():
            del self._unanswered[response.request_id]
        elif response.HasField("error"):
            del self._unanswered[response.request_id]
            self._spawn(self._handle_error(pending, response.error))
        elif response.HasField("part"):
            pending.parts.append(response.part)
            if response.part.last:
                del self._unanswered[response.request_id]
                self._spawn(self._finish(pending))

    async def _finish(self, pending: _Pending) -> None:
        """Checks and decodes a complete answer off the loop; asks again if it is damaged."""
        assert self._info is not None
        try:
            decoding = self._decoder.submit(_assemble, pending, self._info.teacher_fingerprint)
        except RuntimeError:
            return  # closed, or the interpreter is ending: nobody takes the answer any more
        try:
            targets = await asyncio.wrap_future(decoding)
        except (CodecError, TargetsCorrupt) as error:
            self.counters.corrupt += 1
            pending.attempts += 1
            if pending.attempts >= MAX_ATTEMPTS:
                damaged = isinstance(error, TargetsCorrupt) or "digest" in str(error)
                kind = TargetsCorrupt if damaged else ProtocolError
                _fail(pending, kind(f"{error} ({pending.attempts} times, from {self._where()})"))
            else:
                logger.warning("targets arrived damaged, asking again: %s", error)
                self.counters.resent += 1
                self._resubmit(pending)
            return
        except TeacherError as error:
            _fail(pending, error)
            return
        self.counters.rows += targets.num_rows
        self.counters.payload_nbytes += sum(len(part.payload) for part in pending.parts)
        if pending.future.set_running_or_notify_cancel():
            pending.future.set_result(targets)

    async def _handle_error(self, pending: _Pending, error: teacher_pb2.RequestError) -> None:
        """Waits out RESOURCE_EXHAUSTED, asks once more after DATA_LOSS, raises everything else."""
        kind = BY_CODE.get(error.code, ProtocolError)
        now = time.monotonic()
        if kind is TeacherOverloaded and error.reason != "OUT_OF_MEMORY":
            pending.waited_since_s = pending.waited_since_s or now
            delay = error.retry_after_ms / 1000 or random.uniform(0.5, 1.0)
            if now + delay - pending.waited_since_s <= self._patience_s:
                await asyncio.sleep(delay)
                self.counters.resent += 1
                self._resubmit(pending)
                return
        elif kind is TargetsCorrupt and pending.attempts == 0:
            pending.attempts += 1
            self.counters.resent += 1
            self._resubmit(pending)
            return
        _fail(pending, kind(error.message))

    def _resubmit(self, pending: _Pending) -> None:
        if not pending.future.cancelled():
            self.counters.requests -= 1
            self.submit(pending)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _reach(self, patience_s: float) -> teacher_pb2.TeacherInfo:
        """Opens a channel to the first address that answers Describe."""
        started = time.monotonic()
        told = started
        delay = 0.1
        last = ""
        while True:
            for address in self._addresses:
                channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
                try:
                    stub = teacher_pb2_grpc.TeacherStub(channel)
                    left = patience_s - (time.monotonic() - started)
                    timeout = min(DESCRIBE_TIMEOUT_S, max(1.0, left))
                    info = await stub.Describe(teacher_pb2.DescribeRequest(), timeout=timeout)
                    self._channel = channel
                    return info
                except grpc.aio.AioRpcError as error:
                    await channel.close()
                    if error.code() not in RETRIED:
                        kind = BY_CODE.get(error.code().value[0], ProtocolError)
                        raise kind(f"{address}: {_explain(error)}") from None
                    last = _explain(error)
                except BaseException:
                    await channel.close()
                    raise
            waited = time.monotonic() - started
            if waited + delay > patience_s:
                raise TeacherUnavailable(
                    f"no teacher answers at {', '.join(self._addresses)} after {waited:.0f} s: "
                    f"{last}. Is the address right, and has the service said 'ready'?"
                )
            if time.monotonic() - told > 5.0:
                told = time.monotonic()
                logger.warning(
                    "waiting for the teacher at %s since %.0f s (up to %.0f s): %s",
                    self._where(),
                    waited,
                    patience_s,
                    last,
                )
            await asyncio.sleep(delay)
            delay = min(2.0, 1.5 * delay)

    def _check_same(self, info: teacher_pb2.TeacherInfo) -> None:
        assert self._info is not None
        if info.teacher_fingerprint != self._info.teacher_fingerprint:
            raise IncompatibleTeacher(
                f"the teacher at {self._where()} was changed: its fingerprint is "
                f"{info.teacher_fingerprint}, this run began with "
                f"{self._info.teacher_fingerprint}. Connect again to train with the new one."
            )

    async def _hang_up(self) -> None:
        if self._channel is not None:
            channel, self._channel = self._channel, None
            await channel.close()

    def _where(self) -> str:
        return ", ".join(self._addresses)


def _assemble(pending: _Pending, fingerprint: str) -> Targets:
    """The targets of a complete answer. Raises CodecError, TargetsCorrupt or TeacherError."""
    digest = xxhash.xxh3_128_digest(pending.request.token_ids)
    parts = sorted(pending.parts, key=lambda part: part.first_row)
    row = 0
    decoded = []
    for part in parts:
        if part.teacher_fingerprint != fingerprint:
            raise IncompatibleTeacher(
                f"an answer came from teacher {part.teacher_fingerprint}, this run began with "
                f"{fingerprint}"
            )
        if part.ids_digest != digest:
            raise TargetsCorrupt("the digest of the scored ids is not that of the ids sent")
        targets = decode(part.payload)
        if part.first_row != row or part.num_rows != targets.num_rows:
            raise TargetsCorrupt(f"row {row} was expected, rows from {part.first_row} came")
        row += targets.num_rows
        decoded.append(targets)
    if row != pending.num_rows:
        raise TargetsCorrupt(f"{pending.num_rows} rows were asked for, {row} came")
    return Targets.cat(decoded)


def _fail(pending: _Pending, error: TeacherError) -> None:
    if pending.future.set_running_or_notify_cancel():
        pending.future.set_exception(type(error)(str(error)))


def _explain(error: grpc.aio.AioRpcError) -> str:
    return f"{error.code().name}: {error.details()}"


class _IoThread:
    """The one thread of this process that runs the asyncio loop of every client."""

    _instance: "_IoThread | None" = None
    _lock = threading.Lock()

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="teacher-io", daemon=True
        )
        self._thread.start()
        atexit.register(self._stop)

    @classmethod
    def shared(cls) -> "_IoThread":
        with cls._lock:
            if cls._instance is None or cls._instance.pid != os.getpid():
                if cls._instance is not None:
                    raise ForkedClient(
                        f"process {cls._instance.pid} used a teacher before it forked this one: "
                        "gRPC does not survive a fork. Start this process with the 'spawn' "
                        "method, or connect before anything else does in the parent."
                    )
                cls._instance = cls()
            return cls._instance

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine in the loop and waits for it; Ctrl-C cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def call(self, function: Any, *arguments: Any) -> None:
        self._loop.call_soon_threadsafe(function, *arguments)

    def _stop(self) -> None:
        if os.getpid() == self.pid:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(2.0)
