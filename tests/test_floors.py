"""The lowest versions that pyproject.toml allows are those of constraints-floor.txt, and they work."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ROOT / "constraints-floor.txt"
EXTRAS = ("server", "train", "ray-train")
TRIED = (
    "tests/logit_codec/test_targets.py",
    "tests/student_trainer/losses/test_distillation.py",
    "tests/student_trainer/losses/test_fused_head.py",
    "tests/student_trainer/losses/test_causal.py",
    "tests/end_to_end/test_hf_plain_student.py",
    "tests/end_to_end/test_hf_trainer.py",
    "tests/end_to_end/test_hf_sharded.py",
    "tests/end_to_end/test_record.py",
)
"""Quick files that use every dependency but Ray."""


def allowed() -> dict[str, str]:
    """name -> lowest version, of what is installed with the extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"]]
    for extra in EXTRAS:
        wanted += project["optional-dependencies"][extra]
    floors = {}
    for one in wanted:
        found = re.fullmatch(r"([\w-]+)(?:\[[\w,-]+\])?>=([\d.]+)", one)
        if found:
            floors[found[1]] = found[2]
        else:
            assert one.startswith("logitstream["), f"{one} has no lowest version"
    return floors


def test_every_lowest_version_is_one_that_is_tried():
    tried = dict(
        line.split("==") for line in FLOORS.read_text().splitlines() if not line.startswith("#")
    )
    found = allowed()
    assert set(tried) == set(found)
    for name, version in found.items():
        assert (tried[name] + ".").startswith(version + "."), name


@pytest.mark.slow
def test_the_lowest_versions_work(tmp_path: Path):
    """Needs a package index. Old versions warn of what is newer than they are."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path], check=True)
    python = str(tmp_path / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "-c", str(FLOORS)]
    subprocess.run([*install, "torch"], check=True)  # first: see the Makefile
    project = f"{ROOT}[{','.join(EXTRAS)}]"
    subprocess.run([*install, project, "pytest", "pytest-xdist", "hypothesis"], check=True)
    ended = subprocess.run(
        [python, "-m", "pytest", "-q", "-o", "filterwarnings=default", "-m", "not slow", *TRIED],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout[-8000:]
