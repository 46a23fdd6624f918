"""The command line of student-trainer: one file for several commands."""

import re
import tomllib
from pathlib import Path

import pytest

from student_trainer.cli import expand_files
from student_trainer.config import RecordConfig, TrainConfig

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def readme_file(tmp_path: Path) -> Path:
    """The distill.toml of the README."""
    (text,) = re.findall(r"```toml\n(# distill\.toml.*?)```", README.read_text(), re.DOTALL)
    path = tmp_path / "distill.toml"
    path.write_text(text)
    return path


def test_the_readmes_file_serves_train_and_record(readme_file: Path):
    content = tomllib.loads(readme_file.read_text())
    assert set(content) <= set(TrainConfig.model_fields)
    trained = expand_files(["train", f"@{readme_file}"])
    recorded = expand_files(["record", f"@{readme_file}"])
    assert {"--steps", "--output", "--batch-size"} <= set(trained)
    given = {flag[2:].replace("-", "_") for flag in recorded if flag.startswith("--")}
    assert given == set(content) & set(RecordConfig.model_fields)


def test_flags_that_record_does_not_know_stay_errors(tmp_path: Path):
    path = tmp_path / "wrong.toml"
    path.write_text("stepz = 3\n")
    assert expand_files(["record", f"@{path}", "--steps", "3"]) == [
        *("record", "--stepz", "3"),
        *("--steps", "3"),
    ]
