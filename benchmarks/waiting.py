"""How long does a training loop wait for a teacher that is late, or away for a while?

Run `python -m benchmarks.waiting` (two minutes). The stream and the look-ahead are the real ones; the
teacher's targets are real too, and arrive after a stated time: a multiple of the step's, which is a
sleep. An outage holds every answer back that falls into it.
"""

import itertools
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future

import torch
from torch import Tensor

from student_trainer import LocalTeacher
from student_trainer.teachers.look_ahead import make_look_ahead
from student_trainer.teachers.request import Answer, Piece, ScoreOptions
from student_trainer.teachers.stream import stream_loader
from tests.support import tiny

STEP_S = 0.1
STEPS = 200
OUTAGE_AT_S, OUTAGE_S = 100 * STEP_S, 30 * STEP_S
VOCABULARY = 64
OPTIONS = ScoreOptions.of("top_k:8", 1.0, 0, 0)


class LateTeacher:
    """Answers of `teacher`, each `latency_s` after it was asked for."""

    def __init__(self, teacher: LocalTeacher, batches: list[dict[str, Tensor]]) -> None:
        self._targets = {
            one["input_ids"].numpy().tobytes(): targets
            for one, targets in teacher.stream_batches(batches, targets="top_k:8")
        }
        self.latency_s = 0.0
        self.outage: tuple[float, float] | None = None
        """When it begins and ends, on time.monotonic's clock."""
        self._due: queue.SimpleQueue[tuple[float, Future[Answer], Answer]] = queue.SimpleQueue()
        # One for all answers: to start one for each would keep the trainer waiting for it.
        threading.Thread(target=self._answer, daemon=True).start()

    def submit(self, piece: Piece, options: ScoreOptions) -> "Future[Answer]":
        future: Future[Answer] = Future()
        at = time.monotonic() + self.latency_s
        if self.outage is not None and self.outage[0] <= at < self.outage[1]:
            at = self.outage[1]
        answer = Answer(self._targets[piece.token_ids[None].numpy().tobytes()])
        self._due.put((at, future, answer))
        return future

    def _answer(self) -> None:
        """Gives each answer when it is due. What is asked for later is never due earlier."""
        while True:
            at, future, answer = self._due.get()
            if future.set_running_or_notify_cancel():
                time.sleep(max(0.0, at - time.monotonic()))
                future.set_result(answer)


def main() -> None:
    """Measures and prints the table."""
    torch.set_num_threads(1)
    local = LocalTeacher(tiny.make_model("Llama", VOCABULARY))
    generator = torch.Generator().manual_seed(0)
    batches = [
        {"input_ids": torch.randint(VOCABULARY, (1, 12), generator=generator)} for _ in range(16)
    ]
    teacher = LateTeacher(local, batches)
    print(f"{STEPS} steps of {STEP_S} s; what the first batch costs is left out")
    print(f"{'':<58}{'waiting':>9}{'of the time':>13}")
    for label, ahead, latency_steps, outage in (
        ("latency 2 steps, one batch at a time", 1, 2, False),
        ("latency 2 steps, look-ahead 8", 8, 2, False),
        ("latency 40 steps, look-ahead 30s", "30s", 40, False),
        ("latency 2 steps, outage of 30 steps, look-ahead 40", 40, 2, True),
        ("latency 2 steps, outage of 30 steps, look-ahead 30s", "30s", 2, True),
    ):
        teacher.latency_s = latency_steps * STEP_S
        look_ahead = make_look_ahead(ahead, OPTIONS.spec, local.info)
        stream = stream_loader(teacher.submit, itertools.cycle(batches), OPTIONS, look_ahead)
        next(stream)
        started = time.monotonic() + OUTAGE_AT_S
        teacher.outage = (started, started + OUTAGE_S) if outage else None
        waited_s, seconds = train(stream)
        stream.close()
        print(f"{label:<58}{waited_s:7.2f} s{waited_s / seconds:12.2%}")


def train(pairs: Iterator[object]) -> tuple[float, float]:
    """Takes STEPS pairs, one after each step; returns the seconds it waited, and those in all."""
    began_s, waited_s = time.perf_counter(), 0.0
    for _ in range(STEPS):
        asked_s = time.perf_counter()
        next(pairs)
        waited_s += time.perf_counter() - asked_s
        time.sleep(STEP_S)
    return waited_s, time.perf_counter() - began_s


if __name__ == "__main__":
    main()
