"""How long teams wait while one batch is computed and the next one was taken, in virtual time."""

import random
from collections.abc import Iterator

import pytest

from teacher_server.scheduling.job import BULK, INTERACTIVE, TRAINING, SequenceJob
from teacher_server.scheduling.scheduler import SHARED_BATCH_S, Scheduler
from teacher_server.teams.declaration import Team
from tests.support import simulator
from tests.support.simulator import (
    BATCH_TOKENS,
    COST_S,
    REPLY_NBYTES_PER_TOKEN,
    CancelStorm,
    Closed,
    Fifo,
    Open,
    Simulation,
    cost,
    idle_s,
    sizes,
)

ROUNDING = 1 + 1e-9
DENSE_NBYTES_PER_TOKEN = 100_000
"""Three batches' worth of answers are in a few hundred tokens of such sequences."""


def any_length(longest: int, seed: int) -> Iterator[int]:
    """Lengths without end, short ones as likely as long ones."""
    draw = random.Random(seed)
    while True:
        yield round(2 * (longest / 2) ** draw.random())


def floods(
    run: Simulation, shape: str, *, seed: int, level: int, weights: tuple[float, ...]
) -> None:
    """Three teams that always have far more work than fits."""
    shapes = {
        "long": lambda number: sizes(3000, BATCH_TOKENS, 2 * BATCH_TOKENS, seed=number),
        "short": lambda number: sizes(5, 17, 40, 64, seed=number),
        "dense": lambda number: sizes(60, 130, 500, seed=number),
        "any": lambda number: any_length(BATCH_TOKENS, number),
    }
    each = ("long", "short", "dense") if shape == "each" else (shape,) * 3
    for number, (weight, one) in enumerate(zip(weights, each, strict=True)):
        Closed(
            run,
            Team(f"flood{number}", weight=weight),
            shapes[one](10 * seed + number),
            window=800 if one == "short" else 300,
            level=level,
            nbytes_per_token=DENSE_NBYTES_PER_TOKEN if one == "dense" else REPLY_NBYTES_PER_TOKEN,
        )


class Asks:
    """A light team that asks for `count` sequences at moments that are drawn."""

    def __init__(self, run: Simulation, *, count: int, level: int, seed: int) -> None:
        draw = random.Random(seed)

        def ask() -> None:
            for _ in range(count):
                run.submit(Team("light"), draw.randint(20, 200), level=level)
            run.at(run.now + draw.uniform(0.5, 1.5) * 0.3 * count, ask)

        run.at(1.0 + draw.random(), ask)


SHAPES = ("long", "short", "dense", "any", "each")
WEIGHTS = ((1.0, 1.0, 1.0), (0.5, 2.0, 4.0))


@pytest.mark.parametrize("level", [INTERACTIVE, TRAINING])
@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(2))
def test_a_light_team_among_three_floods_waits_for_two_batches_at_most(
    shape: str, count: int, level: int, seed: int
) -> None:
    run = Simulation()
    # What the floods call their work changes nothing.
    flood_level = (TRAINING, INTERACTIVE)[seed]
    floods(run, shape, seed=seed, level=flood_level, weights=WEIGHTS[seed])
    Asks(run, count=count, level=level, seed=seed)
    run.run(15.0)
    assert len(run.starts["light"]) > 30
    # It is in the very next batch, and the one that was taken before is computed first.
    assert max(run.waits["light"]) <= run.longest_pass_s * ROUNDING
    assert max(run.starts["light"]) <= 2 * run.longest_pass_s * ROUNDING
    assert max(run.latencies["light"]) <= 3 * run.longest_pass_s * ROUNDING


@pytest.mark.parametrize("shape", SHAPES)
def test_batches_are_as_short_as_the_largest_job_lets_them(shape: str) -> None:
    run = Simulation()
    floods(run, shape, seed=5, level=TRAINING, weights=WEIGHTS[0])
    Asks(run, count=1, level=TRAINING, seed=5)
    run.run(5.0)
    run.passes.clear()
    run.run(20.0)
    largest_s = COST_S * max(entry.cost for entry in run.log)
    assert run.longest_pass_s <= max(SHARED_BATCH_S, largest_s) * ROUNDING


class AllBulk(Scheduler):
    """Planted: no job may go ahead."""

    def submit(self, job: SequenceJob) -> None:
        job.level = BULK
        super().submit(job)


def test_a_light_team_that_may_not_go_ahead_is_caught() -> None:
    run = Simulation(AllBulk)
    floods(run, "any", seed=0, level=TRAINING, weights=WEIGHTS[0])
    Asks(run, count=8, level=TRAINING, seed=0)
    run.run(25.0)
    assert max(run.starts["light"]) > 2.5 * run.longest_pass_s


