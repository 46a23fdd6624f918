"""Replicas, services and tokenizers that do not belong together (row 16)."""

import time
from pathlib import Path

import pytest

from student_trainer import IncompatibleTeacher, connect
from tests.support import tiny
from tests.support.fleet import Fleet, wait_until
from tests.support.oracle import VOCAB, digest, within

SEQUENCES = tiny.random_sequences(60, VOCAB, seed=21)


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other weights."""
    return tiny.save_model(tmp_path_factory.mktemp("other"), "Gemma2", VOCAB, seed=1)


def test_two_services_in_one_list_of_addresses_are_refused(serve, folder):
    with Fleet(serve, folder, 1) as one, Fleet(serve, folder, 1, service_id="second") as two:
        with pytest.raises(IncompatibleTeacher) as caught:
            connect([*one.own, *two.own])
        for words in ("fleet", "second", two.own[0]):
            assert words in str(caught.value)
        for each in (one, two):
            each.assert_nothing_left()


def test_two_teachers_in_one_list_of_addresses_are_refused(serve, folder, other_folder):
    with Fleet(serve, folder, 1) as one, Fleet(serve, other_folder, 1) as two:
        with pytest.raises(IncompatibleTeacher) as caught:
            connect([*one.own, *two.own])
        for each in (one, two):
            assert each.describe(0).teacher_fingerprint in str(caught.value)
            each.assert_nothing_left()


@pytest.mark.parametrize("service_id", ["fleet", pytest.param("second", marks=pytest.mark.slow)])
def test_a_peer_that_is_another_teacher_or_service_is_left_out(
    serve, folder, other_folder, service_id: str
):
    strange = other_folder if service_id == "fleet" else folder
    with (
        Fleet(serve, strange, 1, service_id=service_id) as stranger,
        Fleet(serve, folder, 1, peers=stranger.own) as fleet,
        connect(fleet.own) as teacher,
    ):
        listed = 2 if service_id == "fleet" else 1
        wait_until(lambda: len(fleet.describe(0).replicas) == listed, "the peer was asked")
        began = time.monotonic()
        wanted = [digest(targets) for _, targets in teacher.stream(SEQUENCES)]
        while time.monotonic() - began < 4.0:  # longer than the list of replicas lives
            assert [digest(targets) for _, targets in teacher.stream(SEQUENCES)] == wanted
        assert teacher.replicas == fleet.own
        assert stranger.gauge(0, "teacher_streams") == 0


def test_replicas_that_do_not_see_each_other_are_both_used(serve, folder):
    with Fleet(serve, folder, 2, peers=()) as fleet, connect(fleet.own) as teacher:
        began = time.monotonic()
        wanted = [digest(targets) for _, targets in teacher.stream(SEQUENCES)]
        while time.monotonic() - began < 8.0:  # the lists of both are asked for several times
            got = within(15, lambda: [digest(t) for _, t in teacher.stream(SEQUENCES, ahead=60)])
            assert got == wanted
        victim = fleet.own.index(teacher.replicas[0])
        fleet.kill(victim)
        assert within(15, lambda: [digest(t) for _, t in teacher.stream(SEQUENCES)]) == wanted
