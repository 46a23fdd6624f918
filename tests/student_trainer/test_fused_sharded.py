"""fused_distillation_loss with a head that FSDP2 has sharded: two ranks, one process's gradients."""

import os
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from logit_codec import Targets, select
from student_trainer import fused_distillation_loss
from tests import tiny
from tests.ranks import run_ranks

VOCAB, LENGTH, SEQUENCES = 61, 10, 5


def make_batch() -> tuple[Tensor, Targets]:
    """(B, T) ids, and targets of the (B * (T - 1)) rows that have a next token."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCAB, (SEQUENCES, LENGTH), generator=generator)
    logits = 3 * torch.randn(SEQUENCES * (LENGTH - 1), VOCAB, generator=generator)
    return ids, select(logits, "top_k:8,realized=0")


def loss_of(
    student: transformers.PreTrainedModel, head: Tensor, first: int, last: int, num_ranks: int
) -> Tensor:
    """Of sequences [first, last), divided by all rows; ranks average their gradients."""
    ids, targets = make_batch()
    hidden = student.model(ids[first:last]).last_hidden_state[:, :-1].flatten(0, 1)
    rows = slice(first * (LENGTH - 1), last * (LENGTH - 1))
    loss = fused_distillation_loss(
        hidden,
        head,
        targets[rows],
        labels=ids[first:last, 1:].flatten(),
        ce_weight=0.3,
        reduction="sum",
    )
    return loss * num_ranks / targets.num_rows


def compare_with_one_process(folder: Path, kind: str) -> None:
    """One rank: its gradients, gathered, against those of the whole batch without sharding."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    rank = int(os.environ["RANK"])
    alone, student = tiny.make_model("Llama", VOCAB), tiny.make_model("Llama", VOCAB)
    if kind == "frozen":
        alone.lm_head.requires_grad_(False)
        student.lm_head.requires_grad_(False)
    loss_of(alone, alone.lm_head.weight, 0, SEQUENCES, 1).backward()

    fully_shard(student.model)
    fully_shard(student.lm_head)
    head = student.lm_head.weight
    assert isinstance(head, DTensor)
    # Three sequences and two, in two steps of accumulation.
    for first, last in (((0, 1), (1, 3)), ((3, 4), (4, 5)))[rank]:
        loss_of(student, head, first, last, 2).backward()

    worst = 0.0
    for (name, found), (_, exact) in zip(
        student.named_parameters(), alone.named_parameters(), strict=True
    ):
        if exact.grad is None:
            assert found.grad is None, name
            continue
        assert isinstance(found.grad, DTensor), name
        assert found.grad.placements == found.placements, name
        whole = found.grad.full_tensor()
        worst = max(worst, float((whole - exact.grad).abs().max() / exact.grad.abs().max()))
    assert (head.grad is None) == (kind == "frozen")
    assert worst < 1e-6
    (folder / f"rank-{rank}").write_text(f"{worst}")


@pytest.mark.parametrize("kind", ["trained", "frozen"])
def test_a_sharded_heads_gradient_is_that_of_one_process(tmp_path: Path, kind):
    assert run_ranks(compare_with_one_process, tmp_path, kind) == [0, 0]
    assert len(list(tmp_path.iterdir())) == 2
