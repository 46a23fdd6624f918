"""Says what a run would take: reads what it would read, and measures a few of its steps."""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers
from torch import Tensor

from student_trainer.client.remote import RemoteTeacher
from student_trainer.config import TrainConfig
from student_trainer.losses.fused_pass import CHUNK_BYTES, CHUNK_BYTES_ELSEWHERE
from student_trainer.record.recorded import Recorded
from student_trainer.teachers.layout import Layout
from student_trainer.trainer_fields import find_deciding
from student_trainer.training.arguments import make_training_arguments
from student_trainer.training.corpus import Corpus
from student_trainer.training.held_out import HeldOut
from student_trainer.training.progress import read_history
from student_trainer.training.run import list_targets, make_trainer, make_view
from student_trainer.training.trainer import StudentTrainer

WARM_UP_STEPS, MIN_STEPS, MIN_SECONDS = 3, 5, 15.0
"""What is measured: so many steps and seconds at least, after steps that are slower."""
TEACHER_SECONDS = 5.0
GIB = 2**30
BEST_STUDENT = {"load_best_model_at_end", "metric_for_best_model", "greater_is_better"}
"""Fields of `[training]` that need checkpoints or measurements, of which a scratch run has none."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Holds what a few steps of one process cost."""

    rows: float
    """Trained rows of a step."""
    step_s: float
    """Of a step, with what it waits for targets."""
    student_s: float
    """Of a step, without that."""
    held_out_s: float
    """Of a measurement of the student on the held-out text."""
    asked: float
    """Share of the sequences that the live teacher was asked for."""
    payload_nbytes: float
    """Of a row's targets."""
    wire_nbytes: float
    """Of a row that the live teacher is asked for, both ways."""
    memory: Mapping[str, Any]


