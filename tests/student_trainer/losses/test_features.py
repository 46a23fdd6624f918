"""FeatureLoss against the same sums written out row by row in float64."""

import math

import pytest
import torch
from torch import Tensor

from logit_codec import FeaturesTargets
from student_trainer import FeatureLoss, UnsuitableTargets
from tests.student_trainer.losses.test_distillation import make
from tests.support.fake_cuda import DEVICE, FakeCuda, backward
from tests.support.waits import Waits

ROWS, TEACHER, STUDENT = 7, 12, 5
LAYERS = {2: 1, 5: 3}
"""The teacher's 2 and 5, of the targets' 2, 4 and 5."""


@pytest.fixture
def targets() -> FeaturesTargets:
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, 3, TEACHER)
    hidden[2, :, 4] = 300.0  # as some tokens have it in large models
    return FeaturesTargets(
        vocab_size=61, temperature=1.0, hidden=hidden.to(torch.bfloat16), layers=(2, 4, 5)
    )


def make_states(size: int = STUDENT) -> list[Tensor]:
    torch.manual_seed(1)
    shape = (ROWS, size)
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for _ in range(4)]


def make_loss(size: int = STUDENT, **options) -> FeatureLoss:
    torch.manual_seed(2)
    return FeatureLoss(LAYERS, size, TEACHER, dtype=torch.float64, **options)


def write_out(loss: FeatureLoss, states: list[Tensor], targets: FeaturesTargets) -> Tensor:
    """(R,) losses, in the plainest way."""
    rows = []
    for row in range(ROWS):
        found = []
        for layer, own in loss.layers.items():
            wanted = targets.hidden[row, targets.layers.index(layer)].double()
            if loss.normalize == "layer_norm":
                variance = (wanted - wanted.mean()).square().mean()
                wanted = (wanted - wanted.mean()) / (variance + 1e-5).sqrt()
            projector = loss.projectors[str(layer)]
            got = states[own][row]
            if isinstance(projector, torch.nn.Linear):
                got = projector.weight @ got + projector.bias
            if loss.loss == "mse":
                found.append(((got - wanted) ** 2).sum() / TEACHER)
            else:
                found.append(1 - got @ wanted / (got.norm() * wanted.norm()))
        rows.append(sum(found) / len(found))
    return torch.stack(rows)


def gradients(value: Tensor, loss: FeatureLoss, states: list[Tensor]) -> list[Tensor]:
    used = [states[own] for own in loss.layers.values()]
    return [*torch.autograd.grad(value, [*used, *loss.parameters()], retain_graph=True)]


