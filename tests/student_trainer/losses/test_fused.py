"""fused_distillation_loss against distillation_loss of the full logits, and against the formulas."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from logit_codec import FeaturesTargets, RealizedTargets, TopKTargets, select
from student_trainer import UnsuitableTargets, distillation_loss, fused_distillation_loss
from student_trainer.losses import fused_pass
from student_trainer.losses import options as loss_options
from student_trainer.losses.divergences import DIVERGENCES
from student_trainer.losses.fused_chunk import RowStatistics
from tests.support import tiny
from tests.support.divergences import gradients, oracle, relative_error, select_any

ROWS, VOCAB, DIM = 13, 31, 5
SPECS = (
    *("dense:f32", "top_k:4", "top_k:min_p=1/4,max_k=8", f"top_k:{VOCAB}", "sampled:16"),
    *("given_ids:bits=32", "hidden:bf16", "hidden:int8"),
)
REALIZED = RealizedTargets(vocab_size=VOCAB, temperature=1.0, realized_logprob=torch.zeros(ROWS))
FEATURES = FeaturesTargets(
    vocab_size=VOCAB, temperature=1.0, hidden=torch.zeros(ROWS, 1, 4).bfloat16(), layers=(1,)
)
ALLOWED = [
    (spec, divergence)
    for spec, divergence in itertools.product(SPECS, DIVERGENCES)
    if divergence == "forward_kl" or "sampled" not in spec
]


def make(
    spec: str,
    temperature: float = 1.0,
    *,
    rows: int = ROWS,
    vocab: int = VOCAB,
    sharpness: float = 3.0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Any]:
    """(hidden with gradient, head with gradient, targets)."""
    torch.manual_seed(seed)
    targets = select_any(torch.randn(rows, vocab) * sharpness, spec, temperature)
    hidden = torch.randn(rows, DIM, dtype=torch.float64).to(dtype).requires_grad_()
    head = torch.randn(vocab, DIM, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, head, targets


@pytest.mark.parametrize(("spec", "divergence"), ALLOWED)
def test_value_and_gradients_are_those_of_the_formula(spec, divergence):
    """Every combination of temperature, softcap, mask, mix with labels; bias, scale, chunks in turn."""
    settings = itertools.product(
        (1.0, 2.0), (None, 3.0), (False, True), ((1.0, 0.0), (0.3, 0.6), (0.0, 1.0))
    )
    turns = zip(
        itertools.cycle((1, 5, 100)),
        itertools.cycle((True, False)),
        itertools.cycle((0.3, 0.8)),
        strict=False,
    )
    for (temperature, softcap, masked, weights), turn in zip(settings, turns, strict=False):
        chunk_rows, shifted, beta = turn
        hidden, head, targets = make(spec, temperature)
        bias = torch.randn(VOCAB, dtype=torch.float64, requires_grad=True) if shifted else None
        scale = 0.7 if shifted else 1.0
        labels = torch.randint(VOCAB, (ROWS,))
        labels[3] = -100
        mask = torch.arange(ROWS) % 3 != 1 if masked else None
        kd_weight, ce_weight = weights
        loss = fused_distillation_loss(
            hidden,
            head,
            targets,
            head_bias=bias,
            softcap=softcap,
            logit_scale=scale,
            divergence=divergence,
            beta=beta,
            labels=labels,
            kd_weight=kd_weight,
            ce_weight=ce_weight,
            mask=mask,
            num_items=7,
            chunk_rows=chunk_rows,
        )
        logits = hidden @ head.T if bias is None else hidden @ head.T + bias
        logits = logits * scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        each = kd_weight * temperature**2 * oracle(logits, targets, divergence, beta, temperature)
        each = each + ce_weight * torch.nn.functional.cross_entropy(
            logits, labels, reduction="none"
        )
        wanted = (each if mask is None else each[mask]).sum() / 7
        assert relative_error(loss, wanted) < 1e-10
        inputs = (hidden, head) if bias is None else (hidden, head, bias)
        for found, exact in zip(gradients(loss, *inputs), gradients(wanted, *inputs), strict=True):
            assert relative_error(found, exact) < 1e-10


@pytest.mark.parametrize(("spec", "divergence"), ALLOWED)
def test_gradients_are_finite_differences(spec, divergence):
    hidden, head, targets = make(spec, 2.0, rows=3, vocab=31)
    bias = torch.randn(VOCAB, dtype=torch.float64, requires_grad=True)

    def loss(hidden: Tensor, head: Tensor, bias: Tensor) -> Tensor:
        return fused_distillation_loss(
            hidden,
            head,
            targets,
            head_bias=bias,
            softcap=4.0,
            logit_scale=0.8,
            divergence=divergence,
            beta=0.3,
            labels=torch.tensor([1, -100, 30]),
            ce_weight=0.5,
            chunk_rows=2,
        )

    # A second backward computes again, in another order.
    assert torch.autograd.gradcheck(loss, (hidden, head, bias), fast_mode=True, nondet_tol=1e-12)


@pytest.mark.parametrize("spec", SPECS)
def test_statistics_are_those_of_each_row_and_change_nothing(spec):
    """With and without everything that decides where they are computed."""
    for temperature, softcap, ce_weight, kd_weight in itertools.product(
        (1.0, 2.0), (None, 3.0), (0.0, 0.5), (1.0, 0.0)
    ):
        hidden, head, targets = make(spec, temperature)
        labels = torch.randint(VOCAB, (ROWS,))
        labels[3] = -100
        mask = torch.arange(ROWS) % 3 != 1
        options = {"softcap": softcap, "labels": labels, "mask": mask, "chunk_rows": 4}
        options |= {"ce_weight": ce_weight, "kd_weight": kd_weight}
        wanted = fused_distillation_loss(hidden, head, targets, **options)
        found = RowStatistics.zeros(ROWS)
        loss = fused_distillation_loss(hidden, head, targets, statistics=found, **options)
        assert relative_error(loss, wanted) < 1e-12
        for one, exact in zip(
            gradients(loss, hidden, head), gradients(wanted, hidden, head), strict=True
        ):
            assert relative_error(one, exact) < 1e-12 or not exact.any()
        logits = (hidden @ head.T).detach()
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        each = oracle(logits, targets, "forward_kl", 0.5, temperature) * (kd_weight != 0)
        assert torch.allclose(found.divergence.double(), each.where(mask, 0.0), rtol=1e-5)
        each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        assert torch.allclose(found.cross_entropy.double(), each.where(mask, 0.0), rtol=1e-5)
        assert torch.equal(found.best, logits.argmax(1).where(mask, 0))


@pytest.mark.parametrize("loss", [distillation_loss, fused_distillation_loss])
@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if name != "forward_kl"])
def test_sampled_targets_are_refused_for_what_is_not_linear(loss, divergence):
    hidden, head, targets = make("sampled:16")
    first = (hidden @ head.T,) if loss is distillation_loss else (hidden, head)
    with pytest.raises(UnsuitableTargets, match=rf"{divergence} .*forward_kl.*targets='top_k:"):
        loss(*first, targets, divergence=divergence)


@pytest.mark.parametrize("vocab", [1, 2, 3])
def test_the_smallest_vocabularies(vocab):
    specs = ["dense:f32", "sampled:4", *(f"top_k:{k}" for k in range(1, vocab + 1))]
    for spec, divergence in itertools.product(specs, DIVERGENCES):
        if "sampled" in spec and divergence != "forward_kl":
            continue
        hidden, head, targets = make(spec, rows=4, vocab=vocab)
        labels = torch.tensor([0, -100, vocab - 1, 0])
        options = {"divergence": divergence, "labels": labels, "ce_weight": 0.5}
        loss = fused_distillation_loss(hidden, head, targets, **options)
        wanted = distillation_loss(hidden @ head.T, targets, **options)
        assert float((loss - wanted).abs().detach()) < 1e-12
        for found, exact in zip(
            gradients(loss, hidden, head), gradients(wanted, hidden, head), strict=True
        ):
            assert torch.allclose(found, exact, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_that_keep_nothing_one_certain_id_or_everything(divergence):
    targets = TopKTargets(
        vocab_size=4,
        temperature=1.0,
        row_splits=torch.tensor([0, 0, 1, 5, 5]),
        token_ids=torch.tensor([2, 0, 1, 2, 3]),
        logprobs=torch.cat([torch.zeros(1), torch.randn(4).log_softmax(0)]),
        tail_logprob=torch.tensor([0.0, -torch.inf, -torch.inf, 0.0]),
    )
    hidden, head, _ = make("top_k:1", rows=4, vocab=4)
    loss = fused_distillation_loss(hidden, head, targets, divergence=divergence)
    wanted = distillation_loss(hidden @ head.T, targets, divergence=divergence)
    assert relative_error(loss, wanted) < 1e-12
    for found, exact in zip(
        gradients(loss, hidden, head), gradients(wanted, hidden, head), strict=True
    ):
        assert torch.isfinite(exact).all()
        assert relative_error(found, exact) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spec", ["dense:f32", "top_k:4"])
def test_skew_reverse_kl_without_skew_has_no_nan_where_the_teacher_is_certain(spec, dtype):
    """q / p overflows there, and 0 times infinity is no gradient."""
    hidden, head, targets = make(spec, sharpness=200.0, dtype=dtype)
    options = {"divergence": "skew_reverse_kl", "beta": 0.0}
    loss = fused_distillation_loss(hidden, head, targets, **options)
    wanted = distillation_loss(hidden @ head.T, targets, **options)
    for found, exact in zip(
        gradients(loss, hidden, head), gradients(wanted, hidden, head), strict=True
    ):
        assert relative_error(found, exact) < 1e-4


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_tiny_student_tail_is_summed_not_cancelled(divergence):
    """The student's tail is about 5e-7 in float32, where 1 - head would be off by 10 %."""
    rows, vocab = 4, 50
    _, _, targets = make("top_k:1", rows=rows, vocab=vocab, sharpness=5.0)
    assert isinstance(targets, TopKTargets)
    kept = torch.arange(rows), targets.token_ids
    logits = torch.randn(rows, vocab)
    logits[kept] = logits.exp().sum(1).log() + 14.5
    logits.requires_grad_()
    exact_logits = logits.detach().double().requires_grad_()
    loss = fused_distillation_loss(logits, torch.eye(vocab), targets, divergence=divergence)
    wanted = distillation_loss(exact_logits, targets, divergence=divergence)
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    (found,), (exact,) = gradients(loss, logits), gradients(wanted, exact_logits)
    assert torch.allclose(found[kept].double(), exact[kept], rtol=0, atol=1e-6)
    found[kept] = exact[kept] = 0
    assert relative_error(found, exact) < 1e-5


