"""What is not installed is one line with the command that installs it, in every program."""

import importlib
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

import logitstream
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


@pytest.mark.parametrize("package", [logitstream, student_trainer])
def test_every_public_name_is_found_and_listed(package: ModuleType):
    importlib.import_module("student_trainer.teachers.prefetch")
    assert {*package.__all__} <= {*dir(package)}
    assert all(callable(getattr(package, name)) for name in package.__all__)
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'"):
        _ = package.nothing


FRONT_DOOR = """
import sys
import logitstream, student_trainer
heavy = {"torch", "numpy", "grpc", "pydantic", "transformers"} & {*sys.modules}
assert not heavy, heavy
from logitstream import connect, distillation_loss
assert connect is student_trainer.connect
assert "transformers" not in sys.modules
sys.modules["accelerate"] = None
try:
    from logitstream import DistillationTrainer
except ImportError as error:
    print(error)
"""


def test_the_front_door_is_light_and_says_what_a_name_misses():
    ended = subprocess.run(
        [sys.executable, "-c", FRONT_DOOR], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    said = "DistillationTrainer: accelerate is not installed; it comes with the extra [train]: "
    assert ended.stdout.startswith(said)


@pytest.mark.parametrize(
    "package", ["protos", "logit_codec", "logitstream", "teacher_server", "student_trainer"]
)
def test_every_package_says_that_it_has_types(package: str):
    (folder,) = importlib.import_module(package).__path__
    assert (Path(folder) / "py.typed").is_file()