@pytest.mark.parametrize("kind", ["mse", "cosine"])
@pytest.mark.parametrize("normalize", ["layer_norm", "none"])
@pytest.mark.parametrize("projector", ["linear", "identity"])
def test_value_and_gradients_are_those_of_the_formula(targets, kind, normalize, projector):
    size = TEACHER if projector == "identity" else STUDENT
    loss = make_loss(size, loss=kind, normalize=normalize, projector=projector)
    states = make_states(size)
    assert len([*loss.parameters()]) == (4 if projector == "linear" else 0)
    expected_R = write_out(loss, states, targets)
    found_R = loss(states, targets, reduction="none")
    torch.testing.assert_close(found_R, expected_R, rtol=1e-12, atol=1e-12)
    weights = torch.linspace(0.1, 2.0, ROWS)
    mask = torch.arange(ROWS) % 3 != 1
    cases = (
        ({}, expected_R.mean()),
        ({"reduction": "sum"}, expected_R.sum()),
        ({"row_weights": weights}, (expected_R * weights).mean()),
        ({"mask": mask, "row_weights": weights}, (expected_R * weights)[mask].sum() / mask.sum()),
        ({"mask": mask, "num_items": 100}, expected_R[mask].sum() / 100),
        ({"num_items": torch.tensor(100)}, expected_R.sum() / 100),
    )
    for options, expected in cases:
        found = loss(states, targets, **options)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        pairs = gradients(found, loss, states), gradients(expected, loss, states)
        for got, wanted in zip(*pairs, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_a_masked_row_may_hold_anything(targets, kind):
    loss, mask = make_loss(loss=kind), torch.arange(ROWS) != 3
    clean = loss(make_states(), targets, mask=mask, row_weights=torch.ones(ROWS))
    with torch.no_grad():
        states = make_states()
        for state in states:
            state[3] = math.inf
    hidden = targets.hidden.clone()
    hidden[3] = math.nan
    spoilt = FeaturesTargets(vocab_size=61, temperature=1.0, hidden=hidden, layers=targets.layers)
    weights = torch.ones(ROWS)
    weights[3] = math.nan
    found = loss(states, spoilt, mask=mask, row_weights=weights)
    assert torch.equal(found, clean)
    for gradient in gradients(found, loss, states):
        assert torch.isfinite(gradient).all()


def test_normalised_no_row_outweighs_the_others(targets):
    """One row of the targets is a hundred times as large as the others."""
    states = [torch.zeros(ROWS, TEACHER) for _ in range(4)]
    plain = FeatureLoss(LAYERS, TEACHER, TEACHER, normalize="none", projector="identity")
    losses_R = plain(states, targets, reduction="none")
    assert losses_R[2] / losses_R.sum() > 0.99
    even = FeatureLoss(LAYERS, TEACHER, TEACHER, projector="identity")
    torch.testing.assert_close(
        even(states, targets, reduction="none"), torch.ones(ROWS), rtol=1e-3, atol=1e-3
    )


def test_in_16_bits_the_loss_is_float32_and_close(targets):
    states = [state.detach().bfloat16() for state in make_states()]
    loss = FeatureLoss(LAYERS, STUDENT, TEACHER)
    exact = loss([state.double() for state in states], targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(states, targets)
    assert found.dtype == torch.float32
    assert float(found.detach()) == pytest.approx(float(exact.detach()), rel=1e-2)
    assert float(loss(states, targets).detach()) == pytest.approx(float(exact.detach()), rel=1e-6)


def test_no_rows_are_a_loss_of_nothing(targets):
    loss = make_loss()
    found = loss([state[:0] for state in make_states()], targets[:0])
    found.backward()
    assert float(found.detach()) == 0
    assert not any(parameter.grad.any() for parameter in loss.parameters())


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"loss": "l1"}, "loss must be mse or cosine, got 'l1'"),
        ({"normalize": "batch"}, "normalize must be layer_norm or none"),
        ({"projector": "identity"}, r"needs a student as wide as the teacher: 5 and 12"),
        ({"layers": {}}, "layers must map at least one layer"),
        ({"layers": {-1: 2}}, "counted from 0"),
    ],
)
def test_options_that_cannot_be_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        FeatureLoss(
            **{"layers": LAYERS, "student_size": STUDENT, "teacher_size": TEACHER} | options
        )


def test_states_and_targets_that_do_not_fit_are_refused(targets):
    loss, states = make_loss(), make_states()
    with pytest.raises(ValueError, match="output_hidden_states=True"):
        loss(None, targets)
    with pytest.raises(ValueError, match="lack layer 3 of the student, which learns layer 5"):
        loss(states[:3], targets)
    with pytest.raises(ValueError, match=r"hidden_states of layer 1 must be \(7, 5\)"):
        loss([state[1:] for state in states], targets)
    with pytest.raises(ValueError, match=r"row_weights must have shape \(7,\)"):
        loss(states, targets, row_weights=torch.ones(3))
    with pytest.raises(
        ValueError, match=r"the targets have 12 numbers after the layers \[2, 4, 5\]"
    ):
        FeatureLoss({3: 1}, STUDENT, TEACHER)(states, targets)
    with pytest.raises(UnsuitableTargets, match="targets='features:layers=2\\+5'"):
        loss(states, make("top_k:4")[1])


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_no_step_waits_for_the_device(targets, kind):
    """Targets, masks and weights come from the host."""
    cuda, waits = FakeCuda(), Waits()
    mask, weights = torch.arange(ROWS) != 3, torch.ones(ROWS)
    with cuda:
        loss = FeatureLoss(LAYERS, STUDENT, TEACHER, loss=kind).to(DEVICE)
        states = [torch.zeros(ROWS, STUDENT, device=DEVICE).requires_grad_() for _ in range(4)]
        with waits:
            for options in ({}, {"mask": mask, "row_weights": weights}, {"num_items": 3}):
                backward(loss(states, targets, **options))
        assert all(parameter.grad.device == DEVICE for parameter in loss.parameters())
    assert waits.found == []
