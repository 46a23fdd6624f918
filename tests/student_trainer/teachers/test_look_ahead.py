"""The look-ahead in simulated time: the real streams over a teacher that answers late."""

import heapq
import itertools
import statistics
from collections.abc import Collection, Iterator
from concurrent.futures import Future

import pytest
import torch

from logit_codec import Targets, TopKTargets, parse_targets
from protos import teacher_pb2
from student_trainer import InvalidRequest
from student_trainer.teachers.look_ahead import (
    MAX_UNMEASURED,
    AdaptiveLookAhead,
    Clock,
    make_look_ahead,
)
from student_trainer.teachers.request import Answer, Piece, ScoreOptions
from student_trainer.teachers.stream import TargetStream, stream_loader

K = 4
OPTIONS = ScoreOptions.of(f"top_k:{K}", 1.0, 0, 0)
VOCAB = 100
ROW_NBYTES = 12 * K + 8 + 8
"""Of a decoded row, but for the last element of row_splits."""


class Teacher(Clock):
    """Answers after `latency_s`, one token per `token_s`; time passes only while somebody waits."""

    def __init__(self, latency_s: float, token_s: float = 0.0, entries: int = K) -> None:
        self.now_s = 0.0
        self.latency_s, self.token_s, self.entries = latency_s, token_s, entries
        self.free_s = 0.0
        """When it has scored everything that it was asked for."""
        self.due: list[tuple[float, int, Future[Answer], int]] = []
        self.futures: list[Future[Answer]] = []
        """Of every batch, in order."""
        self.unanswered_tokens = 0
        self.most_unanswered_tokens = 0

    def now(self) -> float:
        return self.now_s

    def submit(self, piece: Piece, options: ScoreOptions) -> Future[Answer]:
        ids = piece.token_ids
        future: Future[Answer] = Future()
        self.free_s = max(self.free_s, self.now_s) + self.token_s * len(ids)
        heapq.heappush(
            self.due, (self.free_s + self.latency_s, len(self.futures), future, len(ids))
        )
        self.futures.append(future)
        self.unanswered_tokens += len(ids)
        self.most_unanswered_tokens = max(self.most_unanswered_tokens, self.unanswered_tokens)
        return future

    def advance(self, until_s: float) -> None:
        """Answers what is due by then."""
        while self.due and self.due[0][0] <= until_s:
            self.now_s, _, future, num_tokens = heapq.heappop(self.due)
            self.unanswered_tokens -= num_tokens
            if future.set_running_or_notify_cancel():
                future.set_result(Answer(targets_of(num_tokens - 1, self.entries)))
        self.now_s = max(self.now_s, until_s)

    def wait(self, futures: Collection[Future[Answer]], timeout_s: float | None) -> bool:
        until_s = float("inf") if timeout_s is None else self.now_s + timeout_s
        while not all(future.done() for future in futures):
            assert self.due or until_s < float("inf"), "waited for ever"
            if not self.due or self.due[0][0] > until_s:
                self.advance(until_s)
                return False
            self.advance(self.due[0][0])
        return True


def targets_of(num_rows: int, entries: int = K) -> Targets:
    return TopKTargets(
        vocab_size=VOCAB,
        temperature=1.0,
        realized_logprob=torch.zeros(num_rows),
        row_splits=torch.arange(num_rows + 1) * entries,
        token_ids=torch.arange(entries).repeat(num_rows),
        logprobs=torch.zeros(num_rows * entries),
        tail_logprob=torch.zeros(num_rows),
    )


def batches(*num_tokens: int) -> Iterator[dict[str, torch.Tensor]]:
    """Without end, of one sequence each, of these lengths in turn."""
    return (
        {"input_ids": torch.zeros(1, n, dtype=torch.int64)} for n in itertools.cycle(num_tokens)
    )


def look_ahead_of(teacher: Teacher, seconds: float = 30.0, **limits) -> AdaptiveLookAhead:
    return AdaptiveLookAhead(
        seconds, max_row_nbytes=OPTIONS.spec.max_decoded_row_nbytes(VOCAB), clock=teacher, **limits
    )


def waits(teacher: Teacher, stream: TargetStream, step_s: float, steps: int) -> list[float]:
    """How long each step of a trainer waits whose steps take `step_s` seconds."""
    found = []
    for _ in range(steps):
        asked_s = teacher.now_s
        next(stream)
        found.append(teacher.now_s - asked_s)
        teacher.advance(teacher.now_s + step_s)
    return found


