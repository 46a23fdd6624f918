"""`train --dry-run`, and runs whose length the data or the held-out loss decide."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from student_trainer import LocalTeacher, Recorded
from student_trainer.cli import main
from student_trainer.training.results import Results
from tests.end_to_end.conftest import WORDS, write_config
from tests.support import tiny

LENGTH, SEQUENCES = 16, 60


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A student, a text of 60 sequences of which 3 are held out, and a record of it."""
    folder = tmp_path_factory.mktemp("given")
    tokenizer = tiny.make_tokenizer(WORDS)
    words = [WORDS[number * number % 61] for number in range(LENGTH * SEQUENCES)]
    (folder / "text.txt").write_text(" ".join(words))
    model = tiny.make_model("Llama", len(tokenizer))
    model.config.save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    ids = torch.tensor(tokenizer(" ".join(words)).input_ids)
    sequences = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    with Recorded(folder / "record", LocalTeacher(model, tokenizer), tokenizer=tokenizer) as record:
        list(record.stream(sequences, targets="top_k:8"))
    return {
        "student": str(folder / "student"),
        "data": [str(folder / "text.txt")],
        "record": str(folder / "record"),
        "targets": "top_k:8",
        "sequence_length": LENGTH,
        "batch_size": 4,
        "device": "cpu",
    }


def list_all(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_a_dry_run_says_what_the_run_takes_and_leaves_nothing(
    given: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = write_config(
        tmp_path / "a.toml",
        **{**given, "output": str(tmp_path / "new" / "out"), "epochs": 2, "control": True},
        **{"checkpoint_every": 1, "tensorboard": True, "early_stopping": 3},
    )
    before = list_all(tmp_path), list_all(Path(given["record"]))
    assert main(["train", file, "--dry-run", "--json"]) == 0
    assert (list_all(tmp_path), list_all(Path(given["record"]))) == before
    plan = json.loads(capsys.readouterr().out)
    assert (plan["sequences"], plan["held_out_sequences"]) == (57, 3)
    assert (plan["tokens"], plan["trained_tokens"]) == (57 * LENGTH, 57 * (LENGTH - 1))
    assert (plan["steps"], plan["epochs"]) == (28, 2)
    assert plan["trained_tokens_of_run"] == 28 * 4 * (LENGTH - 1)
    parts = [*plan["hours_of_students"].values(), plan["hours_of_measuring"]]
    assert {*plan["hours_of_students"]} == {"distilled", "control"}
    assert plan["hours"] == pytest.approx(sum(parts))
    assert min(parts) > 0
    assert plan["teacher_tokens_per_s"] is plan["wire_gib"] is plan["record_gib"] is None
    config = transformers.AutoConfig.from_pretrained(given["student"])
    student = transformers.AutoModelForCausalLM.from_config(config)
    nbytes = 4 * sum(parameter.numel() for parameter in student.parameters())
    assert plan["weights_gib"] == plan["gradients_gib"] == nbytes / 2**30
    assert plan["optimizer_gib"] == pytest.approx(2 * nbytes / 2**30, rel=0.01)
    assert plan["loss"] == "fused"
    words = [WORDS[number * number % 61] for number in range(LENGTH)]
    assert plan["first_example"] == [
        {"trained": False, "text": words[0]},
        {"trained": True, "text": " ".join(words[1:])},
    ]
    assert main(["train", file, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "28 steps of 4 sequences, 2 epochs" in said
    assert f"  context | {words[0]}\n  trained | {words[1]} {words[2]}" in said


def test_a_dry_run_fails_where_the_run_would(given: dict[str, Any], tmp_path: Path, capsys):
    (tmp_path / "file").write_text("")
    for changes, said in (
        ({"output": str(tmp_path / "file" / "out")}, "cannot be created"),
        ({"targets": "top_k:9"}, "top_k:8"),
        ({"record": str(tmp_path / "nothing")}, "nothing"),
    ):
        settings = {**given, "output": str(tmp_path / "out"), "steps": 5, **changes}
        assert main(["train", write_config(tmp_path / "a.toml", **settings), "--dry-run"]) == 1
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_that_no_longer_improves_stops_and_keeps_its_best(
    given: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "out"
    file = write_config(
        tmp_path / "a.toml",
        **{**given, "output": str(output), "epochs": 1.5, "early_stopping": 2},
        **{"learning_rate": 1e-12, "warmup_steps": 0, "schedule": "constant"},
    )
    assert main(["train", file, "--training.eval-steps", "3"]) == 0
    capsys.readouterr()
    results = Results.load(output)
    assert results.settings["steps"] == 21  # of 14 in an epoch
    # The first measurement is the best, and two more are no better.
    found = results.students["distilled"]
    assert [one["step"] for one in found.measurements] == [3, 6, 9]
    assert found.tokens == 9 * 4 * (LENGTH - 1)
    assert found.scores.loss == found.measurements[0]["held_out_loss"]
    assert [one.name for one in (output / "checkpoints").iterdir()] == ["checkpoint-3"]
    assert main(["train", file, "--training.eval-steps", "4"]) == 1
    assert "belongs to another run: training was" in capsys.readouterr().err
