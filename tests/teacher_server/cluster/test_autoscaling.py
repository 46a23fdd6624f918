"""The policy that decides how many replicas there should be: its edges, and bursts in virtual time."""

from collections.abc import Mapping, Sequence
from functools import partial

import pytest

from teacher_server.cluster.autoscaling import (
    FULL,
    GROWTH,
    USUAL_LOADING_S,
    Fleet,
    Load,
    Settings,
    State,
    decide,
)
from teacher_server.config import ServeConfig
from tests.support.scaling_scenarios import (
    KINDS,
    ByWaitingTokens,
    Kind,
    find_misses,
    judge,
    make_world,
)
from tests.support.scaling_simulator import ScalingSimulation

DEFAULTS = Settings(
    *(
        ServeConfig.model_fields[name].default
        for name in ("target_queue_s", "scale_up_after_s", "scale_down_after_s")
    )
)
IDLE = Load(0.0, 0.0)
LONG = Load(30.0, 1.0)


class Run:
    """Calls the policy once a second, and does what it says."""

    def __init__(
        self, *names: str, least: int = 1, most: int = 8, settings: Settings = DEFAULTS
    ) -> None:
        self.now_s = 1000.0
        self.target = max(least, len(names))
        self.loads: dict[str, Load | None] = dict.fromkeys(names, IDLE)
        self.state: State | None = None
        self._bounds = (least, most)
        self._settings = settings

    def wait(self, seconds: float, load: Load | Mapping[str, Load | None] | None) -> list[int]:
        """Lets time pass while replicas say the same; returns the targets that there were."""
        targets = []
        for _ in range(int(seconds)):
            self.now_s += 1
            said = load if isinstance(load, Mapping) else dict.fromkeys(self.loads, load)
            self.loads = {name: said.get(name) for name in self.loads}
            fleet = Fleet(self.now_s, self.target, self.loads, *self._bounds)
            self.target, self.state = decide(self._settings, fleet, self.state)
            targets.append(self.target)
        return targets

    def start(self, *names: str) -> None:
        """Lets replicas become ready."""
        self.loads |= dict.fromkeys(names)

    def lose(self, *names: str) -> None:
        for name in names:
            del self.loads[name]


def test_a_queue_that_stays_is_answered_by_growth_and_only_after_a_while() -> None:
    run = Run("a")
    assert set(run.wait(DEFAULTS.up_after_s, LONG)) == {1}
    assert run.wait(1, LONG) == [GROWTH]


def test_nothing_more_is_ordered_while_something_loads() -> None:
    run = Run("a")
    assert set(run.wait(300, LONG)[25:]) == {GROWTH}
    run.start("b")  # one of two
    assert set(run.wait(100, LONG)) == {GROWTH}
    run.start("c")
    assert set(run.wait(DEFAULTS.up_after_s, LONG)) == {GROWTH}  # first they have to be of use
    assert run.wait(1, LONG) == [8]  # 9 would be too many


def test_an_order_is_no_larger_than_the_queue_is_long() -> None:
    run = Run("a", "b", most=50)
    assert run.wait(30, Load(1.7 * DEFAULTS.target_queue_s, 1.0))[-1] == 4


def test_what_keeps_more_busy_for_longer_than_they_load_is_ordered_at_once() -> None:
    run = Run("a", most=50)
    assert run.wait(30, Load(10.5 * USUAL_LOADING_S, 1.0))[-1] == 10


def test_a_queue_that_will_be_gone_before_another_replica_is_there_is_left_alone() -> None:
    run = Run("a")
    for queue_s in range(40, 0, -1):  # by a second each second
        assert run.wait(1, Load(queue_s, 1.0)) == [1]
    slow = Run("a")
    targets = [slow.wait(1, Load(40 - 0.2 * second, 1.0))[0] for second in range(40)]
    assert targets[-1] > 1  # 60 s later there would be 28 s


def test_loading_is_measured_and_what_will_be_gone_follows_it() -> None:
    run = Run("a")
    run.wait(21, LONG)
    assert run.target == GROWTH
    run.wait(299, LONG)
    run.start("b", "c")
    run.wait(1, IDLE)
    assert run.state is not None
    assert run.state.loading_s == pytest.approx(300, abs=1)
    # Falls by 0.2 s per second: in 300 s it will be gone, which was not so within 60 s.
    targets = [run.wait(1, Load(40 - 0.2 * second, 1.0))[0] for second in range(40)]
    assert set(targets) == {3}


def test_a_queue_that_others_do_not_get_at_brings_no_replica() -> None:
    run = Run("a", "b", "c")
    one = {"a": Load(300.0, 1.0), "b": IDLE, "c": IDLE}  # through a tunnel, say
    assert set(run.wait(200, one)) == {3}


