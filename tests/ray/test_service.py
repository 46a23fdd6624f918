"""A service on Ray, as operators start it and as trainers see it."""

import contextlib
import os
import shutil
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.ray.conftest import VOCAB, Launched, describe, members, trainer, wait_for
from tests.support.http2 import Peer

AGENTS = {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}

pytestmark = pytest.mark.ray


def test_replicas_know_each_other_and_have_ports_of_their_own(pair: Launched) -> None:
    assert pair.output() == f"ready {pair.address}\n"
    info = describe(pair.address)
    replicas = members(pair.address)
    assert info.replica_id in replicas
    assert len({pair.address, *replicas.values()}) == 3
    for replica_id, address in replicas.items():
        other = describe(address)
        assert other.replica_id == replica_id
        assert other.service_id == info.service_id
        assert other.teacher_fingerprint == info.teacher_fingerprint
        assert members(address) == replicas


def listening(pids: set[int]) -> set[str]:
    """The hexadecimal addresses on which these processes listen for TCP."""
    sockets = set()
    for pid in pids:
        for file in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                sockets.add(os.readlink(file))
            except OSError:
                continue
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.add(fields[1].partition(":")[0])
    return found


def test_everything_listens_on_loopback_and_no_argument_has_the_token(pair: Launched) -> None:
    processes = pair.processes()
    assert len(pair.replica_pids()) == 2
    loopback = {"0100007F", "0" * 16 + "FFFF0000" + "0100007F"}
    assert listening(set(processes)) <= loopback
    token = pair.environment["RAY_AUTH_TOKEN"]
    assert not any(token in command for command in processes.values())
    assert token not in pair.log()


def test_replicas_get_as_much_of_the_machine_as_other_programs(pair: Launched) -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert [os.getpriority(os.PRIO_PROCESS, pid) for pid in pair.replica_pids()] == [own, own]


def test_a_killed_replica_is_forgotten_and_replaced(pair: Launched) -> None:
    before = members(pair.address)
    with trainer(pair.address):
        os.kill(pair.replica_pids()[0], signal.SIGKILL)
        alive = {}

        def survivor() -> bool:
            alive.update({a: members(a) for a in before.values()})
            return any(len(found) == 1 for found in alive.values())

        wait_for(survivor, 60)
        (address,) = [a for a, found in alive.items() if found]
        wait_for(lambda: len(members(address)) == 2, 180)
    after = members(pair.address)
    assert len(before.keys() & after.keys()) == 1


@pytest.mark.slow
def test_an_update_replaces_replicas_one_by_one_and_no_trainer_notices(
    pair: Launched, launch, model_folder
) -> None:
    before, identity = members(pair.address), describe(pair.address).service_id
    port = pair.address.rpartition(":")[2]
    with trainer(pair.address):
        update = launch(
            *(model_folder("Gemma2", VOCAB), "--update", "--port", port, "--replicas", "2"),
            on=pair,
            ready=False,
        )
        fewest = 2
        while update.process.poll() is None:
            fewest = min(fewest, len(members(pair.address)) or fewest)
            time.sleep(0.2)
        assert update.process.returncode == 0, update.log()
        assert fewest == 2
    wait_for(lambda: len(members(pair.address)) == 2, 20)
    assert not before.keys() & members(pair.address).keys()
    assert describe(pair.address).service_id == identity
    assert update.output() == f"ready {pair.address}\n"


def test_a_ray_that_asks_for_another_token_is_told_in_one_line(
    pair: Launched, launch, model_folder
) -> None:
    for environment, said in (
        ({}, f"the Ray at {pair.ray_address} asks for a token: set RAY_AUTH_TOKEN"),
        (
            {"RAY_AUTH_TOKEN": "x"},
            f"the Ray at {pair.ray_address} refuses the token in RAY_AUTH_TO",
        ),
    ):
        other = replace(pair, environment=environment)
        update = launch(model_folder("Gemma2", VOCAB), "--update", on=other, ready=False)
        assert update.process.wait(60) == 1
        (line,) = update.log().splitlines()
        assert line.startswith(f"teacher-server: {said}")


def send_bad_paths(address: str, count: int) -> None:
    """Calls whose path is no UTF-8, each over a connection of its own: any replica may get it."""
    for _ in range(count):
        with contextlib.suppress(OSError), Peer(address) as peer:
            peer.call(b"/\xe5")
            peer.receive(0.2)


def test_paths_that_are_no_utf8_deafen_no_replica(pair: Launched) -> None:
    before = members(pair.address)
    with trainer(pair.address):
        send_bad_paths(pair.address, 10)
        for address in before.values():
            send_bad_paths(address, 2)
            assert members(address) == before
        assert members(pair.address) == before
    assert "Traceback" not in pair.log()


UNHARDENED = """
import importlib.machinery, sys

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target)
        if name == "teacher_server.rpc.server" and spec is not None:
            run = spec.loader.exec_module
            def exec_module(module):
                run(module)
                module.can_be_hardened = lambda: False
            spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder)
"""
"""sitecustomize.py: in every process, gRPC's own server is used, which such a path ends."""


@pytest.mark.slow
def test_replicas_that_went_deaf_are_opened_anew_and_ray_hears_of_it(
    launch, model_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(UNHARDENED)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.getcwd()}")
    service = launch(model_folder("Gemma2", VOCAB), "--replicas", "2")
    wait_for(lambda: len(members(service.address)) == 2, 60)
    before = members(service.address)
    with trainer(service.address):
        for address in (service.address, *before.values()):
            send_bad_paths(address, 4)
        for address in before.values():
            wait_for(lambda address=address: address in members(address).values(), 25)
        wait_for(lambda: members(service.address), 25)
    assert "reopening it" in service.log()
    assert members(service.address) == before, "no replica had to be replaced"
    assert service.stop() == 0


