"""Decides how many replicas there should be, in seconds of queue.

Each replica says how long what waits at it would take at the rate that it has measured itself, and how busy it has
been. More are ordered when there is too much to do for those that run, and will still be when new ones could be
ready; none while some are still loading. How long that takes is measured. Replicas go when the others would have
been enough for minutes.

Trainers ask for more only as they use what they got, so a queue does not say how many replicas would be enough; it
only says that those there are were not. Hence the number at most doubles with each order, unless more of them
would be busy for longer than they took to load with nothing but what waits now. And an empty queue does not say
that replicas are idle: that is what busy is for.

Nothing here keeps time or state, and nothing knows of Ray: `decide` gets both, so that a simulation runs the same
decisions in virtual time (benchmarks/autoscaling.py). Ray Serve ships this module to its controller by value, so
it imports the standard library alone.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

GROWTH = 3
"""An order makes of n replicas at most so many times n."""
FULL = 0.85
"""Share of the time for which a replica may be busy; what keeps it busier needs another one."""
SHARED = 0.6
"""A queue that fewer than this part of the replicas have is one that others do not get at."""
USUAL_LOADING_S = 60.0
"""How long loading takes, until it has been measured."""
NUM_LOADINGS = 5
"""So many measurements are remembered; their median counts."""
TREND_S = 40.0
"""Over this time at most it is judged whether the queue is becoming shorter."""
SAMPLE_S = 1.0
"""The queue is remembered so often."""
STRETCH_S = 20.0
"""What is needed is averaged over so long, and the highest average counts."""


class Load(NamedTuple):
    """What a replica says of itself."""

    queue_s: float
    """How long it would take to compute what waits at it."""
    busy: float
    """Share of the last seconds in which it was computing, from 0 to 1."""


@dataclass(frozen=True, slots=True)
class Settings:
    """When replicas come and go."""

    target_queue_s: float
    """Seconds of waiting work per replica above which others are started."""
    up_after_s: float
    """For so long there has to be more, without becoming less so fast that loading would take longer."""
    down_after_s: float
    """For so long fewer replicas would have to have been enough."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """The replicas as they are now."""

    now_s: float
    target: int
    """How many there should be: those that run and those that are loading."""
    loads: Mapping[str, Load | None]
    """Of each replica that runs; None: it has not said anything yet."""
    min_replicas: int
    max_replicas: int


class Stretch(NamedTuple):
    """How many replicas were needed for a while."""

    since_s: float
    num_samples: int
    busy: float
    """Sum of the samples, in replicas that are always busy. One that has not said anything counts as busy."""
    crowded: int
    """How many there were to be while the queue was above the target; 0 if it never was."""

    @property
    def needed(self) -> int:
        return max(self.crowded, math.ceil(self.busy / self.num_samples / FULL))


@dataclass(frozen=True, slots=True)
class State:
    """What has to be remembered from one decision to the next."""

    since_s: float
    """When the first decision was made."""
    known: frozenset[str] = frozenset()
    """Replicas that ran at the last decision."""
    loading_since_s: tuple[float, ...] = ()
    """When each replica that is loading was ordered, or lost, the oldest first."""
    loadings_s: tuple[float, ...] = ()
    """How long the last ones took to load."""
    queues: tuple[tuple[float, float], ...] = ()
    """(when, seconds of queue per replica) lately, since it is above the target, with the replicas that
    run now."""
    crowded_since_s: float | None = None
    """Since when that is so."""
    stretches: tuple[Stretch, ...] = ()
    """What was needed lately, the oldest first."""

    @property
    def loading_s(self) -> float:
        """How long a replica takes to load."""
        return statistics.median(self.loadings_s) if self.loadings_s else USUAL_LOADING_S


def decide(settings: Settings, fleet: Fleet, state: State | None) -> tuple[int, State]:
    """Decides how many replicas there should be; returns it with the state for the next decision."""
    state = _follow_loading(fleet, state or _begin(fleet))
    if not fleet.loads:
        return _bound(fleet, fleet.target), state
    loads = [load for load in fleet.loads.values() if load is not None]
    queue_s = sum(load.queue_s for load in loads) / len(fleet.loads)
    is_crowded = queue_s > settings.target_queue_s
    since_s = state.crowded_since_s if state.crowded_since_s is not None else fleet.now_s
    busy = sum(load.busy for load in loads) + len(fleet.loads) - len(loads)
    sample = Stretch(fleet.now_s, 1, busy, fleet.target if is_crowded else 0)
    state = replace(
        state,
        queues=_remember(state.queues, fleet.now_s, queue_s) if is_crowded else (),
        crowded_since_s=since_s if is_crowded else None,
        stretches=_remember_needed(state.stretches, sample, settings.down_after_s),
    )
    wanted = fleet.target
    if is_crowded and fleet.now_s - since_s >= settings.up_after_s:
        wanted = _count_wanted(settings, fleet, loads, state)
    elif fleet.now_s - state.since_s >= settings.down_after_s:
        wanted = min(fleet.target, max(stretch.needed for stretch in state.stretches))
    wanted = _bound(fleet, wanted)
    kept = state.loading_since_s[: max(0, wanted - len(fleet.loads))]
    ordered = (fleet.now_s,) * max(0, wanted - fleet.target)
    return wanted, replace(state, loading_since_s=kept + ordered)


def _begin(fleet: Fleet) -> State:
    """Returns the state before the first decision."""
    # Beside some that run already, nobody knows for how long others have been loading.
    num_loading = max(0, fleet.target - len(fleet.loads)) if fleet.loads else 0
    return State(
        fleet.now_s, known=frozenset(fleet.loads), loading_since_s=(math.nan,) * num_loading
    )


def _follow_loading(fleet: Fleet, state: State) -> State:
    """Sees which replicas have become ready, and which are loading since now because others were lost."""
    new = fleet.loads.keys() - state.known
    ready = state.loading_since_s[: len(new)]
    loading = state.loading_since_s[len(new) :]
    num_loading = max(0, fleet.target - len(fleet.loads))
    loading = (*loading, *(fleet.now_s,) * (num_loading - len(loading)))[:num_loading]
    took = (fleet.now_s - since_s for since_s in ready if not math.isnan(since_s))
    measured = (*state.loadings_s, *took)
    is_same = fleet.loads.keys() == state.known
    return replace(
        state,
        known=frozenset(fleet.loads),
        loading_since_s=loading,
        loadings_s=measured[-NUM_LOADINGS:],
        # What the queue was like with other replicas says nothing of these.
        queues=state.queues if is_same else (),
        crowded_since_s=state.crowded_since_s if is_same else None,
    )


def _count_wanted(settings: Settings, fleet: Fleet, loads: Sequence[Load], state: State) -> int:
    """Counts the replicas for what waits; those there are, if others would not help."""
    running = len(fleet.loads)
    sharing = sum(load.queue_s > settings.target_queue_s / 2 for load in loads)
    if state.loading_since_s or sharing < SHARED * running:
        return fleet.target
    waiting_s = sum(load.queue_s for load in loads)
    expected_s = waiting_s / running + min(0.0, _trend(state.queues)) * state.loading_s
    if expected_s < settings.target_queue_s:
        return fleet.target
    most = max(GROWTH * running, math.floor(waiting_s / state.loading_s))
    return max(fleet.target, min(most, math.ceil(waiting_s / settings.target_queue_s)))


def _trend(queues: Sequence[tuple[float, float]]) -> float:
    """Returns how fast the queue grows, in seconds of queue per second, by least squares."""
    if len(queues) < 2:
        return 0.0
    times, lengths = zip(*queues, strict=True)
    return statistics.linear_regression(times, lengths).slope


def _remember(
    queues: tuple[tuple[float, float], ...], now_s: float, queue_s: float
) -> tuple[tuple[float, float], ...]:
    if queues and now_s - queues[-1][0] < SAMPLE_S:
        return queues
    return (*(one for one in queues if now_s - one[0] <= TREND_S), (now_s, queue_s))


def _remember_needed(
    stretches: tuple[Stretch, ...], sample: Stretch, keep_s: float
) -> tuple[Stretch, ...]:
    stretch_s = min(STRETCH_S, keep_s / 4)
    if stretches and sample.since_s - stretches[-1].since_s < stretch_s:
        last = stretches[-1]
        longer = Stretch(
            last.since_s,
            last.num_samples + 1,
            last.busy + sample.busy,
            max(last.crowded, sample.crowded),
        )
        return (*stretches[:-1], longer)
    kept = (one for one in stretches if sample.since_s - one.since_s < keep_s + stretch_s)
    return (*kept, sample)


def _bound(fleet: Fleet, count: int) -> int:
    return max(1, fleet.min_replicas, min(fleet.max_replicas, count))


class Context(Protocol):
    """What is used of Ray Serve's AutoscalingContext."""

    running_replicas: Sequence[Any]
    raw_metrics: Mapping[str, Mapping[Any, Sequence[Any]]] | None
    target_num_replicas: int
    capacity_adjusted_min_replicas: int
    capacity_adjusted_max_replicas: int
    current_time: float
    policy_state: Mapping[str, Any]


class Autoscaler:
    """Decides for Ray Serve, which calls it several times a second and keeps its state in between.

    Serve makes one out of the arguments, which travel as JSON. It forgets the state when its controller starts
    again and with each update of the application; nothing is scaled down then until the time for that has passed
    again.
    """

    def __init__(self, target_queue_s: float, up_after_s: float, down_after_s: float) -> None:
        self._settings = Settings(target_queue_s, up_after_s, down_after_s)

    def __call__(self, context: Context) -> tuple[int, dict[str, State]]:
        fleet = Fleet(
            now_s=context.current_time,
            target=context.target_num_replicas,
            loads={one.unique_id: _last_load(context, one) for one in context.running_replicas},
            min_replicas=context.capacity_adjusted_min_replicas,
            max_replicas=context.capacity_adjusted_max_replicas,
        )
        count, state = decide(self._settings, fleet, context.policy_state.get("state"))
        return count, {"state": state}


def _last_load(context: Context, replica: Any) -> Load | None:
    """Returns what a replica said last."""
    metrics = context.raw_metrics or {}
    values = [metrics.get(name, {}).get(replica, ())[-1:] for name in Load._fields]
    return Load(*(last.value for (last,) in values)) if all(values) else None
