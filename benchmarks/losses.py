"""What a distillation loss costs in memory and time: from full logits, fused, and TRL's.

Run `python -m benchmarks.losses` (13 minutes of one core; --rounds 1 takes five). TRL's rows need
`pip install -e '.[bench]'`. 512 rows of a head of 256,000 x 128 in float32, 64 kept ids per
row: forward, backward, gradients of hidden states and head. The logits alone are 0.49 GiB, the head's
gradient 0.12 GiB. One CPU thread.

    memory    GiB: the highest resident set size of the first step in a fresh process, less the size
              just before; gradients included
    CPU       seconds of CPU time per step; the median of the steps after the first, over all rounds
    of naive  that time over the naive loss's with the same options
    loss      what came out, to see that the same was computed

`TRL chunked` is the loss of AsyncDistillationTrainer: the same kept ids with the same tail bucket, in
chunks of 256 rows under activation checkpointing. `TRL chunked, teacher's head` is the loss of
DistillationTrainer, of dense targets that it computes from the teacher's hidden states (128 wide
here) in tiles: exact, and half of its multiplications are the teacher's.
"""

import argparse
import importlib
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logit_codec import SampledTargets, TopKTargets
from student_trainer import distillation_loss, fused_distillation_loss

ROWS, VOCAB, KEPT, DIM = 512, 256_000, 64, 128
STEPS = 3


class Inputs:
    """A student's hidden states and head, labels, and what a teacher kept; by a fixed seed."""

    def __init__(self, rows: int = ROWS, vocab: int = VOCAB) -> None:
        torch.manual_seed(0)
        self.hidden = torch.randn(rows, DIM).requires_grad_()
        self.head = (0.2 * torch.randn(vocab, DIM)).requires_grad_()
        self.labels = torch.randint(vocab, (rows,))
        first = torch.randint(vocab - 37 * KEPT, (rows, 1))
        self.ids = first + 37 * torch.arange(KEPT)
        self.logprobs = (2 * torch.randn(rows, KEPT)).log_softmax(1) + torch.tensor(0.95).log()
        self.rows, self.vocab = rows, vocab

    def top_k(self, temperature: float = 1.0) -> TopKTargets:
        return TopKTargets(
            vocab_size=self.vocab,
            temperature=temperature,
            row_splits=KEPT * torch.arange(self.rows + 1),
            token_ids=self.ids.flatten(),
            logprobs=self.logprobs.flatten(),
            tail_logprob=torch.full((self.rows,), 0.05).log(),
        )

    def sampled(self) -> SampledTargets:
        return SampledTargets(
            vocab_size=self.vocab,
            temperature=1.0,
            row_splits=KEPT * torch.arange(self.rows + 1),
            token_ids=self.ids.flatten(),
            counts=torch.ones(self.rows * KEPT, dtype=torch.int64),
            num_draws=KEPT,
        )


def naive(inputs: Inputs, **options: Any) -> Tensor:
    targets = options.pop("targets", None) or inputs.top_k()
    logits = inputs.hidden @ inputs.head.T
    softcap = options.pop("softcap", None)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return distillation_loss(logits, targets, **options)


def fused(inputs: Inputs, **options: Any) -> Tensor:
    targets = options.pop("targets", None) or inputs.top_k()
    return fused_distillation_loss(inputs.hidden, inputs.head, targets, **options)


def frozen(inputs: Inputs) -> Tensor:
    return fused_distillation_loss(inputs.hidden, inputs.head.detach(), inputs.top_k())


def trl_chunked(inputs: Inputs) -> Tensor:
    module = importlib.import_module(
        "trl.experimental.async_distillation.async_distillation_trainer"
    )
    total, *_ = module._chunked_jsd_loss(
        inputs.hidden,
        inputs.head,
        None,
        logit_scale=1.0,
        final_logit_softcapping=None,
        target_ids=inputs.ids,
        teacher_target_logps=inputs.logprobs,
        valid_candidate_mask=torch.ones_like(inputs.ids, dtype=torch.bool),
        beta=0.0,
        temperature=1.0,
        add_tail_bucket=True,
        teacher_id_idx=None,
        num_teachers=1,
        chunk_size=module._CHUNKED_LM_HEAD_CHUNK_SIZE,
    )
    return total / inputs.rows


def trl_dense(inputs: Inputs) -> Tensor:
    module = importlib.import_module("trl.kernels.chunked_divergence")
    teacher_hidden, teacher_head = inputs.hidden.detach().roll(1, 0), inputs.head.detach()
    each, _ = module.ChunkedDivergenceFunction.apply(
        inputs.hidden, inputs.head, None, teacher_hidden, teacher_head, None, 0.0
    )
    return each.mean()


