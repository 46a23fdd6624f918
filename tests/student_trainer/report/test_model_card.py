"""The model card of a student, as the hub would read it."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from student_trainer.report.build import make_report
from student_trainer.report.model_card import license_of, license_of_hub_model, write_model_card
from student_trainer.training.results import Results
from tests.support.made_up import make_results


def test_the_card_has_the_scores_on_tasks(tmp_path: Path):
    results = make_results(tasks=True)
    card, _ = card_of(tmp_path, results)
    for line in (
        "| task | metric | teacher | **this student** | same student, labels alone |",
        "|---|---|---:|---:|---:|",
        "| sciq | acc ↑ | 0.7 ± 0.013 | 0.66 ± 0.013 | 0.6 ± 0.013 |",
    ):
        assert line in card.text.splitlines()
    assert "like its training text and on these tasks. It" in card.text
    found = {(one.dataset_name, one.metric_type) for one in card.data.eval_results or []}  # type: ignore[attr-defined]
    assert {("sciq", "acc"), ("wikitext", "word_perplexity")} <= found


def card_of(
    folder: Path, results: Results, adapter: dict[str, Any] | None = None
) -> tuple[ModelCard, dict[str, Any]]:
    report = make_report({"runs/one": results})
    student = folder / "first" / "student"
    student.mkdir(parents=True)
    if adapter:
        (student / "adapter_config.json").write_text(json.dumps(adapter))
    path = write_model_card(student, results, report)
    assert path.name == "README.md"
    return ModelCard(path.read_text()), report


def with_teacher(**changed: Any) -> Results:
    results = make_results(shuffled=5.0)
    return results.model_copy(update={"teacher": results.teacher.model_copy(update=changed)})


def test_the_card_says_from_whom_with_what_and_how_good(tmp_path: Path):
    card, report = card_of(tmp_path, with_teacher())
    assert card.data.license == "unknown"  # type: ignore[attr-defined]
    assert card.data.library_name == "transformers"  # type: ignore[attr-defined]
    assert "knowledge-distillation" in card.data.tags  # type: ignore[attr-defined]
    assert "base_model" not in card.data.to_dict()
    found = card.data.eval_results or []  # type: ignore[attr-defined]
    results = {one.metric_type: one.metric_value for one in found}
    assert results["loss"] == report["distilled_loss"]
    assert results["agreement with the teacher"] == report["distilled_top1_agreement"]
    assert "bfloat16, quantised with torchao-int8 0.18.0" in card.text
    for words in ("a" * 64, "`sampled`", "6,000 trained on", "ask before you publish", "3.400"):
        assert words in card.text
    for sentence in report["sentences"]:
        assert sentence in card.text
    settings = tomllib.loads(card.text.partition("```toml\n")[2].partition("```")[0])
    assert settings["steps"] == 100
    assert settings["seed"] == 0
    assert "teacher" not in settings


def test_a_teacher_of_the_hub_is_the_base_model(tmp_path: Path):
    found = {"model": "google/gemma-2-2b", "revision": "0" * 40, "license": "gemma"}
    card, _ = card_of(tmp_path, with_teacher(**found))
    assert card.data.base_model == "google/gemma-2-2b"  # type: ignore[attr-defined]
    assert card.data.license == "gemma"  # type: ignore[attr-defined]
    assert "0" * 40 in card.text


@pytest.mark.parametrize("revision", [None, "0" * 40])  # of a folder, and of the hub
def test_an_adapter_has_the_model_that_it_adapts_as_its_base(tmp_path: Path, revision):
    adapter = {"base_model_name_or_path": "org/student", "revision": revision}
    results = make_results(settings={"lora_r": 8})
    card, _ = card_of(tmp_path, results, adapter)
    assert card.data.library_name == "peft"  # type: ignore[attr-defined]
    assert card.data.to_dict().get("base_model") == ("org/student" if revision else None)
    assert "LoRA of rank 8, alpha 16, on all-linear" in card.text


@pytest.mark.parametrize(
    ("teachers", "own", "expected"),
    [
        ("mit", "mit", "mit"),
        ("gemma", "apache-2.0", "other"),
        ("mit", None, "unknown"),
        (None, "mit", "unknown"),
    ],
)
def test_a_student_with_weights_of_its_own_is_under_both_licenses(
    tmp_path: Path, teachers, own, expected
):
    results = with_teacher(license=teachers).model_copy(
        update={"starts_from_weights": True, "student_license": own}
    )
    card, _ = card_of(tmp_path, results)
    assert card.data.license == expected  # type: ignore[attr-defined]


def test_a_license_is_read_from_a_folders_card_or_is_unknown(tmp_path: Path):
    assert license_of(tmp_path) is None
    readme = tmp_path / "README.md"
    for text, expected in [
        ("---\nlicense: apache-2.0\n---\n# A model\n", "apache-2.0"),
        ("# No front matter\n", None),
        ("---\nlicense: [\n---\n", None),
        ("---\ntags: [x]\n---\n", None),
    ]:
        readme.write_text(text)
        assert license_of(tmp_path) == expected, text
    assert license_of_hub_model("folder", "") is None
    assert license_of_hub_model("nobody/has-this-model", "0" * 40) is None
