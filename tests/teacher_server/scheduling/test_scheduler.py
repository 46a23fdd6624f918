import random
import threading
import time
from collections import Counter

import grpc
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from logit_codec import TopKSpec
from teacher_server.engine.batch import RowRequest
from teacher_server.errors import RequestRefused
from teacher_server.scheduling.job import BULK, INTERACTIVE, NUM_LEVELS, TRAINING, SequenceJob
from teacher_server.scheduling.scheduler import Scheduler
from teacher_server.teams.declaration import Team

NOTHING = torch.empty(0, dtype=torch.int64)


def make_job(num_tokens: int = 32, *, level: int = TRAINING, reply_nbytes: int = 0) -> SequenceJob:
    wanted = RowRequest(NOTHING, NOTHING, TopKSpec(k=1))
    return SequenceJob(wanted, num_tokens, reply_nbytes, level)


def make_scheduler(
    *, batch: int = 1 << 20, reply: int = 1 << 30, queued: int = 1 << 30
) -> Scheduler:
    return Scheduler(max_batch_tokens=batch, max_batch_reply_nbytes=reply, max_queued_tokens=queued)


def submit(scheduler: Scheduler, *jobs: SequenceJob) -> list[SequenceJob]:
    for job in jobs:
        scheduler.submit(job)
    return list(jobs)


def test_a_batch_is_filled_up_to_the_token_budget() -> None:
    scheduler = make_scheduler(batch=128)
    jobs = submit(scheduler, *(make_job() for _ in range(10)))
    assert scheduler.next_batch() == jobs[:4]
    assert scheduler.next_batch() == jobs[4:8]
    assert scheduler.next_batch() == jobs[8:]


def test_a_budget_that_is_no_multiple_of_the_length_is_not_exceeded() -> None:
    scheduler = make_scheduler(batch=127)
    jobs = submit(scheduler, *(make_job() for _ in range(4)))
    assert scheduler.next_batch() == jobs[:3]


def test_a_batch_holds_the_jobs_in_their_order_whatever_their_lengths() -> None:
    scheduler = make_scheduler(batch=101)
    jobs = submit(scheduler, *(make_job(length) for length in (7, 61, 33, 1, 98, 2, 2)))
    assert scheduler.next_batch() == jobs[:3]
    assert scheduler.next_batch() == jobs[3:6]
    assert scheduler.next_batch() == jobs[6:]


def test_the_first_job_that_does_not_fit_ends_a_batch() -> None:
    scheduler = make_scheduler(batch=128)
    first, long, *short = submit(scheduler, make_job(64), make_job(65), make_job(32), make_job(31))
    assert scheduler.next_batch() == [first]
    assert scheduler.next_batch() == [long, *short]


def test_more_urgent_levels_go_first() -> None:
    scheduler = make_scheduler(batch=32)
    levels = [BULK, TRAINING, INTERACTIVE, BULK, INTERACTIVE, TRAINING]
    jobs = submit(scheduler, *(make_job(level=level) for level in levels))
    taken = [scheduler.next_batch()[0] for _ in jobs]
    assert taken == [jobs[i] for i in (2, 4, 1, 5, 0, 3)]


def test_room_that_urgent_jobs_leave_goes_to_lower_levels() -> None:
    scheduler = make_scheduler(batch=160)
    bulk, training, other, urgent = submit(
        scheduler,
        make_job(level=BULK),
        make_job(level=TRAINING),
        make_job(64, level=TRAINING),
        make_job(level=INTERACTIVE),
    )
    assert scheduler.next_batch() == [urgent, training, other, bulk]


def test_departed_jobs_are_dropped_before_they_cost_anything() -> None:
    scheduler = make_scheduler(batch=64)
    jobs = submit(scheduler, *(make_job() for _ in range(6)))
    for index in (0, 2, 3):
        scheduler.cancel(jobs[index])
    assert scheduler.next_batch() == [jobs[1], jobs[4]]
    assert scheduler.next_batch() == [jobs[5]]


def test_the_tokens_of_a_departed_job_are_given_back_at_once() -> None:
    scheduler = make_scheduler(queued=64)
    first, second = submit(scheduler, make_job(), make_job())
    with pytest.raises(RequestRefused):
        scheduler.submit(make_job())
    scheduler.cancel(second)
    assert scheduler.queued_tokens == 32
    (third,) = submit(scheduler, make_job())
    assert scheduler.next_batch() == [first, third]
    assert scheduler.queued_tokens == 0


