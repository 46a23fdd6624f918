"""`student-trainer train` and `check` against a live service."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from student_trainer import LocalTeacher, ProtocolError, distillation_loss, prefetch
from student_trainer.cli import main
from student_trainer.hf.alignment import check_alignment
from tests.end_to_end.conftest import WORDS, write_config
from tests.support import tiny

ONLY_DISTILLED = (
    *("kd_loss", "ce_loss", "teacher_ce", "top1_agreement", "tail_mass"),
    *("bytes_per_token", "lookahead"),
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "student_trainer", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_train_writes_a_student_and_a_report(trained_service, student_folder, text, tmp_path: Path):
    config = write_config(
        tmp_path / "train.toml",
        student=str(student_folder),
        data=[str(text)],
        output=str(tmp_path / "out"),
        sequence_length=64,
        batch_size=8,
        steps=30,
        learning_rate=1e-2,
        seed=1,
        targets="top_k:16",
        control=True,
        shuffled_control=True,
        ce_weight=0.1,
        tensorboard=True,
    )
    ended = run("train", config, "--teacher", trained_service.address)
    assert ended.returncode == 0, ended.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["steps"] == 30
    assert report["seed"] == 1
    assert report["teacher_loss"] < report["distilled_loss"] < 4.2
    assert report["gain"] == pytest.approx(report["control_loss"] - report["distilled_loss"])
    assert 0 <= report["waiting_fraction"] <= 1
    assert report["bytes_per_token"] > 16
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<svg" in page
    assert (tmp_path / "out" / "loss.png").stat().st_size > 1000
    student = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "student")
    assert student.config.hidden_size == 32
    assert "distilled" in ended.stdout
    # The negative control saw the same targets in the wrong places.
    assert report["shuffled_loss"] > report["distilled_loss"]
    assert report["shuffled_excess"] == pytest.approx(
        report["shuffled_loss"] - report["distilled_loss"]
    )
    assert 0 < report["control_top1_agreement"] < report["distilled_top1_agreement"] < 1
    assert 0 < report["distilled_calibration_error"] < 1
    assert report["teacher_accuracy"] > report["distilled_accuracy"]
    card = ModelCard.load(tmp_path / "out" / "student" / "README.md")
    assert report["teacher_fingerprint"] in card.text
    assert f"{report['distilled_loss']:.3f}" in card.text
    # Made anew from the folder alone, the page and its numbers are the same.
    assert main(["report", str(tmp_path / "out"), "--output", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_text() == page
    assert json.loads((tmp_path / "again.json").read_text()) == report
    curves = {
        name: EventAccumulator(str(tmp_path / "out" / "tensorboard" / name)).Reload()
        for name in ("distilled", "control", "shuffled")
    }
    for name, events in curves.items():
        assert [event.step for event in events.Scalars("train/loss")] == [10, 20, 30]
        last = events.Scalars("eval/loss")[-1]
        assert (last.step, last.value) == (30, pytest.approx(report[f"{name}_loss"], rel=1e-6))
    tags = [f"train/{name}" for name in ONLY_DISTILLED]
    last = {tag[6:]: curves["distilled"].Scalars(tag)[-1].value for tag in tags}
    assert last["bytes_per_token"] == pytest.approx(report["bytes_per_token"], rel=0.1)
    assert last["lookahead"] == 0
    assert not set(tags) & set(curves["control"].Tags()["scalars"])


def test_a_run_that_diverged_is_reported_and_no_success(
    trained_service, student_folder, text, tmp_path: Path, capsys
):
    where = ("--student", str(student_folder), "--data", str(text), "--output", str(tmp_path))
    sizes = ("--sequence-length", "64", "--batch-size", "8", "--steps", "12")
    extreme = ("--optimizer", "adamw", "--learning-rate", "1e30")
    assert main(["train", *where, *sizes, *extreme, "--teacher", trained_service.address]) == 1
    assert "diverged" in capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text())["verdict"] == "diverged"


def test_train_refuses_another_tokenizer(trained_service, student_folder, text, tmp_path: Path):
    other = tmp_path / "student"
    transformers.AutoConfig.from_pretrained(student_folder).save_pretrained(other)
    tiny.make_tokenizer([*WORDS[1:], "other"]).save_pretrained(other)
    ended = run(
        *("train", "--teacher", trained_service.address, "--student", str(other)),
        *("--data", str(text), "--output", str(tmp_path / "out")),
    )
    assert ended.returncode == 1
    assert "tokenizers differ" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_sequences_too_long_for_the_teacher_are_refused_by_the_option_and_leave_nothing(
    trained_service, student_folder, text, tmp_path: Path, capsys
):
    ended = main(
        [
            *("train", "--teacher", trained_service.address, "--student", str(student_folder)),
            *("--data", str(text), "--output", str(tmp_path / "runs" / "out")),
            *("--sequence-length", "600"),
        ]
    )
    assert ended == 1
    (line,) = [one for one in capsys.readouterr().err.splitlines() if "student-trainer:" in one]
    assert "--sequence-length must be at most 256 for the teacher at " in line
    assert line.endswith(", got 600")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("check", "127.0.0.1:1"), 1, ["127.0.0.1:1"]),
        (("check", "nowhere"), 2, ["host:port"]),
        (("train", "--teacher", "x:1"), 2, ["--student"]),
        (("train", "@none.toml"), 2, ["none.toml"]),
        (("check", "127.0.0.1:1", "--tokens", "many"), 2, ["many", "300M"]),
    ],
)
def test_errors_are_clear_and_have_their_exit_code(arguments, code, words):
    ended = run(*arguments)
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    assert all(word in ended.stderr + ended.stdout for word in words)


def test_check_compares_measures_and_estimates(trained_service, student_folder):
    ended = run(
        *("check", trained_service.address, "--student", str(student_folder)),
        *("--tokens", "1.5B", "--json", "--targets", "top_k:16"),
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["tokenizer"] == "same"
    assert found["aligned"] is True
    assert found["latency_ms"] > 0
    assert found["tokens"] == 1_500_000_000
    assert found["hours"] == pytest.approx(1.5e9 / found["tokens_per_s"] / 3600)
    assert found["bytes"] == pytest.approx(1.5e9 * found["bytes_per_token"])
    assert found["disk_gib"] == pytest.approx(found["bytes"] / 2**30)
    assert found["wire_gib"] == pytest.approx(1.5e9 * found["wire_bytes_per_token"] / 2**30)
    # Four bytes of an id go up with each token; what surrounds a sequence is shared by its tokens.
    assert 4 < found["wire_bytes_per_token"] - found["bytes_per_token"] < 10


def test_targets_of_other_tokens_are_noticed_on_the_first_batch(teacher_folder, text):
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher_folder)
    tokenizer = tiny.make_tokenizer(WORDS)
    ids = torch.tensor(tokenizer(text.read_text()[:1000]).input_ids)[:101]
    teacher = LocalTeacher(model, tokenizer)
    ((_, targets),) = teacher.stream([ids[:100]])
    check_alignment({"input_ids": ids[None, :100]}, targets)
    # The same targets one token off in either direction, as a wrong slice would give them.
    with pytest.raises(ProtocolError, match="do not belong"):
        check_alignment({"input_ids": ids[None, 1:100]}, targets[:98])
    with pytest.raises(ProtocolError, match="do not belong"):
        check_alignment({"input_ids": ids[None, :99]}, targets[1:])


def test_the_readme_loop_trains_and_the_local_teacher_gives_the_same_student(
    trained_service, teacher_folder, student_folder, text
):
    from student_trainer import connect

    tokenizer = tiny.make_tokenizer(WORDS)
    ids = torch.tensor(tokenizer(text.read_text()).input_ids)[: 64 * 20].view(-1, 64)
    local = LocalTeacher(
        transformers.AutoModelForCausalLM.from_pretrained(teacher_folder), tokenizer
    )

    def trained(teacher) -> list[torch.Tensor]:
        torch.manual_seed(0)
        config = transformers.AutoConfig.from_pretrained(student_folder)
        student = transformers.AutoModelForCausalLM.from_config(config)
        optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
        losses = []
        pairs = teacher.stream([*ids, *ids, *ids], targets="top_k:16", ahead=8)
        for token_ids, targets in prefetch(pairs, ahead=4):
            logits = student(token_ids[None]).logits[0, :-1]
            loss = distillation_loss(logits, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert sum(losses[-20:]) < 0.95 * sum(losses[:20])
        return [parameter.detach() for parameter in student.parameters()]

    with connect(trained_service.address, tokenizer=tokenizer) as teacher:
        remote = trained(teacher)
    assert all(torch.equal(a, b) for a, b in zip(remote, trained(local), strict=True))
