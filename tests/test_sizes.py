"""No file, class or function grows too large to be read in one sitting."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("protos", "logit_codec", "logitstream", "teacher_server", "student_trainer")
FILE_LINES, CLASS_LINES, CLASS_METHODS, FUNCTION_LINES = 500, 250, 18, 80
P90_FUNCTION_LINES = 24
FILES = sorted(
    path
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
    if "_pb2" not in path.name
)
EXCEPTIONS: dict[str, int] = {}
"""Larger ones, `path` or `path:name` -> lines or methods, and why."""

FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def lines_of(node: ast.stmt) -> int:
    """Lines of a definition, decorators and docstring included."""
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def definitions(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_is_too_large(path: Path):
    name = path.relative_to(ROOT).as_posix()
    assert len(path.read_text().splitlines()) <= EXCEPTIONS.get(name, FILE_LINES)
    for node in definitions(path):
        if isinstance(node, ast.ClassDef):
            allowed = EXCEPTIONS.get(f"{name}:{node.name}", CLASS_LINES)
            assert lines_of(node) <= allowed, node.name
            methods = [one for one in node.body if isinstance(one, FUNCTIONS)]
            assert len(methods) <= CLASS_METHODS, node.name
        elif isinstance(node, FUNCTIONS):
            allowed = EXCEPTIONS.get(f"{name}:{node.name}", FUNCTION_LINES)
            assert lines_of(node) <= allowed, node.name


def test_most_functions_are_short():
    lengths = sorted(
        lines_of(node)
        for path in FILES
        for node in definitions(path)
        if isinstance(node, FUNCTIONS)
    )
    assert lengths[int(0.9 * len(lengths))] <= P90_FUNCTION_LINES
