"""One job's way through the pipeline, and what is left when it is given up at each stage."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from contextlib import closing
from typing import Any

import pytest
import torch

from logit_codec import TopKSpec, decode
from teacher_server.engine.batch import RowRequest
from teacher_server.engine.engine import Engine, Launched
from teacher_server.engine.loading import prepare
from teacher_server.engine.model import TeacherModel
from teacher_server.errors import RequestRefused
from teacher_server.ledger.accounts import open_accounts
from teacher_server.monitoring.metrics import Metrics
from teacher_server.pipeline import Pipeline
from teacher_server.scheduling.job import SequenceJob
from teacher_server.scheduling.scheduler import Scheduler
from tests.support import tiny
from tests.support.fleet import wait_until

VOCAB = 1001
BROKEN = 666
"""A sequence with this token fails its forward pass."""


class HeldEngine(Engine):
    """An engine whose launches wait until they are let go."""

    def __init__(self, model: TeacherModel) -> None:
        super().__init__(model)
        self.begun, self.go = threading.Event(), threading.Event()
        self.go.set()

    def launch(self, requests: Sequence[RowRequest]) -> Launched:
        self.begun.set()
        self.go.wait(60)
        if any((request.token_ids == BROKEN).any() for request in requests):
            raise ValueError("broken for the test")
        return super().launch(requests)

    async def hold(self, pipeline: Pipeline) -> "asyncio.Task[list[int]]":
        """The launcher has a job in hand until `go` is set."""
        self.go.clear()
        self.begun.clear()
        first = asyncio.create_task(rows(pipeline, make_job()))
        await asyncio.to_thread(self.begun.wait, 60)
        return first


@pytest.fixture(scope="module")
def model() -> TeacherModel:
    return prepare(tiny.make_model("Gemma2", VOCAB))


def make_job(*ids: int) -> SequenceJob:
    token_ids = torch.tensor(ids or range(20))
    rows = torch.arange(len(token_ids) - 1)
    request = RowRequest(token_ids, rows, TopKSpec(k=4))
    return SequenceJob(request, len(token_ids), 1000, held=0)


async def rows(pipeline: Pipeline, job: SequenceJob) -> list[int]:
    """The number of rows of each part of an answer."""
    with closing(pipeline.score(job)) as parts:
        return [decode(part.payload).num_rows async for part in parts]


Test = Callable[[Pipeline, HeldEngine], Coroutine[Any, Any, None]]


def run(model: TeacherModel, test: Test) -> None:
    """Runs a test with a pipeline; afterwards nothing is queued or waits to be encoded."""

    async def closed() -> None:
        engine = HeldEngine(model)
        pipeline = Pipeline(
            Scheduler(
                max_batch_tokens=4096, max_batch_reply_nbytes=1 << 20, max_queued_tokens=4096
            ),
            engine,
            accounts=open_accounts(None),
            metrics=Metrics(),
            max_unencoded_nbytes=1 << 20,
            max_payload_nbytes=1 << 20,
        )
        pipeline.start()
        try:
            async with asyncio.timeout(120):
                await test(pipeline, engine)
        finally:
            engine.go.set()
            await pipeline.close(60)
        assert pipeline.queued_tokens == 0
        assert pipeline._backlog.nbytes == 0

    asyncio.run(closed())


def test_a_job_is_scored_and_encoded(model: TeacherModel) -> None:
    async def test(pipeline: Pipeline, engine: HeldEngine) -> None:
        job = make_job()
        assert await rows(pipeline, job) == [19]
        assert job.forward_pass is not None
        assert (job.forward_pass.num_sequences, job.forward_pass.num_tokens) == (1, 20)

    run(model, test)


def test_a_job_that_is_cancelled_in_the_queue_leaves_it(model: TeacherModel) -> None:
    async def test(pipeline: Pipeline, engine: HeldEngine) -> None:
        first = await engine.hold(pipeline)
        waiting = asyncio.create_task(rows(pipeline, make_job()))
        await asyncio.sleep(0)
        assert pipeline.queued_tokens == 20
        waiting.cancel()
        await asyncio.wait({waiting})
        assert pipeline.queued_tokens == 0
        engine.go.set()
        assert await first == [19]

    run(model, test)


def test_a_job_that_is_cancelled_while_it_is_computed_is_not_encoded(model: TeacherModel) -> None:
    async def test(pipeline: Pipeline, engine: HeldEngine) -> None:
        first = await engine.hold(pipeline)
        first.cancel()
        await asyncio.wait({first})
        engine.go.set()
        assert await rows(pipeline, make_job()) == [19]  # in a later pass
        assert pipeline._backlog.nbytes == 0

    run(model, test)


def test_a_pass_that_fails_fails_only_the_job_at_fault(model: TeacherModel) -> None:
    async def test(pipeline: Pipeline, engine: HeldEngine) -> None:
        first = await engine.hold(pipeline)
        jobs = [make_job(1, 2, 3), make_job(1, BROKEN, 3), make_job(4, 5), make_job(6, 7)]
        answers = [asyncio.create_task(rows(pipeline, job)) for job in jobs]
        await asyncio.sleep(0)
        engine.go.set()
        results = await asyncio.gather(first, *answers, return_exceptions=True)
        assert isinstance(results.pop(2), ValueError)
        assert results == [[19], [2], [1], [1]]

    run(model, test)


def test_closing_fails_the_jobs_that_wait(model: TeacherModel) -> None:
    async def test(pipeline: Pipeline, engine: HeldEngine) -> None:
        first = await engine.hold(pipeline)
        waiting = asyncio.create_task(rows(pipeline, make_job()))
        await asyncio.sleep(0)
        closing_task = asyncio.create_task(pipeline.close(60))
        with pytest.raises(RuntimeError, match="stopped"):
            await waiting
        engine.go.set()
        await closing_task
        first.cancel()
        await asyncio.wait({first})

    run(model, test)


def test_a_pass_is_stuck_only_once_it_takes_far_longer_than_any_before(model: TeacherModel) -> None:
    async def test(pipeline: Pipeline, engine: HeldEngine) -> None:
        assert pipeline.busy_s == 0.0
        assert not pipeline.find_trouble(0.0)
        first = await engine.hold(pipeline)
        await asyncio.sleep(0.01)
        assert pipeline.busy_s >= 0.01
        assert "stuck" in pipeline.find_trouble(0.0)
        assert not pipeline.find_trouble(60.0)
        engine.go.set()
        await first

    run(model, test)


def test_work_that_nobody_takes_is_noticed(model: TeacherModel) -> None:
    async def test(pipeline: Pipeline, engine: HeldEngine) -> None:
        first = await engine.hold(pipeline)
        compute = pipeline._compute
        waiting = asyncio.create_task(rows(pipeline, make_job()))
        await asyncio.sleep(0)
        begun, compute._begun_s = compute._begun_s, {}  # as if the launcher slept
        assert not pipeline.find_trouble(0.0), "it was seen for the first time"
        await asyncio.sleep(0.01)
        assert "not been taken" in pipeline.find_trouble(0.0)
        compute._begun_s = begun
        engine.go.set()
        assert await first == await waiting == [19]

    run(model, test)


def test_a_known_answer_that_does_not_come_out_after_three_failures_is_the_end(
    model: TeacherModel,
) -> None:
    async def test(pipeline: Pipeline, engine: HeldEngine) -> None:
        results = []
        for _ in range(3):
            with pytest.raises(ValueError, match="broken"):
                await rows(pipeline, make_job(1, BROKEN, 3))
            results.append(pipeline.find_trouble(60.0))
        assert results == ["", "", ""], "a known answer still comes out"
        pipeline._compute._repeats_known_answer = lambda: False
        for _ in range(2):
            with pytest.raises(ValueError, match="broken"):
                await rows(pipeline, make_job(1, BROKEN, 3))
        assert await rows(pipeline, make_job()) == [19]  # one that works in between counts anew
        for _ in range(3):
            assert pipeline.find_trouble(60.0) == ""
            with pytest.raises(ValueError, match="broken"):
                await rows(pipeline, make_job(1, BROKEN, 3))
        await asyncio.to_thread(wait_until, lambda: pipeline.find_trouble(60.0), "it gives up")
        with pytest.raises(RequestRefused, match="another"):
            await rows(pipeline, make_job())

    run(model, test)