def make_plan(
    config: TrainConfig,
    corpus: Corpus,
    teacher: RemoteTeacher | Recorded | None,
    held_out: HeldOut,
    held_out_s: float,
) -> dict[str, Any]:
    """Measures a few steps of a scratch copy of the student; returns what the run would take.

    teacher: None where the student learns from labels. held_out_s: how long the teacher took for the
    held-out text. Sizes are in GiB, times in hours,
    rates in trained tokens per second. Raises what training can raise.
    """
    num_ranks = max(config.workers, 1)
    live = teacher.fallback if isinstance(teacher, Recorded) else teacher
    measured = _measure_steps(config, corpus, teacher, held_out, num_ranks)
    teacher_rate = None if live is None else _measure_teacher(config, corpus, live)
    assert config.steps is not None
    steps, per_step = config.steps, config.batch_size * config.accumulation
    step_s = measured.step_s
    if teacher_rate is not None and measured.asked:  # the ranks share the teacher
        step_s = max(step_s, measured.asked * measured.rows * num_ranks / teacher_rate)
    epoch_steps = None if corpus.num_sequences is None else max(corpus.num_sequences // per_step, 1)
    live_steps = steps if live else 0
    if isinstance(teacher, Recorded) and epoch_steps is not None:
        live_steps = min(live_steps, config.draws * epoch_steps)
    distilled_s = live_steps * step_s + (steps - live_steps) * measured.student_s
    if live is None:
        distilled_s = steps * step_s
    students_s = {"distilled": distilled_s}
    if config.control:
        control = _measure_steps(config, corpus, None, held_out, num_ranks)
        students_s["control"] = steps * control.step_s
    if config.shuffled_control:
        is_recorded = isinstance(teacher, Recorded)
        students_s["shuffled"] = steps * (measured.student_s if is_recorded else step_s)
    measurements = _count_measurements(config, steps, epoch_steps)
    measuring_s = len(students_s) * measurements * measured.held_out_s + held_out_s
    asked_rows = measured.asked * live_steps * measured.rows * num_ranks
    if config.shuffled_control and not isinstance(teacher, Recorded):
        asked_rows *= 2
    slower = "student"
    if step_s - measured.student_s > 0.1 * step_s:
        slower = "record" if live is None else "teacher"
    return {
        "sequences": corpus.num_sequences,
        "tokens": corpus.num_tokens,
        "trained_tokens": corpus.num_trained_tokens,
        "held_out_sequences": len(corpus.held_out),
        "notes": corpus.notes,
        "batch_size": config.batch_size,
        "accumulation": config.accumulation,
        "processes": num_ranks,
        "steps": steps,
        "epochs": None if epoch_steps is None else steps / epoch_steps,
        "trained_tokens_of_run": round(steps * measured.rows * num_ranks),
        "student_tokens_per_s": measured.rows * num_ranks / measured.student_s,
        "teacher_tokens_per_s": teacher_rate,
        "slower": slower,
        "hours": (sum(students_s.values()) + measuring_s) / 3600,
        "hours_of_students": {name: seconds / 3600 for name, seconds in students_s.items()},
        "hours_of_measuring": measuring_s / 3600,
        "bytes_per_token": measured.payload_nbytes,
        "wire_gib": asked_rows * measured.wire_nbytes / GIB if live else None,
        "record_gib": asked_rows * measured.payload_nbytes / GIB
        if config.record and live
        else None,
        **measured.memory,
        "first_example": _mark_example(corpus),
    }


class _Watch(transformers.TrainerCallback):
    """Logs after the steps of the warm-up, and ends the training when enough was measured."""

    def __init__(self) -> None:
        self._began_s: float | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now_s, step = time.perf_counter(), state.global_step
        if step == WARM_UP_STEPS:
            self._began_s = now_s
            control.should_log = True
        elif self._began_s is not None and step >= WARM_UP_STEPS + MIN_STEPS:
            is_enough = now_s - self._began_s >= MIN_SECONDS
            control.should_log = control.should_training_stop = is_enough


def _measure_steps(
    config: TrainConfig,
    corpus: Corpus,
    teacher: RemoteTeacher | Recorded | None,
    held_out: HeldOut,
    num_ranks: int,
) -> Measured:
    """Trains a scratch copy of the student for a few steps, on what one process would get.

    Without a teacher it is the control, which learns from labels.
    """
    live = teacher.fallback if isinstance(teacher, Recorded) else teacher
    with tempfile.TemporaryDirectory() as folder:
        scratch = _make_scratch(config, Path(folder), num_ranks)
        name = "control" if teacher is None else "distilled"
        trainer = make_trainer(scratch, corpus, held_out, name, teacher)
        trainer.add_callback(_Watch())
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        before = _count(teacher, live)
        trainer.train()
        after = _count(teacher, live)
        history = read_history(trainer.state.log_history)
        memory = _measure_memory(trainer, config)
        held_out_s = fmean(_time_measurement(trainer) for _ in range(2))
        trainer.progress.close()
        trainer.close()
    last, first = history[-1], history[0] if len(history) > 1 else None
    steps, seconds, rows = last["step"], last["seconds"], last["tokens"]
    waiting_s = last["waiting_fraction"] * seconds
    if first is not None:
        steps, rows = steps - first["step"], rows - first["tokens"]
        seconds = seconds - first["seconds"]
        waiting_s = last["waiting_fraction"] * seconds
    num_targets = len(list_targets(config))  # of each row
    handed_out, asked, num_rows, payload, wire = (b - a for a, b in zip(before, after, strict=True))
    return Measured(
        rows=rows / steps,
        step_s=seconds / steps,
        student_s=(seconds - waiting_s) / steps,
        held_out_s=held_out_s,
        asked=asked / max(handed_out, 1),
        payload_nbytes=payload / max(num_rows, 1) * num_targets,
        wire_nbytes=wire / max(num_rows, 1) * num_targets,
        memory=memory,
    )


def _time_measurement(trainer: StudentTrainer) -> float:
    began_s = time.perf_counter()
    trainer.evaluate()
    return time.perf_counter() - began_s


def _make_scratch(config: TrainConfig, folder: Path, num_ranks: int) -> TrainConfig:
    """Returns the settings for steps like those of the run, of which nothing is kept."""
    table = find_deciding(config.training)
    table = {name: value for name, value in table.items() if name not in BEST_STUDENT}
    needs_measurements = config.schedule in ("reduce_lr_on_plateau", "greedy")
    return config.model_copy(
        update={
            "output": folder,
            "batch_size": max(config.batch_size // num_ranks, 1),
            "workers": 0,
            "schedule": "linear" if needs_measurements else config.schedule,
            "training": {**table, "eval_strategy": "no", "logging_strategy": "no"},
            "early_stopping": 0,
            "checkpoint_every": 0,
            "tensorboard": False,
            "report_to": [],
        }
    )


def _count(teacher: RemoteTeacher | Recorded | None, live: Any) -> tuple[int, ...]:
    """Returns sequences, those of the live teacher, rows, and their bytes alone and on the wire."""
    wire = 0 if live is None else live.counters.sent_nbytes + live.counters.received_nbytes
    if teacher is None:
        return (0,) * 5
    if isinstance(teacher, Recorded):
        asked = teacher.counters.asked
        handed_out = asked + teacher.counters.replayed
    else:
        handed_out = asked = teacher.counters.requests
    return handed_out, asked, teacher.counters.rows, teacher.counters.payload_nbytes, wire


def _measure_teacher(config: TrainConfig, corpus: Corpus, live: Any) -> float:
    """Returns how many rows in a second the live teacher answers when nothing else is done."""

    def make_batches():
        while True:
            for row in corpus.train:
                yield corpus.collate([row])

    streams = [
        live.stream_batches(
            make_batches(),
            targets=targets,
            temperature=config.temperature,
            seed=config.seed,
            ahead=4 * config.batch_size,
            teacher_view=make_view(config, corpus.tokenizer),
        )
        for targets in list_targets(config)
    ]
    pairs = zip(*streams, strict=True)
    try:
        next(pairs)
        began_s, rows = time.perf_counter(), 0
        while time.perf_counter() - began_s < TEACHER_SECONDS:
            rows += next(pairs)[0][1].num_rows
        return rows / (time.perf_counter() - began_s)
    finally:
        for stream in streams:
            stream.close()


def _measure_memory(trainer: StudentTrainer, config: TrainConfig) -> dict[str, Any]:
    """Returns what the student, its training and the loss of a batch take, in GiB."""
    student: Any = trainer.model
    optimizer: Any = trainer.optimizer
    parameters = [*student.parameters()]
    states = [value for state in optimizer.state.values() for value in state.values()]
    head = student.get_output_embeddings()
    rows = trainer.args.train_batch_size * config.sequence_length
    row_nbytes = head.weight.shape[0] * 4
    if trainer.has_fused_loss:  # a few buffers of logits for as many rows as fit
        device = head.weight.device.type
        loss = min(CHUNK_BYTES.get(device, CHUNK_BYTES_ELSEWHERE), 2 * rows * row_nbytes)
    else:
        loss = 2 * rows * row_nbytes  # logits and their gradient
    found = {
        "weights_gib": sum(one.nbytes for one in parameters) / GIB,
        "gradients_gib": sum(one.nbytes for one in parameters if one.requires_grad) / GIB,
        "optimizer_gib": sum(one.nbytes for one in states if isinstance(one, Tensor)) / GIB,
        "loss": "fused" if trainer.has_fused_loss else "logits in full",
        "loss_gib": loss / GIB,
    }
    if torch.cuda.is_available():
        found["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    return found


def _count_measurements(config: TrainConfig, steps: int, epoch_steps: int | None) -> int:
    """Returns how often each student is measured on the held-out text."""
    args = make_training_arguments(config, config.output)
    count = 1 + args.eval_on_start  # at the end
    if args.eval_strategy == "steps":
        every = args.eval_steps or 1
        count += steps // int(every if every >= 1 else max(every * steps, 1))
    elif args.eval_strategy == "epoch" and epoch_steps is not None:
        count += -(-steps // epoch_steps)
    return count


def _mark_example(corpus: Corpus) -> list[dict[str, Any]]:
    """Returns the text of the first row, in parts that are trained or not."""
    layout = Layout.of(corpus.collate([next(iter(corpus.train))]))
    ids = layout.ids[0][layout.real[0]]
    is_trained = torch.zeros(len(ids), dtype=torch.bool)
    is_trained[1:] = layout.trained[0, : len(ids) - 1]  # what row t predicts is token t+1
    edges = [0, *(is_trained[1:] != is_trained[:-1]).nonzero()[:, 0].add(1).tolist(), len(ids)]
    return [
        {"trained": bool(is_trained[start]), "text": corpus.tokenizer.decode(ids[start:end])}
        for start, end in pairwise(edges)
    ]
