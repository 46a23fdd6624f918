"""A limited text read for many epochs: labels alone against targets that were recorded once.

The demo's teacher scores the text once, or once per draw, and `Recorded` writes it down; then every
student trains from such a record alone, with no teacher, and its held-out loss (cross-entropy, nats
per token) is measured after each epoch. "4 draws" are recorded in four passes with samples of their
own, and take turns; "redrawn" is one draw per epoch, which is what a live teacher sends. The students
of a seed begin with the same weights and see the same batches; another seed is other text, weights,
order and samples. The learning rate stays where it is after the warm-up, so that each epoch is a
place to stop. Curves are kept in a file: what is there is not trained again.

    python -m benchmarks.replay [--seeds 0 1 2] [--epochs 16] [--picture docs/replay.png]
"""

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.training import train
from examples import demo_teacher
from examples.demo_teacher import SEQUENCE
from logit_codec import Targets
from student_trainer import LocalTeacher, Recorded, data

LEARNING_RATE = 1e-2
TOKENS = 20_480
BATCH = 8  # sequences
EPOCHS = 16
SHOWN = (1, 2, 4, 6, 8, 10, 12, 14, 16)
"""Epochs that get a column."""
EACH_EPOCH = 0
"""In place of a number of draws."""
ARMS: dict[str, tuple[str | None, int]] = {
    "labels": (None, 1),
    "dense": ("dense:f32", 1),
    "sampled N=12": ("sampled:12", 1),
    "sampled N=12, redrawn": ("sampled:12", EACH_EPOCH),
    "sampled N=64": ("sampled:64", 1),
    "top_k 32 + tail": ("top_k:32", 1),
    "sampled N=12, 4 draws": ("sampled:12", 4),
    "sampled N=64, redrawn": ("sampled:64", EACH_EPOCH),
    "sampled N=256": ("sampled:256", 1),
}
"""Name -> targets, and how many draws of each sequence are recorded."""
DEFAULT_ARMS = list(ARMS)[:7]
"""Of the others docs/replay.md says nothing."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is the same for every student."""

    teacher: str
    tokens: int
    epochs: int
    learning_rate: float
    held_out: int
    """Sequences."""


@dataclass(frozen=True, slots=True)
class Curve:
    """What one student's training left behind."""

    losses: list[float]
    """Held-out loss after each epoch."""
    nbytes: float
    """Of the record, per token of the text: files on disk, the token ids in them included."""


@cache
def read(folder: Path) -> tuple[LocalTeacher, Tensor, Tensor]:
    """The teacher, all of the text and the held-out text, (N, L) int64 each."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    train_files, held_out_files = demo_teacher.corpus_files()
    sequences = data.pack(train_files, tokenizer, SEQUENCE, label="data")
    held_out = data.pack(held_out_files, tokenizer, SEQUENCE, label="held-out data")
    return LocalTeacher(model, tokenizer), sequences, held_out


def limited(sequences: Tensor, tokens: int, seed: int) -> Tensor:
    """Whole batches of sequences, drawn from everywhere in the text."""
    generator = torch.Generator().manual_seed(seed)
    count = tokens // SEQUENCE
    return sequences[torch.randperm(len(sequences), generator=generator)[:count]]


def record(
    folder: Path, teacher: LocalTeacher, sequences: Tensor, targets: str, draws: int, seed: int
) -> float:
    """Writes down `draws` draws of each sequence; returns the bytes per token that this takes."""
    with Recorded(folder, teacher, draws=draws) as recording:
        for epoch in range(draws):
            for _ in recording.stream(sequences, targets=targets, seed=seed, epoch=epoch):
                pass
    return sum(path.stat().st_size for path in folder.iterdir()) / sequences.numel()


def run(arm: str, seed: int, settings: Settings) -> Curve:
    """Records, then trains from the record."""
    torch.set_num_threads(1)
    teacher, everything, held_out = read(Path(settings.teacher))
    sequences = limited(everything, settings.tokens, seed)
    targets, draws = ARMS[arm]
    steps_per_epoch = len(sequences) // BATCH
    batches = data.batches(
        sequences, batch_size=BATCH, steps=settings.epochs * steps_per_epoch, seed=seed
    )
    student = demo_teacher.make_student(Path(settings.teacher), seed)

    def losses(pairs: Iterable[tuple[dict[str, Any], Targets | None]]) -> list[float]:
        return train(
            student,
            pairs,
            held_out[: settings.held_out],
            measure_every=steps_per_epoch,
            learning_rate=settings.learning_rate,
        )

    if targets is None:
        return Curve(losses((batch, None) for batch in batches), 0.0)
    with tempfile.TemporaryDirectory(prefix="replay-") as name:
        folder = Path(name)
        nbytes = record(folder, teacher, sequences, targets, draws or settings.epochs, seed)
        with Recorded(folder) as recorded:
            # The epoch that each batch is of chooses the draw.
            return Curve(losses(recorded.stream_batches(batches, seed=seed, ahead=2)), nbytes)


def main() -> None:
    parser = argparse.ArgumentParser(description="Many epochs of a limited text.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of text, in each epoch")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--held-out", type=int, default=128, help="sequences to measure on")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=DEFAULT_ARMS)
    parser.add_argument("--processes", type=int, default=2, help="students trained at a time")
    parser.add_argument("--teacher", type=Path, default=Path("runs/demo/teacher"))
    parser.add_argument("--curves", type=Path, default=Path("runs/replay.jsonl"))
    parser.add_argument("--picture", type=Path, help="where a picture of the curves goes")
    options = parser.parse_args()
    if options.tokens < 1 or options.tokens % (BATCH * SEQUENCE):
        parser.error(f"--tokens must be a multiple of a batch's {BATCH * SEQUENCE:,} tokens")

    demo_teacher.build_teacher(options.teacher)
    settings = Settings(
        str(options.teacher),
        options.tokens,
        options.epochs,
        options.learning_rate,
        options.held_out,
    )
    wanted = [(arm, seed) for arm in options.arms for seed in options.seeds]
    found = load(options.curves, settings)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, mp_context=spawn) as processes:
        pending = {
            processes.submit(run, arm, seed, settings): (arm, seed)
            for arm, seed in wanted
            if (arm, seed) not in found
        }
        for future in as_completed(pending):
            arm, seed = pending[future]
            found[arm, seed] = curve = future.result()
            keep(options.curves, settings, arm, seed, curve)
            print(f"{arm}, seed {seed}: {curve.losses[-1]:.3f}", file=sys.stderr, flush=True)
    curves = {arm: [found[arm, seed] for seed in options.seeds] for arm in options.arms}

    print(
        f"{settings.tokens:,} tokens, learning rate {settings.learning_rate:g}, held-out loss of "
        f"seeds {', '.join(map(str, options.seeds))}"
    )
    print_table(curves)
    if options.picture:
        draw(curves, options.picture)


def load(path: Path, settings: Settings) -> dict[tuple[str, int], Curve]:
    """The curves that were kept, of these settings, by arm and seed."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [entry for entry in map(json.loads, lines) if entry["settings"] == asdict(settings)]
    return {(entry["arm"], entry["seed"]): Curve(**entry["curve"]) for entry in kept}


