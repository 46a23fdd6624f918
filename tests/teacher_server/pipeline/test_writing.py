"""Texts through the pipeline: the engine's tokens, alone and in any company, and what is left of them."""

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Coroutine, Sequence
from contextlib import closing
from typing import Any

import pytest
import torch

from logit_codec import SampledSpec, TargetSpec, TopKSpec, decode, decode_parts, encode_parts
from teacher_server.engine.batch import RowRequest
from teacher_server.engine.continuation import Continuation, DrawRule
from teacher_server.engine.engine import Engine
from teacher_server.engine.generate import Generator, LaunchedChunks, LaunchedStep
from teacher_server.engine.head import ScoredRows
from teacher_server.engine.key_pool import PAGE_TOKENS, pages_for
from teacher_server.engine.loading import prepare
from teacher_server.engine.model import TeacherModel
from teacher_server.engine.stops import StopRule
from teacher_server.errors import RequestRefused
from teacher_server.ledger.accounts import open_accounts
from teacher_server.monitoring.metrics import Metrics
from teacher_server.pipeline import GenerationJob, Pipeline, SequenceJob
from teacher_server.scheduling.cost import CostModel
from teacher_server.scheduling.generation_job import SampleGroup
from teacher_server.scheduling.scheduler import Scheduler
from teacher_server.teams.declaration import Team
from tests.support import tiny
from tests.support.fleet import wait_until

VOCAB = 501
SPEC = TopKSpec(k=4)


@pytest.fixture(scope="module")
def model() -> TeacherModel:
    return prepare(tiny.make_model("Llama", VOCAB))


