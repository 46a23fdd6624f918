"""Heads that FSDP2 has sharded: two ranks get the gradients of one process.

Passed to fused_distillation_loss as they are (trained, frozen), or used inside the forward pass of a
sharded model (with the rest of it, as a unit of its own, tied to the embeddings).
"""

import os
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from logit_codec import Targets, select
from student_trainer import fused_distillation_loss
from student_trainer.losses.fused_head import FusedHead
from tests.support import tiny
from tests.support.ranks import run_ranks

VOCAB, LENGTH, SEQUENCES = 61, 10, 5


def make_batch() -> tuple[Tensor, Targets]:
    """(B, T) ids, and targets of the (B * (T - 1)) rows that have a next token."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCAB, (SEQUENCES, LENGTH), generator=generator)
    logits = 3 * torch.randn(SEQUENCES * (LENGTH - 1), VOCAB, generator=generator)
    return ids, select(logits, "top_k:8,realized=0")


def loss_of(
    student: transformers.PreTrainedModel,
    first: int,
    last: int,
    num_ranks: int,
    fused: FusedHead | None = None,
) -> Tensor:
    """Of sequences [first, last), divided by all rows; ranks average their gradients."""
    ids, targets = make_batch()
    rows = slice(first * (LENGTH - 1), last * (LENGTH - 1))

    def compute(hidden_BTD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
        loss = fused_distillation_loss(
            hidden_BTD[:, :-1].flatten(0, 1),
            weight_VD,
            targets[rows],
            labels=ids[first:last, 1:].flatten(),
            ce_weight=0.3,
            reduction="sum",
        )
        return loss * num_ranks / targets.num_rows

    inputs = {"input_ids": ids[first:last]}
    if fused is not None:
        return fused.loss(student, inputs, compute)[0]
    hidden_BTD = student.model(**inputs).last_hidden_state
    return compute(hidden_BTD, student.get_output_embeddings().weight, None)


def compare_with_one_process(folder: Path, kind: str) -> None:
    """One rank: its gradients, gathered, against those of the whole batch without sharding."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    rank = int(os.environ["RANK"])
    alone, student = (
        tiny.make_model("Gemma2" if "tied" in kind else "Llama", VOCAB) for _ in range(2)
    )
    for model in (alone, student):
        model.config.final_logit_softcapping = None
        if "frozen" in kind:
            model.lm_head.requires_grad_(False)
    loss_of(alone, 0, SEQUENCES, 1).backward()

    fused = None
    if "inside" in kind:
        for layer in student.model.layers:
            fully_shard(layer)
        if "own" in kind:
            fully_shard(student.lm_head)
        fully_shard(student, reshard_after_forward="reshards" in kind)
        fused = FusedHead.of(student, student, {"input_ids": make_batch()[0]})
    else:
        fully_shard(student.model)
        fully_shard(student.lm_head)
    head = student.lm_head.weight
    assert isinstance(head, DTensor) or fused is not None
    # Three sequences and two, in two steps of accumulation.
    for first, last in (((0, 1), (1, 3)), ((3, 4), (4, 5)))[rank]:
        loss_of(student, first, last, 2, fused).backward()

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
    assert (student.lm_head.weight.grad is None) == ("frozen" in kind)
    assert worst < 1e-6
    (folder / f"rank-{rank}").write_text(f"{worst}")


@pytest.mark.parametrize(
    "kind", ["trained", "frozen", "inside", "inside, own", "inside, tied", "inside, reshards"]
)
def test_a_sharded_heads_gradient_is_that_of_one_process(tmp_path: Path, kind):
    assert run_ranks(compare_with_one_process, tmp_path, kind) == [0, 0]
    assert len(list(tmp_path.iterdir())) == 2