def keep(path: Path, settings: Settings, arm: str, seed: int, curve: Curve) -> None:
    """Adds a line to the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {"settings": asdict(settings), "arm": arm, "seed": seed, "curve": asdict(curve)}
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def print_table(curves: dict[str, list[Curve]]) -> None:
    """Means of the seeds; the best epoch is the best of the mean, the spread is that of the end."""
    epochs = len(next(iter(curves.values()))[0].losses)
    shown = [epoch for epoch in SHOWN if epoch < epochs] + [epochs]
    print(
        f"{'epoch':22}{'B/token':>8}"
        + "".join(f"{epoch:7}" for epoch in shown)
        + f"{'best':>13}   each seed at epoch {epochs}"
    )
    for arm, found in curves.items():
        means = mean_curve(found)
        best = min(range(epochs), key=means.__getitem__)
        nbytes = statistics.mean(curve.nbytes for curve in found)
        size = f"{nbytes:.0f}" if nbytes else "-"
        print(
            f"{arm:22}{size:>8}"
            + "".join(f"{means[epoch - 1]:7.3f}" for epoch in shown)
            + f"{means[best]:7.3f} ({best + 1:2})   "
            + " ".join(f"{curve.losses[-1]:.3f}" for curve in found)
        )


def mean_curve(curves: list[Curve]) -> list[float]:
    """Over the seeds, per epoch."""
    return [statistics.mean(losses) for losses in zip(*(one.losses for one in curves), strict=True)]


def draw(curves: dict[str, list[Curve]], path: Path) -> None:
    """Held-out loss against epochs, the mean of the seeds: all on the left, the distilled closer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"labels": "black", "dense": "tab:green", "top_k:32": "tab:purple"}
    colours |= {"sampled:12": "tab:red", "sampled:64": "tab:blue", "sampled:256": "tab:cyan"}
    styles = {1: "-", 4: "--", EACH_EPOCH: ":"}
    figure, (whole, closer) = pyplot.subplots(1, 2, figsize=(10, 4.4))
    lowest, highest = math.inf, -math.inf
    for arm, found in curves.items():
        targets, draws = ARMS[arm]
        means = mean_curve(found)
        look = {"color": colours.get(targets or arm, colours["dense"]), "linestyle": styles[draws]}
        for axes in (whole, closer):
            axes.plot(range(1, len(means) + 1), means, label=arm, **look)
        if targets is not None:
            lowest, highest = min([lowest, *means]), max([highest, *means[3:]])
    if math.isfinite(lowest + highest):
        margin = 0.05 * (highest - lowest)
        closer.set_ylim(lowest - margin, highest + margin)
    for axes in (whole, closer):
        axes.set_xlabel("epochs of the same text")
        axes.grid(alpha=0.3)
    whole.set_ylabel("held-out loss, nats per token")
    closer.set_title("the same, closer", fontsize=10)
    closer.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
