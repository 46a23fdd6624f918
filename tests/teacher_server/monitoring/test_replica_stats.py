import pytest

from teacher_server.monitoring.replica_stats import ReplicaStats


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_means_and_rates_are_of_the_last_minute() -> None:
    clock = Clock()
    counter = ReplicaStats(clock)
    nothing = counter.numbers()
    assert (nothing.busy, nothing.stage_s, nothing.encode_s, nothing.tokens_per_s) == (0, {}, 0, 0)
    counter.passed(100, {"forward": 0.2, "head": 0.1})
    counter.passed(300, {"forward": 0.4, "head": 0.3})
    counter.computed(1.0)
    counter.encoded(0.01, 0.004)
    counter.encoded(0.03, 0.006)
    clock.now += 10
    numbers = counter.numbers(computing_s=1.0)
    assert numbers.pass_tokens == 200
    assert numbers.stage_s == pytest.approx({"forward": 0.3, "head": 0.2})
    assert numbers.compact_s == pytest.approx(0.005)
    assert numbers.encode_s == pytest.approx(0.02)
    assert numbers.tokens_per_s == 40
    assert numbers.busy == pytest.approx(0.2)
    clock.now += 60
    assert counter.numbers() == nothing


def test_how_busy_a_replica_was_follows_the_last_seconds() -> None:
    clock = Clock()
    counter = ReplicaStats(clock)
    clock.now += 100
    assert counter.busy_shares(20) == (0.0, 0.0)
    counter.computed(10.0)
    counter.held(2.0)
    assert counter.busy_shares(20) == pytest.approx((0.5, 0.1))
    assert counter.busy_shares(20, computing_s=5.0) == pytest.approx((0.75, 0.1))
    assert counter.busy_shares(20, computing_s=50.0) == pytest.approx((1.0, 0.1))
    clock.now += 21
    assert counter.busy_shares(20) == (0.0, 0.0)


def test_a_pass_longer_than_the_window_is_no_more_than_all_of_the_time() -> None:
    clock = Clock()
    counter = ReplicaStats(clock)
    clock.now += 90
    counter.computed(90.0)
    assert counter.numbers().busy == 1.0
