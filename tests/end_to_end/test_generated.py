"""Texts that a teacher wrote: trained on with its targets and without, and what is said of them."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from student_trainer import connect
from student_trainer.cli import main
from tests.conftest import Served, one_torch_thread
from tests.end_to_end.conftest import WORDS, write_config
from tests.student_trainer.commands.test_generate import run, write
from tests.support import tiny

one_thread = pytest.fixture(autouse=True, scope="module")(one_torch_thread)
LENGTH = 32


@pytest.fixture(scope="module")
def prompts(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    words = text.read_text().split()
    starts = range(0, 48 * 50, 50)
    path.write_text("\n".join(" ".join(words[start : start + 6]) for start in starts))
    return path


@pytest.fixture(scope="module")
def texts(
    trained_service: Served,
    teacher_model: Any,
    prompts: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """46 texts of the teacher, with targets."""
    folder = tmp_path_factory.mktemp("texts") / "set"
    with connect(trained_service.address, tokenizer=tiny.make_tokenizer(WORDS)) as teacher:
        writing: Any = teacher
        writing.info.max_generation_tokens = 256
        writing.generate = partial(write, teacher_model, teacher)
        settings: dict[str, Any] = {"split_lines": True, "max_new_tokens": 24, "seed": 2}
        run(teacher, prompts, folder, targets="sampled", **settings)
    return folder


def train(folder: Path, name: str, *flags: str, student: Path, text: Path) -> dict[str, Any]:
    config = write_config(
        folder / f"{name}.toml",
        **{"student": str(student), "output": str(folder / name), "sequence_length": LENGTH},
        **{"batch_size": 8, "steps": 12, "learning_rate": 1e-2, "seed": 1},
        held_out=[str(text)],
        held_out_sequences=16,
    )
    assert main(["train", config, *flags]) == 0
    return json.loads((folder / name / "report.json").read_text())


def test_soft_and_hard_learn_from_the_same_text_and_are_compared(
    trained_service: Served, texts: Path, student_folder: Path, text: Path, tmp_path: Path, capsys
):
    where = {"student": student_folder, "text": text}
    live = "--teacher", trained_service.address
    soft = train(tmp_path, "soft", "--record", str(texts), *live, **where)
    hard = train(tmp_path, "hard", "--data", str(texts), "--targets", "none", *live, **where)
    several = "--packing", "isolate", "--sequence-length", "64"  # texts in a row
    train(tmp_path, "several", "--record", str(texts), "--held-out", str(texts), *several, **where)
    alone = train(tmp_path, "alone", "--record", str(texts), "--targets", "none", **where)
    assert soft["data_digest"] == hard["data_digest"] == alone["data_digest"]
    assert soft["trained_tokens"] == hard["trained_tokens"]
    assert soft["teacher_loss"] == pytest.approx(hard["teacher_loss"], rel=1e-5)
    assert alone["teacher_loss"] is None
    assert hard["distilled_loss"] == alone["distilled_loss"] != soft["distilled_loss"]
    assert hard["bytes_per_token"] is None
    assert hard["waiting_fraction"] == 0
    for report in (soft, hard, alone):
        assert report["written_texts"] == 46
        assert report["written_mean_tokens"] == pytest.approx(report["written_tokens"] / 46)
        assert 0 <= report["written_repetition"] < 1
        assert report["written_bytes_per_token"] > 8
        assert report["written_tokens_per_s"] > 0
        assert any("The text was written by" in one for one in report["sentences"])
        assert report["teacher_fingerprint"] == soft["teacher_fingerprint"]
    assert "without targets" in hard["sentences"][0]
    card = ModelCard.load(tmp_path / "hard" / "student" / "README.md").text
    for words in (
        "on texts that it wrote (sequence-level distillation)",
        "| targets | none: the student learnt from the text alone |",
        "| loss | cross-entropy on the text |",
        "46 texts after 46 prompts",
        "temperature 1.0, max_new_tokens 24, seed 2",
        soft["teacher_fingerprint"],
    ):
        assert words in card
    assert "by knowledge distillation" in ModelCard.load(tmp_path / "soft/student/README.md").text
    capsys.readouterr()
    both = [str(tmp_path / "soft"), str(tmp_path / "hard")]
    assert main(["report", *both, "--output", str(tmp_path / "both.html")]) == 0
    assert "2 settings were compared" in capsys.readouterr().out
    page = (tmp_path / "both.html").read_text()
    assert "written repetition" in page
    assert "student, labels alone" in (tmp_path / "hard" / "report.html").read_text()
    assert "student, distilled" not in (tmp_path / "hard" / "report.html").read_text()


def test_held_out_texts_of_a_set_tell_the_teachers_loss_without_a_teacher(
    texts: Path, student_folder: Path, tmp_path: Path
):
    config = write_config(
        tmp_path / "train.toml",
        **{"student": str(student_folder), "record": str(texts), "sequence_length": LENGTH},
        **{"batch_size": 8, "steps": 4, "seed": 1},
    )
    reports = []
    for targets in ("sampled", "none"):
        output = tmp_path / targets
        assert main(["train", config, "--targets", targets, "--output", str(output)]) == 0
        reports.append(json.loads((output / "report.json").read_text()))
    soft, hard = reports
    assert soft["held_out_rows"] == hard["held_out_rows"] == pytest.approx(2 * 24, abs=24)
    assert 0 < soft["teacher_loss"] == hard["teacher_loss"] < 3
    assert soft["written_nats"] == pytest.approx(soft["teacher_loss"], abs=1)


def test_labels_of_any_text_need_no_teacher(student_folder: Path, text: Path, tmp_path: Path):
    where = {"student": student_folder, "text": text}
    report = train(tmp_path, "labels", "--data", str(text), "--targets", "none", **where)
    assert report["distilled_loss"] < 4.2
    assert report["written_by"] is None
    card = ModelCard.load(tmp_path / "labels" / "student" / "README.md").text
    assert "Trained on the labels of a text with logitstream" in card
    assert "teacher's fingerprint" not in card


def test_a_run_of_labels_resumes_bit_for_bit(
    texts: Path, student_folder: Path, text: Path, tmp_path
):
    where = {"student": student_folder, "text": text}
    flags = "--data", str(texts), "--targets", "none", "--checkpoint-every", "4"
    whole = train(tmp_path, "whole", *flags, **where)
    (tmp_path / "again" / "checkpoints").mkdir(parents=True)
    for name in ("checkpoint-8",):
        kept = tmp_path / "whole" / "checkpoints" / name
        kept.rename(tmp_path / "again" / "checkpoints" / name)
    again = train(tmp_path, "again", *flags, **where)
    assert again["distilled_loss"] == whole["distilled_loss"]


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (("--record", "SET", "--sequence-length", "8"), 1, "--sequence-length must be at least"),
        (("--data", "TEXT"), 2, "give --teacher HOST:PORT, --record FOLDER or both"),
        (
            ("--data", "TEXT", "--targets", "none", "--control"),
            2,
            "--control is a student trained on",
        ),
        (("--data", "TEXT", "--targets", "none", "--kd-weight", "1"), 2, "--kd-weight could use"),
        (
            ("--data", "TEXT", "--targets", "none", "--entropy-routing", "0.1"),
            2,
            "--entropy-routing could use",
        ),
        (("--record", "EMPTY"), 1, "--data is missing: "),
    ],
)
def test_what_cannot_be_learnt_is_refused_at_once(
    texts: Path, student_folder: Path, text: Path, tmp_path: Path, capsys, flags, code, words
):
    names = {"SET": str(texts), "TEXT": str(text), "EMPTY": str(tmp_path)}
    given = [names.get(flag, flag) for flag in flags]
    arguments = ["--student", str(student_folder), "--output", str(tmp_path / "out"), *given]
    assert main(["train", *arguments]) == code
    assert words in capsys.readouterr().err


def test_the_plan_of_a_run_of_labels_names_no_teacher(
    texts: Path, student_folder: Path, tmp_path: Path, capsys, monkeypatch
):
    monkeypatch.setattr("student_trainer.training.plan.MIN_SECONDS", 0.1)
    where = "--student", str(student_folder), "--output", str(tmp_path / "out"), "--steps", "20"
    sizes = "--sequence-length", str(LENGTH), "--batch-size", "4"
    flags = "--data", str(texts), "--targets", "none", "--dry-run", "--json"
    assert main(["train", *where, *sizes, *flags]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["slower"] == "student"
    assert plan["wire_gib"] is None
    assert plan["bytes_per_token"] == 0
    assert [part["trained"] for part in plan["first_example"]] == [False, True]


def test_a_record_of_other_texts_is_no_data(
    trained_service: Served, student_folder: Path, text: Path, tmp_path: Path, capsys
):
    record = "--teacher", trained_service.address, "--record", str(tmp_path / "record")
    few = tmp_path / "few.txt"
    few.write_text(" ".join(text.read_text().split()[: 42 * LENGTH]))
    where = "--student", str(student_folder), "--sequence-length", str(LENGTH)
    assert main(["record", *where, *record, "--data", str(few)]) == 0
    capsys.readouterr()
    assert main(["train", *where, *record[2:], "--output", str(tmp_path / "out")]) == 1
    assert "holds no texts that a teacher wrote" in capsys.readouterr().err


def test_options_of_the_file_are_printed_as_a_file(tmp_path: Path, capsys):
    config = write_config(
        tmp_path / "generate.toml",
        **{"teacher": "x:1", "student": "s", "prompts": ["p.txt"], "output": "set"},
        **{"num_return_sequences": 3, "stop": ["end"], "max_tokens": 5},
    )
    with pytest.raises(SystemExit) as ended:
        main(["generate", config, "--print-config"])
    assert not ended.value.code
    printed = capsys.readouterr().out
    (tmp_path / "again.toml").write_text(printed)
    assert "num_samples = 3" in printed
    assert 'stop_strings = ["end"]' in printed
    assert "max_new_tokens = 5" in printed