class FailingGenerator:
    """Planted: a generator whose launches fail while a text that is at fault is in them."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self.at_fault: Callable[[Continuation], bool] = lambda text: False
        self.error: Callable[[], Exception] = lambda: ValueError("broken for the test")
        self.failures = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)

    def _look(self, texts: Sequence[Continuation]) -> None:
        if any(map(self.at_fault, texts)):
            self.failures += 1
            raise self.error()

    def launch_step(self, texts: Sequence[Continuation]) -> LaunchedStep:
        self._look(texts)
        return self._generator.launch_step(texts)

    def launch_chunks(self, chunks: Sequence[tuple[Continuation, int]]) -> LaunchedChunks:
        self._look([text for text, _ in chunks])
        return self._generator.launch_chunks(chunks)


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


def make_job(
    token_ids: torch.Tensor,
    count: int,
    *,
    sample: int = 0,
    spec: TargetSpec | None = SPEC,
    team: str = "default",
    group: SampleGroup | None = None,
    received: Sequence[int] = (),
    stop_ids: Sequence[int] = (),
) -> GenerationJob:
    text = Continuation(token_ids, DrawRule(seed=7, sample=sample), spec, new_ids=list(received))
    return GenerationJob(
        text,
        StopRule(stop_ids, (), count, None),
        count,
        row_nbytes=100,
        team=Team(team),
        group=group or SampleGroup(),
    )


def alone(model: TeacherModel, job: GenerationJob) -> tuple[list[int], list[bytes]]:
    """What the engine writes without a pipeline: ids, and a container for each token."""
    generator = Engine(model).open_generation(16 << 20)
    text = Continuation(job.text.prompt_ids, job.text.rule, job.text.spec)
    text.pages = generator.pool.take(pages_for(job.num_tokens)) or []
    rows = []
    while not job.stop_rule.check(text):
        while count := generator.next_chunk(text):
            generator.result_of_chunks(generator.launch_chunks([(text, count)]))
        ids, kept, _ = generator.result_of_step(generator.launch_step([text]))
        text.new_ids += ids
        rows += kept
    spec = text.spec
    if spec is None:
        return text.new_ids, []
    pieces = [piece for row in rows if row is not None for piece in row.pieces]
    parts = encode_parts(ScoredRows(tuple(pieces)).compact(), spec, max_nbytes=1 << 20)
    return text.new_ids, [payload for _, _, payload in parts]


async def read(
    pipeline: Pipeline, job: GenerationJob, pause_s: float = 0.0
) -> tuple[list[int], list[bytes], str]:
    """All of a text: ids, the containers, how it ended. Places are checked as the parts come."""
    ids: list[int] = []
    payloads: list[bytes] = []
    finish = ""
    place = job.text.num_tokens
    with closing(pipeline.generate(job)) as parts:
        async for part in parts:
            assert part.first == place + len(ids)
            ids += part.token_ids
            if job.text.spec is not None and part.token_ids:  # none if it had all of them before
                payloads.append(part.payload)
                assert decode(part.payload).num_rows == len(part.token_ids)
            finish = part.finish
            if pause_s:
                await asyncio.sleep(pause_s)
            parts.mark_read()
    return ids, payloads, finish


Test = Callable[[Pipeline, FailingGenerator], Coroutine[Any, Any, None]]


def run(model: TeacherModel, test: Test, *, pages: int = 400, max_running: int = 64) -> Metrics:
    """Runs a test with a pipeline; afterwards no page is in use."""
    metrics = Metrics()

    async def closed() -> None:
        engine = Engine(model)
        size = engine.open_generation(1 << 24).pool.token_nbytes * PAGE_TOKENS
        generator = FailingGenerator(engine.open_generation(pages * size))
        assert generator.pool.num_pages == pages
        pipeline = Pipeline(
            Scheduler(
                max_batch_tokens=1024, max_batch_reply_nbytes=1 << 20, max_queued_tokens=1 << 20
            ),
            engine,
            accounts=open_accounts(None),
            metrics=metrics,
            max_unencoded_nbytes=1 << 20,
            max_payload_nbytes=1 << 20,
            generator=generator,  # type: ignore[arg-type]
            costs=CostModel.of(model.causal_lm),
            max_running=max_running,
        )
        pipeline.start()
        try:
            async with asyncio.timeout(120):
                await test(pipeline, generator)
        finally:
            await pipeline.close(60)
        assert generator.pool.num_free == pages
        assert pipeline.num_texts == (0, 0)

    asyncio.run(closed())
    return metrics


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.mark.parametrize("spec", [SPEC, SampledSpec(), None])
def test_texts_are_those_of_the_engine_whoever_is_beside_them(
    model: TeacherModel, spec: TargetSpec | None
) -> None:
    jobs = [make_job(prompt(length, length), 40, spec=spec) for length in (1, 5, 64, 65, 600)]
    wanted = [alone(model, job) for job in jobs]

    async def test(pipeline: Pipeline, generator: FailingGenerator) -> None:
        async def score(number: int) -> None:
            ids = prompt(50 + number, number)
            request = RowRequest(ids, torch.arange(len(ids) - 1), SPEC)
            job = SequenceJob(request, len(ids), 5000, team=Team("scores"))
            with closing(pipeline.score(job)) as parts:
                async for _ in parts:
                    pass

        async with asyncio.TaskGroup() as group:
            for number in range(30):
                group.create_task(score(number))
            tasks = [group.create_task(read(pipeline, job)) for job in jobs]
        for task, (ids, containers) in zip(tasks, wanted, strict=True):
            got, payloads, finish = task.result()
            assert got == ids
            assert finish == "length"
            if spec is not None:
                one, other = decode_parts(payloads), decode_parts(containers)
                for field in dataclasses.fields(one):
                    values = getattr(one, field.name)
                    if isinstance(values, torch.Tensor):
                        assert torch.equal(values, getattr(other, field.name)), field.name

    metrics = run(model, test)
    assert value(metrics, "teacher_written_tokens_total", team="default") == 200
    assert value(metrics, "teacher_first_token_seconds_count") == 5


def test_texts_that_do_not_fit_side_by_side_are_dropped_and_go_on_with_the_same_tokens(
    model: TeacherModel,
) -> None:
    jobs = [
        make_job(prompt(100, number), 300, team=f"team{number % 2}", spec=None)
        for number in range(4)
    ]
    wanted = [alone(model, job)[0] for job in jobs]

    async def test(pipeline: Pipeline, generator: FailingGenerator) -> None:
        got = await asyncio.gather(*(read(pipeline, job) for job in jobs))
        assert [ids for ids, _, _ in got] == wanted

    metrics = run(model, test, pages=15)
    assert value(metrics, "teacher_preemptions_total") > 0


def test_samples_of_a_prompt_compute_it_once(model: TeacherModel) -> None:
    shared = SampleGroup()
    jobs = [make_job(prompt(200), 6, sample=number, group=shared) for number in range(4)]
    wanted = [alone(model, job)[0] for job in jobs]
    assert len(set(map(tuple, wanted))) == 4

    async def test(pipeline: Pipeline, generator: FailingGenerator) -> None:
        got = await asyncio.gather(*(read(pipeline, job) for job in jobs))
        assert [ids for ids, _, _ in got] == wanted

    metrics = run(model, test)
    # The prompt's last token is computed with the first draw of each sample.
    assert value(metrics, "teacher_team_tokens_total", team="default") == 199 + 4 * 7


def test_a_text_goes_on_after_what_was_received(model: TeacherModel) -> None:
    whole = make_job(prompt(70), 20)
    wanted, _ = alone(model, whole)

    async def test(pipeline: Pipeline, generator: FailingGenerator) -> None:
        for received in (1, 12, 20):
            job = make_job(prompt(70), 20, received=wanted[:received])
            ids, _, finish = await read(pipeline, job)
            assert wanted[:received] + ids == wanted
            assert finish == "length"
        stop = wanted[9]
        job = make_job(prompt(70), 20, stop_ids=[stop])
        ids, _, finish = await read(pipeline, job)
        assert ids == wanted[: wanted.index(stop) + 1]
        assert finish == "stop"

    run(model, test)


def test_a_cancelled_text_leaves_nothing(model: TeacherModel) -> None:
    async def test(pipeline: Pipeline, generator: FailingGenerator) -> None:
        pool = generator.pool
        parts = [
            pipeline.generate(make_job(prompt(300, number), 5000, spec=None)) for number in range(6)
        ]
        await anext(parts[0])
        assert pool.num_free < pool.num_pages
        for one in parts:
            one.close()
        await asyncio.to_thread(
            wait_until, lambda: pool.num_free == pool.num_pages, "pages come back"
        )
        ids, _, _ = await read(pipeline, make_job(prompt(9), 3))
        assert len(ids) == 3

    run(model, test, max_running=4)


def test_a_text_whose_reader_is_behind_pauses_and_leaves_its_pages_to_others(
    model: TeacherModel,
) -> None:
    slow = make_job(prompt(30), 400, spec=None)
    wanted, _ = alone(model, slow)

    async def test(pipeline: Pipeline, generator: FailingGenerator) -> None:
        with closing(pipeline.generate(slow)) as parts:
            await asyncio.to_thread(wait_until, lambda: slow.unread == 2, "it pauses")
            written = len(slow.text.new_ids)
            await read(pipeline, make_job(prompt(9), 100))
            assert len(slow.text.new_ids) <= written + 1
            assert slow.state == "parked", "the other text needed the only slot"
            ids: list[int] = []
            async for part in parts:
                ids += part.token_ids
                parts.mark_read()
        assert ids == wanted

    run(model, test, max_running=1)


def test_a_text_that_fails_fails_alone(model: TeacherModel) -> None:
    good = [make_job(prompt(20, number), 8) for number in range(4)]
    wanted = [alone(model, job)[0] for job in good]
    bad = make_job(prompt(33), 8)

    async def test(pipeline: Pipeline, generator: FailingGenerator) -> None:
        generator.at_fault = lambda text: text is bad.text and len(text.new_ids) == 3
        got = await asyncio.gather(
            read(pipeline, bad), *(read(pipeline, job) for job in good), return_exceptions=True
        )
        assert isinstance(got[0], ValueError)
        assert [one[0] for one in got[1:] if isinstance(one, tuple)] == wanted
        assert generator.failures > 1, "it was halved"
        assert not pipeline.find_trouble(60)

    run(model, test)


def test_running_out_of_memory_is_retried_in_halves(model: TeacherModel) -> None:
    jobs = [make_job(prompt(20, number), 5) for number in range(5)]
    wanted = [alone(model, job)[0] for job in jobs]

    async def test(pipeline: Pipeline, generator: FailingGenerator) -> None:
        limit = generator._look

        def look(texts: Sequence[Continuation]) -> None:
            if len(texts) > 2:
                generator.failures += 1
                raise MemoryError
            limit(texts)

        generator._look = look  # type: ignore[method-assign]
        got = await asyncio.gather(*(read(pipeline, job) for job in jobs))
        assert [ids for ids, _, _ in got] == wanted
        assert generator.failures

    run(model, test)


def test_a_broken_device_refuses_all_texts(model: TeacherModel) -> None:
    async def test(pipeline: Pipeline, generator: FailingGenerator) -> None:
        generator.error = lambda: RuntimeError("CUDA error: an illegal memory access")
        generator.at_fault = lambda text: len(text.new_ids) == 2
        jobs = [make_job(prompt(20, number), 10) for number in range(3)]
        got = await asyncio.gather(*(read(pipeline, job) for job in jobs), return_exceptions=True)
        for one in got:
            assert isinstance(one, RequestRefused)
            assert one.reason == "STOPPED"
        assert "broken" in pipeline.find_trouble(60)
        with pytest.raises(RequestRefused):
            pipeline.generate(make_job(prompt(3), 3))

    run(model, test)


def test_closing_refuses_what_is_not_finished(model: TeacherModel) -> None:
    async def test(pipeline: Pipeline, generator: FailingGenerator) -> None:
        job = make_job(prompt(20), 20_000, spec=None)
        ids: list[int] = []
        with closing(pipeline.generate(job)) as parts:
            with contextlib.suppress(StopAsyncIteration):
                first = await anext(parts)
                ids += first.token_ids
                parts.mark_read()
            await pipeline.close(60)
            with pytest.raises(RequestRefused, match="another one"):
                ids += [token_id async for part in parts for token_id in part.token_ids]
        assert ids == job.text.new_ids[: len(ids)]
        assert ids

    run(model, test)