@pytest.mark.parametrize("loss", ["logits", "fused"])
def test_accumulation_over_any_split_gives_the_gradient_of_the_whole_batch(loss):
    """(batch, accumulation) = (8, 1), (4, 2), (1, 8), with sequences of very different lengths."""
    sequences, length = 8, 6
    hidden, head, targets = make("top_k:4", rows=sequences * length)
    labels = torch.randint(VOCAB, (sequences * length,))
    counts = torch.tensor([6, 1, 0, 3, 6, 2, 5, 4])
    mask = (torch.arange(length) < counts[:, None]).flatten()
    found = []
    for batch in (8, 4, 1):
        hidden.grad = head.grad = None
        for part in range(0, sequences * length, batch * length):
            rows = slice(part, part + batch * length)
            options = {"labels": labels[rows], "ce_weight": 0.5, "mask": mask[rows]}
            options["num_items"] = mask.sum()
            if loss == "fused":
                one = fused_distillation_loss(hidden[rows], head, targets[rows], **options)
            else:
                one = distillation_loss(hidden[rows] @ head.T, targets[rows], **options)
            one.backward()
        assert hidden.grad is not None
        assert head.grad is not None
        found.append((hidden.grad, head.grad))
    for other in found[1:]:
        assert relative_error(other[0], found[0][0]) < 1e-13
        assert relative_error(other[1], found[0][1]) < 1e-13