def test_cancelling_twice_gives_tokens_back_once() -> None:
    scheduler = make_scheduler()
    _, job = submit(scheduler, make_job(), make_job())
    scheduler.cancel(job)
    scheduler.cancel(job)
    assert scheduler.queued_tokens == 32


def test_cancelling_what_was_taken_or_never_submitted_changes_nothing() -> None:
    scheduler = make_scheduler(batch=32)
    taken, kept = submit(scheduler, make_job(), make_job())
    assert scheduler.next_batch() == [taken]
    scheduler.cancel(taken)
    scheduler.cancel(make_job())
    assert scheduler.queued_tokens == 32
    assert scheduler.next_batch() == [kept]


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    scheduler = make_scheduler(queued=100)
    submit(scheduler, make_job(), make_job(), make_job())
    with pytest.raises(RequestRefused) as caught:
        scheduler.submit(make_job())
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.reason == "QUEUE_FULL"
    assert caught.value.retry_after_ms > 0
    assert "96" in str(caught.value)
    assert "100" in str(caught.value)
    assert scheduler.queued_tokens == 96


def test_a_queue_may_be_filled_to_its_limit_exactly() -> None:
    scheduler = make_scheduler(queued=96)
    submit(scheduler, make_job(), make_job(64))
    assert scheduler.queued_tokens == 96
    with pytest.raises(RequestRefused):
        scheduler.submit(make_job(1))


def test_one_job_always_fits_an_empty_queue() -> None:
    scheduler = make_scheduler(queued=10)
    (job,) = submit(scheduler, make_job(4096))
    with pytest.raises(RequestRefused):
        scheduler.submit(make_job(1))
    assert scheduler.next_batch() == [job]
    submit(scheduler, make_job(4096))


def test_a_queue_whose_jobs_have_all_departed_is_empty() -> None:
    scheduler = make_scheduler(queued=10)
    (job,) = submit(scheduler, make_job(4096))
    scheduler.cancel(job)
    submit(scheduler, make_job(4096))


def test_the_retry_hint_follows_the_measured_speed_within_bounds() -> None:
    hints = []
    for tokens_per_s in (1e9, 1000.0, 100.0, 0.001):
        scheduler = make_scheduler(queued=1000)
        submit(scheduler, make_job(1000))
        scheduler.record_speed(1000, 1000 / tokens_per_s)
        with pytest.raises(RequestRefused) as caught:
            scheduler.submit(make_job())
        hints.append(caught.value.retry_after_ms)
    assert hints == [50, 500, 5000, 30_000]


def test_a_batch_that_took_no_time_does_not_break_the_hint() -> None:
    scheduler = make_scheduler(queued=1)
    submit(scheduler, make_job())
    scheduler.record_speed(32, 0.0)
    with pytest.raises(RequestRefused) as caught:
        scheduler.submit(make_job())
    assert caught.value.retry_after_ms == 50


def test_the_bytes_of_the_answers_bound_a_batch() -> None:
    scheduler = make_scheduler(reply=1000)
    sizes = [400, 600, 1, 999, 1]
    jobs = submit(scheduler, *(make_job(reply_nbytes=size) for size in sizes))
    assert scheduler.next_batch() == jobs[:2]
    assert scheduler.next_batch() == jobs[2:4]
    assert scheduler.next_batch() == jobs[4:]


@pytest.mark.parametrize(("num_tokens", "reply_nbytes"), [(4096, 1), (32, 10**9)])
def test_a_job_that_is_too_large_for_any_batch_goes_alone(
    num_tokens: int, reply_nbytes: int
) -> None:
    scheduler = make_scheduler(batch=64, reply=1000)
    before, large, after = submit(
        scheduler,
        make_job(num_tokens, reply_nbytes=1),
        make_job(num_tokens, reply_nbytes=reply_nbytes),
        make_job(num_tokens, reply_nbytes=1),
    )
    assert [scheduler.next_batch() for _ in range(3)] == [[before], [large], [after]]


