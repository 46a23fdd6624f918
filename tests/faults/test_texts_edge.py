"""Clients of texts that do not read, give up, ask for too much, or may not ask at all."""

import asyncio
import time
from collections import Counter
from typing import Any

import grpc
import numpy as np

from protos import teacher_pb2, teacher_pb2_grpc
from tests.support.fleet import Fleet, wait_until

DENSE = teacher_pb2.TargetSpec(dense=teacher_pb2.Dense(bits=32))
PROMPT = np.array([5, 9, 33, 7, 50], dtype="<i4").tobytes()
PROMPT_TOKENS = 5
WIDE, NARROW = 32_003, 101
"""Sizes of vocabularies: a row of dense targets of the first has 128 KB."""
GROWTH_NBYTES = 160 << 20
WRITTEN = 'teacher_written_tokens_total{team="default"}'


def make_request(number: int, **fields: Any) -> teacher_pb2.GenerateRequest:
    return teacher_pb2.GenerateRequest(
        **{
            "request_id": number,
            "prompt_ids": PROMPT,
            "max_new_tokens": 20,
            "ignore_teacher_stop_ids": True,
            **fields,
        }
    )


def make_cancel(number: int) -> teacher_pb2.GenerateRequest:
    return teacher_pb2.GenerateRequest(request_id=number, cancel=True)


def number_samples(count: int) -> list[dict[str, int]]:
    return [{"number": number} for number in range(count)]


def end_of(response: teacher_pb2.GenerateResponse) -> str:
    """What this message ends its request with; empty: it does not."""
    if response.HasField("error"):
        return response.error.reason
    return "last" if response.part.last else ""


class Reader:
    """A stream of which nothing is read until it is asked for."""

    def __init__(self, address: str) -> None:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]
        self._channel = grpc.aio.insecure_channel(address, options=options)
        self.call = teacher_pb2_grpc.TeacherStub(self._channel).Generate()

    async def read_all(self) -> Counter[tuple[int, str]]:
        """Reads to the end; returns how often each request ended, and how."""
        ends: Counter[tuple[int, str]] = Counter()
        await self.call.done_writing()
        while (response := await self.call.read()) is not grpc.aio.EOF:
            if end := end_of(response):
                ends[response.request_id, end] += 1
        return ends

    async def close(self) -> None:
        self.call.cancel()
        await self._channel.close()


def wait_paused(fleet: Fleet, least: float) -> float:
    """Until texts have been written and none goes on; returns how many tokens they have."""
    found = [0.0, -1.0]

    def is_paused() -> bool:
        time.sleep(0.5)
        found.append(fleet.gauges(0).get(WRITTEN, 0.0))
        return found[-1] == found[-2] > least

    wait_until(is_paused, "the texts pause", 60.0)
    return found[-1]


def assert_no_text_left(fleet: Fleet) -> None:
    fleet.assert_nothing_left(15.0)
    wait_until(lambda: fleet.gauge(0, "teacher_texts_running") == 0, "texts run", 10.0)
    found = fleet.gauges(0)
    assert found["teacher_texts_waiting"] == 0
    assert found["teacher_free_key_pages"] == found["teacher_key_pages"] > 0


async def give_up(address: str) -> tuple[list[str], int, list[str]]:
    """Cancels requests whose samples fill the budget and wait for it; returns how all of them ended,
    samples that ended after that, and how a request ended that was sent later."""
    reader = Reader(address)
    call, ends, finished = reader.call, {}, 0
    await call.write(
        make_request(1, targets=DENSE, max_new_tokens=240, samples=number_samples(200))
    )
    for number in range(2, 8):
        await call.write(make_request(number, targets=DENSE, max_new_tokens=240))
    await call.read()
    for number in (7, 1, *range(2, 7)):
        await call.write(make_cancel(number))
    while len(ends) < 7:
        response = await call.read()
        finished += bool(response.part.finish)
        if end := end_of(response):
            assert response.request_id not in ends
            ends[response.request_id] = end
    await call.write(make_request(1, max_new_tokens=2))
    later = [end_of(await call.read())]
    await reader.close()
    return [ends[number] for number in range(1, 8)], finished, later


def test_a_client_is_heard_while_its_texts_use_up_the_budget(serve, model_folder):
    flags = ("--admission.max-stream-mib", "1")
    with Fleet(serve, model_folder("Llama", NARROW), 1, flags=flags) as fleet:
        ends, finished, later = asyncio.run(give_up(fleet.own[0]))
        assert ends == ["CANCELLED"] * 7
        # Some 17 texts fit; a stream that heard nothing before all 200 had started would end 180.
        assert finished < 60
        assert later == ["last"]
        assert_no_text_left(fleet)


def test_a_reader_that_stops_pauses_its_texts_and_each_request_ends_once(serve, model_folder):
    flags = ("--admission.max-stream-mib", "64")
    with Fleet(serve, model_folder("Llama", WIDE), 1, flags=flags) as fleet:

        async def stop_reading() -> Counter[tuple[int, str]]:
            warm = Reader(fleet.own[0])
            await warm.call.write(make_request(1, targets=DENSE, samples=number_samples(8)))
            assert await warm.read_all() == {(1, "last"): 1}
            await warm.close()
            before_nbytes, before = fleet.rss_nbytes(0), fleet.gauge(0, WRITTEN)
            reader = Reader(fleet.own[0])
            await reader.call.write(
                make_request(1, targets=DENSE, max_new_tokens=100, samples=number_samples(8))
            )
            paused = await asyncio.to_thread(wait_paused, fleet, before)
            assert paused - before < 8 * 100, "it has written what nobody reads"
            assert fleet.rss_nbytes(0) - before_nbytes < GROWTH_NBYTES
            assert fleet.gauge(0, "teacher_answer_bytes") < 64 << 20
            # The only token of this one is its last; it waits to be read when it is given up.
            await reader.call.write(make_request(2, max_new_tokens=1))
            await asyncio.to_thread(wait_until, lambda: fleet.gauge(0, WRITTEN) > paused, "written")
            await asyncio.sleep(0.5)
            await reader.call.write(make_cancel(2))
            await asyncio.sleep(0.5)
            ends = await reader.read_all()
            await reader.close()
            return ends

        assert asyncio.run(stop_reading()) == {(1, "last"): 1, (2, "last"): 1}
        assert_no_text_left(fleet)
