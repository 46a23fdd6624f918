"""The student's own text against the corpus, at equal student tokens; a part of `benchmarks.distill --modes`.

Every arm begins like the others: half of the steps off-policy (sampled:64, forward KL) on the same
batches. In the other half each row is a prompt of 8 tokens and 120 trained ones: those of the corpus, or
those that the student writes after the prompt. So all arms train on the same number of tokens (a text
that the student ends early has fewer).

Measured at the end: held-out cross-entropy, and the exact reverse KL to the teacher over the whole
vocabulary, per token, along 256 texts that the student itself writes after held-out prompts.

Letters: N texts, L tokens of a text, R rows, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.modes import MODES, Batch, Mode, compute_loss
from benchmarks.training import measure, minimise
from student_trainer import LocalTeacher, OnPolicyBatches, distillation_loss
from student_trainer.on_policy.arguments import OnPolicyArguments
from student_trainer.on_policy.writing import Writer
from student_trainer.teachers.layout import IGNORE_INDEX

PROMPT, NEW = 8, 120
"""Tokens of a prompt, and of what is trained after it."""
NUM_TEXTS = 256
"""Texts of each student that the reverse KL is measured along."""
COLD_START = "sampled:64"
"""The mode of the first half."""


@dataclass(frozen=True, slots=True)
class Arm:
    """Says how the second half is trained."""

    mode: Mode
    """What is asked of the teacher, and the loss."""
    share: float = 0.0
    """Of the batches, those that the student writes."""
    writing: dict[str, Any] = field(default_factory=dict)
    """Of OnPolicyArguments."""


REVERSE = {"divergence": "reverse_kl"}
ARMS: dict[str, Arm] = {
    "off-policy, sampled:64": Arm(MODES[COLD_START]),
    "off-policy, given ids": Arm(MODES["given ids, reverse KL"]),
    "off-policy, hidden": Arm(Mode("hidden:int8", REVERSE)),
    "on-policy, given ids": Arm(Mode(None, REVERSE), 1.0, {"targets": "given_ids"}),
    "on-policy, 64 ids": Arm(Mode(None, REVERSE), 1.0, {"support": 64}),
    "on-policy, hidden": Arm(Mode(None, REVERSE), 1.0, {"targets": "hidden:int8"}),
    "half on-policy, hidden": Arm(Mode(None, REVERSE), 0.5, {"targets": "hidden:int8"}),
    "on-policy, hidden, jsd": Arm(
        Mode(None, {"divergence": "jsd"}), 1.0, {"targets": "hidden:int8"}
    ),
}
"""By the name in the table; the first is what the others are compared with."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Holds what was measured of one student."""

    reverse_kl: float
    error: float
    """The standard error of that over the texts."""
    loss: float
    tokens: int
    """Trained rows of the second half."""
    length: float
    """Tokens of the texts that it was measured along."""


def train_arm(
    arm: Arm,
    student: nn.Module,
    teacher: LocalTeacher,
    teacher_model: nn.Module,
    batches: list[Batch],
    held_out: Tensor,
    *,
    learning_rate: float,
    seed: int,
) -> Outcome:
    """Trains a student and measures it."""
    count = [0]
    minimise(
        student,
        _losses(arm, student, teacher, batches, seed, count),
        held_out,
        learning_rate=learning_rate,
        measure_every=len(batches) + 1,
        steps=len(batches),
    )
    texts = write(student, held_out[:NUM_TEXTS], seed)
    each_N = torch.tensor([measure_reverse_kl(student, teacher_model, ids) for ids in texts])
    lengths_N = torch.tensor([float(len(ids) - PROMPT) for ids in texts])
    # Per token: long texts count more. The error is that of a ratio of two sums.
    mean = float((each_N * lengths_N).sum() / lengths_N.sum())
    off_N = lengths_N * (each_N - mean) / lengths_N.mean()
    error = float(off_N.std() / len(texts) ** 0.5)
    return Outcome(mean, error, measure(student, held_out), count[0], float(lengths_N.mean()))


