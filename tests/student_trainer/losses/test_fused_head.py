"""The loss in the place of a student's head: which heads, and the numbers of the logits' path."""

import pytest
import torch
from torch import Tensor, nn

from logit_codec import Targets, select
from student_trainer import distillation_loss, fused_distillation_loss
from student_trainer.losses.fused_head import FusedHead, Unfusable
from tests.support import tiny
from tests.support.divergences import relative_error

VOCAB = 61
IDS = torch.arange(24).view(2, 12)


def targets_for(logits_RV: Tensor) -> Targets:
    """Of a teacher that has nothing to do with them."""
    generator = torch.Generator().manual_seed(0)
    return select(torch.randn(logits_RV.shape, generator=generator), "top_k:8,realized=0")


@pytest.mark.parametrize("name", tiny.DENSE_ARCHITECTURES)
def test_the_gradients_are_those_of_the_models_own_logits(name):
    """float64, with heads tied and not, with softcap and with a scale."""
    student = tiny.make_model(name, VOCAB).double().train()
    inputs = {"input_ids": IDS}
    head = FusedHead.of(student, student, inputs)
    assert student.training
    torch.manual_seed(0)  # of the dropout that some have
    logits_RV = student(**inputs).logits.flatten(0, 1)
    targets = targets_for(logits_RV)
    exact = distillation_loss(logits_RV, targets)
    exact.backward()
    expected = {name: p.grad for name, p in student.named_parameters()}
    student.zero_grad()

    def compute(hidden_BTD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
        return fused_distillation_loss(
            hidden_BTD.flatten(0, 1),
            weight_VD,
            targets,
            head_bias=bias_V,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
        )

    torch.manual_seed(0)
    loss, _ = head.loss(student, inputs, compute)
    assert relative_error(loss, exact) < 1e-10
    loss.backward()
    for name, parameter in student.named_parameters():
        wanted = expected[name]
        if wanted is None:
            assert parameter.grad is None
        else:
            assert relative_error(parameter.grad, wanted) < 1e-10, name
    torch.manual_seed(0)
    assert torch.equal(student(**inputs).logits.flatten(0, 1), logits_RV)  # as it was before


def test_a_head_comes_back_after_an_error():
    student = tiny.make_model("Llama", VOCAB)
    head = FusedHead.of(student, student, {"input_ids": IDS})

    def compute(*_) -> Tensor:
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        head.loss(student, {"input_ids": IDS}, compute)
    assert student(input_ids=IDS).logits.shape == (*IDS.shape, VOCAB)


class Masking(nn.Module):
    """A causal LM whose forward does more to its logits."""

    def __init__(self, change) -> None:
        super().__init__()
        self.inner = tiny.make_model("Llama", VOCAB)
        self.config, self.change = self.inner.config, change

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.get_output_embeddings()

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.change(self.inner(input_ids=input_ids).logits)}


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits * 1.01,
        lambda logits: 30 * torch.tanh(logits / 30),
        lambda logits: logits.log_softmax(-1),
        lambda logits: logits.masked_fill(torch.arange(VOCAB) >= 60, -1e4),
        lambda logits: logits + torch.linspace(0, 0.01, VOCAB),
    ],
)
def test_a_model_that_does_more_to_its_logits_keeps_them(change):
    student = Masking(change)
    with pytest.raises(Unfusable, match="more to its logits"):
        FusedHead.of(student, student, {"input_ids": IDS})
    assert student(IDS)["logits"].shape == (*IDS.shape, VOCAB)


def test_a_model_that_counts_its_logits_keeps_them():
    student = Masking(lambda logits: logits.view(*IDS.shape, VOCAB))
    with pytest.raises(Unfusable, match="a logit for each token"):
        FusedHead.of(student, student, {"input_ids": IDS})
    assert student(IDS)["logits"].shape == (*IDS.shape, VOCAB)


def test_heads_that_are_no_plain_product_are_left_alone():
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    student = tiny.make_model("Llama", VOCAB)
    plain = student.get_output_embeddings()
    for head, reason in (
        (Doubled(64, VOCAB), "Doubled, not a plain"),
        (nn.Sequential(plain), "Sequential, not a plain"),
    ):
        student.lm_head = head
        with pytest.raises(Unfusable, match=reason):
            FusedHead.of(student, student, {"input_ids": IDS})
    student.lm_head = plain
    with pytest.raises(Unfusable, match="once, on every token"):
        FusedHead.of(student, student, {"input_ids": IDS, "logits_to_keep": 1})
    vars(plain)["forward"] = plain.forward
    with pytest.raises(Unfusable, match="replaces the forward"):
        FusedHead.of(student, student, {"input_ids": IDS})


def test_a_student_that_zero_3_holds_in_parts_keeps_its_logits():
    """DeepSpeed's marks: its parameters are empty outside of the modules that own them."""
    student = tiny.make_model("Llama", VOCAB)
    for number, parameter in enumerate(student.parameters()):
        parameter.ds_id, parameter.ds_status = number, "NOT_AVAILABLE"  # type: ignore[attr-defined]
    with pytest.raises(Unfusable, match="ZeRO-3"):
        FusedHead.of(student, student, {"input_ids": IDS})
