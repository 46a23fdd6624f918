"""A service of one replica that writes texts by the contract, and breaks where a test wants it to."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import torch

from logit_codec import encode_parts
from logitstream.messages import describe_model, read_targets
from protos import teacher_pb2, teacher_pb2_grpc
from protos.answer_check import generation_check, request_digest
from teacher_server.engine.continuation import Continuation, DrawRule
from teacher_server.engine.engine import Engine
from teacher_server.engine.generate import Generator
from teacher_server.engine.key_pool import pages_for
from teacher_server.engine.loading import prepare
from teacher_server.engine.stops import StopRule

Change = Callable[[teacher_pb2.GenerateResponse, int], None]
"""Changes an answer before it is sent, given the number of answers before it."""


class TextService(teacher_pb2_grpc.TeacherServicer):
    """Answers Describe and Generate; the tokens come from the engine, `part_tokens` in a part."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        replica_id: str = "one",
        part_tokens: int = 3,
        max_running: int = 1 << 20,
    ) -> None:
        """max_running: requests that are answered at a time; the others wait in order."""
        self._engine = Engine(prepare(model, tokenizer))
        self._generator: Generator = self._engine.open_generation(1 << 22)
        self._part_tokens = part_tokens
        self._slots = asyncio.Semaphore(max_running)
        self.replica_id = replica_id
        self.others: list[TextService] = []
        self.state = "ready"
        self.requests: list[teacher_pb2.GenerateRequest] = []
        """Every request that was read, cancellations too."""
        self.refuse: list[teacher_pb2.RequestError] = []
        """Answers to the next requests."""
        self.change: Change = lambda response, number: None
        self.lose: set[int] = set()
        """Places of requests, in the order of arrival, that are never answered."""
        self.pause_s = 0.0
        """Before every part."""
        self.die_after: int | None = None
        """Parts after which every stream breaks and no new one is taken."""
        self.num_parts = 0
        self.delivered: list[tuple[int, int]] = []
        """(sample, first) of each part."""
        self._dead = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.address = self._run(self._start())

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _start(self) -> str:
        self._server = grpc.aio.server()
        teacher_pb2_grpc.add_TeacherServicer_to_server(self, self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return f"127.0.0.1:{port}"

    def stop(self) -> None:
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    async def _stop(self) -> None:
        self._dead.set()
        await self._server.stop(None)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def Describe(self, request: Any, context: Any) -> teacher_pb2.TeacherInfo:
        if self.is_dead:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "it is gone")
        model = self._engine.model
        return describe_model(
            model,
            service_id="texts",
            replica_id=self.replica_id,
            max_sequence_tokens=model.max_sequence_tokens,
            max_generation_tokens=self._generator.max_tokens,
            limits=teacher_pb2.Limits(max_top_k=64, max_request_tokens=1 << 16),
            replicas=[
                teacher_pb2.Replica(id=one.replica_id, address=one.address, state=one.state)
                for one in (self, *self.others)
            ],
        )

    @property
    def is_dead(self) -> bool:
        return self.die_after is not None and self.num_parts >= self.die_after

    async def Score(self, request_iterator: Any, context: Any) -> None:
        """Ends at once, as a service does where no request comes."""
        await context.send_initial_metadata(())
        await asyncio.sleep(0.2)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "no request arrived")

    async def Generate(self, request_iterator: Any, context: Any) -> None:
        await context.send_initial_metadata(())
        running: dict[int, asyncio.Task[None]] = {}
        writing = asyncio.Lock()  # two writes at once fail

        async def read() -> None:
            async for request in request_iterator:
                self.requests.append(request)
                if request.cancel:
                    if task := running.pop(request.request_id, None):
                        task.cancel()
                    continue
                if len(self.requests) - 1 in self.lose:
                    continue
                running[request.request_id] = asyncio.create_task(
                    self._answer(request, context, writing)
                )

        reading = asyncio.create_task(read())
        dying = asyncio.create_task(self._dead.wait())
        await asyncio.wait({reading, dying}, return_when=asyncio.FIRST_COMPLETED)
        dying.cancel()
        for task in running.values():
            task.cancel()
        reading.cancel()
        if self.is_dead:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "it is gone")

    async def _answer(
        self, request: teacher_pb2.GenerateRequest, context: Any, writing: asyncio.Lock
    ) -> None:
        response = teacher_pb2.GenerateResponse(request_id=request.request_id)
        digest = request_digest(request)
        if self.refuse:
            response.error.CopyFrom(self.refuse.pop(0))
            response.check = generation_check(digest, response)
            async with writing:
                await context.write(response)
            return
        async with self._slots:
            await self._write(request, digest, context, writing)

    async def _write(
        self,
        request: teacher_pb2.GenerateRequest,
        digest: bytes,
        context: Any,
        writing: asyncio.Lock,
    ) -> None:
        """Writes the samples of a request, one after the other."""
        response = teacher_pb2.GenerateResponse(request_id=request.request_id)
        samples = list(request.samples) or [teacher_pb2.Sample()]
        for sample in samples:
            text = _Text(self, request, sample)
            try:
                while not text.finish:
                    await asyncio.sleep(self.pause_s)
                    part = text.write(self._part_tokens)
                    part.last = bool(text.finish) and sample is samples[-1]
                    response.part.CopyFrom(part)
                    response.check = generation_check(digest, response)
                    self.change(response, self.num_parts)
                    if self.is_dead:
                        return
                    self.num_parts += 1
                    if self.is_dead:
                        self._dead.set()
                    self.delivered.append((part.sample, part.first))
                    async with writing:
                        with contextlib.suppress(Exception):  # the stream may have ended
                            await context.write(response)
            finally:
                self._generator.pool.give_back(text.continuation.pages)

    @property
    def num_free_pages(self) -> int:
        return self._generator.pool.num_free