def test_a_window_without_trained_tokens_has_no_loss_and_no_gradient():
    hidden, head, targets = make("top_k:4")
    mask = torch.zeros(ROWS, dtype=torch.bool)
    for num_items in (None, 0, torch.tensor(0)):
        loss = fused_distillation_loss(hidden, head, targets, mask=mask, num_items=num_items)
        assert float(loss.detach()) == 0
        assert not any(found.any() for found in gradients(loss, hidden, head))


def test_no_rows_at_all():
    hidden, head, targets = make("top_k:4")
    loss = fused_distillation_loss(hidden[:0], head, targets[:0])
    assert float(loss.detach()) == 0
    assert not gradients(loss, head)[0].any()


@pytest.mark.parametrize("poison", [torch.inf, torch.nan])
def test_masked_rows_may_hold_anything(poison):
    hidden, head, targets = make("top_k:4")
    mask = torch.arange(ROWS) % 2 == 0
    poisoned = hidden.detach().clone()
    poisoned[1::2] = poison
    poisoned.requires_grad_()
    loss = fused_distillation_loss(poisoned, head, targets, mask=mask)
    wanted = fused_distillation_loss(hidden, head, targets, mask=mask)
    assert torch.equal(loss, wanted)
    for found, exact in zip(
        gradients(loss, poisoned, head), gradients(wanted, hidden, head), strict=True
    ):
        assert torch.equal(found, exact)


