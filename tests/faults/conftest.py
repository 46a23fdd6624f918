"""Fixtures of the fault tests: a tiny teacher, and the fault-free run that others are compared with."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.support.fleet import Fleet
from tests.support.oracle import VOCAB, Left, Plan, Training


@pytest.fixture(scope="session")
def folder(model_folder: Callable[[str, int], Path]) -> Path:
    return model_folder("Gemma2", VOCAB)


@pytest.fixture(scope="module")
def fleet(serve, folder) -> Iterator[Fleet]:
    """One replica for all tests of a file that need nothing else."""
    with Fleet(serve, folder, 1) as fleet:
        yield fleet


@pytest.fixture(scope="session")
def fault_free(
    serve: Serve, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Plan], list[Left]]:
    """fault_free(plan) -> what each rank leaves when nothing is broken; run once per plan."""
    runs: dict[tuple, list[Left]] = {}

    def run(plan: Plan) -> list[Left]:
        # Pace, window and patience do not change what comes out.
        key = (plan.sequences, plan.tokens, plan.batch_size, plan.epochs, plan.targets, plan.seed)
        if key not in runs:
            with Fleet(serve, folder, 1) as fleet:
                where = tmp_path_factory.mktemp("fault-free") / "run"
                runs[key] = Training(fleet.addresses, plan, where).wait()
        return runs[key]

    return run
