import pytest

from teacher_server.monitoring.team_stats import Dispatched, TeamStats


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stats(clock: Clock) -> TeamStats:
    return TeamStats(clock)


def jobs(team: str, count: int, *, tokens: int = 32, cost: float = 40.0, waited_s: float = 0.01):
    return [Dispatched(team, tokens, cost, waited_s)] * count


def test_tokens_in_flight_are_those_admitted_and_not_answered(stats: TeamStats) -> None:
    stats.admitted("a", 64)
    stats.admitted("a", 32)
    stats.answered("a", 64)
    (a,) = stats.teams({"a": 32})
    assert (a.team, a.tokens_in_flight, a.queued_tokens) == ("a", 32, 32)
    stats.answered("a", 32)
    assert stats.teams({}) == []


def test_shares_are_of_cost_and_entitlement_is_by_weight(stats: TeamStats) -> None:
    stats.dispatched(jobs("a", 3) + jobs("b", 1), {"a": 3.0, "b": 1.0})
    a, b = stats.teams({})
    assert (a.share, b.share) == (0.75, 0.25)
    assert (a.entitled, b.entitled) == (0.75, 0.25)
    assert (a.weight, b.weight) == (3.0, 1.0)


def test_a_team_that_came_late_is_not_entitled_to_what_was_before(
    stats: TeamStats, clock: Clock
) -> None:
    for second in range(40):
        clock.now = 1000.0 + second
        late = second >= 30
        work = {"a": 1.0, "b": 1.0} if late else {"a": 1.0}
        stats.dispatched(jobs("a", 2) if not late else jobs("a", 1) + jobs("b", 1), work)
    a, b = stats.teams({})
    assert b.share == b.entitled == pytest.approx(0.125)
    assert a.share == a.entitled == pytest.approx(0.875)


def test_everything_is_forgotten_after_a_minute(stats: TeamStats, clock: Clock) -> None:
    stats.dispatched(jobs("a", 5), {"a": 1.0})
    stats.rejected("a")
    clock.now += 59.0
    (a,) = stats.teams({})
    assert a.rejected == 1
    assert a.tokens_per_s == pytest.approx(5 * 32 / 59)
    clock.now += 1.0
    assert stats.teams({}) == []
    assert len(stats._slots) <= 2


def test_the_cost_by_which_replicas_are_weighed_does_not_depend_on_their_age() -> None:
    """Else shares of a service would be wrong for a minute after a replica came, and drift."""
    for age_s in (0.0, 20.0, 500.0):
        clock = Clock()
        stats = TeamStats(clock)
        clock.now += age_s
        stats.dispatched(jobs("a", 5), {"a": 1.0})
        for _ in range(3):
            (a,) = stats.teams({})
            assert a.cost == 5 * 40
            clock.now += 10.0


def test_waiting_is_reported_up_to_a_tenth_too_high(stats: TeamStats) -> None:
    for number in range(100):
        stats.dispatched(jobs("a", 1, waited_s=(number + 1) / 100), {"a": 1.0})
    (a,) = stats.teams({})
    assert 0.95 <= a.waiting_p95_s <= 0.95 * 1.1


def test_a_team_that_only_waits_is_entitled_too(stats: TeamStats) -> None:
    stats.dispatched(jobs("a", 1), {"a": 1.0, "b": 1.0})
    a, b = stats.teams({"b": 96})
    assert (b.share, b.entitled, b.queued_tokens, b.waiting_p95_s) == (0.0, 0.5, 96, 0.0)
    assert a.share == 1.0
