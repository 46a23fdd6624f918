"""transformers' Trainer in two processes (DDP, gloo): the steps of one process, also after a crash."""

import json
import os
import signal
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from student_trainer.hf_trainer import DistillationArguments, DistillationTrainer
from tests.conftest import one_torch_thread
from tests.support import tiny
from tests.support.hf import make_trainer, num_trained, weights
from tests.support.ranks import run_ranks

one_thread = pytest.fixture(autouse=True)(one_torch_thread)

GLOBAL_BATCH = 8
CUTS = ((8, 1), (4, 2), (2, 4))
"""Sequences of a batch on all ranks, and batches of a step."""


def make_student(kind: str) -> transformers.PreTrainedModel:
    """tied: GPT-2. frozen: Llama with a head of its own that is not trained."""
    if kind == "tied":
        return tiny.make_student()
    student = tiny.make_model("Llama", 64)
    student.get_output_embeddings().requires_grad_(False)
    return student


def train_and_keep(
    folder: Path, rows: list, address: str, num_ranks: int, kind: str, fused: bool
) -> None:
    """Trains with every cut of the same step; weights and losses go to a file of this rank."""
    rank = int(os.environ.get("RANK", "0"))
    found = {}
    for batch, accumulation in CUTS:
        trainer = make_trainer(
            folder,
            rows,
            address,
            student=make_student(kind),
            distillation=DistillationArguments(targets="top_k:4", ce_weight=0.3, fused=fused),
            per_device_train_batch_size=batch // num_ranks,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            optim="sgd",
            learning_rate=0.5,
            max_grad_norm=0.0,
            ddp_find_unused_parameters=kind == "tied",
        )
        assert trainer.args.world_size == num_ranks
        trainer.train()
        trainer.close()
        assert (trainer._batch_loss.head is not None) == fused
        logs = [entry for entry in trainer.state.log_history if "kd_loss" in entry]
        found[batch, accumulation] = {
            "weights": weights(trainer),
            "logs": logs,
            "rows": trainer._meter.rows_in_loss,
            "head": trainer.model.get_output_embeddings().weight.detach(),
        }
    torch.save(found, folder / f"rank-{rank}.pt")


@pytest.mark.parametrize(("kind", "fused"), [("tied", True), ("tied", False), ("frozen", True)])
def test_two_processes_take_the_steps_of_one(trained_service, rows, tmp_path: Path, kind, fused):
    """However a step is cut into ranks and batches; ranks have unequal numbers of rows, or none."""
    rows = [
        {**row, "labels": [-100] * len(row["labels"])} if number % 4 == 1 else row
        for number, row in enumerate(rows)
    ]
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    together.mkdir()
    train_and_keep(alone, rows, trained_service.address, 1, kind, fused)
    codes = run_ranks(train_and_keep, together, rows, trained_service.address, 2, kind, fused)
    assert codes == [0, 0]
    first: dict[str, Any] | None = None
    for path in (alone / "rank-0.pt", together / "rank-0.pt", together / "rank-1.pt"):
        for found in torch.load(path, weights_only=True).values():
            first = first or found
            assert (found["weights"] - first["weights"]).abs().max() < 1e-6
            if path.name == "rank-0.pt":
                for entry, exact in zip(found["logs"], first["logs"], strict=True):
                    for name in ("loss", "kd_loss", "ce_loss", "teacher_ce", "top1_agreement"):
                        assert entry[name] == pytest.approx(exact[name], rel=1e-4), name
                    for name in ("target_rows", "tokens_without_target"):
                        assert entry[name] == exact[name]
    start = weights_of(make_student(kind))
    assert first is not None
    assert (first["weights"] - start).abs().max() > 1e-3
    untrained_head = make_student(kind).get_output_embeddings().weight
    assert torch.equal(first["head"], untrained_head) == (kind == "frozen")
    for cut in CUTS:
        counts = [
            torch.load(together / f"rank-{rank}.pt", weights_only=True)[cut]["rows"]
            for rank in (0, 1)
        ]
        assert counts[0] != counts[1]
        assert sum(counts) == first["rows"] <= num_trained(rows)


def weights_of(model: transformers.PreTrainedModel) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Noting(DistillationTrainer):
    """Writes down which sequences each step trains; a rank appends to a file of its own."""

    notes: Path
    dies_in_save = False

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        samples, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        ids = [
            row[mask.bool()].tolist()
            for sample in samples
            for row, mask in zip(sample["input_ids"], sample["attention_mask"], strict=True)
        ]
        with open(self.notes, "a") as file:
            file.write(json.dumps({"step": self.state.global_step, "ids": ids}) + "\n")
        return samples, count

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.dies_in_save and self.state.global_step == CRASH_STEP + 1:
            os.kill(os.getpid(), signal.SIGKILL)


CRASH_STEP = 5


class Crash(transformers.TrainerCallback):
    """The process is killed after an optimizer step that no checkpoint has."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == CRASH_STEP:
            os.kill(os.getpid(), signal.SIGKILL)


def train_with_checkpoints(
    folder: Path, rows: list, address: str, num_ranks: int, crash: str | None
) -> None:
    """8 steps, of which an epoch has 3; checkpoints after every second."""
    rank = int(os.environ.get("RANK", "0"))
    trainer = make_trainer(
        folder,
        rows,
        address,
        kind=Noting,
        distillation=DistillationArguments(targets="sampled:8", ahead="2"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=GLOBAL_BATCH // 2 // num_ranks,
        max_steps=8,
        adam_epsilon=1e-4,  # with 1e-8 a gradient of rounding errors moves a weight as any other
        save_strategy="steps",
        save_steps=2,
    )
    trainer.notes = folder / f"notes-{num_ranks}-{rank}"
    if crash == "after a step":
        trainer.add_callback(Crash())
    trainer.dies_in_save = crash == "in a save" and rank == 0
    checkpoint = any(folder.glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.close()
    torch.save(weights(trainer), folder / "weights.pt")


def noted(folder: Path, pattern: str) -> dict[int, list[list[int]]]:
    """Of each global step, the sequences of all ranks, sorted."""
    found = defaultdict(list)
    for path in folder.glob(pattern):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            found[entry["step"]] += entry["ids"]
    return {step: sorted(ids) for step, ids in found.items()}


@pytest.mark.parametrize("crash", ["after a step", "in a save"])
def test_two_processes_crash_and_one_goes_on_with_the_same_steps(
    trained_service, rows, tmp_path: Path, crash
):
    """Half the ranks, twice the accumulation: the same sequences in every global step."""
    whole, crashed = tmp_path / "whole", tmp_path / "crashed"
    whole.mkdir()
    crashed.mkdir()
    address = trained_service.address
    train_with_checkpoints(whole, rows, address, 1, None)
    codes = run_ranks(train_with_checkpoints, crashed, rows, address, 2, crash)
    assert codes[0] == -signal.SIGKILL
    assert codes[1] != 0
    assert not (crashed / "weights.pt").exists()
    train_with_checkpoints(crashed, rows, address, 1, None)

    expected = noted(whole, "notes-1-*")
    assert sorted(expected) == list(range(8))
    assert all(len(ids) == GLOBAL_BATCH for ids in expected.values())
    before, after = noted(crashed, "notes-2-*"), noted(crashed, "notes-1-*")
    assert sorted(after) == [4, 5, 6, 7]
    assert before == {step: expected[step] for step in before}
    assert after == {step: expected[step] for step in after}
    difference = torch.load(crashed / "weights.pt") - torch.load(whole / "weights.pt")
    assert difference.abs().max() < 1e-6
