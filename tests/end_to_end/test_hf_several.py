"""transformers' Trainer with several teachers, a mixture of them, and a view of another text."""

import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers

from student_trainer import InvalidRequest, LocalTeacher, Teachers, connect, distillation_loss
from student_trainer.hf_trainer import IDENTITY_FILE, DistillationArguments
from tests.conftest import one_torch_thread
from tests.support import tiny
from tests.support.hf import SETTINGS, TOKENIZER, collate, make_trainer, num_trained, weights

one_thread = pytest.fixture(autouse=True)(one_torch_thread)
ARGUMENTS = DistillationArguments(targets="top_k:8", ahead="2")


@pytest.fixture(scope="module")
def other_model():
    return tiny.make_model("Llama", 64, 5)


@pytest.fixture
def marked(rows) -> list[dict[str, Any]]:
    """Of each row, who teaches it and what only the teacher reads."""
    marks = [{"domain": "math" if n % 3 else "code", "hint": [n, 2, 3]} for n in range(len(rows))]
    return [{**row, **mark} for row, mark in zip(rows, marks, strict=True)]


def read_hint(ids: torch.Tensor, row: dict[str, Any]) -> torch.Tensor:
    return torch.cat([torch.tensor(row["hint"]), ids])


def first_loss(pair: dict[str, LocalTeacher], rows, weights_of, view) -> float:
    """The loss of the first step, with each row asked for on its own."""
    student, total = tiny.make_student(), 0.0
    for row in rows:
        batch = collate([row])
        logits = student(input_ids=batch["input_ids"]).logits
        where = (batch["labels"][0, 1:] != -100).nonzero()[:, 0]
        teachers = Teachers(pair, weights=weights_of(row))
        seen = {**batch, "hint": [row["hint"]]}
        ((_, targets),) = teachers.stream_batches([seen], targets="top_k:8", teacher_view=view)
        total += float(distillation_loss(logits[0, where].detach(), targets, reduction="sum"))
    return total / num_trained(rows)


@pytest.mark.parametrize("form", ["list", "data set"])
def test_each_row_is_learnt_from_its_teacher_and_its_view(
    teacher_model, other_model, marked, tmp_path: Path, form
):
    models = {"math": teacher_model, "code": other_model}
    trainer = make_trainer(
        tmp_path,
        marked if form == "list" else datasets.Dataset.from_list(marked),
        models,
        distillation=ARGUMENTS,
        choice={"teacher_column": "domain", "teacher_view": read_hint},
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        train_sampling_strategy="sequential",
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "kd_loss" in entry]
    pair = {name: LocalTeacher(model, TOKENIZER) for name, model in models.items()}
    wanted = first_loss(pair, marked[:4], lambda row: {row["domain"]: 1.0}, read_hint)
    assert logs[0]["kd_loss"] == pytest.approx(wanted, rel=1e-4)
    of_math = num_trained([row for row in marked[:4] if row["domain"] == "math"])
    assert logs[0]["share/math"] == pytest.approx(of_math / num_trained(marked[:4]))
    assert logs[0]["share/math"] + logs[0]["share/code"] == pytest.approx(1)
    identity = (tmp_path / "checkpoint-1" / IDENTITY_FILE).read_text()
    for name, one in pair.items():
        assert f"{name}={one.info.teacher_fingerprint}" in identity
    assert '"teacher_column": "domain"' in identity
    if form == "data set":
        return
    assert (
        trainer.evaluate()["eval_loss"] > 0
    )  # by the Trainer, without what only the teacher reads
    again = make_trainer(
        tmp_path,
        marked,
        models,
        distillation=ARGUMENTS,
        choice={"teacher_column": "domain", "teacher_view": read_hint},
        max_steps=2,
        train_sampling_strategy="sequential",
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    torch.testing.assert_close(weights(again), weights(trainer), rtol=0, atol=0)


def test_a_mixture_may_hold_for_all_rows(teacher_model, other_model, marked, tmp_path: Path):
    models = {"math": teacher_model, "code": other_model}
    mixed = {"math": 0.7, "code": 0.3}
    trainer = make_trainer(
        tmp_path,
        marked,
        models,
        distillation=ARGUMENTS,
        choice={"teacher_weights": mixed},
        max_steps=1,
        train_sampling_strategy="sequential",
    )
    trainer.train()
    (log,) = [entry for entry in trainer.state.log_history if "kd_loss" in entry]
    pair = {name: LocalTeacher(model, TOKENIZER) for name, model in models.items()}
    wanted = first_loss(pair, marked[:4], lambda row: mixed, None)
    assert log["kd_loss"] == pytest.approx(wanted, rel=1e-4)
    assert log["share/math"] == pytest.approx(0.7)


def test_rows_without_a_known_teacher_end_the_training(
    teacher_model, other_model, marked, rows, tmp_path: Path
):
    models = {"math": teacher_model, "law": other_model}
    choice = {"teacher_column": "domain"}
    for data, words in ((marked, r"'code'; the teachers are 'math', 'law'"), (rows, "no column")):
        trainer = make_trainer(tmp_path, data, models, distillation=ARGUMENTS, choice=choice)
        with pytest.raises(InvalidRequest, match=words):
            trainer.train()
    with pytest.raises(ValueError, match=r"either column=.* or weights="):
        make_trainer(tmp_path, rows, models)
    with pytest.raises(ValueError, match="for several teachers"):
        make_trainer(tmp_path, rows, teacher_model, choice=choice)


def test_the_examples_of_the_page_run_as_they_are_printed(
    trained_service, padded_service, marked, tmp_path: Path, capsys
):
    page = (Path(__file__).parents[2] / "docs" / "several_teachers.md").read_text()
    for name, service in (("math", trained_service), ("code", padded_service)):
        page = page.replace(f"{name}.lab:50051", service.address)
    names: dict[str, Any] = {
        "tokenizer": TOKENIZER,
        "student": tiny.make_student(),
        "ids": torch.arange(2, 26).view(2, 12),
        "name_ids": lambda batch: torch.arange(22 * 3).view(22, 3) % 64,
        "args": transformers.TrainingArguments(str(tmp_path), **{**SETTINGS, "max_steps": 1}),
        "rows": marked,
        "collate": collate,
    }
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 4
    exec(blocks[0], names)  # closes its teachers at the end
    for name, service in (("math", trained_service), ("code", padded_service)):
        names[name] = connect(service.address, tokenizer=TOKENIZER)
    for block in blocks[1:]:
        exec(block, names)
    assert "22\n" in capsys.readouterr().out
    for name in ("math", "code"):
        names[name].close()
