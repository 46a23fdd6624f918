"""How long what waits would take, against how long it then takes, in virtual time."""

import pytest

from teacher_server.scheduling.scheduler import Scheduler
from teacher_server.scheduling.speed import Speed
from teacher_server.scheduling.turns import Turns
from teacher_server.teams.declaration import Team
from tests.support.text_simulator import Machine
from tests.teacher_server.scheduling.test_scheduler import make_job

SCORING, WRITING = Team("scoring"), Team("writing")


def queue_s(machine: Machine) -> float:
    return machine.turns.queue_s()


def test_nobody_knows_how_long_a_queue_takes_before_anything_was_computed() -> None:
    machine = Machine()
    assert queue_s(machine) == 0.0
    machine.score(SCORING, 500)
    machine.write(WRITING, 300, 100)
    assert queue_s(machine) == 0.0


def test_speed_follows_the_last_turns() -> None:
    speed = Speed()
    assert speed.seconds(100.0) == 0.0
    speed.record(1000.0, 1.0)
    assert speed.seconds(100.0) == pytest.approx(0.1)
    for _ in range(40):
        speed.record(100.0, 1.0)
    assert speed.seconds(100.0) == pytest.approx(1.0, rel=1e-2)


def test_sequences_take_as_long_as_was_said() -> None:
    machine = Machine()
    for number in range(600):
        machine.score(SCORING, 100 + number)
    machine.run(0.3)
    said, began = queue_s(machine), machine.now
    machine.run(1000.0)
    assert said > 3.0
    assert said == pytest.approx(machine.now - began, rel=0.01)
    assert queue_s(machine) == 0.0


@pytest.mark.parametrize("allowed", [100, 5000])
def test_texts_take_about_as_long_as_was_said(allowed: int) -> None:
    machine = Machine(max_running=16)
    for number in range(300):
        # They end after 100 tokens, whatever they may have.
        job = machine.write(WRITING, 50 + number % 400, 100)
        job.max_new_tokens = allowed
    ends_at(machine, 100)
    while len(machine.ended) < 60:
        machine.run(machine.now + 0.1)
    said, began, first = queue_s(machine), machine.now, len(machine.ended)
    left = machine.slots.num_waiting
    assert left > 150
    while len(machine.ended) < first + left:
        machine.run(machine.now + 0.1)
    assert said == pytest.approx(machine.now - began, rel=0.2)


def ends_at(machine: Machine, count: int) -> None:
    """Lets texts end after so many tokens, as if each met its stop."""
    land = machine.turns.land

    def end_early(ended: list) -> None:
        turn = machine.turns.texts.in_flight
        assert turn is not None
        early = [j for j in turn.jobs if len(j.text.new_ids) >= count and j not in ended]
        ended += [job for job in early if job.state == "running"]
        land(ended)

    machine.turns.land = end_early  # type: ignore[method-assign]


def test_what_is_scored_and_what_is_written_add_up() -> None:
    machine = Machine()
    for _ in range(150):
        machine.score(SCORING, 400)
        machine.write(WRITING, 200, 50)
    machine.run(2.0)
    both, began = queue_s(machine), machine.now
    machine.run(1000.0)
    assert both == pytest.approx(machine.now - began, rel=0.25)


def test_time_in_which_answers_have_no_room_is_counted() -> None:
    held: list[float] = []
    now, has_room = 10.0, False
    scheduler = Scheduler(
        max_batch_tokens=100, max_batch_reply_nbytes=100, max_queued_tokens=1000, clock=lambda: now
    )
    turns = Turns(scheduler, lambda _: has_room, clock=lambda: now, on_held=held.append)
    scheduler.submit(make_job())

    def wait(timeout: float | None = None) -> bool:
        nonlocal now, has_room
        now += 3.0
        has_room = len(held) == 1
        return True

    scheduler.changed.wait = wait  # type: ignore[method-assign]
    assert turns.next()
    assert held == [3.0, 3.0]


def test_waiting_for_work_is_not_being_held_up() -> None:
    held: list[float] = []
    scheduler = Scheduler(max_batch_tokens=100, max_batch_reply_nbytes=100, max_queued_tokens=1000)
    turns = Turns(scheduler, lambda _: True, clock=lambda: 0.0, on_held=held.append)

    def wait(timeout: float | None = None) -> bool:
        scheduler.closed = True
        return True

    scheduler.changed.wait = wait  # type: ignore[method-assign]
    assert turns.next() is None
    assert held == []