def _losses(
    arm: Arm,
    student: nn.Module,
    teacher: LocalTeacher,
    batches: list[Batch],
    seed: int,
    count: list[int],
) -> Iterator[Tensor]:
    """Yields the loss of each step, computed from the student as it is then."""
    half = len(batches) // 2
    for batch in batches[:half]:
        yield compute_loss(MODES[COLD_START], student, teacher, batch, None)
    arguments = OnPolicyArguments(
        fraction=arm.share or 1.0, prompt_tokens=PROMPT, max_new_tokens=NEW, **arm.writing
    )
    chosen = [bool(arm.share) and arguments.chooses(seed, n) for n in range(len(batches))]
    prompts = [
        ids[:PROMPT]
        for batch, chooses in zip(batches[half:], chosen[half:], strict=True)
        if chooses
        for ids in batch["input_ids"]
    ]
    size = len(batches[0]["input_ids"])
    written = OnPolicyBatches(
        student, prompts, teacher, arguments=arguments, batch_size=size, seed=seed
    )
    for number in range(half, len(batches)):
        if chosen[number]:
            batch, targets = next(written)
            rows = batch["labels"][:, 1:].flatten() != IGNORE_INDEX
            outputs = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            logits = outputs.logits[:, :-1].flatten(0, 1)[rows]
            count[0] += len(logits)
            yield distillation_loss(logits, targets, **arm.mode.options)
        else:
            ids = batches[number]["input_ids"]
            mask = torch.ones_like(ids[:, 1:], dtype=torch.bool)
            mask[:, : PROMPT - 1] = False
            count[0] += int(mask.sum())
            mode = arm.mode if not arm.share else MODES[COLD_START]
            yield compute_loss(mode, student, teacher, batches[number], None, mask=mask.flatten())
        written.step()
    written.close()


def write(student: nn.Module, held_out: Tensor, seed: int) -> list[Tensor]:
    """Lets the student continue held-out prompts; returns N of (L,) ids."""
    config: Any = student.config
    arguments = OnPolicyArguments(max_new_tokens=NEW)
    writer = Writer(student, None, arguments, num_ids=config.vocab_size, seed=seed)
    found: list[Tensor] = []
    for number, ids in enumerate(held_out[:, :PROMPT].split(64)):
        found += writer.write([*ids], name=f"measured {number}", version=0).token_ids
    return found


@torch.inference_mode()
def measure_reverse_kl(student: nn.Module, teacher: nn.Module, ids_L: Tensor) -> float:
    """Computes the mean over the written tokens of KL(student | teacher), over every id."""
    was_training = student.training
    student.eval()
    own_RV, theirs_RV = (
        model(input_ids=ids_L[None]).logits[0, PROMPT - 1 : -1].double().log_softmax(1)
        for model in (student, teacher.eval())
    )
    student.train(was_training)
    return float((own_RV.exp() * (own_RV - theirs_RV)).sum(1).mean())


def print_arms(found: dict[str, list[Outcome]], seeds: list[int], steps: int) -> None:
    """Prints what was measured of each arm, and in how many seeds it is nearer to the teacher."""
    print(
        f"\n{steps} steps, the second half on the corpus or on the student's own text, seeds "
        f"{', '.join(map(str, seeds))}"
    )
    print(f"{'second half':24}{'reverse KL':>11}{'loss':>8}{'tokens':>9}{'nearer':>8}   each seed")
    base = found.get(next(iter(ARMS)))
    for name, outcomes in found.items():
        mean = sum(one.reverse_kl for one in outcomes) / len(outcomes)
        loss = sum(one.loss for one in outcomes) / len(outcomes)
        tokens = sum(one.tokens for one in outcomes) // len(outcomes)
        nearer = ""
        if base is not None and outcomes is not base:
            pairs = zip(outcomes, base, strict=True)
            won = sum(ours.reverse_kl < theirs.reverse_kl for ours, theirs in pairs)
            nearer = f"{won} of {len(outcomes)}"
        print(
            f"{name:24}{mean:11.3f}{loss:8.3f}{tokens:9,}{nearer:>8}   "
            + " ".join(f"{one.reverse_kl:.3f}±{one.error:.3f}" for one in outcomes)
        )