def test_a_machine_that_takes_more_than_two_batches_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(simulator, "MAX_IN_FLIGHT", 3)
    run = Simulation()
    floods(run, "short", seed=0, level=TRAINING, weights=WEIGHTS[0])
    Asks(run, count=1, level=TRAINING, seed=0)
    run.run(25.0)
    assert max(run.starts["light"]) > 2.5 * run.longest_pass_s


@pytest.mark.parametrize("level", [INTERACTIVE, TRAINING, BULK])
@pytest.mark.parametrize("shape", ["short", "any", "each"])
def test_a_backlog_of_its_own_adds_its_own_time_only(shape: str, level: int) -> None:
    run = Simulation()
    floods(run, shape, seed=3, level=TRAINING, weights=WEIGHTS[0])
    backlog = 0.0

    def ask() -> None:
        nonlocal backlog
        jobs = [run.submit(Team("light"), 300, level=level) for _ in range(50)]
        backlog = sum(cost(job) for job in jobs if job)

    run.at(3.0, ask)
    run.run(20.0)
    assert backlog > 3 * BATCH_TOKENS
    assert len(run.starts["light"]) == 50
    # At its weight it gets a fourth, after at most one job of every other team.
    largest = {entry.team: 0.0 for entry in run.log}
    for entry in run.log:
        largest[entry.team] = max(largest[entry.team], entry.cost)
    own_s = COST_S * (4 * backlog + sum(largest.values()))
    assert max(run.starts["light"]) <= own_s + 2 * run.longest_pass_s


@pytest.mark.parametrize("seed", range(6))
def test_the_teacher_never_idles_while_work_waits(seed: int) -> None:
    draw = random.Random(seed)
    run = Simulation()
    for number in range(draw.randint(1, 5)):
        one = Team(f"t{number}", weight=draw.choice([0.2, 1.0, 5.0]))
        lengths = any_length(draw.choice([100, BATCH_TOKENS, 3 * BATCH_TOKENS]), seed)
        match draw.randrange(3):
            case 0:
                window = draw.choice([1, 3, 40])
                pauses = {"on_s": draw.random(), "off_s": draw.random()}
                Closed(run, one, lengths, window=window, level=draw.randrange(3), **pauses)
            case 1:
                Open(run, one, lengths, period_s=draw.random(), count=draw.choice([1, 9]))
            case 2:
                CancelStorm(run, one, lengths, count=20, after_s=draw.random() * 0.1)
    run.run(15.0)
    assert run.passes
    assert idle_s(run) == pytest.approx(0.0, abs=1e-9)


class WaitsForFullBatches(Scheduler):
    """Planted: it says that nothing waits while a batch is not full."""

    @property
    def queued_tokens(self) -> int:
        tokens = super().queued_tokens
        return tokens if tokens >= BATCH_TOKENS else 0


def test_a_scheduler_that_waits_for_full_batches_is_caught() -> None:
    run = Simulation(WaitsForFullBatches)
    Open(run, Team("a"), sizes(300), period_s=0.05)
    assert idle_s(run.run(5.0)) > 1.0


SPLITS = {
    "into credentials": {"lengths": (1024,), "window": 100, "credentials": 20},
    "into short sequences": {"lengths": (16,), "window": 6400},
    "into many requests": {"lengths": (1024,), "window": 3000},
    "into levels": {"lengths": (1024,), "window": 100, "levels": (INTERACTIVE, TRAINING, BULK)},
    "into everything": {
        "lengths": (5, 64, 1024),
        "window": 3000,
        "credentials": 50,
        "levels": (INTERACTIVE, BULK),
    },
}


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_splitting_its_work_gains_a_team_nothing(name: str, weight: float) -> None:
    split = SPLITS[name]
    levels = split.get("levels", (TRAINING,))
    run = Simulation()
    for number, level in enumerate(levels):
        Closed(
            run,
            Team("splitter"),
            sizes(*split["lengths"], seed=number),
            window=split["window"] // len(levels),
            credentials=split.get("credentials", 1),
            level=level,
        )
    Closed(run, Team("plain", weight=weight), sizes(1024), window=50)
    run.run(40.0)
    most = run.total() / (1 + weight)
    slack = BATCH_TOKENS + 2 * 1100
    assert run.dispatched("splitter") <= most + slack
    assert run.dispatched("plain") >= run.total() - most - slack


def test_the_machine_computes_one_batch_and_holds_one() -> None:
    run = Simulation(Fifo)
    for _ in range(4):
        job = run.submit(Team("a"), BATCH_TOKENS)
    assert job is not None
    pass_s = COST_S * cost(job)
    taken = []
    for passes in (0.0, 0.99, 1.01, 2.01, 3.01, 4.01):
        run.run(passes * pass_s)
        taken.append((len(run.batches), len(run.latencies["a"])))
    assert taken == [(2, 0), (2, 0), (3, 1), (4, 2), (4, 3), (4, 4)]
