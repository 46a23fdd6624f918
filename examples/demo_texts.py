"""The demo's students of teacher-written text: `make demo DEMO_FLAGS=--generate`.

The teacher continues pieces of the training text. One student learns from what it wrote with the
distributions of every token, another from the words alone.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from examples import demo_teacher

PROMPT, EVERY = 32, 2048  # tokens of a prompt, and from one prompt to the next
STUDENTS = {"soft": "distilled", "hard": "labels alone"}


def run(options: argparse.Namespace, address: str) -> dict[str, Any] | None:
    """Lets the teacher write, and trains the students; None if that failed.

    Returns what the texts are like, and of each seed the report of each student.
    """
    texts = write(options, address)
    if texts is None:
        return None
    reports: dict[int, dict[str, Any]] = {}
    for seed in options.seeds:
        trained = {kind: train(options, address, seed, kind) for kind in STUDENTS}
        if None in trained.values():
            return None
        reports[seed] = trained
    folders = [folder_of(options, options.seeds[0], kind) for kind in STUDENTS]
    if (options.output / "results.json").is_file():  # the student of the text itself
        folders.insert(0, options.output)
    page = options.output / "texts.html"
    if call("report", *map(str, folders), "--output", str(page)) is None:
        return None
    return {"texts": texts, "reports": reports, "page": page}


def write(options: argparse.Namespace, address: str) -> dict[str, Any] | None:
    """Lets the teacher continue a piece of text at every 2,048 tokens; returns what it wrote."""
    train, _ = demo_teacher.corpus_files()
    settings = {
        "teacher": address,
        "student": str(demo_teacher.student_folder(options.output / "teacher")),
        "prompts": [str(path) for path in train],
        "output": str(options.output / "texts"),
        "prompt_tokens": PROMPT,
        "prompt_every": EVERY,
        "max_new_tokens": demo_teacher.SEQUENCE - PROMPT,
        "targets": options.targets,
    }
    said = call("generate", write_settings(options.output / "generate.toml", settings), "--json")
    return None if said is None else json.loads(said)


def train(options: argparse.Namespace, address: str, seed: int, kind: str) -> dict[str, Any] | None:
    """Trains a student on these texts: soft, from the distributions, or hard, from the words."""
    output, texts = folder_of(options, seed, kind), str(options.output / "texts")
    _, held_out = demo_teacher.corpus_files()
    settings = {
        "teacher": address,  # which the held-out text is asked of; the texts have their targets
        "student": str(demo_teacher.student_folder(options.output / "teacher")),
        "data": [texts],
        "held_out": [str(path) for path in held_out],
        "output": str(output),
        "sequence_length": demo_teacher.SEQUENCE,
        "batch_size": demo_teacher.BATCH,
        "steps": options.steps,
        "learning_rate": options.learning_rate,
        "optimizer": "muon",
        "seed": seed,
        **(
            {"targets": options.targets, "record": texts} if kind == "soft" else {"targets": "none"}
        ),
    }
    output.mkdir(parents=True, exist_ok=True)
    said = call("train", write_settings(output / "train.toml", settings), "--json")
    return None if said is None else json.loads(said)


def folder_of(options: argparse.Namespace, seed: int, kind: str) -> Path:
    """The folder of a student of these texts."""
    first = seed == options.seeds[0]
    return options.output / ("" if first else f"seed-{seed}") / f"texts-{kind}"


def write_settings(path: Path, settings: dict[str, Any]) -> str:
    """Writes settings as TOML, in which JSON's values are values too; returns the argument."""
    path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))
    return f"@{path}"


def call(*arguments: str) -> str | None:
    """Runs `student-trainer`; returns what it printed, or None if it failed."""
    command = [sys.executable, "-m", "student_trainer", *arguments]
    ended = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    return ended.stdout if ended.returncode == 0 else None


def print_table(found: dict[str, Any]) -> None:
    """What the texts cost, and one line per seed."""
    texts = found["texts"]
    seconds = texts["tokens"] / texts["set_tokens_per_s"]
    nbytes = texts["tokens"] * texts["set_bytes_per_token"]
    print(
        f"\nwritten by the teacher: {texts['texts']:,} texts, {texts['tokens']:,} tokens, in "
        f"{seconds:.0f} s ({texts['set_tokens_per_s']:,.0f} tokens/s); targets {nbytes / 2**20:.1f} "
        f"MiB ({texts['set_bytes_per_token']:.1f} bytes/token)"
    )
    print("held-out loss of students of this text, nats per token")
    print("seed  distilled  labels alone  trained tokens")
    for seed, reports in found["reports"].items():
        print(
            f"{seed:4}  {reports['soft']['distilled_loss']:9.3f}  "
            f"{reports['hard']['distilled_loss']:12.3f}  {reports['soft']['trained_tokens']:14,}"
        )
    print(f"compared with the student of the text itself: {found['page']}")
