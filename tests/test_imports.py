"""The direction of imports: the two sides meet only in logit_codec and protos."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "protos": {"protos"},
    "logit_codec": {"logit_codec"},
    "teacher_server": {"teacher_server", "logit_codec", "protos"},
    "student_trainer": {"student_trainer", "logit_codec", "protos"},
}
OURS = {*ALLOWED, "tests", "examples", "benchmarks", "deploy"}
WITH_RAY = {"teacher_server/app.py", "student_trainer/ray_train/driver.py"}
# A teacher in the trainer's own process is the one exception, and only when one is made.
EXCEPTION = (
    "student_trainer/teachers/local.py",
    {"teacher_server.engine.model", "teacher_server.engine.head"},
)
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for package in ALLOWED
    for path in (ROOT / package).rglob("*.py")
)


def imports(path: str) -> list[tuple[str, bool]]:
    """(module, whether at the top level) of every import in a file."""
    tree = ast.parse((ROOT / path).read_text())
    top = set(tree.body)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.append((node.module or "", node in top))
    return found


@pytest.mark.parametrize("path", FILES)
def test_imports_point_in_the_allowed_direction(path: str):
    package = path.partition("/")[0]
    for module, at_top in imports(path):
        root = module.partition(".")[0]
        if root not in OURS or root in ALLOWED[package]:
            continue
        assert path == EXCEPTION[0], f"{path} must not import {module}"
        assert module in EXCEPTION[1], f"{path} must not import {module}"
        assert not at_top, f"{path} imports {module} when it is loaded"


@pytest.mark.parametrize("path", [path for path in FILES if path.startswith("logit_codec/")])
def test_the_codec_needs_torch_numpy_and_xxhash_only(path: str):
    import sys

    for module, _ in imports(path):
        root = module.partition(".")[0]
        assert root in {"logit_codec", "torch", "numpy", "xxhash"} | sys.stdlib_module_names


@pytest.mark.parametrize("path", FILES)
def test_ray_is_imported_where_it_belongs_and_by_no_trainer_before_it_is_used(path: str):
    for module, at_top in imports(path):
        if module.partition(".")[0] == "ray":
            assert path in WITH_RAY, f"{path} must not import {module}"
            assert path == "teacher_server/app.py" or not at_top, f"{path} loads {module}"
