"""The scheduler among hostile teams, in virtual time."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_server.scheduling.fairness import FairQueue
from teacher_server.scheduling.job import BULK, INTERACTIVE, NUM_LEVELS, TRAINING, SequenceJob
from teacher_server.scheduling.scheduler import SHARED_BATCH_S, Scheduler
from teacher_server.scheduling.team_queue import TeamQueue
from teacher_server.teams.declaration import Team
from tests.support import simulator
from tests.support.simulator import (
    BATCH_TOKENS,
    WANTED,
    CancelStorm,
    Closed,
    Fifo,
    Open,
    Queue,
    Quitter,
    Simulation,
    by_credential,
    cost,
    sizes,
    worst_gap,
)

MIXED = (7, 33, 64, 100, 129, 256, 333, 512, 1024)
TINY, HUGE = 32, 8192
ROUNDING = 1 + 1e-9


def team(name: str, weight: float = 1.0) -> Team:
    return Team(name, weight=weight)


def good(run: Simulation, *, weight: float = 1.0) -> None:
    """An ordinary team with enough work to always have some waiting."""
    Closed(run, team("good", weight), sizes(*MIXED, seed=1), window=64)


def flood(run: Simulation) -> None:
    Closed(run, team("flood"), sizes(*MIXED, seed=2), window=500)


def tiny(run: Simulation) -> None:
    Closed(run, team("tiny", 0.5), sizes(TINY), window=500)


def huge(run: Simulation) -> None:
    Closed(run, team("huge", 2.0), sizes(HUGE), window=30)


def burst(run: Simulation) -> None:
    Open(run, team("burst"), sizes(*MIXED, seed=3), period_s=1.5, count=150)


def on_off(run: Simulation) -> None:
    Closed(run, team("on_off", 3.0), sizes(*MIXED, seed=4), window=80, on_s=0.7, off_s=0.4)


def blink(run: Simulation) -> None:
    """Has work for moments only, at the worst rhythm: less than a batch."""
    Closed(run, team("blink"), sizes(1024, seed=5), window=20, on_s=0.05, off_s=0.05)


def storm(run: Simulation) -> None:
    CancelStorm(run, team("storm"), sizes(*MIXED, seed=6))


def quitter(run: Simulation) -> None:
    Quitter(run, team("quitter"), sizes(*MIXED, seed=7))


def tokens(run: Simulation) -> None:
    Closed(run, team("tokens"), sizes(256), window=400, credentials=20)


def joins_and_leaves(run: Simulation) -> None:
    for number in range(6):
        Closed(
            run,
            team(f"guest{number % 2}", 1.5),
            sizes(*MIXED, seed=number),
            window=50,
            start=number * 0.9,
            end=number * 0.9 + 0.7,
        )


def urgent(run: Simulation) -> None:
    """Marks everything as interactive, and always has work."""
    Closed(run, team("urgent"), sizes(512), window=100, level=INTERACTIVE)


def urgent_bursts(run: Simulation) -> None:
    """Marks everything as interactive, and pauses just long enough to fill its budget."""
    Closed(
        run,
        team("urgent_bursts"),
        sizes(*MIXED, seed=8),
        window=60,
        on_s=0.3,
        off_s=0.3,
        level=INTERACTIVE,
    )


def hopper(run: Simulation) -> None:
    """Always comes back from idle, and has no more work then than a light team may have."""
    Closed(run, team("hopper"), sizes(1024), window=3, back_s=0.0)


HOSTILE = (
    flood,
    tiny,
    huge,
    burst,
    on_off,
    blink,
    storm,
    quitter,
    tokens,
    joins_and_leaves,
    urgent,
    urgent_bursts,
    hopper,
)
Setup = Callable[[Simulation], None]


def gaps(run: Simulation, budget: float = BATCH_TOKENS) -> dict[tuple[str, str], float]:
    """The largest unfairness of every two teams, as a fraction of what is promised."""
    names = sorted({entry.team for entry in run.log})
    found = {}
    for one, other in itertools.combinations(names, 2):
        worst, promised = worst_gap(run.log, one, other, budget)
        found[one, other] = worst / promised
    return found


@pytest.mark.parametrize("hostile", [*HOSTILE, None], ids=lambda one: one and one.__name__)
@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_every_two_teams_stay_within_a_largest_job_and_a_budget_of_each(
    hostile: Setup | None, weight: float
) -> None:
    run = Simulation()
    good(run, weight=weight)
    for setup in HOSTILE if hostile is None else (hostile, flood):
        setup(run)
    found = gaps(run.run(6.0))
    assert max(found.values()) <= ROUNDING, found
    assert len(found) >= 1
    assert run.dispatched("good") > 0


class AllBulk(Scheduler):
    """Whatever a job says, it is bulk, which never goes ahead."""

    def submit(self, job: SequenceJob) -> None:
        job.level = BULK
        super().submit(job)


def test_without_going_ahead_every_two_teams_stay_within_a_largest_job_of_each() -> None:
    run = Simulation(AllBulk)
    good(run)
    for setup in HOSTILE:
        setup(run)
    found = gaps(run.run(6.0), budget=0.0)
    assert max(found.values()) <= ROUNDING, found


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "weight": st.sampled_from([0.25, 1.0, 3.0, 10.0]),
                "lengths": st.sets(st.sampled_from([2, 33, 96, 517, 4096, 9000]), min_size=1),
                "window": st.sampled_from([1, 3, 30, 200]),
                "start": st.floats(0.0, 1.0),
                "end": st.floats(0.5, 2.0),
                "on_s": st.sampled_from([0.01, 0.3, 9.0]),
                "off_s": st.sampled_from([0.01, 0.3]),
                "back_s": st.sampled_from([0.0, 0.01, 0.2]),
                "level": st.sampled_from(range(NUM_LEVELS)),
                "storm": st.booleans(),
            }
        ),
        min_size=2,
        max_size=6,
    )
)
def test_whatever_teams_do_the_bound_holds(plans: list[dict]) -> None:
    run = Simulation()
    for number, plan in enumerate(plans):
        one = team(f"t{number}", plan.pop("weight"))
        lengths = sizes(*sorted(plan.pop("lengths")), seed=number)
        if plan.pop("storm"):
            CancelStorm(run, one, lengths, count=plan["window"], after_s=plan["on_s"])
        else:
            Closed(run, one, lengths, **plan)
    found = gaps(run.run(1.5))
    assert max(found.values(), default=0.0) <= ROUNDING, found


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_twenty_credentials_get_the_share_of_one_team(weight: float) -> None:
    run = Simulation()
    Closed(run, team("many"), sizes(*MIXED, seed=1), window=400, credentials=20)
    Closed(run, team("one", weight), sizes(*MIXED, seed=2), window=100)
    run.run(60.0)
    entitled = weight / (1 + weight)
    assert run.dispatched("one") / run.total() == pytest.approx(entitled, rel=0.01)
    assert run.dispatched("many") / run.total() == pytest.approx(1 - entitled, rel=0.01)


def one_mixed(run: Simulation) -> None:
    Closed(run, team("a"), sizes(*MIXED), window=64)


def four_mixed(run: Simulation) -> None:
    for number in range(4):
        Closed(run, team(f"t{number}", number + 1), sizes(*MIXED, seed=number), window=100)


def four_lengths(run: Simulation) -> None:
    for number, length in enumerate((64, 128, 512, 1024)):
        Closed(run, team(f"t{number}", number + 1), sizes(length), window=200)


def four_small_windows(run: Simulation) -> None:
    for number in range(4):
        Closed(run, team(f"t{number}"), sizes(*MIXED, seed=number), window=8)


@pytest.mark.parametrize("setup", [one_mixed, four_mixed, four_lengths, four_small_windows])
def test_the_throughput_is_that_of_a_fifo_queue(setup: Setup) -> None:
    totals = []
    for make in (Fifo, Scheduler):
        run = Simulation(make)
        setup(run)
        totals.append(run.run(30.0).total())
    assert totals[1] / totals[0] == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("setup", [one_mixed, four_mixed, four_lengths, four_small_windows])
def test_where_time_follows_the_tokens_nothing_is_lost_to_order(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulator, "FLOOR_S", 0.0)
    totals = []
    for make in (Fifo, Scheduler):
        run = Simulation(make)
        setup(run)
        totals.append(run.run(30.0).total())
    assert totals[1] / totals[0] == pytest.approx(1.0, abs=0.01)


def test_a_light_team_waits_at_most_a_batch_among_floods() -> None:
    run = Simulation()
    for number in range(3):
        Closed(run, team(f"flood{number}"), sizes(*MIXED, seed=number), window=500)
    Open(run, team("light"), sizes(128), period_s=0.37)
    run.run(30.0)
    assert len(run.waits["light"]) > 75
    assert max(run.waits["light"]) <= run.longest_pass_s
    fifo = Simulation(Fifo)
    for number in range(3):
        Closed(fifo, team(f"flood{number}"), sizes(*MIXED, seed=number), window=500)
    Open(fifo, team("light"), sizes(128), period_s=0.37)
    assert max(fifo.run(30.0).waits["light"]) > 10 * run.longest_pass_s  # what it would wait


def floods(run: Simulation, count: int = 3, level: int = TRAINING) -> None:
    for number in range(count):
        lengths = sizes(*MIXED, seed=number)
        Closed(run, team(f"flood{number}"), lengths, window=500, level=level)


def next_batches(run: Simulation, level: int, count: int) -> list[list[str]]:
    """The batches after a light team asked for `count` sequences in the middle of one."""
    before = 0

    def ask() -> None:
        nonlocal before
        before = len(run.batches)
        for _ in range(count):
            assert run.submit(team("light"), 128, level=level)

    run.at(5.03, ask)
    run.run(8.0)
    return run.batches[before:]


@pytest.mark.parametrize("level", [INTERACTIVE, TRAINING])
def test_all_that_a_light_team_asks_for_is_in_the_very_next_batch_among_floods(level: int) -> None:
    run = Simulation()
    floods(run)
    batches = next_batches(run, level, 12)
    assert batches[0][:12] == ["light"] * 12
    bulk = Simulation()
    floods(bulk)
    spread = next_batches(bulk, BULK, 12)
    assert spread[0].count("light") < 12  # what it would be by tags alone


def test_a_light_team_goes_ahead_of_a_flood_that_marks_everything_as_interactive() -> None:
    run = Simulation()
    floods(run, level=INTERACTIVE)
    assert next_batches(run, INTERACTIVE, 12)[0][:12] == ["light"] * 12


def test_batches_are_short_while_a_light_team_is_there() -> None:
    run = Simulation(max_batch_tokens=16 * BATCH_TOKENS)
    Closed(run, team("flood"), sizes(512), window=500)
    Open(run, team("light"), sizes(128), period_s=0.5, start=3.0)
    run.run(6.0)
    assert run.longest_pass_s > 1.0, "a team alone may have long ones"
    run.passes.clear()
    run.waits.clear()
    run.run(20.0)
    largest_s = simulator.COST_S * 700  # a job of 512 tokens
    assert run.longest_pass_s <= SHARED_BATCH_S + largest_s
    assert max(run.waits["light"]) <= SHARED_BATCH_S + largest_s


def test_a_team_that_marks_everything_as_interactive_gains_nothing_over_a_minute() -> None:
    run = Simulation()
    Closed(run, team("urgent"), sizes(512), window=100, credentials=20, level=INTERACTIVE)
    Closed(run, team("good"), sizes(512), window=100)
    run.run(60.0)
    most = 0.5 * run.total() + BATCH_TOKENS + 2 * 1024
    assert run.dispatched("urgent") <= most
    assert run.dispatched("good") >= run.total() - most


def test_prompts_in_bursts_gain_no_more_than_the_share_that_was_left_unused() -> None:
    run = Simulation()
    Closed(run, team("good"), sizes(512), window=100)
    urgent_bursts(run)
    run.run(60.0)
    assert run.dispatched("urgent_bursts") <= 0.5 * run.total() + BATCH_TOKENS


def test_a_team_that_returns_has_saved_no_share_up() -> None:
    run = Simulation()
    Closed(run, team("steady"), sizes(256), window=100)
    Closed(run, team("guest"), sizes(256), window=100, start=20.0)
    run.run(30.0)
    shares = [run.dispatched(name, 20.0, 21.0) for name in ("steady", "guest")]
    assert shares[1] / sum(shares) == pytest.approx(0.5, abs=0.02)


def test_a_team_that_leaves_at_once_and_returns_has_gained_nothing() -> None:
    run = Simulation()
    Closed(run, team("steady"), sizes(1024), window=20)
    # Its last job is dispatched, it has none waiting, and comes back before its tag is reached.
    hopper(run)
    run.run(30.0)
    assert run.dispatched("hopper") <= 0.5 * run.total() + BATCH_TOKENS + 2 * 1100


def gain_of_returning(make: type = Scheduler) -> float:
    """What a team of prompts has more than another, each time that it comes back and stays."""
    run = Simulation(make)
    Closed(run, team("steady"), sizes(512), window=100)
    prompts = {"window": 20, "on_s": 2.0, "off_s": 2.0, "level": INTERACTIVE}
    Closed(run, team("prompts"), sizes(512), **prompts)
    run.run(60.0)
    periods = [(since, since + 2.0) for since in range(0, 60, 4)]
    got = {
        name: sum(run.dispatched(name, *one) for one in periods) for name in ("steady", "prompts")
    }
    return (got["prompts"] - got["steady"]) / len(periods)


def test_what_goes_ahead_is_paid_back_while_others_wait() -> None:
    assert gain_of_returning() <= 1100


@pytest.mark.parametrize("hostile", [storm, quitter])
def test_cancelling_gains_nothing(hostile: Setup) -> None:
    run = Simulation()
    good(run)
    hostile(run)
    run.run(10.0)
    assert run.dispatched("good") >= 0.5 * run.total() * 0.99


def test_a_new_weight_holds_from_then_on() -> None:
    run = Simulation()
    Closed(run, team("a"), sizes(*MIXED, seed=1), window=100)
    changing = Closed(run, team("b"), sizes(*MIXED, seed=2), window=100)
    run.at(20.0, lambda: setattr(changing, "team", team("b", 3.0)))
    run.run(40.0)
    before = run.dispatched("b", 5.0, 20.0) / run.dispatched("a", 5.0, 20.0)
    after = run.dispatched("b", 20.5, 40.0) / run.dispatched("a", 20.5, 40.0)
    assert before == pytest.approx(1.0, rel=0.01)
    assert after == pytest.approx(3.0, rel=0.02)


def _sort(fair: FairQueue) -> None:
    """Sorts the heap after tags went down, which they never do unless a test planted it."""
    heap = [(team.start, number, team) for number, (_, _, team) in enumerate(fair._heap)]
    fair._heap = sorted(heap)


def planted(fair: type[FairQueue]) -> Callable[..., Scheduler]:
    """Makes schedulers that follow another rule."""

    def make(**options) -> Scheduler:
        scheduler = Scheduler(**options)
        names = ("max_batch_tokens", "max_batch_reply_nbytes")
        scheduler.fair = fair(**{name: options[name] for name in names})
        return scheduler

    return make


class Refunds(Scheduler):
    """Planted: cancelling gives back what was charged."""

    def cancel(self, job: SequenceJob) -> None:
        if not job.waiting:
            team = self.fair._teams[job.team.name]
            team.start -= job.cost / team.weight
            _sort(self.fair)
        super().cancel(job)


class NeverLifts(FairQueue):
    """Planted: who was away comes back with the tag it left with."""

    def _return_from_idle(self, team: TeamQueue) -> None:
        start = team.start
        super()._return_from_idle(team)
        team.start = start
        _sort(self)


class Unweighted(FairQueue):
    """Planted: weights are ignored."""

    def _charge(self, team: TeamQueue, job: SequenceJob) -> None:
        self._virtual_time = team.start
        team.start += job.cost


class CountsJobs(FairQueue):
    """Planted: a turn is a turn, whatever it costs."""

    def _charge(self, team: TeamQueue, job: SequenceJob) -> None:
        self._virtual_time = team.start
        team.start += 1 / team.weight


class NoBudget(FairQueue):
    """Planted: who marks its jobs as interactive always goes ahead."""

    def _review(self, team: TeamQueue) -> None:
        team.budget = self.max_budget
        super()._review(team)


class NoCap(FairQueue):
    """Planted: whatever was left unused may be spent at once."""

    def _budget_on_return(self, team: TeamQueue) -> float:
        return team.budget + max(0.0, team.weight * (self._virtual_time - team.start))


class NotCharged(FairQueue):
    """Planted: going ahead costs budget, and nothing of the share."""

    def _charge_ahead(self, team: TeamQueue, job: SequenceJob) -> None:
        start = team.start
        super()._charge_ahead(team, job)
        team.start = start


class NotSpent(FairQueue):
    """Planted: going ahead is charged, and may go on for ever."""

    def _charge_ahead(self, team: TeamQueue, job: SequenceJob) -> None:
        budget = team.budget
        super()._charge_ahead(team, job)
        team.budget = budget


def test_a_scheduler_that_does_not_charge_who_goes_ahead_is_caught() -> None:
    assert gain_of_returning(planted(NotCharged)) > 3000


def test_a_budget_of_every_credential_is_caught() -> None:
    run = Simulation(identify=by_credential)
    many = team("many")
    options = {"window": 60, "credentials": 20, "on_s": 0.6, "off_s": 0.6, "level": INTERACTIVE}
    Closed(run, many, sizes(512), **options)
    Closed(run, team("one"), sizes(512), window=100)
    assert max(gaps(run.run(15.0)).values()) > 1.5


@pytest.mark.parametrize("fair", [NoBudget, NoCap, NotSpent])
def test_a_scheduler_that_lets_a_team_go_ahead_too_far_is_caught(fair: type[FairQueue]) -> None:
    run = Simulation(planted(fair))
    good(run)
    Closed(run, team("guest"), sizes(512), window=400, start=5.0, end=5.3, level=INTERACTIVE)
    urgent(run)
    urgent_bursts(run)
    assert max(gaps(run.run(8.0)).values()) > 1.2


@pytest.mark.parametrize(
    ("make", "hostile"),
    [
        (Refunds, quitter),
        (planted(NeverLifts), joins_and_leaves),
        (planted(Unweighted), on_off),
        (planted(CountsJobs), huge),
        (Fifo, flood),
    ],
)
def test_a_scheduler_that_is_not_fair_is_caught(make: Callable[..., Queue], hostile: Setup) -> None:
    run = Simulation(make)
    good(run)
    hostile(run)
    assert max(gaps(run.run(8.0)).values()) > 1.5


def test_fairness_among_credentials_is_caught() -> None:
    run = Simulation(identify=by_credential)
    Closed(run, team("many"), sizes(256), window=400, credentials=20)
    Closed(run, team("one"), sizes(256), window=100)
    run.run(15.0)
    assert max(gaps(run).values()) > 1.5
    assert run.dispatched("one") / run.total() < 0.1


def queued(
    scheduler: Scheduler, one: Team, num_tokens: int, count: int, level: int = 1
) -> list[SequenceJob]:
    jobs = [SequenceJob(WANTED, num_tokens, 0, level, one) for _ in range(count)]
    for job in jobs:
        scheduler.submit(job)
    return jobs


def _drain(scheduler: Scheduler):
    while scheduler.queued_tokens:
        yield from scheduler.next_batch()


def test_a_level_is_about_the_jobs_of_its_own_team_only() -> None:
    scheduler = Simulation(max_batch_tokens=64).queue
    assert isinstance(scheduler, Scheduler)
    bulk = queued(scheduler, team("a"), 32, 4, level=2)
    urgent_jobs = queued(scheduler, team("b"), 32, 4, level=0)
    late = queued(scheduler, team("a"), 32, 1, level=0)
    order = list(_drain(scheduler))
    assert order.index(late[0]) < order.index(bulk[0])
    first_four = order[:4]
    assert sum(job in urgent_jobs for job in first_four) == 2


def test_storms_and_strangers_leave_nothing_behind() -> None:
    scheduler = Simulation().queue
    assert isinstance(scheduler, Scheduler)
    queued(scheduler, team("steady"), 32, 2000)
    for number in range(5000):
        (job,) = queued(scheduler, team(f"t{number % 1000}"), 32, 1)
        scheduler.cancel(job)
        if number % 100 == 0:
            scheduler.next_batch()
            queued(scheduler, team("steady"), 32, BATCH_TOKENS // 32)
    for _ in range(200):
        (job,) = queued(scheduler, team("storm"), 32, 1)
        scheduler.cancel(job)
    assert len(scheduler.fair._heap) <= len(scheduler.fair._teams) <= 1100
    while scheduler.queued_tokens:
        scheduler.next_batch()
    queued(scheduler, team("steady"), 32, 300)
    list(_drain(scheduler))
    for number in range(3000):
        scheduler.cancel(queued(scheduler, team(f"new{number}"), 32, 1)[0])
        if number % 50 == 0:
            queued(scheduler, team("steady"), 32, 1)
            scheduler.next_batch()
    assert len(scheduler.fair._teams) < 400


def test_a_flood_fills_its_own_part_of_the_queue() -> None:
    run = Simulation(max_queued_tokens=20_000)
    for number in range(8):
        Closed(run, team(f"flood{number}"), sizes(256), window=100, credentials=20)
    Open(run, team("light"), sizes(256), period_s=0.2)
    run.run(3.0)
    assert run.refused["flood0"] > 0
    assert run.refused["light"] == 0
    assert run.queue.queued_tokens <= 4 * 20_000 + 2 * BATCH_TOKENS
    assert max(run.waits["light"]) <= 2 * run.longest_pass_s


def test_the_hint_is_made_from_the_teams_own_backlog_and_share() -> None:
    run = Simulation(max_queued_tokens=1000)
    scheduler = run.queue
    assert isinstance(scheduler, Scheduler)
    queued(scheduler, team("other", 3.0), 1000, 1)
    queued(scheduler, team("mine"), 500, 2)
    scheduler.record_speed(1000, 1.0)
    with pytest.raises(Exception, match="1000 tokens of team mine") as caught:
        queued(scheduler, team("mine"), 32, 1)
    assert caught.value.retry_after_ms == 2000  # half of what 250 tokens/s take


def test_a_cost_is_known_when_a_job_is_queued() -> None:
    scheduler = Simulation().queue
    (job,) = queued(scheduler, team("a"), 256, 1)  # type: ignore[arg-type]
    assert job.cost == cost(job) > 256


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_a_team_without_a_weight_is_refused(weight: float) -> None:
    scheduler = Simulation().queue
    with pytest.raises(ValueError, match="weight of team a"):
        queued(scheduler, replace(team("a"), weight=weight), 32, 1)  # type: ignore[arg-type]
