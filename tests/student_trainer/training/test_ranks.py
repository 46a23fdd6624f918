"""The reference loop in two processes (DDP, gloo): the steps and the scores of one. Without Ray."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.parallel import DistributedDataParallel

from student_trainer import LocalTeacher, data
from student_trainer.ray_train.checkpoints import _seed_of
from student_trainer.training import loop as trainer
from student_trainer.training.evaluate import UNKNOWN
from student_trainer.training.held_out import HeldOut
from student_trainer.training.ranks import unwrapped
from student_trainer.training.tensorboard import Curves
from tests.conftest import one_torch_thread
from tests.support import tiny
from tests.support.ranks import run_ranks

one_thread = pytest.fixture(autouse=True)(one_torch_thread)

STEPS = 6


def train_and_keep(folder: Path, num_ranks: int) -> None:
    """What this rank has in the end goes to a file of it."""
    rank = int(os.environ["RANK"]) if num_ranks > 1 else 0
    ids = torch.randint(2, 64, (30, 12), generator=torch.Generator().manual_seed(0))
    teacher = LocalTeacher(tiny.make_model("Gemma2", 64))
    student: Any = tiny.make_student()
    if num_ranks > 1:
        student = DistributedDataParallel(student)
    # Shares of 3 and 2 sequences; of the held-out ones, 4 and 3.
    batches = data.batches(ids[:23], batch_size=5, steps=STEPS, seed=1)
    shares = data.share(batches, rank=rank, num_ranks=num_ranks)
    best_ids = ids[23:, 1:].clone()
    best_ids[2:, 3] = UNKNOWN
    held_out = HeldOut(ids[23:], best_ids)
    run = trainer.train(
        student,
        teacher.stream_batches(shares, targets="top_k:8", ahead=2),
        steps=STEPS,
        learning_rate=1e-2,
        warmup_steps=2,
        optimizer="adamw",
        kd_weight=0.7,
        ce_weight=0.2,
        measure=lambda model: held_out.measure(model, batch_size=2).loss or 0.0,
        measured=held_out.beside_the_loss,
        label="student",
        log_every=3,
        curves=Curves(folder / "curves" if rank == 0 else None),
        is_aligned=False,  # random ids are nothing that this teacher would write
    )
    weights = torch.cat([p.detach().flatten() for p in unwrapped(student).parameters()])
    single = HeldOut(ids[:1]).measure(student, batch_size=2)  # the second rank has no share of it
    assert held_out.last is not None
    found = {
        "weights": weights,
        "losses": run.train_losses,
        "tokens": run.tokens,
        "measurements": [
            {name: value for name, value in one.items() if name != "seconds"}
            for one in run.measurements
        ],
        "scores": held_out.last.model_dump(),
        "single": single.loss,
    }
    torch.save(found, folder / f"{rank}.pt")


def curves_in(folder: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(folder / "curves")).Reload()
    return {
        name: [event.value for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
        if name not in ("tokens_per_s", "waiting_fraction")
    }


def test_two_ranks_take_the_steps_of_one_process_and_measure_the_same(tmp_path: Path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    train_and_keep(tmp_path / "one", 1)
    assert run_ranks(train_and_keep, tmp_path / "two", 2) == [0, 0]
    one = torch.load(tmp_path / "one" / "0.pt")
    both = [torch.load(tmp_path / "two" / f"{rank}.pt") for rank in (0, 1)]
    assert torch.equal(both[0]["weights"], both[1]["weights"])
    # Of the whole step and the whole text, on each rank.
    assert both[0]["scores"] == both[1]["scores"]
    assert both[0]["losses"] == both[1]["losses"]
    # Where a gradient is next to nothing, AdamW makes steps of its rounding; wrong weights of the
    # shares differ by a thousand times that.
    assert float((both[0]["weights"] - one["weights"]).abs().max()) < 5e-5
    assert one["tokens"] == both[0]["tokens"] == both[1]["tokens"] == STEPS * 5 * 11
    for name in ("losses", "single"):
        assert both[1][name] == pytest.approx(one[name], rel=1e-5), name
    for ours, theirs in zip(both[1]["measurements"], one["measurements"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
        assert {"held_out_loss", "held_out_accuracy", "held_out_top1_agreement"} <= set(ours)
    for name in ("loss", "accuracy", "top1_agreement", "agreement_rows", "sequence_losses"):
        assert both[0]["scores"][name] == pytest.approx(one["scores"][name], rel=1e-5), name
    found, expected = curves_in(tmp_path / "two"), curves_in(tmp_path / "one")
    assert {"kd_loss", "ce_loss", "teacher_ce", "tail_mass"} <= set(found)
    assert set(found) == set(expected)
    for name, values in found.items():
        assert values == pytest.approx(expected[name], rel=1e-4), name


def test_ranks_drop_different_units():
    """torch's generator for the CPU looks at the low 32 bits of a seed only."""
    drawn = []
    for seed in (0, 1, 2**40):
        for rank in range(4):
            drawn.append(
                torch.rand(8, generator=torch.Generator().manual_seed(_seed_of(seed, rank)))
            )
    assert len({tuple(one.tolist()) for one in drawn}) == len(drawn)
