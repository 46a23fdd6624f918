"""Who is written for, and when, among teams that take what they can, in virtual time."""

import itertools

import pytest

from teacher_server.scheduling.generation_job import GenerationJob
from teacher_server.scheduling.slots import PATIENCE_STEPS
from teacher_server.teams.declaration import Team
from tests.support.simulator import COST_S
from tests.support.text_simulator import COSTS, PACK_TOKENS, Machine

PACK_S = PACK_TOKENS * (1 + COSTS.per_row + 100 * COSTS.per_reply_byte) * 1.05 * COST_S
STEP_S = 64 * (COSTS.empty_row + 100 * COSTS.per_reply_byte + 5000 * COSTS.per_token_pair) * COST_S
"""The longest step: all slots, each far into its text."""
LIGHT = Team("light")


def endless(machine: Machine, team: Team, *, count: int, prompt: int = 300) -> None:
    """A team that has so many texts written at all times, each as long as the pool allows."""
    longest = machine.model.pool.num_pages * 64 // 2

    def again(_: object = None) -> None:
        machine.write(team, prompt, longest, ended=again)

    for _ in range(count):
        again()


def many_prompts(machine: Machine) -> None:
    for _ in range(10_000):
        machine.write(Team("prompts"), 500, 100)


def cancel_storm(machine: Machine) -> None:
    """Hundreds of texts, cancelled wherever they are, again and again."""
    jobs: list[GenerationJob] = []

    def storm() -> None:
        for job in jobs:
            machine.turns.cancel(job)
        jobs[:] = [machine.write(Team("storm"), 100 + n, 5000) for n in range(100)]
        machine.at(machine.now + 0.07, storm)

    storm()


def light(machine: Machine, period_s: float = 0.7) -> None:
    """One short text every now and then."""

    def ask() -> None:
        machine.write(LIGHT, 60, 20)
        machine.at(machine.now + period_s, ask)

    machine.at(1.0, ask)


HOSTILE = {
    "endless": lambda machine: endless(machine, Team("endless"), count=200),
    "prompts": many_prompts,
    "storm": cancel_storm,
    "scoring": lambda machine: machine.flood(Team("scoring"), 500),
}


@pytest.mark.parametrize(
    "hostile",
    [(name,) for name in HOSTILE] + list(itertools.combinations(HOSTILE, 2)) + [tuple(HOSTILE)],
)
@pytest.mark.parametrize("pages", [200])
def test_the_first_token_of_a_light_team_waits_two_packs_and_a_preemption_at_most(
    hostile: tuple[str, ...], pages: int
) -> None:
    machine = Machine(pages=pages)
    for name in hostile:
        HOSTILE[name](machine)
    light(machine)
    machine.run(3.2)
    assert len(machine.first_s["light"]) >= 3
    assert max(machine.first_s["light"]) <= 2 * PACK_S + PATIENCE_STEPS * STEP_S


def test_scoring_beside_endless_texts_loses_what_the_weights_say() -> None:
    machine = Machine()
    machine.flood(Team("scoring", weight=3.0), 500)
    endless(machine, Team("endless"), count=100)
    machine.run(4.0)
    scored, written = machine.scored["scoring"], machine.written["endless"]
    assert scored / (scored + written) == pytest.approx(0.75, abs=0.02)


def test_one_team_that_scores_and_writes_divides_its_share_between_both() -> None:
    machine = Machine()
    machine.flood(Team("both"), 500)
    endless(machine, Team("both"), count=20)
    machine.run(3.0)
    assert machine.scored["both"] == pytest.approx(machine.written["both"], rel=0.05)


def test_two_teams_of_texts_share_by_weight_whatever_they_ask_for() -> None:
    machine = Machine(max_running=16)
    endless(machine, Team("heavy", weight=2.0), count=500)
    endless(machine, Team("other"), count=20)
    machine.flood(Team("scoring"), 300)
    machine.run(4.0)
    cost = machine.written
    assert cost["heavy"] / cost["other"] == pytest.approx(2.0, rel=0.1)
    assert machine.scored["scoring"] / cost["other"] == pytest.approx(1.0, rel=0.1)


def test_texts_that_do_not_fit_side_by_side_all_end() -> None:
    machine = Machine(pages=20)
    for number in range(12):
        machine.write(Team(f"team{number % 3}"), 100 + 50 * number, 500)
    machine.run(1e6)
    assert len(machine.ended) == 12
    assert machine.slots.num_preemptions > 0
    assert machine.model.pool.num_free == 20


def test_after_thousands_of_cancelled_texts_no_page_is_lost() -> None:
    machine = Machine(pages=300)
    cancelled = 0

    def storm() -> None:
        nonlocal cancelled
        jobs = [machine.write(Team(f"team{n % 3}"), 1 + 7 * n, 400) for n in range(50)]

        def go() -> None:
            nonlocal cancelled
            for job in jobs:
                cancelled += job.state != "ended"
                machine.turns.cancel(job)
            if cancelled < 5000:
                storm()

        machine.at(machine.now + 0.05, go)

    storm()
    machine.run(1e6)
    assert cancelled >= 5000
    assert machine.model.pool.num_free == 300
    assert machine.slots.num_running == machine.slots.num_waiting == 0
    assert not machine.slots.teams