@dataclass
class _Text:
    service: TextService
    request: teacher_pb2.GenerateRequest
    sample: teacher_pb2.Sample
    finish: Any = 0
    continuation: Continuation = field(init=False)

    def __post_init__(self) -> None:
        request, engine = self.request, self.service._engine
        ids, received = (
            torch.frombuffer(bytearray(data), dtype=torch.int32).long() if data else torch.empty(0)
            for data in (request.prompt_ids, self.sample.received_ids)
        )
        draw = request.draw
        rule = DrawRule(
            draw.temperature,
            draw.top_k,
            draw.top_p,
            request.seed,
            request.epoch,
            self.sample.number,
        )
        spec = None
        if request.targets.WhichOneof("kind"):
            spec = engine.model.complete(read_targets(request.targets))
        temperature = request.target_temperature or draw.temperature or 1.0
        self.continuation = Continuation(ids, rule, spec, temperature, [int(x) for x in received])
        most = len(ids) + request.max_new_tokens
        pages = self.service._generator.pool.take(pages_for(most))
        assert pages is not None
        self.continuation.pages = pages
        own = () if request.ignore_teacher_stop_ids else engine.model.stop_ids
        self.stops = StopRule({*request.stop_ids, *own}, (), request.max_new_tokens, None)

    def write(self, count: int) -> teacher_pb2.GeneratedPart:
        """Writes up to `count` more tokens."""
        generator, text = self.service._generator, self.continuation
        rows: list[Any] = []
        first = text.num_tokens
        while count and not self.finish:
            if text.is_ready:
                (token,), row, _ = generator.result_of_step(generator.launch_step([text]))
                text.new_ids.append(token)
                rows += row
                said = self.stops.check(text)
                self.finish = {"": 0, "stop": 1, "length": 2}[said]
                count -= 1
            else:
                chunk = [(text, generator.next_chunk(text))]
                generator.result_of_chunks(generator.launch_chunks(chunk))
        payload = b""
        if text.spec is not None:
            pieces = tuple(piece for row in rows for piece in row.pieces)
            targets = type(rows[0])(pieces).compact()
            ((_, _, payload),) = encode_parts(targets, text.spec, max_nbytes=1 << 20)
        new = torch.tensor(text.new_ids[first - len(text.prompt_ids) :], dtype=torch.int32)
        return teacher_pb2.GeneratedPart(
            sample=self.sample.number,
            first=first,
            token_ids=new.numpy().tobytes(),
            payload=payload,
            finish=teacher_pb2.Finish.Name(self.finish),
            teacher_fingerprint=self.service._engine.model.teacher_fingerprint,
        )