def labelled(loss: Callable[..., Tensor]) -> Callable[[Inputs], Tensor]:
    return lambda inputs: loss(inputs, labels=inputs.labels, kd_weight=0.5, ce_weight=0.5)


def capped(loss: Callable[..., Tensor]) -> Callable[[Inputs], Tensor]:
    return lambda inputs: loss(
        inputs, targets=inputs.top_k(2.0), softcap=30.0, labels=inputs.labels, ce_weight=0.5
    )


def named(loss: Callable[..., Tensor], divergence: str) -> Callable[[Inputs], Tensor]:
    return lambda inputs: loss(inputs, divergence=divergence)


def drawn(loss: Callable[..., Tensor]) -> Callable[[Inputs], Tensor]:
    return lambda inputs: loss(inputs, targets=inputs.sampled())


# name: (loss, name of the naive loss with the same options)
VARIANTS: dict[str, tuple[Callable[[Inputs], Tensor], str]] = {
    "naive": (naive, "naive"),
    "fused": (fused, "naive"),
    "fused, frozen head": (frozen, "naive"),
    "TRL chunked": (trl_chunked, "naive"),
    "TRL chunked, teacher's head": (trl_dense, "naive"),
    "naive, labels too": (labelled(naive), "naive, labels too"),
    "fused, labels too": (labelled(fused), "naive, labels too"),
    "naive, JSD": (named(naive, "jsd"), "naive, JSD"),
    "fused, JSD": (named(fused, "jsd"), "naive, JSD"),
    "naive, sampled": (drawn(naive), "naive, sampled"),
    "fused, sampled": (drawn(fused), "naive, sampled"),
    "naive, T = 2, labels, softcap": (capped(naive), "naive, T = 2, labels, softcap"),
    "fused, T = 2, labels, softcap": (capped(fused), "naive, T = 2, labels, softcap"),
}


@dataclass
class Found:
    """What the processes of a variant measured."""

    memory: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    loss: float = 0.0


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description="What a distillation loss costs.")
    parser.add_argument("--rounds", type=int, default=3, help="processes per row, taken in turn")
    parser.add_argument("--only", default="", help="rows whose name contains this, and their naive")
    parser.add_argument("--variant", choices=tuple(VARIANTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(measure(VARIANTS[args.variant][0])))
        return
    chosen = {name for name in VARIANTS if args.only in name}
    chosen |= {VARIANTS[name][1] for name in chosen}
    missing = importlib.util.find_spec("trl") is None
    names = [name for name in VARIANTS if name in chosen and not (missing and "TRL" in name)]
    found = {name: Found() for name in names}
    for _ in range(args.rounds):
        for name in names:
            result = in_a_process_of_its_own(name)
            found[name].memory.append(result["memory"])
            found[name].seconds += result["seconds"]
            found[name].loss = result["loss"]
    print(f"{ROWS} rows, V = {VOCAB:,}, K = {KEPT}, D = {DIM}, float32, {args.rounds} rounds")
    print(f"{'':<32}{'memory':>8}{'CPU':>8}{'of naive':>10}{'loss':>10}")
    for name in names:
        row, base = found[name], found[VARIANTS[name][1]]
        seconds = statistics.median(row.seconds)
        ratio = seconds / statistics.median(base.seconds)
        memory = statistics.median(row.memory)
        print(f"{name:<32}{memory:8.2f}{seconds:8.2f}{ratio:10.2f}{row.loss:10.5f}")
    if missing and chosen & {"TRL chunked", "TRL chunked, teacher's head"}:
        print("TRL is not installed: pip install -e '.[bench]'")
    elif {"fused", "TRL chunked"} <= found.keys():
        ours, theirs = (statistics.median(found[name].seconds) for name in ("fused", "TRL chunked"))
        print(f"fused takes {ours / theirs:.2f} of the time of TRL chunked")


def in_a_process_of_its_own(name: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.losses", "--variant", name]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(loss: Callable[[Inputs], Tensor]) -> dict[str, Any]:
    """Memory of the first step, times of those after it."""
    torch.set_num_threads(1)
    loss(Inputs(rows=2, vocab=37 * KEPT + 1)).backward()  # loads what is loaded on first use
    inputs = Inputs()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is now the present
    loss(inputs).backward()
    memory = resident("VmHWM") - before
    seconds = []
    value = 0.0
    for _ in range(STEPS):
        inputs.hidden.grad = inputs.head.grad = None
        started = time.process_time()
        result = loss(inputs)
        result.backward()
        seconds.append(time.process_time() - started)
        value = float(result.detach())
    return {"memory": memory, "seconds": seconds, "loss": value}


def resident(which: str) -> float:
    """GiB, as Linux counts it."""
    match = re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) / (1 << 20)


if __name__ == "__main__":
    main()
