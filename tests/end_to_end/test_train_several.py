"""`student-trainer train` with several teachers, and with a text that only the teacher reads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from student_trainer import Recorded, connect
from student_trainer.cli import main
from tests.conftest import one_torch_thread
from tests.end_to_end.conftest import WORDS, write_config
from tests.support import tiny

one_thread = pytest.fixture(autouse=True)(one_torch_thread)
PREFIX = "w1 w2 w3"


@pytest.fixture
def data(text: Path, tmp_path: Path) -> Path:
    """Documents of 20 words, of two domains."""
    words, path = text.read_text().split()[:6000], tmp_path / "data.jsonl"
    rows = [
        {"text": " ".join(words[at : at + 20]), "domain": ("math", "code")[at // 20 % 3 == 0]}
        for at in range(0, len(words), 20)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def add_teachers(config: str, addresses: dict[str, str]) -> None:
    with Path(config[1:]).open("a") as file:
        file.write("[teacher]\n")
        file.writelines(f'{name} = "{address}"\n' for name, address in addresses.items())


def settings_of(student_folder: Path, data: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "teacher_column": "domain",
        "teacher_prefix": PREFIX,
        "student": str(student_folder),
        "data": [str(data)],
        "output": str(tmp_path / "out"),
    }


def test_each_row_is_learnt_from_its_teacher(
    trained_service, padded_service, student_folder, data, tmp_path: Path
):
    pair = {"math": trained_service.address, "code": padded_service.address}
    config = write_config(
        tmp_path / "train.toml",
        **settings_of(student_folder, data, tmp_path),
        record=str(tmp_path / "record"),
        sequence_length=64,
        batch_size=8,
        steps=6,
        targets="top_k:16",
        ce_weight=0.1,
        control=True,
        shuffled_control=True,
        log_every=1,
    )
    add_teachers(config, pair)
    assert main(["train", config]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["teacher_loss"] < report["control_loss"]
    infos = {}
    tokenizer = tiny.make_tokenizer(WORDS)
    for name, address in pair.items():
        with connect(address, tokenizer=tokenizer) as teacher:
            infos[name] = teacher.info
    of_both = ",".join(f"{name}={infos[name].teacher_fingerprint}" for name in ("code", "math"))
    assert results["teacher"]["teacher_fingerprint"] == of_both
    assert of_both in (tmp_path / "out" / "student" / "README.md").read_text()
    history = results["students"]["distilled"]["history"]
    assert all(0 < entry["share/math"] < 1 for entry in history)
    # Each has a record of its own, of the text that it read.
    row = json.loads(data.read_text().splitlines()[19])  # of the held-out text
    ids = [*tokenizer(row["text"]).input_ids, tokenizer.eos_token_id]
    for name in pair:
        with Recorded(tmp_path / "record" / name) as record:
            assert record.info.teacher_fingerprint == infos[name].teacher_fingerprint
            before = tokenizer(PREFIX).input_ids
            rows = torch.arange(len(ids) - 1) + len(before)
            assert record.has([*before, *ids], rows=rows) == (name == row["domain"])
            assert not record.has(ids)
    assert main(["train", config, "--start-over"]) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--packing", "concatenate"], "needs --packing pad"),
        (["--teacher-column", "text"], "names the teacher 'w"),
        (["--teacher-column", "topic"], "'topic'"),
        (["--sequence-length", "254"], "must be at most 253"),
        (["--dry-run"], "measures one teacher"),
    ],
)
def test_what_cannot_work_is_refused_before_training(
    trained_service, student_folder, data, tmp_path: Path, options, words, capsys
):
    config = write_config(
        tmp_path / "train.toml",
        **settings_of(student_folder, data, tmp_path),
        sequence_length=64,
        steps=2,
    )
    add_teachers(config, dict.fromkeys(("math", "code"), trained_service.address))
    assert main(["train", config, *options]) != 0
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