def test_a_second_service_of_the_same_name_is_refused(pair: Launched, launch, model_folder) -> None:
    second = launch(model_folder("Gemma2", VOCAB), on=pair, ready=False)
    assert second.process.wait(60) == 1
    (line,) = second.log().splitlines()
    assert '"teacher"' in line
    assert "--name" in line
    assert len(members(pair.address)) == 2


@pytest.mark.slow
def test_replicas_are_added_under_load_and_taken_away_after(
    pair: Launched, launch, model_folder
) -> None:
    scaled = launch(
        model_folder("Gemma2", VOCAB),
        *("--name", "scaled", "--max-replicas", "3", "--target-queue-s", "0.5"),
        *("--scale-up-after-s", "1", "--scale-down-after-s", "2", "--threads", "1"),
        on=pair,
    )
    assert describe(scaled.address).service_id != describe(pair.address).service_id
    with trainer(scaled.address, ahead=400) as answered:
        wait_for(lambda: len(members(scaled.address)) == 3, 120)
        assert answered
    wait_for(lambda: len(members(scaled.address)) == 1, 120)
    assert scaled.stop() == 0
    assert not pair.replica_pids("scaled")
    assert len(members(pair.address)) == 2  # the other service of this cluster is untouched


@pytest.mark.slow
def test_a_frozen_replica_is_forgotten_and_replaced(pair: Launched) -> None:
    before = members(pair.address)
    frozen = pair.replica_pids()[0]
    os.kill(frozen, signal.SIGSTOP)
    try:
        alive = {}

        def survivor() -> bool:
            alive.update({a: members(a) for a in before.values() if alive.get(a) != {}})
            return any(len(found) == 1 for found in alive.values())

        wait_for(survivor, 60)
        (address,) = [a for a, found in alive.items() if found]
        wait_for(lambda: len(members(address)) == 2, 180)
    finally:
        if frozen in pair.processes():
            os.kill(frozen, signal.SIGKILL)


@pytest.mark.slow
def test_serving_goes_on_while_serves_controller_is_killed(pair: Launched) -> None:
    before = members(pair.address)
    title = "ray::ServeController"
    (controller,) = (p for p, command in pair.processes().items() if command.startswith(title))
    with trainer(pair.address) as answered:
        os.kill(controller, signal.SIGKILL)
        seen = len(answered)
        wait_for(lambda: len(answered) > seen + 100, 30)
        assert members(pair.address) == before
        # The next one watches over the replicas as the one before did.
        os.kill(pair.replica_pids()[0], signal.SIGKILL)
        wait_for(lambda: len(before.keys() & members(pair.address).keys()) == 1, 30)
        wait_for(lambda: len(members(pair.address)) == 2, 90)


@pytest.mark.slow
def test_a_killed_launcher_takes_its_ray_along(launch, model_folder) -> None:
    for seconds in (2.0, 6.0):
        launched = launch(model_folder("Gemma2", VOCAB), ready=False)
        time.sleep(seconds)
        launched.process.kill()
        launched.process.wait()
        for folder in Path("/tmp").glob(f"teacher-*/session_*_{launched.process.pid}"):
            shutil.rmtree(folder.parent)
        # Two agents of Ray would give up after a minute; they hold no port of ours and no device.
        wait_for(lambda one=launched: set(one.processes().values()) <= AGENTS, 15)
        for pid in launched.processes():
            os.kill(pid, signal.SIGKILL)
        for folder in Path("/tmp").glob(f"teacher-*/session_*_{launched.process.pid}"):
            shutil.rmtree(folder.parent)
        # Two agents of Ray give up after a minute only; they hold no port of ours and no device.
        wait_for(lambda one=launched: set(one.processes().values()) <= AGENTS, 15)
        wait_for(lambda one=launched: not one.processes(), 90)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["raylet", "gcs_server"])
def test_serve_ends_with_its_ray_and_leaves_nothing_behind(launch, model_folder, part: str) -> None:
    launched = launch(model_folder("Gemma2", VOCAB))
    host, _, port = launched.address.rpartition(":")
    session = f"session_*_{launched.process.pid}"
    assert list(Path("/tmp").glob(f"teacher-*/{session}"))
    (killed,) = (p for p, command in launched.processes().items() if f"/{part} " in command)
    os.kill(killed, signal.SIGKILL)
    try:
        assert launched.process.wait(60) == 1
        left = launched.processes()
    finally:
        for pid in launched.processes():
            os.kill(pid, signal.SIGKILL)
    assert left == {}
    told = [line for line in launched.log().splitlines() if line.startswith("teacher-server: ")]
    assert len(told) == 1
    assert f"Ray's {part} has ended unexpectedly" in told[0]
    assert "Traceback" not in launched.log()
    assert not list(Path("/tmp").glob(f"teacher-*/{session}"))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), 5)


# The last one: it ends the service of the others.
def test_ctrl_c_drains_the_service_and_leaves_nothing_behind(pair: Launched) -> None:
    assert pair.stop() == 0
    assert pair.output() == f"ready {pair.address}\n"
    assert "Traceback" not in pair.log()
    assert pair.log().count("INFO stopped id=") >= 2