@pytest.mark.parametrize("latency_s", [0.02, 0.2, 2.0])
@pytest.mark.parametrize("steps_per_round_trip", [1, 4, 40])
def test_a_long_way_to_the_teacher_costs_three_round_trips_and_nothing_after(
    latency_s, steps_per_round_trip
):
    teacher = Teacher(latency_s)
    step_s = latency_s / steps_per_round_trip
    stream = stream_loader(teacher.submit, batches(32), OPTIONS, look_ahead_of(teacher))
    found = waits(teacher, stream, step_s, 10 * steps_per_round_trip)
    assert found[0] == pytest.approx(latency_s)
    assert sum(found[1:]) <= 2 * latency_s + 0.02
    assert sum(found[4 * steps_per_round_trip :]) == 0


def test_the_first_answer_is_waited_for_with_more_and_more_asked_for():
    teacher = Teacher(2.0)
    stream = stream_loader(teacher.submit, batches(32), OPTIONS, look_ahead_of(teacher))
    found = waits(teacher, stream, step_s=0.05, steps=400)
    assert sum(found) == pytest.approx(2.0)  # the first answer, and no other
    teacher = Teacher(1000.0)
    stream = stream_loader(teacher.submit, batches(32), OPTIONS, look_ahead_of(teacher))
    next(stream)
    assert teacher.most_unanswered_tokens == MAX_UNMEASURED * 32


def test_an_outage_shorter_than_the_look_ahead_is_not_noticed():
    teacher = Teacher(0.1)
    stream = stream_loader(teacher.submit, batches(32), OPTIONS, look_ahead_of(teacher))
    waits(teacher, stream, step_s=0.2, steps=300)
    assert stream.in_flight == pytest.approx(30 / 0.2, abs=2)
    teacher.free_s = teacher.now_s + 28  # nothing is answered until then
    assert max(waits(teacher, stream, step_s=0.2, steps=300)) == 0


def test_a_teacher_that_is_slower_than_the_trainer_gets_seconds_of_work_and_no_more():
    teacher = Teacher(0.0, token_s=1.0 / 32)  # one batch a second
    stream = stream_loader(
        teacher.submit, batches(32), OPTIONS, look_ahead_of(teacher, seconds=10.0)
    )
    found = waits(teacher, stream, step_s=0.01, steps=200)
    assert statistics.mean(found[100:]) == pytest.approx(0.99)
    assert stream.in_flight == pytest.approx(10, abs=1)


def test_less_seconds_than_a_round_trip_takes_do_not_starve_the_trainer():
    teacher = Teacher(2.0)
    stream = stream_loader(
        teacher.submit, batches(32), OPTIONS, look_ahead_of(teacher, seconds=0.5)
    )
    assert sum(waits(teacher, stream, step_s=0.1, steps=400)[100:]) == 0


def test_a_trainer_that_takes_several_at_once_gets_them():
    """As one that accumulates gradients, or a prefetch that fills its queue."""
    teacher = Teacher(0.5)
    stream = stream_loader(
        teacher.submit, batches(32), OPTIONS, look_ahead_of(teacher, seconds=10.0)
    )
    found: list[float] = []
    in_flight = []
    for _ in range(60):
        found += waits(teacher, stream, step_s=0.0, steps=8)
        in_flight.append(stream.in_flight)
        teacher.advance(teacher.now_s + 1.0)
    assert sum(found[8:]) == 0
    assert max(in_flight) < 2.5 * 80
    assert min(in_flight[-20:]) > 80 / 2.5


def test_the_trainers_pace_is_followed():
    teacher = Teacher(0.1)
    stream = stream_loader(teacher.submit, batches(32), OPTIONS, look_ahead_of(teacher))
    waits(teacher, stream, step_s=0.1, steps=500)
    assert stream.in_flight == pytest.approx(300, abs=5)
    waits(teacher, stream, step_s=1.0, steps=400)
    assert stream.in_flight == pytest.approx(30, abs=2)
    waits(teacher, stream, step_s=0.1, steps=500)
    assert stream.in_flight == pytest.approx(300, abs=5)


@pytest.mark.parametrize("latency_s", [0.0, 0.3])
@pytest.mark.parametrize("lengths", [(32,), (2, 2000), (*[2] * 40, *[2000] * 40), (500, 3, 70)])
def test_targets_held_never_exceed_the_bytes(lengths, latency_s):
    teacher = Teacher(latency_s, token_s=1e-6)
    limit = 10 * 2000 * ROW_NBYTES
    look_ahead = look_ahead_of(teacher, max_nbytes=limit)
    stream = stream_loader(teacher.submit, batches(*lengths), OPTIONS, look_ahead)
    held = []
    for handed_out in range(1, 600):
        waits(teacher, stream, step_s=0.01, steps=1)
        ready = [future for future in teacher.futures[handed_out:] if future.done()]
        held.append(sum(future.result().nbytes for future in ready))
        assert held[-1] <= min(look_ahead.nbytes, limit)
    if max(lengths) == 2000:
        assert max(held) > 0.3 * limit


