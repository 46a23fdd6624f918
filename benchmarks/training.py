"""The loop with which the benchmarks train small students on (batch, targets) pairs, on one CPU."""

from collections.abc import Iterable, Iterator
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

    The other arguments are those of `minimise`.
    """

    def losses() -> Iterator[Tensor]:
        for batch, targets in pairs:
            ids = batch["input_ids"]
            logits = student(input_ids=ids).logits[:, :-1].flatten(0, 1)
            if targets is None:
                yield nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
            else:
                yield distillation_loss(logits, targets)

    return minimise(
        student,
        losses(),
        held_out,
        learning_rate=learning_rate,
        measure_every=measure_every,
        steps=steps,
    )


def minimise(
    student: nn.Module,
    losses: Iterable[Tensor],
    held_out: Tensor,
    *,
    learning_rate: float,
    measure_every: int,
    steps: int | None = None,
    beside: nn.Module | None = None,
) -> list[float]:
    """Takes a step of the demo's optimizer on each loss; returns the curve of held-out losses.

    losses: each is computed when it is asked for, from the student as it is then. held_out: (N, L)
    ids, measured after every `measure_every` steps. The learning rate falls to zero in `steps` steps,
    or stays where it is after the warm-up if that is None. beside: what is trained with the student,
    at the same rate.
    """

    def factor(step: int) -> float:
        falling = 1.0 if steps is None else (steps - step) / steps
        return min(falling, (step + 1) / WARMUP)

    both = student if beside is None else nn.ModuleList([student, beside])
    optimizer = make_muon(both, learning_rate=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    curve = []
    student.train()
    for step, loss in enumerate(losses, 1):
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % measure_every == 0:
            curve.append(measure(student, held_out))
    return curve


@torch.inference_mode()
def measure(student: nn.Module, held_out: Tensor) -> float:
    """Computes the mean cross-entropy, in nats per token, on (N, L) ids."""
    student.eval()
    total = 0.0
    for ids in held_out.split(32):
        total += float(student(input_ids=ids, labels=ids).loss) * len(ids)
    student.train()
    return total / len(held_out)