def test_submission_is_stamped_with_the_clock() -> None:
    times = iter([5.0, 7.5])
    scheduler = Scheduler(
        max_batch_tokens=64,
        max_batch_reply_nbytes=1,
        max_queued_tokens=64,
        clock=lambda: next(times),
    )
    jobs = submit(scheduler, make_job(), make_job())
    assert [job.submitted_s for job in jobs] == [5.0, 7.5]


def test_close_wakes_a_waiting_thread_with_an_empty_batch() -> None:
    scheduler = make_scheduler()
    batches: list[list[SequenceJob]] = []
    thread = threading.Thread(target=lambda: batches.append(scheduler.next_batch()))
    thread.start()
    time.sleep(0.05)  # it is most likely waiting by now; the claim holds if it is not
    assert scheduler.close() == []
    thread.join(60)
    assert batches == [[]]


def test_a_job_wakes_a_waiting_thread() -> None:
    scheduler = make_scheduler()
    batches: list[list[SequenceJob]] = []
    thread = threading.Thread(target=lambda: batches.append(scheduler.next_batch()))
    thread.start()
    time.sleep(0.05)  # as above
    (job,) = submit(scheduler, make_job())
    thread.join(60)
    assert batches == [[job]]


def test_close_returns_what_nobody_will_score() -> None:
    scheduler = make_scheduler(batch=32)
    taken, *left = submit(scheduler, *(make_job(level=i % 3) for i in range(3)), make_job(64))
    assert scheduler.next_batch() == [taken]
    assert set(scheduler.close()) == set(left)
    assert scheduler.queued_tokens == 0
    assert scheduler.next_batch() == []
    assert scheduler.close() == []


def test_a_job_that_departs_after_close_gives_nothing_back_twice() -> None:
    # The replica does this for every job that close() returns.
    scheduler = make_scheduler()
    (job,) = submit(scheduler, make_job())
    scheduler.close()
    scheduler.cancel(job)
    assert scheduler.queued_tokens == 0


def of(team: str, job: SequenceJob) -> SequenceJob:
    job.team = Team(team)
    return job


def beside_a_flood(**options: int) -> Scheduler:
    """A scheduler whose only batch so far was one of a flood that has much more."""
    scheduler = make_scheduler(batch=128, **options)
    submit(scheduler, *(of("flood", make_job()) for _ in range(40)))
    assert len(scheduler.next_batch()) == 4
    return scheduler


def test_nobody_goes_ahead_where_only_a_flood_or_nobody_is() -> None:
    assert make_scheduler().take_ahead() == []
    scheduler = beside_a_flood()
    assert not scheduler.has_ahead
    assert scheduler.take_ahead() == []


def test_what_may_go_ahead_can_be_taken_by_itself() -> None:
    scheduler = beside_a_flood()
    jobs = submit(scheduler, *(of("light", make_job(level=INTERACTIVE)) for _ in range(3)))
    assert scheduler.has_ahead
    assert scheduler.take_ahead() == jobs
    assert not scheduler.has_ahead
    assert scheduler.take_ahead() == []
    assert scheduler.queued_tokens == 36 * 32


def test_a_budget_is_a_batch_and_what_is_beyond_it_waits_for_its_turn() -> None:
    scheduler = beside_a_flood()
    jobs = submit(scheduler, *(of("light", make_job(level=INTERACTIVE)) for _ in range(9)))
    # Two have the smallest tag, the others need the budget, which is for four of them.
    assert scheduler.take_ahead() + scheduler.take_ahead() == jobs[:6]
    assert scheduler.take_ahead() == []
    assert {job.team.name for job in scheduler.next_batch()} == {"flood"}


def test_more_training_work_than_a_budget_does_not_go_ahead() -> None:
    scheduler = beside_a_flood()
    submit(scheduler, *(of("heavy", make_job()) for _ in range(5)))
    assert scheduler.take_ahead() == []


def test_bulk_work_and_large_answers_do_not_go_ahead() -> None:
    scheduler = beside_a_flood(reply=1000)
    submit(scheduler, of("bulk", make_job(level=BULK)))
    submit(scheduler, of("dense", make_job(level=INTERACTIVE, reply_nbytes=501)))
    assert scheduler.take_ahead() == []
    (small,) = submit(scheduler, of("small", make_job(level=INTERACTIVE, reply_nbytes=500)))
    assert scheduler.take_ahead() == [small]


