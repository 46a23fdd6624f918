"""`student-trainer generate` against a live service: what it stores, and that it goes on after a kill."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from examples import demo_texts
from student_trainer import Recorded, connect
from student_trainer.cli import main
from tests.conftest import Served, one_torch_thread
from tests.end_to_end.conftest import WORDS, write_config
from tests.support import tiny

one_thread = pytest.fixture(autouse=True, scope="module")(one_torch_thread)

SEALING = """
import sys
from student_trainer.record import generated
generated.SEAL_S = 0.0
from student_trainer.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""The program, with a shard for each text."""


@pytest.fixture
def config(trained_service: Served, student_folder: Path, text: Path, tmp_path: Path) -> str:
    """16 prompts of 6 words, 4 texts of each."""
    words = text.read_text().split()
    rows = [{"prompt": " ".join(words[at : at + 6]), "topic": "x"} for at in range(0, 800, 50)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write_config(
        tmp_path / "generate.toml",
        **{"teacher": trained_service.address, "student": str(student_folder)},
        **{
            "prompts": [str(prompts)],
            "max_new_tokens": 32,
            "num_samples": 4,
            "seed": 3,
            "ahead": 2,
        },
    )


def read(folder: Path) -> list[dict[str, Any]]:
    files = sorted(map(str, folder.glob("shard-*.parquet")))
    found: Any = datasets.load_dataset("parquet", data_files=files, split="train")
    return list(found)


def test_the_command_stores_what_the_teacher_wrote_with_its_distributions(
    trained_service: Served, config: str, tmp_path: Path, capsys
):
    output = tmp_path / "set"
    assert main(["generate", config, "--output", str(output), "--json"]) == 0
    printed = capsys.readouterr()
    said = json.loads(printed.out)
    assert "texts" in printed.err  # the bar
    assert (said["texts"], said["written"], said["already_there"]) == (64, 64, 0)
    assert said["finish_length"] + said.get("finish_stop", 0) == 64
    rows = read(output)
    assert said["tokens"] == said["new_tokens"] == sum(len(row["token_ids"]) for row in rows)
    assert said["tokens_per_s"] > 0
    assert len({row["text"] for row in rows}) > 32, "samples differ"
    tokenizer = tiny.make_tokenizer(WORDS)
    with connect(trained_service.address, tokenizer=tokenizer) as live, Recorded(output) as record:
        for row in rows[:8]:
            ids, before = torch.tensor(row["input_ids"]), row["prompt_tokens"]
            labels = torch.where(torch.arange(len(ids)) < before, -100, ids)
            ((_, stored),) = record.stream_batches(
                [{"input_ids": ids[None], "labels": labels[None]}]
            )
            ((_, scored),) = live.stream([ids])
            scored = scored[before - 1 :]
            assert stored.num_rows == len(row["token_ids"])
            torch.testing.assert_close(
                stored.realized_logprob, scored.realized_logprob, atol=1e-4, rtol=0
            )
            assert row["nats"] == pytest.approx(-float(stored.realized_logprob.mean()), rel=1e-4)
    # What was drawn is what the teacher finds likely.
    assert said["nats"] < 2


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGINT]
)
def test_a_command_that_was_stopped_goes_on_to_the_same_set(
    config: str, tmp_path: Path, capsys, number: signal.Signals
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(["generate", config, "--output", str(whole)]) == 0
    command = [sys.executable, "-c", SEALING, "generate", config, "--output", str(stopped)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len([*stopped.glob("shard-*.parquet")]) < 5:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -9), errors
    if number == signal.SIGINT:
        assert "run the same command to resume" in errors
    count = len(read(stopped))
    assert 5 <= count < 64
    capsys.readouterr()
    assert main(["generate", config, "--output", str(stopped), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["texts"], said["already_there"], said["written"]) == (64, count, 64 - count)
    assert read(stopped) == read(whole)


def test_the_prompts_of_a_set_are_prompts(config: str, tmp_path: Path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["generate", config, "--output", str(first), "--max-prompts", "3"]) == 0
    again = ["generate", config, "--output", str(second), "--prompts", str(first)]
    assert main([*again, "--temperature", "0", "--num-samples", "1", "--targets", "none"]) == 0
    rows = read(second)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in read(first)][::4]
    assert all(row["targets"] == [] for row in rows)
    assert json.loads(rows[0]["settings"])["temperature"] == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--max-new-tokens", "256"), "--max-new-tokens must be at most 255"),
        (("--prompt-column", "question"), "has no column 'question'; it has prompt, topic"),
        (
            ("--prompt-column", "topic", "--prompt-tokens", "240"),
            "--prompt-tokens must be at most 224",
        ),
        (("--prompts", "nowhere.txt"), "no file matches 'nowhere.txt'"),
        (("--targets", "given_ids"), "whose ids the teacher chooses"),
        (("--targets", "top-k"), "--targets: unknown kind of targets"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_folder(
    config: str, tmp_path: Path, capsys, flags, words
):
    assert main(["generate", config, "--output", str(tmp_path / "set"), *flags]) == 1
    lines = [one for one in capsys.readouterr().err.splitlines() if "student-trainer:" in one]
    assert len(lines) == 1
    assert words in lines[0]
    assert not (tmp_path / "set").exists()


@pytest.mark.slow
def test_the_demos_texts_train_two_students(
    trained_service: Served, student_folder: Path, text: Path, tmp_path: Path, monkeypatch, capsys
):
    class Options:
        output, seeds, steps, learning_rate, targets = tmp_path, [0], 6, 1e-2, "sampled"

    words = text.read_text().split()
    files = tmp_path / "train.txt", tmp_path / "held_out.txt"
    for file, some in zip(files, (words[:4000], words[-2000:]), strict=True):
        file.write_text(" ".join(some))
    monkeypatch.setattr(demo_texts.demo_teacher, "SEQUENCE", 32)
    monkeypatch.setattr(demo_texts.demo_teacher, "corpus_files", lambda: ([files[0]], [files[1]]))
    monkeypatch.setattr(demo_texts.demo_teacher, "student_folder", lambda folder: student_folder)
    monkeypatch.setattr(demo_texts, "PROMPT", 8)
    monkeypatch.setattr(demo_texts, "EVERY", 100)
    found = demo_texts.run(Options, trained_service.address)  # type: ignore[arg-type]
    assert found is not None
    count = found["texts"]["texts"]
    assert 30 < count <= 40  # one after every 100 words, equal ones once
    assert found["reports"][0]["soft"]["written_texts"] == count
    assert found["page"].is_file()
    demo_texts.print_table(found)
    printed = capsys.readouterr().out
    assert f"written by the teacher: {count} texts" in printed
    assert "MiB (" in printed
