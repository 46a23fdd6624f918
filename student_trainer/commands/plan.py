"""`student-trainer train --dry-run`: prints what a run would take, without training."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from student_trainer.client.remote import RemoteTeacher
from student_trainer.commands.show import format_size
from student_trainer.commands.student import find_student
from student_trainer.config import TrainConfig
from student_trainer.record.recorded import Recorded
from student_trainer.training import ranks
from student_trainer.training.corpus import check_ids, find_texts, read_corpus
from student_trainer.training.held_out import HeldOut
from student_trainer.training.plan import make_plan
from student_trainer.training.run import (
    check_checkpoints,
    check_settings,
    check_teacher,
    count_steps,
    make_view,
    open_measure,
    open_teacher,
    read_student,
)


def run_plan(config: TrainConfig) -> int:
    """Prints the plan of a run. Raises what the run would raise before its first step."""
    check_settings(config)
    if isinstance(config.teacher, dict):
        raise ValueError(
            "--dry-run measures one teacher: give --teacher HOST:PORT, without --teacher-column"
        )
    if ranks.count() > 1:
        raise ValueError("--dry-run measures one process: start it without torchrun or accelerate")
    check_output(config.output)
    config = config.model_copy(update={"student": find_student(config.student, config.revision)})
    read = read_student(config.student)
    find_texts(config)
    opened = open_measure(config, read.tokenizer)
    if config.has_targets:
        opened = open_teacher(config, read.tokenizer, write=False)
    with opened as teacher:
        assert teacher is None or isinstance(teacher, RemoteTeacher | Recorded)
        num_ids, fingerprint = read.num_ids, ""
        if teacher is not None:
            num_ids = check_teacher(config, teacher, read)
            fingerprint = teacher.info.teacher_fingerprint
        check_checkpoints(config, None, fingerprint)
        corpus = read_corpus(config, read.tokenizer)
        check_ids(corpus, num_ids)
        config = count_steps(config, corpus)
        check_checkpoints(config, corpus, fingerprint)
        began_s = time.perf_counter()
        held_out = HeldOut.ask(
            config, teacher, corpus, num_ids, make_view(config, corpus.tokenizer)
        )
        asked_s = time.perf_counter() - began_s
        learnt_from = teacher if config.has_targets else None
        plan = make_plan(config, corpus, learnt_from, held_out, asked_s)
    print(json.dumps(plan, indent=2) if config.as_json else format_plan(plan))
    return 0


def check_output(folder: Path) -> None:
    """Raises ValueError if the run could not create its folder, or not write to it."""
    existing = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not existing.is_dir():
        raise ValueError(f"--output {folder} cannot be created: {existing} is not a folder")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"--output {folder} is not writable for this user")


def format_plan(plan: Mapping[str, Any]) -> str:
    """Returns the plan as text for people."""
    lines = {"data": "a stream, whose length nobody knows"}
    if plan["sequences"] is not None:
        lines["data"] = (
            f"{plan['sequences']:,} sequences, {plan['tokens']:,} tokens, of which "
            f"{plan['trained_tokens']:,} are trained; {plan['held_out_sequences']:,} held out"
        )
    size = f"{plan['batch_size']} sequences"
    if plan["accumulation"] > 1:
        size = f"{plan['accumulation']} batches of {size}"
    lines["run"] = f"{plan['steps']:,} steps of {size}"
    if plan["epochs"] is not None:
        lines["run"] += f", {plan['epochs']:.3g} epochs"
    lines["run"] += f": {plan['trained_tokens_of_run']:,} trained tokens"
    lines["speed"] = f"student {plan['student_tokens_per_s']:,.0f} tokens/s"
    if plan["teacher_tokens_per_s"] is not None:
        lines["speed"] += f", teacher {plan['teacher_tokens_per_s']:,.0f} tokens/s by itself"
    lines["speed"] += f"; the {plan['slower']} decides"
    if plan["processes"] > 1:
        lines["speed"] += f", with one of {plan['processes']} processes measured"
    parts = [f"{hours:.3g} student {name}" for name, hours in plan["hours_of_students"].items()]
    lines["time"] = (
        f"{plan['hours']:.3g} hours: {', '.join(parts)}, {plan['hours_of_measuring']:.3g} measuring "
        "on the held-out text"
    )
    if plan["wire_gib"] is not None:
        lines["wire"] = f"{format_size(plan['wire_gib'])} from the teacher"
    if plan["record_gib"] is not None:
        lines["record"] = f"{format_size(plan['record_gib'])} to be added"
    lines["memory"] = ", ".join(
        f"{name} {format_size(plan[f'{name}_gib'])}"
        for name in ("weights", "gradients", "optimizer")
    )
    lines["memory"] += f", loss {format_size(plan['loss_gib'])} ({plan['loss']})"
    if "peak_gib" in plan:
        lines["memory"] += f"; at most {format_size(plan['peak_gib'])} on the GPU"
    text = [f"{name:8} {line}" for name, line in lines.items()]
    text += [f"{'note':8} {note}" for note in plan["notes"]]
    text.append("first example, after what it is for the student:")
    for part in plan["first_example"]:
        label = "trained" if part["trained"] else "context"
        text += [f"  {label} | {line}" for line in part["text"].split("\n")]
    return "\n".join(text)
