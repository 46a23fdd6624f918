"""Replicas that answer requests with INTERNAL: some of them, all of them, once."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from student_trainer import TeacherInternalError, connect
from tests.support import tiny
from tests.support.fleet import Fleet
from tests.support.oracle import VOCAB, digest, within

SEQUENCES = tiny.random_sequences(80, VOCAB, seed=13)


def breakable(signs: Path) -> None:
    """Runs in the service: it fails on everything while `signs` has a file named after its port."""
    from teacher_server.engine.model import TeacherModel
    from teacher_server.engine.packing import SHORT
    from teacher_server.replica import Replica

    start, hidden_states = Replica.start, TeacherModel.hidden_states
    ports: list[int] = []

    async def started(self: Replica, *arguments, **options) -> int:
        ports.append(await start(self, *arguments, **options))
        return ports[0]

    def failing(self: TeacherModel, *arguments):
        pack = arguments[-1]
        # A known answer comes out: else the replica would end, and be no replica that only fails.
        is_known = (len(pack.members), pack.num_tokens) == (1, SHORT // 2)
        if ports and not is_known and (sign := signs / str(ports[0])).exists():
            if sign.read_text() == "once":
                sign.unlink()
            raise ValueError("broken for the test")
        return hidden_states(self, *arguments)

    Replica.start, TeacherModel.hidden_states = started, failing


@pytest.fixture(scope="module")
def signs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("signs")


@pytest.fixture(scope="module")
def fleet(serve, folder, signs: Path) -> Iterator[Fleet]:
    with Fleet(serve, folder, 2, hook=partial(breakable, signs)) as fleet:
        fleet.wait_known()
        yield fleet


@pytest.fixture(scope="module")
def wanted(fleet: Fleet) -> list[str]:
    with connect(fleet.own) as teacher:
        return [digest(targets) for _, targets in teacher.stream(SEQUENCES)]


@pytest.fixture(autouse=True)
def _repaired(signs: Path) -> Iterator[None]:
    yield
    for sign in signs.iterdir():
        sign.unlink()


def sign_of(fleet: Fleet, index: int, signs: Path) -> Path:
    return signs / fleet.own[index].rpartition(":")[2]


@pytest.mark.parametrize("broken", [0, 1])
def test_a_replica_that_fails_on_everything_does_not_end_the_run(
    fleet: Fleet, wanted, signs: Path, broken: int
):
    sign_of(fleet, broken, signs).touch()
    with connect(fleet.own) as teacher:
        got = within(60, lambda: [digest(t) for _, t in teacher.stream(SEQUENCES, ahead=8)])
        assert got == wanted
        # It has the fewest outstanding tokens all the time, and would be asked nearly always.
        assert 0 < teacher.counters.resent < len(SEQUENCES) // 2
        assert teacher.counters.reconnects == 0


def test_a_replica_that_is_repaired_is_asked_again(fleet: Fleet, wanted, signs: Path):
    sign = sign_of(fleet, 0, signs)
    sign.write_text("once")
    with connect(fleet.own) as teacher:
        for _ in range(60):
            assert within(30, lambda: [digest(t) for _, t in teacher.stream(SEQUENCES)]) == wanted
            if not sign.exists() and not teacher._session._dispatch._distrusted:
                break
        else:
            raise AssertionError("the replica stays out of use")
        assert len(teacher.replicas) == 2


def test_a_failure_of_the_only_replica_is_asked_again(fleet: Fleet, signs: Path):
    sign = sign_of(fleet, 0, signs)
    with connect(fleet.own[0]) as teacher:
        fleet.kill(1)
        try:
            expected = within(60, lambda: [digest(t) for _, t in teacher.stream(SEQUENCES[:4])])
            sign.write_text("once")
            got = within(60, lambda: [digest(t) for _, t in teacher.stream(SEQUENCES[:4])])
            assert got == expected
            assert not sign.exists()
        finally:
            fleet.start(1)


def test_replicas_that_all_fail_are_an_error_with_the_incident(fleet: Fleet, wanted, signs: Path):
    for index in range(2):
        sign_of(fleet, index, signs).touch()
    with (
        connect(fleet.own) as teacher,
        pytest.raises(TeacherInternalError, match=r"stream item 0.*incident"),
    ):
        within(30, lambda: list(teacher.stream(SEQUENCES)))
