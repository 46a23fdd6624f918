"""The demo's student trained with each kind of target, at equal steps: what each kind is worth.

For every seed the demo's teacher scores each batch once, densely; every kind is then selected from
those rows, encoded and decoded as the service and the client do, and trains a student of its own
from the same initial weights on the same batches. Loss is held-out cross-entropy in nats per token;
"from dense" is the distance to the student trained on the whole distribution.

    python -m benchmarks.distill [--seeds 0 1 2] [--steps 150] [--picture docs/distill.png]

With --modes every way of using a teacher is trained instead, each with the targets and the loss that it
is meant for (benchmarks/modes.py; docs/modes.md), and then the student's own text is compared with the
corpus (benchmarks/on_policy.py; docs/on_policy.md).
"""

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.modes import MODES, CountingTeacher, train_mode
from benchmarks.on_policy import ARMS, Outcome, print_arms, train_arm
from benchmarks.training import train
from examples import demo_teacher
from examples.demo import LEARNING_RATE, STEPS
from logit_codec import Targets, decode, encode, ids_digest, parse_targets, select, uniforms
from student_trainer import LocalTeacher, data
from student_trainer.losses.distillation import prepare
from student_trainer.teachers.several import Teachers
from student_trainer.teachers.teacher import Teacher

NUM_MEASUREMENTS = 10
KINDS: dict[str, tuple[str | None, bool]] = {
    "labels": (None, False),
    "dense": ("dense:f32", False),
    "sampled N=16": ("sampled:16", False),
    "sampled N=64": ("sampled:64", False),
    "sampled N=256": ("sampled:256", False),
    "top_k 32 + tail": ("top_k:32", False),
    "top_k p>=1/256 + tail": ("top_k:min_p=1/256,max_k=128", False),
    "top_k 32 renormalised": ("top_k:32", True),
}
"""Name -> targets, and whether the tail is thrown away and the rest scaled up to 1."""


def targets_of(batch_BL: Tensor, dense_RV: Tensor, kind: str, seed: int) -> tuple[Targets, int]:
    """One batch's targets of a kind, through bytes, and the size of those."""
    wanted, drop_tail = KINDS[kind]
    assert wanted is not None
    spec = parse_targets(wanted)
    positions = torch.arange(batch_BL.shape[1] - 1)
    draws = torch.cat([uniforms(seed, 0, ids_digest(ids), positions) for ids in batch_BL])
    picked = select(dense_RV, spec, uniforms=draws, realized_ids=batch_BL[:, 1:].flatten())
    data_bytes = encode(picked, bits=getattr(spec, "bits", 7))
    return prepare(decode(data_bytes), renormalize=drop_tail), len(data_bytes)


def pairs(
    batches: list[dict[str, Tensor]], dense: list[Tensor], kind: str, seed: int, sent: list[int]
) -> Iterator[tuple[dict[str, Tensor], Targets | None]]:
    """The batches with their targets; adds bytes and rows to `sent`."""
    for batch, dense_RV in zip(batches, dense, strict=True):
        if KINDS[kind][0] is None:
            yield batch, None
            continue
        targets, size = targets_of(batch["input_ids"], dense_RV, kind, seed)
        sent[0] += size
        sent[1] += targets.num_rows
        yield batch, targets