def test_a_job_of_more_than_a_budget_goes_ahead_once_and_leaves_a_debt() -> None:
    scheduler = beside_a_flood()
    *first, large, small = submit(
        scheduler,
        *(of("light", make_job(level=INTERACTIVE)) for _ in range(2)),
        of("light", make_job(2000, level=INTERACTIVE)),
        of("light", make_job(level=INTERACTIVE)),
    )
    assert scheduler.take_ahead() == first  # by their tags
    assert scheduler.take_ahead() == [large]
    assert scheduler.take_ahead() == []
    assert small not in scheduler.next_batch()


def test_a_job_that_departs_or_is_closed_does_not_go_ahead() -> None:
    scheduler = beside_a_flood()
    gone, left = submit(scheduler, *(of("light", make_job(level=INTERACTIVE)) for _ in range(2)))
    scheduler.cancel(gone)
    assert scheduler.take_ahead() == [left]
    submit(scheduler, of("light", make_job(level=INTERACTIVE)))
    scheduler.close()
    assert not scheduler.has_ahead
    assert scheduler.take_ahead() == []


def test_teams_that_may_go_ahead_take_turns() -> None:
    scheduler = beside_a_flood()
    one = submit(scheduler, *(of("one", make_job(level=INTERACTIVE)) for _ in range(4)))
    two = submit(scheduler, *(of("two", make_job(level=INTERACTIVE)) for _ in range(4)))
    taken = scheduler.take_ahead()
    assert len(set(taken) & set(one)) == len(set(taken) & set(two)) == 2


def test_a_forgotten_team_has_no_new_budget_before_it_has_earned_one() -> None:
    scheduler = beside_a_flood()
    submit(scheduler, *(of("light", make_job(level=INTERACTIVE)) for _ in range(6)))
    assert len(scheduler.take_ahead() + scheduler.take_ahead()) == 6
    for _ in range(2):  # virtual time passes its tag, by half of a budget
        scheduler.next_batch()
    for number in range(200):
        (job,) = submit(scheduler, of(f"stranger{number}", make_job()))
        scheduler.cancel(job)
    submit(scheduler, *(of("light", make_job(level=INTERACTIVE)) for _ in range(9)))
    assert len(scheduler.take_ahead() + scheduler.take_ahead()) == 2 + 2


def test_a_batch_is_as_long_as_the_speed_says_while_two_teams_are_there() -> None:
    times = [0.0]
    scheduler = Scheduler(
        max_batch_tokens=1 << 20,
        max_batch_reply_nbytes=1 << 30,
        max_queued_tokens=1 << 30,
        clock=lambda: times[0],
    )
    submit(scheduler, of("light", make_job()))
    scheduler.next_batch()
    scheduler.record_speed(3200, 1.0, 3200.0)
    submit(scheduler, *(of("flood", make_job()) for _ in range(100)))
    assert len(scheduler.next_batch()) == 10  # 0.1 s at 3200 units a second
    times[0] = 11.0
    assert len(scheduler.next_batch()) == 90


@pytest.mark.parametrize(("floor", "expected"), [(1, 10), (320, 10), (700, 21), (1 << 20, 64)])
def test_a_batch_is_not_ended_for_its_time_below_the_floor(floor: int, expected: int) -> None:
    scheduler = Scheduler(
        max_batch_tokens=2048,
        max_batch_reply_nbytes=1 << 30,
        max_queued_tokens=1 << 30,
        min_batch_tokens=floor,
    )
    submit(scheduler, of("light", make_job()))
    scheduler.next_batch()
    scheduler.record_speed(3200, 1.0, 3200.0)
    submit(scheduler, *(of("flood", make_job()) for _ in range(100)))
    assert len(scheduler.next_batch()) == expected


def test_speed_does_not_shrink_batches_below_what_a_pass_costs_anyway() -> None:
    # Every pass takes half a second, whatever it holds: without a floor, batches would shrink to
    # single jobs, as each one makes the teacher look slower.
    scheduler = Scheduler(
        max_batch_tokens=4096,
        max_batch_reply_nbytes=1 << 30,
        max_queued_tokens=1 << 30,
        min_batch_tokens=1024,
    )
    submit(scheduler, *(of(f"team{number % 2}", make_job()) for number in range(2000)))
    for _ in range(20):
        batch = scheduler.next_batch()
        assert len(batch) >= 1024 // 32
        tokens = sum(job.num_tokens for job in batch)
        scheduler.record_speed(tokens, 0.5, tokens)


