"""What a step of transformers' Trainer with a teacher costs, with the student's logits and without.

Run `python -m benchmarks.hf_trainer` (one minute). One sequence of 512 trained rows, a 2-layer Llama
student of width 128 with a head of 128,256 ids of its own, 64 kept ids per row, plain SGD, float32 on
one CPU thread. Head, embeddings and their gradients are 0.06 GiB each, the logits would be 0.24 GiB.

    memory    GiB: the highest resident set size of training in a fresh process, less the size just
              before; gradients included
    CPU       seconds of CPU time per step; the median of the steps after the first
    loss      of the last step, to see that the same was computed
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.losses import KEPT, resident
from logit_codec import TopKTargets
from protos import teacher_pb2
from student_trainer.hf_trainer import DistillationArguments, DistillationTrainer

ROWS, VOCAB, DIM, STEPS = 512, 128_256, 128, 6


class Prepared:
    """A teacher that answers every batch with the same targets, at once."""

    info = teacher_pb2.TeacherInfo(teacher_fingerprint="prepared", vocab_size=VOCAB)

    def __init__(self) -> None:
        first = torch.randint(VOCAB - 37 * KEPT, (ROWS, 1))
        logprobs = (2 * torch.randn(ROWS, KEPT)).log_softmax(1) + torch.tensor(0.95).log()
        self.targets = TopKTargets(
            vocab_size=VOCAB,
            temperature=1.0,
            row_splits=torch.arange(ROWS + 1) * KEPT,
            token_ids=(first + 37 * torch.arange(KEPT)).flatten(),
            logprobs=logprobs.flatten(),
            tail_logprob=torch.full((ROWS,), 0.05).log(),
        )

    def stream_batches(self, loader: Iterable[Any], **_: Any) -> Iterator[tuple[Any, TopKTargets]]:
        for batch in loader:
            yield batch, self.targets


class Timed(transformers.TrainerCallback):
    """CPU seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds.append(time.process_time() - self.began)


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description="What a step of the Trainer costs.")
    parser.add_argument("--measure", choices=("logits", "fused"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure == "fused")))
        return
    print(f"{ROWS} rows, V = {VOCAB:,}, K = {KEPT}, D = {DIM}, float32")
    print(f"{'':<32}{'memory':>8}{'CPU':>8}{'loss':>10}")
    for name, title in (
        ("logits", "with logits (fused=False)"),
        ("fused", "without (the default)"),
    ):
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.hf_trainer", "--measure", name]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr}")
        found = json.loads(done.stdout.splitlines()[-1])
        print(f"{title:<32}{found['memory']:8.2f}{found['seconds']:8.2f}{found['loss']:10.5f}")


def measure(fused: bool) -> dict[str, float]:
    """In this process, which should be a fresh one."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    student = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=DIM,
            intermediate_size=2 * DIM,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
    )
    row = {"input_ids": torch.randint(VOCAB, (ROWS + 1,))}
    timed = Timed()
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            student,
            transformers.TrainingArguments(
                folder,
                per_device_train_batch_size=1,
                max_steps=STEPS,
                optim="sgd",
                max_grad_norm=0.0,
                logging_steps=1,
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                save_strategy="no",
            ),
            train_dataset=[row],  # type: ignore[arg-type]
            teacher=Prepared(),  # type: ignore[arg-type]
            distillation=DistillationArguments(
                targets=f"top_k:{KEPT}", ahead="1", check_first_batch=False, fused=fused
            ),
            callbacks=[timed],
        )
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the highest so far is now the present
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "kd_loss" in entry]
    return {
        "memory": resident("VmHWM") - before,
        "seconds": statistics.median(timed.seconds[1:]),
        "loss": losses[-1],
    }


if __name__ == "__main__":
    main()