def main() -> None:
    parser = argparse.ArgumentParser(description="What each kind of target, or mode, is worth.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--modes", action="store_true", help="compare ways of using a teacher")
    parser.add_argument("--kinds", nargs="+", metavar="NAME", help="of the lines of the table")
    parser.add_argument("--teacher", type=Path, default=Path("runs/demo/teacher"))
    parser.add_argument("--picture", type=Path, help="where a picture of the curves goes")
    options = parser.parse_args()
    if options.steps > NUM_MEASUREMENTS and options.steps % NUM_MEASUREMENTS:
        parser.error(f"--steps must be a multiple of {NUM_MEASUREMENTS}, to measure at the end")
    names = [*MODES, *ARMS] if options.modes else list(KINDS)
    if unknown := [name for name in options.kinds or [] if name not in names]:
        parser.error(f"there is no {unknown[0]!r}; there are {', '.join(names)}")
    names = options.kinds or names
    arms = [name for name in names if options.modes and name in ARMS]
    names = [name for name in names if name not in arms]

    import transformers

    demo_teacher.build_teacher(options.teacher)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.teacher)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.teacher)
    teacher = CountingTeacher(model, tokenizer)
    mixed: Teacher = teacher
    if any(MODES[name].mixes for name in names if options.modes):
        second = options.teacher.with_name(f"{options.teacher.name}-second")
        demo_teacher.build_teacher(second, seed=1)
        other = transformers.AutoModelForCausalLM.from_pretrained(second)
        both = {"first": teacher, "second": CountingTeacher(other, tokenizer)}
        mixed = Teachers(both, weights={"first": 0.5, "second": 0.5})
    train_files, held_out_files = demo_teacher.corpus_files()
    sequences = data.pack(train_files, tokenizer, demo_teacher.SEQUENCE, label="data")
    held_out = data.pack(held_out_files, tokenizer, demo_teacher.SEQUENCE, label="held-out data")
    every = max(1, options.steps // NUM_MEASUREMENTS)
    runs: dict[str, list[list[float]]] = {name: [] for name in names}
    nbytes: dict[str, float] = {}
    outcomes: dict[str, list[Outcome]] = {name: [] for name in arms}
    for seed in options.seeds:
        batches = list(
            data.batches(sequences, batch_size=demo_teacher.BATCH, steps=options.steps, seed=seed)
        )
        if options.modes:
            add_text_before(batches, sequences)
        dense = [] if options.modes else score_densely(teacher, batches)
        for name in names:
            student = demo_teacher.make_student(options.teacher, seed)
            if options.modes:
                teacher.nbytes = 0
                curve = train_mode(
                    MODES[name],
                    student,
                    mixed if MODES[name].mixes else teacher,
                    batches,
                    held_out[:256],
                    learning_rate=LEARNING_RATE,
                    measure_every=every,
                )
                rows = len(batches) * batches[0]["input_ids"][:, 1:].numel()
                nbytes[name] = teacher.nbytes / rows * (2 if MODES[name].mixes else 1)
            else:
                sent = [0, 0]
                curve = train(
                    student,
                    pairs(batches, dense, name, seed, sent),
                    held_out[:256],
                    learning_rate=LEARNING_RATE,
                    measure_every=every,
                    steps=options.steps,
                )
                nbytes[name] = sent[0] / max(1, sent[1])
            runs[name].append(curve)
            print(f"{name:24} seed {seed}  {curve[-1]:.3f}", flush=True)
        for name in arms:
            student = demo_teacher.make_student(options.teacher, seed)
            found = train_arm(
                ARMS[name],
                student,
                teacher,
                model,
                batches,
                held_out[:256],
                learning_rate=LEARNING_RATE,
                seed=seed,
            )
            outcomes[name].append(found)
            print(f"{name:24} seed {seed}  {found}", flush=True)
    if runs:
        print_table(runs, nbytes, options.steps, options.seeds)
    if arms:
        print_arms(outcomes, options.seeds, options.steps)
    if options.picture:
        draw(runs, every, options.picture)


def add_text_before(batches: list[dict[str, Any]], sequences: Tensor) -> None:
    """Adds the sequence that comes before each one in the text to the batches, as `before`."""
    places = {ids.numpy().tobytes(): place for place, ids in enumerate(sequences)}
    for batch in batches:
        found = [places[ids.numpy().tobytes()] for ids in batch["input_ids"]]
        batch["before"] = [sequences[max(0, place - 1)].tolist() for place in found]


def score_densely(teacher: LocalTeacher, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """Returns (R, V) logprobs for each batch."""
    stream = teacher.stream_batches(batches, targets="dense:f32,realized=0,log_z=0")
    return [targets.logprobs for _, targets in stream]  # type: ignore[attr-defined]


def print_table(
    runs: dict[str, list[list[float]]], nbytes: dict[str, float], steps: int, seeds: list[int]
) -> None:
    """Prints the last losses, their mean, and the mean of their distances from `dense`."""
    dense_losses = [curve[-1] for curve in runs.get("dense", [])]
    print(f"\n{steps} steps, held-out loss of seeds {', '.join(map(str, seeds))}")
    print(f"{'targets':24}{'bytes/token':>12}{'loss':>8}{'from dense':>12}   each seed")
    for name, found in runs.items():
        losses = [curve[-1] for curve in found]
        distance = ""
        if dense_losses:
            gaps = [ours - base for ours, base in zip(losses, dense_losses, strict=True)]
            distance = f"{statistics.mean(gaps):+.3f}"
        size = f"{nbytes[name]:.1f}" if nbytes[name] else "-"
        print(
            f"{name:24}{size:>12}{statistics.mean(losses):8.3f}{distance:>12}   "
            + " ".join(f"{loss:.3f}" for loss in losses)
        )


def draw(runs: dict[str, list[list[float]]], every: int, path: Path) -> None:
    """Held-out loss against steps, the mean of the seeds, one line per kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for kind, found in runs.items():
        means = [statistics.mean(losses) for losses in zip(*found, strict=True)]
        steps = [every * (number + 1) for number in range(len(means))]
        style = "--" if kind == "labels" or "renormalised" in kind else "-"
        axes.plot(steps, means, style, label=kind)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("held-out loss, nats per token")
    axes.set_ylim(top=min(5.5, axes.get_ylim()[1]))
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
