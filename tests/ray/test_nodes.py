"""A machine of the cluster goes away, and another one comes."""

import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.ray.conftest import VOCAB, Launch, Launched, members, trainer, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]


class Nodes(Launched):
    """The cluster of nodes.py."""

    def __init__(self, folder: Path) -> None:
        environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        with open(folder / "err", "wb") as errors:
            self.program = subprocess.Popen(
                [sys.executable, "-m", "tests.support.nodes"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        super().__init__(self.program, folder, environment)
        self.gcs = self._line()

    @property
    def ray_address(self) -> str:
        return self.gcs

    def _line(self) -> str:
        assert self.program.stdout is not None
        return self.program.stdout.readline().decode().strip()

    def change(self, word: str) -> None:
        assert self.program.stdin is not None
        self.program.stdin.write(f"{word}\n".encode())
        self.program.stdin.flush()
        assert self._line() == "done"

    def close(self) -> None:
        assert self.program.stdin is not None
        assert self.program.stdout is not None
        self.program.stdin.close()
        self.program.wait(60)
        self.program.stdout.close()
        wait_for(lambda: not self.processes(), 20)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    cluster = Nodes(tmp_path)
    yield cluster
    cluster.close()


def test_replicas_of_a_lost_node_come_back_on_another(
    nodes: Nodes, launch: Launch, model_folder: Callable[[str, int], Path]
) -> None:
    service = launch(model_folder("Gemma2", VOCAB), "--replicas", "2", on=nodes)
    before = members(service.address)
    assert len(before) == 2
    with trainer(service.address):
        nodes.change("lose")
        wait_for(lambda: len(members(service.address)) == 1, 60)
        nodes.change("add")
        wait_for(lambda: len(members(service.address)) == 2, 90)
    assert service.stop() == 0
