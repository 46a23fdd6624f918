"""Bursts of trainers of several kinds, the policy that was replaced, and what makes a run good.

Every world is drawn by a seed: 10 to 200 trainers that keep 0.3 to 14 replicas busy for 10 to 50 minutes, four
times with some minutes between them, on replicas of 10,000 to 100,000 tokens per second.
"""

import math
import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

from teacher_server.cluster.autoscaling import Fleet
from tests.support.scaling_simulator import Burst, ScalingSimulation, Second, World

Kind = Literal["look-ahead 30s", "look-ahead in batches", "with pauses", "slow reports", "deaths"]
KINDS: tuple[Kind, ...] = get_args(Kind)
BURSTS = 4


def make_world(kind: Kind, seed: int, *, longest_s: float = 3000.0) -> World:
    """Draws a world of a kind."""
    draw = random.Random(f"{kind} {seed}")
    rate = draw.choice([10_000.0, 33_000.0, 100_000.0])
    made: list[Burst] = []
    now = 120.0
    for _ in range(BURSTS):
        trainers, demand = draw.randint(10, 200), draw.uniform(0.3, 14.0)
        step_s = math.exp(draw.uniform(math.log(0.5), math.log(4.0)))
        pauses = kind == "with pauses"
        end_s = now + draw.uniform(600.0, longest_s)
        made.append(
            Burst(
                now,
                end_s,
                trainers,
                step_s,
                batch_tokens=round(demand * rate * step_s / trainers),
                window=draw.choice([4, 8, 16]) if kind == "look-ahead in batches" else None,
                stagger_s=draw.choice([1.0, 20.0, 60.0]),
                pause_every_s=draw.uniform(300, 900) if pauses else math.inf,
                pause_s=draw.uniform(20, 150) if pauses else 0.0,
            )
        )
        now = end_s + draw.uniform(400, 900)
    slow = kind == "slow reports"
    return World(
        made,
        now,
        tokens_per_s=rate,
        rate_noise=draw.choice([0.05, 0.1, 0.2]),
        report_every_s=10.0 if slow else draw.choice([2.0, 5.0]),
        report_delay_s=5.0 if slow else draw.choice([0.5, 2.0]),
        deaths_per_hour=0.5 if kind == "deaths" else 0.0,
        seed=seed,
    )


class ByWaitingTokens:
    """The policy that was replaced: a replica for each full target of waiting tokens.

    Ray Serve took the mean over `look_back_s` and let the number come true once it had been higher or lower for
    as long as the delays say.
    """

    def __init__(
        self,
        world: World,
        *,
        target_tokens: int = 1 << 14,
        look_back_s: float = 15.0,
        up_after_s: float = 10.0,
        down_after_s: float = 300.0,
    ) -> None:
        self._world = world
        self._target_tokens = target_tokens
        self._look_back_s = look_back_s
        self._delays_s = {1: up_after_s, -1: down_after_s}
        self._sums: list[float] = []
        self._direction, self._since_s = 0, 0.0

    def __call__(self, fleet: Fleet, state: Any) -> tuple[int, None]:
        queued_s = sum(load.queue_s for load in fleet.loads.values() if load is not None)
        self._sums = [*self._sums, queued_s * self._world.tokens_per_s][-int(self._look_back_s) :]
        tokens = sum(self._sums) / len(self._sums)
        wanted = math.ceil(tokens / self._target_tokens)
        wanted = max(fleet.min_replicas, min(fleet.max_replicas, wanted))
        direction = (wanted > fleet.target) - (wanted < fleet.target)
        if direction != self._direction:
            self._direction, self._since_s = direction, fleet.now_s
        if direction and fleet.now_s - self._since_s >= self._delays_s[direction]:
            self._direction = 0
            return wanted, None
        return fleet.target, None


class Verdict(NamedTuple):
    """Judges a run."""

    turns: int
    """Most changes of direction of the target in one burst, the first step counting as one."""
    queue_p95_s: float
    """95th percentile of the queue in seconds while trainers ran."""
    idle_s: float
    """How long after the end of a burst there was at most more than the minimum."""
    surplus_s: float
    """How long at most there were clearly more replicas than were needed."""
    replica_hours: float
    best_hours: float
    """Of somebody who knows all bursts beforehand and holds what they can keep busy."""
    speed: float
    """Tokens that trainers used, of those that they would have used without waiting."""


def judge(run: ScalingSimulation) -> Verdict:
    """Judges a run."""
    world, seconds = run.world, run.seconds
    starts = [burst.start_s for burst in world.bursts]
    turns, idle_s = 0, 0.0
    for start_s, end_s in zip(starts, [*starts[1:], world.end_s], strict=True):
        targets = [second.target for second in seconds[int(start_s) : int(end_s)]]
        steps = [b > a for a, b in pairwise(targets) if a != b]
        turns = max(turns, sum(a != b for a, b in pairwise([None, *steps])))
    for burst, next_s in zip(world.bursts, [*starts[1:], world.end_s], strict=True):
        after = seconds[int(burst.end_s) : int(next_s)]
        idle_s = max(idle_s, sum(second.held > world.min_replicas for second in after))
    waits = sorted(second.queue_s for second in seconds if second.demand)
    best = _best_hours(world, seconds)
    wanted = sum(min(second.demand, world.max_replicas) for second in seconds)
    return Verdict(
        turns=turns,
        queue_p95_s=waits[int(0.95 * len(waits))] if waits else 0.0,
        idle_s=idle_s,
        surplus_s=_longest(seconds),
        replica_hours=sum(second.held for second in seconds) / 3600,
        best_hours=best,
        speed=sum(second.used for second in seconds) / wanted if wanted else 1.0,
    )


def find_misses(world: World, verdict: Verdict) -> list[str]:
    """Says which bounds a run misses."""
    turns = 4 if world.deaths_per_hour else 2
    return [
        f"{name} {value:.0f} > {most:.0f}"
        for name, value, most in (
            ("turns", verdict.turns, turns),
            ("queue_p95_s", verdict.queue_p95_s, 2 * world.loading_s),
            ("idle_s", verdict.idle_s, 300),
        )
        if value > most
    ]


def _best_hours(world: World, seconds: Sequence[Second]) -> float:
    wanted = [
        max(world.min_replicas, min(world.max_replicas, math.ceil(second.demand)))
        for second in seconds
    ]
    ordered = sum(max(0, b - a) for a, b in pairwise(wanted))
    return (sum(wanted) + ordered * world.loading_s) / 3600


def _longest(seconds: Sequence[Second]) -> float:
    """How long at most a replica could have been missed while the others were busy for 3/4 of the time."""
    longest = now = 0
    for second in seconds:
        others = second.rate * (second.ready - 1) / max(1, second.ready)
        now = now + 1 if second.ready > 1 and 0.75 * others > second.demand else 0
        longest = max(longest, now)
    return float(longest)