def test_before_anything_was_said_nothing_changes() -> None:
    run = Run("a", "b")
    assert set(run.wait(600, None)) == {2}
    starting = Run(least=2)  # none runs yet
    assert set(starting.wait(600, None)) == {2}


def test_a_policy_that_has_just_started_does_not_stop_what_it_finds() -> None:
    run = Run("a", "b", "c")  # Serve's controller has been replaced: the state is gone
    targets = run.wait(300, IDLE)
    assert targets.index(1) == DEFAULTS.down_after_s


def test_how_long_replicas_have_been_loading_already_is_not_guessed() -> None:
    run = Run("a")
    run.target = 3
    run.wait(5, LONG)
    run.start("b", "c")
    run.wait(1, LONG)
    assert run.state is not None
    assert run.state.loadings_s == ()
    first = Run(least=2)  # while a service that starts is seen from its beginning
    first.wait(50, None)
    first.start("a", "b")
    first.wait(1, IDLE)
    assert first.state is not None
    assert first.state.loadings_s == (50.0, 50.0)


def test_idle_replicas_go_all_but_the_least_and_never_the_last() -> None:
    run = Run("a", "b", "c", "d", least=2)
    assert run.wait(300, IDLE)[-1] == 2
    last = Run("a", "b", least=0)
    assert set(last.wait(1000, IDLE)[260:]) == {1}


def test_replicas_that_are_busy_without_a_queue_stay() -> None:
    run = Run("a", "b", "c", "d")
    assert set(run.wait(1000, Load(0.5, 0.8))) == {4}  # 3.2 of them are busy: 3 would not do
    less = Load(0.5, 0.6)
    assert 4 * less.busy < 3 * FULL
    assert run.wait(300, less)[-1] == 3


def test_a_pause_of_some_minutes_changes_nothing() -> None:
    run = Run("a", "b", "c")
    for _ in range(5):
        assert set(run.wait(DEFAULTS.down_after_s - 20, IDLE)) == {3}
        assert set(run.wait(30, Load(1.0, 0.9))) == {3}


def test_at_the_most_a_queue_changes_nothing() -> None:
    run = Run("a", "b", most=2)
    assert set(run.wait(1000, LONG)) == {2}


def test_a_most_that_was_lowered_counts_at_once() -> None:
    run = Run("a", "b", "c", most=2)
    assert run.wait(1, LONG) == [2]


def test_a_replica_that_was_lost_is_waited_for() -> None:
    run = Run("a", "b")
    run.wait(10, Load(1.0, 0.9))
    run.lose("b")
    assert set(run.wait(120, LONG)) == {2}  # Serve starts another one
    run.start("c")
    run.wait(1, LONG)
    assert run.state is not None
    assert run.state.loadings_s == (120.0,)


def test_a_replica_that_is_lost_while_it_loads_is_still_on_order() -> None:
    run = Run("a")
    run.wait(21, LONG)
    assert run.target == 3
    run.start("b")
    run.wait(5, LONG)
    run.lose("b")  # as soon as it was there; two are loading again
    assert set(run.wait(100, LONG)) == {3}
    assert run.state is not None
    assert len(run.state.loading_since_s) == 2


def test_an_order_is_taken_back_when_nobody_has_needed_it_for_minutes() -> None:
    run = Run("a")
    run.wait(30, LONG)
    assert run.target == 3
    assert run.wait(300, IDLE)[-1] == 1  # though neither has ever come
    assert run.state is not None
    assert run.state.loading_since_s == ()


def test_without_any_replica_the_number_that_was_wanted_stays() -> None:
    run = Run("a", "b", "c")
    run.wait(5, LONG)
    run.lose("a", "b", "c")
    assert set(run.wait(500, None)) == {3}


def runs(kind: Kind, policy: str, seeds: Sequence[int]) -> list[list[str]]:
    """Which bounds a policy misses, in worlds of a kind with shorter bursts than the benchmark's."""
    found = []
    for seed in seeds:
        world = make_world(kind, seed, longest_s=1200.0)
        made = partial(decide, DEFAULTS) if policy == "seconds" else ByWaitingTokens(world)
        found.append(find_misses(world, judge(ScalingSimulation(world, made).run())))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_bursts_neither_shake_the_number_of_replicas_nor_wait_long_nor_leave_idle_ones(
    kind: Kind,
) -> None:
    assert runs(kind, "seconds", range(100, 112)) == [[]] * 12  # 48 bursts of each kind


def test_the_simulation_finds_what_was_wrong_with_waiting_tokens() -> None:
    assert all(
        any("turns" in miss for miss in missed) for missed in runs(KINDS[0], "tokens", [1, 2])
    )
