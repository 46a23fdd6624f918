"""The recipes of docs/recipes, run as they are printed, against one service."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.recipes.stand_ins import make_stand_ins
from student_trainer.cli import main
from tests.conftest import one_torch_thread

pytestmark = pytest.mark.slow
one_thread = pytest.fixture(autouse=True, scope="module")(one_torch_thread)

PAGES = Path(__file__).parents[2] / "docs" / "recipes"
MADE = {
    "pretraining": "pretrained/student",
    "chat": "chat/student",
    "lora": "lora/merged",
    "from-sft": "sft-distilled",
}
"""What each page leaves in runs/."""
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, serve) -> Iterator[Path]:
    """A folder with fewer stand-ins, briefly trained: a teacher that knows nothing is refused.

    TEACHER says where the teacher is served.
    """
    path = tmp_path_factory.mktemp("recipes")
    make_stand_ins(path / "stand-ins", steps=60, num_files=6)
    served = serve(path / "stand-ins" / "teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEACHER", served.wait_ready())
        yield path


def run(command: str) -> None:
    """Runs a line of a shell; our commands in this process, which takes less time than a new one."""
    program, *arguments = shlex.split(os.path.expandvars(command))
    if program == "python":  # a script stays connected until its process ends
        subprocess.run([sys.executable, *arguments], check=True)
    else:
        assert program == "student-trainer"
        assert main(arguments) == 0


@pytest.mark.parametrize("page", MADE)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_a_recipe_works_as_it_is_printed(folder: Path, page: str, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [""])
    for language, text in BLOCK.findall((PAGES / f"{page}.md").read_text()):
        if language == "bash":
            for command in text.splitlines():
                run(command)
        else:
            name = text.partition("\n")[0].removeprefix("# ")
            assert Path(name).suffix in (".toml", ".py")
            Path(name).write_text(text)
    assert (Path("runs") / MADE[page] / "model.safetensors").is_file()


def test_every_recipe_is_in_the_list_and_tested():
    listed = set(re.findall(r"\((\S+\.md)\) \|", (PAGES / "README.md").read_text()))
    assert listed == {path.name for path in PAGES.glob("*.md")} - {"README.md"}
    assert listed == {f"{page}.md" for page in MADE}