def test_a_batch_larger_than_the_bytes_is_asked_for_alone():
    teacher = Teacher(0.1)
    look_ahead = look_ahead_of(teacher, max_nbytes=100 * ROW_NBYTES)
    stream = stream_loader(teacher.submit, batches(500), OPTIONS, look_ahead)
    waits(teacher, stream, step_s=0.01, steps=20)
    assert teacher.most_unanswered_tokens == 500
    assert stream.in_flight <= 1


def test_answers_that_are_smaller_than_they_could_be_make_room_for_more():
    teacher = Teacher(0.5, entries=1)  # of K
    limit = 10_000 * ROW_NBYTES
    stream = stream_loader(
        teacher.submit, batches(1001), OPTIONS, look_ahead_of(teacher, max_nbytes=limit)
    )
    next(stream)
    assert stream.in_flight <= 9
    waits(teacher, stream, step_s=0.01, steps=100)
    assert stream.in_flight > 15


def test_no_more_tokens_are_unanswered_than_the_teacher_queues():
    teacher = Teacher(1.0)
    stream = stream_loader(
        teacher.submit, batches(10, 300), OPTIONS, look_ahead_of(teacher, max_tokens=1000)
    )
    waits(teacher, stream, step_s=0.01, steps=300)
    assert 600 < teacher.most_unanswered_tokens <= 1000
    assert stream.in_flight > 0


def test_a_stream_that_is_closed_gives_up_what_is_in_flight():
    teacher = Teacher(1.0)
    look_ahead = look_ahead_of(teacher)
    stream = stream_loader(teacher.submit, batches(32), OPTIONS, look_ahead)
    waits(teacher, stream, step_s=0.1, steps=3)
    unanswered = [future for future in teacher.futures if not future.done()]
    stream.close()
    assert unanswered
    assert all(future.cancelled() for future in unanswered)
    assert teacher.futures[-1] in unanswered


@pytest.mark.parametrize("ahead", ["30", "0s", "s", "1.2.3s", "-1s", "30s,", "30s,0MiB", "3 MiB"])
def test_an_ahead_that_means_nothing_is_refused(ahead):
    with pytest.raises(InvalidRequest, match="30s,2048MiB"):
        make_look_ahead(ahead, OPTIONS.spec, teacher_pb2.TeacherInfo(vocab_size=VOCAB))


def test_ahead_may_name_seconds_and_mebibytes():
    info = teacher_pb2.TeacherInfo(vocab_size=VOCAB)
    for ahead, nbytes in (("2s", 512 << 20), ("2.5 s, 1 MiB", 1 << 20), ("30s,2048MiB", 2 << 30)):
        look_ahead = make_look_ahead(ahead, OPTIONS.spec, info)
        rows = nbytes // (ROW_NBYTES + 8)
        assert look_ahead.has_room(1, int(0.9 * rows))
        assert not look_ahead.has_room(1, int(1.1 * rows))


def test_half_of_the_queues_of_all_replicas_may_be_asked_for():
    info = teacher_pb2.TeacherInfo(
        vocab_size=VOCAB, limits=teacher_pb2.Limits(max_queued_tokens=1000)
    )
    info.replicas.add()
    info.replicas.add()
    look_ahead = make_look_ahead("30s", OPTIONS.spec, info)
    assert look_ahead.has_room(1000, 1)
    assert not look_ahead.has_room(1001, 1)


@pytest.mark.parametrize(
    "spec", ["top_k:4", "top_k:64,log_z=0", "sampled:8", "sampled:8,entropy=1", "dense:f32"]
)
def test_no_decoded_row_is_larger_than_its_bound(spec):
    from logit_codec import decode, encode, select

    wanted = parse_targets(spec)
    logits = torch.zeros(1, VOCAB)
    targets = select(
        logits, wanted, uniforms=torch.full((1,), 0.5).double(), realized_ids=torch.zeros(1).long()
    )
    decoded = decode(encode(targets))
    bound = wanted.max_decoded_row_nbytes(VOCAB)
    assert 0.5 * bound < decoded.nbytes <= bound
