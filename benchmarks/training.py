"""The loop with which the benchmarks train small students on (batch, targets) pairs, on one CPU."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from examples.demo_teacher import WARMUP
from logit_codec import Targets
from student_trainer import distillation_loss
from student_trainer.training.optimizers import make_muon


def train(
    student: nn.Module,
    pairs: Iterable[tuple[dict[str, Any], Targets | None]],
    held_out: Tensor,
    *,
    learning_rate: float,
    measure_every: int,
    steps: int | None = None,
) -> list[float]:
    """Trains on targets, or on the labels where targets is None; returns the curve of held-out losses.

    held_out: (N, L) ids, measured after every `measure_every` steps. The learning rate falls to zero
    in `steps` steps, or stays where it is after the warm-up if that is None.
    """
    optimizer, schedule = make_optimizer(student, learning_rate, steps)
    losses = []
    student.train()
    for step, (batch, targets) in enumerate(pairs, 1):
        ids = batch["input_ids"]
        logits = student(input_ids=ids).logits[:, :-1].flatten(0, 1)
        if targets is None:
            loss = nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        else:
            loss = distillation_loss(logits, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % measure_every == 0:
            losses.append(measure(student, held_out))
    return losses


def make_optimizer(
    student: nn.Module,
    learning_rate: float,
    steps: int | None,
    beside: nn.Module | None = None,
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Makes the demo's optimizer and its schedule, which falls to zero in `steps`, if there is an end.

    beside: what is trained with the student, at the same rate.
    """

    def factor(step: int) -> float:
        falling = 1.0 if steps is None else (steps - step) / steps
        return min(falling, (step + 1) / WARMUP)

    both = student if beside is None else nn.ModuleList([student, beside])
    optimizer = make_muon(both, learning_rate=learning_rate)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@torch.inference_mode()
def measure(student: nn.Module, held_out: Tensor) -> float:
    """Computes the mean cross-entropy, in nats per token, on (N, L) ids."""
    student.eval()
    total = 0.0
    for ids in held_out.split(32):
        total += float(student(input_ids=ids, labels=ids).loss) * len(ids)
    student.train()
    return total / len(held_out)
