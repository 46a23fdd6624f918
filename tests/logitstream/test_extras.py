"""What is not installed is one line with the command that installs it, in every program."""

import importlib
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import student_trainer.__main__
import teacher_server.__main__
from logitstream.extras import install_command

HIDDEN = """
import importlib.abc, runpy, sys
module, hidden, *sys.argv[1:] = sys.argv[1:]

class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden.split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
"""`python -m MODULE` where some modules are not installed."""


def without(hidden: str, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HIDDEN, module, hidden, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("module", "arguments", "hidden", "extra"),
    [
        ("teacher_server", "--version", "cyclopts,pydantic", "server"),
        ("teacher_server", "serve --model m --standalone", "cyclopts", "server"),
        ("teacher_server", "serve --model m --port 0", "ray", "server"),
        ("teacher_server", "certs --out {}/certs", "cryptography", "server"),
        ("student_trainer", "--help", "cyclopts,pydantic", "train"),
        ("student_trainer", "check 127.0.0.1:1", "tqdm", "train"),
    ],
)
def test_a_missing_extra_is_one_line(
    tmp_path: Path, module: str, arguments: str, hidden: str, extra: str
):
    ended = without(hidden, module, *arguments.format(tmp_path).split())
    assert (ended.returncode, ended.stdout) == (1, "")
    (line,) = ended.stderr.splitlines()
    program = module.replace("_", "-")
    assert line.startswith(f"{program}: "), line
    assert f" is not installed; it comes with the extra [{extra}]: " in line
    assert line.endswith(install_command(extra))
    assert install_command(extra).startswith(f"{sys.executable} -m pip install ")
    assert f"[{extra}]'" in install_command(extra)


TRAIN = ["train", "--student", "no", "--data", "no", "--teacher", "127.0.0.1:1", "--output"]


@pytest.mark.parametrize(
    ("option", "module", "extra"),
    [("--workers 2", "ray", "ray-train"), ("--tensorboard", "tensorboard", "train")],
)
def test_what_only_an_option_needs_is_missed_before_anything_is_read(
    tmp_path: Path, capsys, monkeypatch, option: str, module: str, extra: str
):
    monkeypatch.setitem(sys.modules, module, None)
    output = str(tmp_path / "out")
    assert student_trainer.__main__.main([*TRAIN, output, *option.split()]) == 1
    said = f"{module} is not installed; it comes with the extra [{extra}]: {install_command(extra)}"
    assert capsys.readouterr().err.splitlines() == [f"student-trainer: {said}"]


def test_a_module_that_no_extra_brings_is_not_blamed_on_one(monkeypatch):
    monkeypatch.setitem(sys.modules, "teacher_server.cli", None)
    with pytest.raises(ModuleNotFoundError, match=r"teacher_server\.cli"):
        teacher_server.__main__.main(["--version"])


LIGHT = """
import sys
module = sys.argv[1]
main = __import__(f"{module}.__main__", fromlist=["main"]).main
for arguments in (["--version"], ["--help"], ["wrong"], *([one, "--wrong"] for one in sys.argv[2:])):
    try:
        main(arguments)
    except SystemExit as ended:
        assert not ended.code
heavy = {"torch", "numpy", "transformers", "ray", "pyarrow"} & {*sys.modules}
assert not heavy, heavy
"""


@pytest.mark.parametrize(
    ("module", "commands"),
    [("teacher_server", "serve status fit-ids"), ("student_trainer", "train record check report")],
)
def test_version_help_and_mistakes_load_nothing_that_takes_seconds(module: str, commands: str):
    ended = subprocess.run(
        [sys.executable, "-c", LIGHT, module, *commands.split()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    assert f"{module.replace('_', '-')} {version('logitstream')}\n" in ended.stdout


def test_every_public_name_is_found_and_listed():
    importlib.import_module("student_trainer.teachers.prefetch")
    assert {*student_trainer.__all__} <= {*dir(student_trainer)}
    assert all(callable(getattr(student_trainer, name)) for name in student_trainer.__all__)