@pytest.mark.parametrize("spec", ["dense:f32", "top_k:4", "sampled:16"])
def test_padding_counts_for_neither_teacher_nor_student(spec):
    torch.manual_seed(1)
    teacher = torch.randn(ROWS, 31)
    teacher[:, 28:] = -torch.inf
    targets = select(teacher, f"{spec},realized=0", uniforms=torch.rand(ROWS, dtype=torch.float64))
    hidden = torch.randn(ROWS, DIM, dtype=torch.float64, requires_grad=True)
    head = torch.randn(34, DIM, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(34, dtype=torch.float64, requires_grad=True)
    options = {"labels": torch.randint(28, (ROWS,)), "ce_weight": 0.5, "effective_vocab_size": 28}
    loss = fused_distillation_loss(hidden, head, targets, head_bias=bias, **options)
    wanted = distillation_loss(hidden @ head.T + bias, targets, **options)
    assert relative_error(loss, wanted) < 1e-12
    found = gradients(loss, hidden, head, bias)
    for one, exact in zip(found, gradients(wanted, hidden, head, bias), strict=True):
        assert relative_error(one, exact) < 1e-10
    assert not found[1][28:].any()


def test_renormalize_is_that_of_the_plain_loss():
    hidden, head, targets = make("top_k:4")
    for divergence in ("forward_kl", "jsd", "total_variation"):
        options = {"divergence": divergence, "renormalize": True}
        loss = fused_distillation_loss(hidden, head, targets, **options)
        wanted = distillation_loss(hidden @ head.T, targets, **options)
        assert relative_error(loss, wanted) < 1e-12
        assert relative_error(gradients(loss, head)[0], gradients(wanted, head)[0]) < 1e-10


def test_tied_embeddings_get_both_gradients_added_to_what_they_had():
    _, _, targets = make("top_k:4")
    ids = torch.randint(VOCAB, (ROWS,))
    grads = []
    for loss in ("fused", "logits"):
        torch.manual_seed(0)
        embedding = torch.nn.Embedding(VOCAB, DIM, dtype=torch.float64)
        for _ in range(2):
            hidden = torch.tanh(embedding(ids))
            if loss == "fused":
                fused_distillation_loss(hidden, embedding.weight, targets).backward()
            else:
                distillation_loss(hidden @ embedding.weight.T, targets).backward()
        grads.append(embedding.weight.grad)
    assert relative_error(*grads) < 1e-12


@pytest.mark.parametrize("frozen", ["head", "hidden", "both"])
def test_what_is_frozen_costs_no_gradient(frozen):
    hidden, head, targets = make("top_k:4")
    bias = torch.zeros(VOCAB, dtype=torch.float64)
    loss = fused_distillation_loss(hidden, head, targets)
    wanted = dict(zip(("hidden", "head"), gradients(loss, hidden, head), strict=True))
    inputs = {"hidden": hidden, "head": head}
    for name in ("hidden", "head") if frozen == "both" else (frozen,):
        inputs[name] = inputs[name].detach()
        del wanted[name]
    with _Largest() as seen:
        loss = fused_distillation_loss(
            inputs["hidden"], inputs["head"], targets, head_bias=bias, chunk_rows=2
        )
    assert loss.requires_grad == bool(wanted)
    for name, exact in wanted.items():
        assert relative_error(gradients(loss, inputs[name])[0], exact) < 1e-12
    assert ((VOCAB, DIM) in seen.fresh) == ("head" in wanted)
    assert ((ROWS, DIM) in seen.fresh) == ("hidden" in wanted)


class _Largest(TorchDispatchMode):
    """Shapes of all tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.fresh: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and func.__name__.startswith(("new_", "zeros", "empty")):
            self.fresh.add(tuple(result.shape))
        if isinstance(result, Tensor):
            assert result.numel() < ROWS * VOCAB
        return result


def test_the_students_logits_never_exist():
    hidden, head, targets = make("top_k:4", 2.0)
    options = {"labels": torch.zeros(ROWS, dtype=torch.int64), "ce_weight": 0.5, "softcap": 3.0}
    with _Largest():
        fused_distillation_loss(hidden, head, targets, chunk_rows=5, **options).backward()


def test_chunks_follow_the_size_of_their_buffers(monkeypatch):
    hidden, head, targets = make("top_k:4")
    wanted = fused_distillation_loss(hidden, head, targets)
    monkeypatch.setitem(fused_pass.CHUNK_BYTES, "cpu", 3 * VOCAB * 8)
    with _Largest() as seen:
        loss = fused_distillation_loss(hidden, head, targets)
    assert (3, VOCAB) in seen.fresh
    assert relative_error(loss, wanted) < 1e-14


def test_no_gradient_is_computed_under_no_grad(monkeypatch):
    hidden, head, targets = make("top_k:4")
    wanted = fused_distillation_loss(hidden, head, targets)
    monkeypatch.setattr(loss_options, "compute_pulls", None)
    with torch.no_grad():
        loss = fused_distillation_loss(hidden, head, targets)
        assert fused_distillation_loss(hidden, head, targets, reduction="none").shape == (ROWS,)
    assert torch.equal(loss, wanted)
    assert not loss.requires_grad


def test_reduction_none_weighs_rows_afterwards():
    hidden, head, targets = make("top_k:4")
    weights = torch.rand(ROWS, dtype=torch.float64)
    options = {"labels": torch.randint(VOCAB, (ROWS,)), "ce_weight": 0.3, "reduction": "none"}
    each = fused_distillation_loss(hidden, head, targets, chunk_rows=4, **options)
    wanted = distillation_loss(hidden @ head.T, targets, **options)
    assert relative_error(each, wanted) < 1e-12
    for found, exact in zip(
        gradients((each * weights).sum(), hidden, head),
        gradients((wanted * weights).sum(), hidden, head),
        strict=True,
    ):
        assert relative_error(found, exact) < 1e-12


@pytest.mark.parametrize("spec", ["dense:f32", "top_k:4", "hidden:int8", "given_ids:bits=32"])
def test_reduction_none_with_labels_temperature_and_mask(spec):
    hidden, head, targets = make(spec, 2.0)
    weights = torch.rand(ROWS, dtype=torch.float64)
    options = {"labels": torch.randint(VOCAB, (ROWS,)), "ce_weight": 0.3, "reduction": "none"}
    options["mask"] = torch.arange(ROWS) % 3 != 1
    each = fused_distillation_loss(hidden, head, targets, chunk_rows=4, **options)
    wanted = distillation_loss(hidden @ head.T, targets, **options)
    assert relative_error(each, wanted) < 1e-12
    (found,) = gradients((each * weights).sum(), head)
    assert relative_error(found, gradients((wanted * weights).sum(), head)[0]) < 1e-12


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("spec", SPECS)
def test_weights_of_rows_multiply_each_term_and_leave_the_divisor_alone(
    spec, temperature, reduction
):
    """Both losses, of which masked rows and their weights may be anything."""
    hidden, head, targets = make(spec, temperature)
    weights, kd_weight, ce_weight = torch.rand(3, ROWS)
    kd_weight[2] = ce_weight[4] = 0.0
    labels, mask = torch.randint(VOCAB, (ROWS,)), torch.arange(ROWS) % 3 != 1
    plain = {"labels": labels, "reduction": "none"}
    outer = torch.rand(ROWS, dtype=torch.float64) if reduction == "none" else torch.tensor(1.0)
    divisor = {"mean": 7, "sum": 1, "none": 1}[reduction]
    for per_row in (True, False):
        kd, ce = (kd_weight, ce_weight) if per_row else (0.5, 0.25)
        logits = hidden @ head.T
        each_kd = distillation_loss(logits, targets, **plain)
        each_ce = distillation_loss(logits, targets, kd_weight=0.0, ce_weight=1.0, **plain)
        each = (weights * (kd * each_kd + ce * each_ce)).where(mask, 0.0)
        wanted = (each * outer).sum() / divisor
        options = {"labels": labels, "mask": mask, "num_items": 7, "reduction": reduction}
        options |= {"row_weights": weights.masked_fill(~mask, torch.nan)}
        options |= {"kd_weight": kd, "ce_weight": ce}
        statistics = RowStatistics.zeros(ROWS)
        for loss in (
            distillation_loss(hidden @ head.T, targets, **options),
            fused_distillation_loss(
                hidden, head, targets, chunk_rows=4, statistics=statistics, **options
            ),
        ):
            found = (loss * outer).sum()
            assert relative_error(found, wanted) < 1e-6
            for one, exact in zip(
                gradients(found, hidden, head), gradients(wanted, hidden, head), strict=True
            ):
                assert relative_error(one, exact) < 1e-6
        kd_R = (each_kd / temperature**2).where(mask, 0.0)
        assert relative_error(statistics.divergence, kd_R) < 1e-6
        assert relative_error(statistics.cross_entropy, each_ce.where(mask, 0.0)) < 1e-6


@pytest.mark.parametrize("spec", ["given_ids:bits=32", "top_k:4"])
def test_the_corrected_truncated_reverse_kl_is_stationary_at_the_teacher(spec):
    """Whatever the student does outside of the kept ids; without the correction it is not."""
    _, _, targets = make(spec)
    p = targets.to_dense().double()
    kept = p > 0
    noise = torch.randn(ROWS, VOCAB, dtype=torch.float64).masked_fill(kept, -torch.inf).softmax(1)
    student = (p + noise * targets.tail_logprob.double().exp()[:, None]).log().requires_grad_()
    options: dict[str, Any] = {"divergence": "reverse_kl", "correction": True, "reduction": "sum"}
    eye = torch.eye(VOCAB, dtype=torch.float64)
    for loss in (
        distillation_loss(student, targets, **options),
        fused_distillation_loss(student, eye, targets, **options),
    ):
        assert float(loss.detach().abs()) < 1e-6
        assert float(gradients(loss, student)[0].abs().max()) < 1e-6
    q = student.softmax(1)
    truncated = (q * (q / p.where(kept, 1.0)).log()).where(kept, 0.0).sum()
    assert float(gradients(truncated, student)[0].abs().max()) > 0.01


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("spec", ["given_ids:bits=32", "top_k:4", f"top_k:{VOCAB}"])
def test_the_correction_is_that_of_the_formula(spec, temperature):
    hidden, head, targets = make(spec, temperature)
    labels, mask = torch.randint(VOCAB, (ROWS,)), torch.arange(ROWS) % 3 != 1
    options: dict[str, Any] = {"labels": labels, "ce_weight": 0.4, "mask": mask}
    p = targets.to_dense().double()
    kept = p > 0
    q = (hidden @ head.T / temperature).softmax(1)
    each = (q * (q.log() - p.where(kept, 1.0).log()) + p - q).where(kept, 0.0).sum(1)
    each = temperature**2 * each + 0.4 * torch.nn.functional.cross_entropy(
        hidden @ head.T, labels, reduction="none"
    )
    wanted = each[mask].mean()
    options |= {"divergence": "reverse_kl", "correction": True}
    for loss in (
        distillation_loss(hidden @ head.T, targets, **options),
        fused_distillation_loss(hidden, head, targets, chunk_rows=4, **options),
    ):
        assert relative_error(loss, wanted) < 1e-6
        for found, exact in zip(
            gradients(loss, hidden, head), gradients(wanted, hidden, head), strict=True
        ):
            assert relative_error(found, exact) < 1e-6


def test_a_retained_graph_can_be_used_again():
    hidden, head, targets = make("top_k:4")
    loss = fused_distillation_loss(hidden, head, targets)
    first = gradients(3 * loss, hidden, head)
    again = gradients(loss, hidden, head)
    for one, other in zip(first, again, strict=True):
        assert relative_error(one, 3 * other) < 1e-14


def test_second_derivatives_are_refused():
    hidden, head, targets = make("top_k:4")
    loss = fused_distillation_loss(hidden, head, targets)
    with pytest.raises(RuntimeError, match=r"second derivative.*Use distillation_loss"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("name", ["num_items", "logit_scale", "logprobs"])
def test_gradients_of_anything_else_are_refused(name):
    hidden, head, targets = make("top_k:4")
    options: dict[str, Any] = {}
    if name == "logprobs":
        targets.logprobs.requires_grad_()
    else:
        options[name] = torch.tensor(2.0, requires_grad=True)
    with pytest.raises(ValueError, match=f"{name} requires a gradient.*distillation_loss"):
        fused_distillation_loss(hidden, head, targets, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", ["dense:f32", "top_k:4", "sampled:16"])
def test_half_precision_inputs_have_float32_statistics(spec, dtype):
    hidden, head, targets = make(spec, dtype=dtype)
    bias = torch.randn(VOCAB, dtype=dtype, requires_grad=True)
    labels = torch.randint(VOCAB, (ROWS,))
    options = {"labels": labels, "ce_weight": 0.5, "chunk_rows": 4}
    loss = fused_distillation_loss(
        hidden, head, targets, head_bias=bias, logit_scale=0.5, **options
    )
    assert loss.dtype == torch.float32
    exact = [one.detach().double().requires_grad_() for one in (hidden, head, bias)]
    wanted = fused_distillation_loss(
        exact[0], exact[1], targets, head_bias=exact[2], logit_scale=0.5, **options
    )
    assert relative_error(loss, wanted) < 3e-3
    for found, right in zip(
        gradients(loss, hidden, head, bias), gradients(wanted, *exact), strict=True
    ):
        assert found.dtype == dtype
        assert relative_error(found, right) < 1e-2


def test_float32_agrees_with_float64():
    hidden, head, targets = make("top_k:4", dtype=torch.float32)
    exact = [one.detach().double().requires_grad_() for one in (hidden, head)]
    for divergence in DIVERGENCES:
        loss = fused_distillation_loss(hidden, head, targets, divergence=divergence)
        wanted = fused_distillation_loss(*exact, targets, divergence=divergence)
        assert relative_error(loss, wanted) < 1e-5
        for found, right in zip(
            gradients(loss, hidden, head), gradients(wanted, *exact), strict=True
        ):
            assert relative_error(found, right) < 1e-5


def test_autocast_multiplies_in_its_own_dtype_and_gives_gradients_in_the_parameters():
    hidden, head, targets = make("top_k:4", dtype=torch.float32)
    wanted = fused_distillation_loss(hidden, head, targets)
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused_distillation_loss(hidden, head, targets)
        mixed = fused_distillation_loss(hidden.bfloat16(), head, targets)
    assert torch.equal(loss, mixed)
    assert loss.dtype == torch.float32
    assert 0 < relative_error(loss, wanted) < 1e-2
    for found, exact in zip(
        gradients(loss, hidden, head), gradients(wanted, hidden, head), strict=True
    ):
        assert found.dtype == torch.float32
        assert relative_error(found, exact) < 2e-2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h, w: {"hidden": h[:-1]}, ["(R, D)", str(ROWS), "hidden_states[0, :-1]"]),
        (lambda h, w: {"head_weight": w.T}, [f"(V, {DIM})", f"({DIM}, {VOCAB})"]),
        (lambda h, w: {"head_weight": w[:2]}, ["ids from 2", f"of {VOCAB}"]),
        (lambda h, w: {"head_weight": w.float()}, ["float32", "float64", "autocast"]),
        (lambda h, w: {"head_bias": w[:, :1]}, [f"({VOCAB},)", f"({VOCAB}, 1)"]),
        (lambda h, w: {"softcap": 0.0}, ["softcap", "None", "0.0"]),
        (lambda h, w: {"chunk_rows": 0}, ["chunk_rows", "0"]),
        (lambda h, w: {"divergence": "kl"}, ["forward_kl", "'kl'"]),
        (lambda h, w: {"divergence": "jsd", "beta": 1.0}, ["between 0 and 1", "1.0"]),
        (lambda h, w: {"reduction": "median"}, ["mean, sum or none", "median"]),
        (lambda h, w: {"ce_weight": 1.0}, ["labels"]),
        (lambda h, w: {"mask": torch.ones(2).bool()}, [str(ROWS), "(2,)"]),
        (lambda h, w: {"row_weights": torch.ones(2)}, ["row_weights", str(ROWS), "(2,)"]),
        (lambda h, w: {"kd_weight": torch.ones(2)}, ["kd_weight", str(ROWS), "(2,)"]),
        (lambda h, w: {"correction": True}, ["divergence='reverse_kl'", "'forward_kl'"]),
        (
            lambda h, w: {
                "targets": make("dense:f32")[2],
                "divergence": "reverse_kl",
                "correction": True,
            },
            ["given_ids, top_k", "dense targets have every id"],
        ),
        (lambda h, w: {"teacher_head": make("hidden")[2].head}, ["hidden targets", "top_k"]),
        (
            lambda h, w: {"targets": replace(make("hidden")[2], head=None)},
            ["teacher_head=teacher.head()"],
        ),
        (
            lambda h, w: {
                "targets": make("hidden")[2],
                "teacher_head": replace(make("hidden")[2].head, fingerprint="cd" * 16),
            },
            ["ab" * 16, "cd" * 16, "teacher.head()"],
        ),
        (
            lambda h, w: {"targets": make("hidden")[2], "teacher_head": w},
            ["TeacherHead", "teacher.head()", "got Tensor"],
        ),
        (lambda h, w: {"targets": REALIZED}, ["realized_logprob", "targets='top_k:"]),
        (lambda h, w: {"targets": FEATURES}, ["FeatureLoss", "targets='hidden:int8'"]),
    ],
)
def test_what_does_not_fit_is_refused_with_got_and_allowed(change, words):
    hidden, head, targets = make("top_k:4")
    arguments = {"hidden": hidden, "head_weight": head, "targets": targets, **change(hidden, head)}
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the words are checked below)
        fused_distillation_loss(**arguments)
    assert all(word in str(caught.value) for word in words)


def test_the_documented_call_is_the_loss_of_the_models_own_logits():
    """A Gemma 2 student: softcap, and the head is the embedding."""
    student = tiny.make_model("Gemma2", 64).double()
    config: Any = student.config
    assert student.lm_head.weight is student.model.embed_tokens.weight
    config.final_logit_softcapping = 2.0
    token_ids = torch.arange(1, 15)
    _, _, targets = make("top_k:4", vocab=64)
    options = {"labels": token_ids[1:], "ce_weight": 0.1}
    hidden = student.model(token_ids[None]).last_hidden_state[0, :-1]
    loss = fused_distillation_loss(
        hidden,
        student.lm_head.weight,
        targets,
        softcap=config.final_logit_softcapping,
        **options,
    )
    wanted = distillation_loss(student(token_ids[None]).logits[0, :-1], targets, **options)
    assert relative_error(loss, wanted) < 1e-9
    parameters = list(student.parameters())
    found = torch.autograd.grad(loss, parameters)
    exact = torch.autograd.grad(wanted, parameters)
    assert max(relative_error(*pair) for pair in zip(found, exact, strict=True)) < 1e-6