class SchedulerMachine(RuleBasedStateMachine):
    """The scheduler beside a plain list of jobs, searched from the front every time."""

    jobs = Bundle("jobs")

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = make_scheduler(batch=160, reply=100, queued=640)
        self.waiting: list[SequenceJob] = []

    @rule(
        target=jobs,
        num_tokens=st.sampled_from([1, 32, 63, 64, 192]),
        level=st.sampled_from([INTERACTIVE, TRAINING, BULK]),
        reply_nbytes=st.sampled_from([0, 30, 60, 120]),
    )
    def submit(self, num_tokens: int, level: int, reply_nbytes: int) -> SequenceJob:
        job = make_job(num_tokens, level=level, reply_nbytes=reply_nbytes)
        full = self.waiting and sum(j.num_tokens for j in self.waiting) + num_tokens > 640
        try:
            self.scheduler.submit(job)
        except RequestRefused:
            assert full
        else:
            assert not full
            self.waiting.append(job)
        return job

    @rule(job=jobs)
    def cancel(self, job: SequenceJob) -> None:
        self.scheduler.cancel(job)
        if job in self.waiting:
            self.waiting.remove(job)

    @precondition(lambda self: self.waiting)
    @rule()
    def take(self) -> None:
        by_urgency = sorted(self.waiting, key=lambda job: job.level)  # stable: oldest first
        expected: list[SequenceJob] = []
        for job in by_urgency:
            batch = [*expected, job]
            tokens = sum(j.num_tokens for j in batch)
            if expected and (tokens > 160 or sum(j.reply_nbytes for j in batch) > 100):
                break
            expected = batch
        assert self.scheduler.next_batch() == expected
        self.waiting = [job for job in self.waiting if job not in expected]

    @invariant()
    def tokens_add_up(self) -> None:
        assert self.scheduler.queued_tokens == sum(job.num_tokens for job in self.waiting)


TestTheSchedulerFollowsAPlainReading = SchedulerMachine.TestCase
TestTheSchedulerFollowsAPlainReading.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None
)


def test_many_threads_lose_and_duplicate_nothing() -> None:
    scheduler = make_scheduler(batch=128, queued=32 * 40)
    submitted: list[list[SequenceJob]] = [[] for _ in range(4)]
    cancelled: list[set[SequenceJob]] = [set() for _ in range(4)]
    taken: list[list[SequenceJob]] = [[] for _ in range(2)]

    def client(index: int) -> None:
        draw = random.Random(index)
        for _ in range(500):
            job = make_job(draw.choice([32, 64, 96]), level=draw.randrange(NUM_LEVELS))
            while True:
                try:
                    scheduler.submit(job)
                    break
                except RequestRefused:
                    time.sleep(0)  # let the others empty the queue
            submitted[index].append(job)
            if draw.random() < 0.3:
                departing = draw.choice(submitted[index][-5:])
                scheduler.cancel(departing)
                cancelled[index].add(departing)

    def compute(index: int) -> None:
        while batch := scheduler.next_batch():
            taken[index].extend(batch)
            assert sum(job.num_tokens for job in batch) <= 128

    clients = [threading.Thread(target=client, args=(i,), daemon=True) for i in range(4)]
    computers = [threading.Thread(target=compute, args=(i,), daemon=True) for i in range(2)]
    for thread in [*computers, *clients]:
        thread.start()
    for thread in clients:
        thread.join(60)
        assert not thread.is_alive()
    left = scheduler.close()
    for thread in computers:
        thread.join(60)
        assert not thread.is_alive()

    counts = Counter(job for jobs in taken for job in jobs)
    assert set(counts.values()) <= {1}
    gone = set().union(*cancelled)
    everything = {job for jobs in submitted for job in jobs}
    assert len(everything) == 2000
    assert everything - gone <= counts.keys() | set(left)
    assert not counts.keys() & set(left)
    assert counts.keys() | set(left) <= everything
    assert scheduler.queued_tokens == 0
