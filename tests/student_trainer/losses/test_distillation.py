"""distillation_loss against the dense KL and its gradient in float64."""

import pytest
import torch
from torch import Tensor

from logit_codec import (
    DenseTargets,
    SampledTargets,
    Targets,
    TopKTargets,
    decode,
    encode,
    parse_targets,
    select,
)
from student_trainer import UnsuitableTargets, distillation_loss
from student_trainer.losses.divergences import DIVERGENCES
from tests.support.divergences import divergence_of, oracle, relative_error, select_any

ROWS, VOCAB = 23, 61


def make(spec: str, temperature: float = 1.0, seed: int = 0) -> tuple[Tensor, Targets, Tensor]:
    """(student logits float64 with grad, targets, teacher probabilities float64)."""
    torch.manual_seed(seed)
    teacher = torch.randn(ROWS, VOCAB) * 3
    student = (torch.randn(ROWS, VOCAB, dtype=torch.float64) * 2).requires_grad_()
    targets = select_any(teacher, spec, temperature)
    return student, targets, (teacher.double() / temperature).softmax(1)


def dense_kl(student: Tensor, p: Tensor, temperature: float) -> Tensor:
    """(R,) the full KL(p || q): the oracle."""
    logq = (student / temperature).log_softmax(1)
    return (torch.special.xlogy(p, p) - p * logq).sum(1)


def bucketed_kl(student: Tensor, targets: TopKTargets, temperature: float) -> Tensor:
    """(R,) KL over the kept ids and one bucket, row by row in the plainest way."""
    rows = []
    q = (student / temperature).softmax(1)
    for row in range(targets.num_rows):
        part = slice(int(targets.row_splits[row]), int(targets.row_splits[row + 1]))
        ids = targets.token_ids[part]
        p = targets.logprobs[part].double().exp()
        p_tail = targets.tail_logprob[row].double().exp()
        q_kept = q[row, ids]
        others = torch.ones(VOCAB, dtype=torch.bool)
        others[ids] = False
        q_tail = q[row, others].sum()
        loss = (p * (p.log() - q_kept.log())).sum()
        rows.append(loss + (p_tail * (p_tail.log() - q_tail.log()) if p_tail > 0 else 0.0))
    return torch.stack(rows)


def gradient(loss: Tensor, student: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, student, retain_graph=True)
    return found


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("scaling", [True, False])
def test_dense_targets_give_the_full_kl_and_its_gradient(temperature, scaling):
    student, targets, p = make("dense:f32", temperature)
    scale = temperature**2 if scaling else 1.0
    loss = distillation_loss(student, targets, temperature_scaling=scaling)
    wanted = scale * dense_kl(student, p, temperature).mean()
    assert torch.allclose(loss, wanted, atol=1e-6)
    q = (student / temperature).softmax(1)
    assert torch.allclose(
        gradient(loss, student), scale * (q - p) / temperature / ROWS, rtol=0, atol=1e-7
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("spec", ["top_k:5", "top_k:1", "top_k:min_p=1/64,max_k=16"])
def test_top_k_targets_give_the_kl_with_one_tail_bucket(spec, temperature):
    student, targets, _ = make(spec, temperature)
    loss = distillation_loss(student, targets, reduction="none", temperature_scaling=False)
    wanted = bucketed_kl(student, targets, temperature)
    assert torch.allclose(loss, wanted, rtol=1e-10, atol=1e-12)
    weights = torch.rand(ROWS, dtype=torch.float64)
    assert torch.allclose(
        gradient((loss * weights).sum(), student),
        gradient((wanted * weights).sum(), student),
        rtol=1e-9,
        atol=1e-12,
    )


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("scaling", [True, False])
def test_sampled_targets_give_the_cross_entropy_of_the_draws_and_its_gradient(temperature, scaling):
    student, targets, _ = make("sampled:16", temperature)
    scale = temperature**2 if scaling else 1.0
    drawn = targets.to_dense().double()
    loss = distillation_loss(student, targets, temperature_scaling=scaling)
    logq = (student / temperature).log_softmax(1)
    assert torch.allclose(loss, -scale * (drawn * logq).sum(1).mean(), rtol=1e-6)
    wanted = scale / temperature * (logq.exp() - drawn) / ROWS
    assert torch.allclose(gradient(loss, student), wanted, atol=1e-8)


def test_sampled_targets_with_the_entropy_estimate_the_full_kl_without_bias():
    """The mean over a grid of u is the dense KL and its gradient."""
    student, _, p = make("dense:f32")
    repeats = 400
    teacher = p.log().float().repeat_interleave(repeats, 0)
    u = ((torch.arange(repeats, dtype=torch.float64) + 0.5) / repeats).repeat(ROWS)
    targets = select(teacher, "sampled:16,entropy=1,realized=0", uniforms=u)
    loss = distillation_loss(student.repeat_interleave(repeats, 0), targets)
    full = dense_kl(student, p, 1.0).mean()
    assert torch.allclose(loss, full, atol=1e-3)
    assert torch.allclose(gradient(loss, student), gradient(full, student), atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    "spec",
    [
        *("dense:f32", "dense:bf16", "top_k:5", "top_k:min_p=1/8,max_k=8", f"top_k:{VOCAB}"),
        *("given_ids:bits=32", "hidden:int8", "hidden:bf16"),
    ],
)
def test_value_and_gradient_are_those_of_the_formula(spec, divergence, temperature):
    student, targets, _ = make(spec, temperature)
    weights = torch.rand(ROWS, dtype=torch.float64)
    for beta in (0.1, 0.5, 0.8):
        loss = distillation_loss(
            student,
            targets,
            divergence=divergence,
            beta=beta,
            temperature_scaling=False,
            reduction="none",
        )
        wanted = oracle(student, targets, divergence, beta, temperature)
        assert relative_error(loss, wanted) < 1e-10
        found = gradient((loss * weights).sum(), student)
        assert relative_error(found, gradient((wanted * weights).sum(), student)) < 1e-10


@pytest.mark.parametrize("spec", ["dense:f32", "top_k:5"])
def test_jsd_goes_from_forward_kl_to_reverse_kl(spec):
    student, targets, _ = make(spec)
    logits = student.detach()
    for beta, share, end in ((1e-9, 1e-9, "forward_kl"), (1 - 1e-9, 1e-9, "reverse_kl")):
        jsd = distillation_loss(logits, targets, divergence="jsd", beta=beta)
        assert float(jsd) / share == pytest.approx(
            float(distillation_loss(logits, targets, divergence=end)), rel=1e-3
        )


@pytest.mark.parametrize(
    ("skewed", "plain"), [("skew_kl", "forward_kl"), ("skew_reverse_kl", "reverse_kl")]
)
def test_a_skew_of_zero_is_none(skewed, plain):
    student, targets, _ = make("top_k:5")
    loss = distillation_loss(student, targets, divergence=skewed, beta=0.0)
    assert torch.equal(loss, distillation_loss(student, targets, divergence=plain))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_of_top_k_is_a_lower_bound_that_rises_with_k(divergence):
    bounds = []
    for k in (1, 4, 16, VOCAB):
        student, targets, p = make(f"top_k:{k}")
        bounds.append(float(distillation_loss(student.detach(), targets, divergence=divergence)))
    full = divergence_of(p, student.detach().softmax(1), divergence, 0.5).mean()
    assert bounds == sorted(bounds)
    assert bounds[-1] == pytest.approx(float(full), rel=1e-4)
    assert bounds[0] < bounds[-1]


def test_reverse_kl_on_the_students_ids_falls_short_by_no_more_than_the_students_tail_allows():
    """Ids: the student's top 16 and the realized one. p of no tail id is below 2^-149.

    full - bucketed = q_tail * KL(q in the tail || p in the tail), which is at least 0 and at most
    q_tail * log(p_tail / the smallest p in the tail).
    """
    torch.manual_seed(3)
    student = torch.randn(ROWS, VOCAB, dtype=torch.float64) * 3
    teacher = student.float() + torch.randn(ROWS, VOCAB)
    realized = torch.randint(VOCAB, (ROWS, 1))
    ids = torch.cat([student.topk(16).indices, realized], 1)
    full = divergence_of(teacher.double().softmax(1), student.softmax(1), "reverse_kl", 0.5)
    inside = torch.zeros(ROWS, VOCAB, dtype=torch.bool).scatter_(1, ids, True)
    q_tail = student.softmax(1).masked_fill(inside, 0.0).sum(1)
    rest = [one.double().masked_fill(inside, -torch.inf).softmax(1) for one in (student, teacher)]
    within_tail = divergence_of(rest[1], rest[0], "reverse_kl", 0.5)
    p = teacher.double().softmax(1)
    p_tail = p.masked_fill(inside, 0.0).sum(1)
    bound = q_tail * (p_tail / p.masked_fill(inside, 1.0).amin(1)).log()
    for bits, rounding in ((32, 1e-6), (16, 1.0 / 1024)):
        targets = select(teacher, f"given_ids:bits={bits},realized=0", given_ids=ids)
        targets = decode(encode(targets, bits=bits), given_ids=targets.given)
        options = {"divergence": "reverse_kl", "reduction": "none"}
        gap = full - distillation_loss(student, targets, **options)
        assert torch.allclose(gap, q_tail * within_tail, rtol=0, atol=rounding)
        assert (gap >= -rounding).all()
        assert (gap <= bound + rounding).all()
    assert float(gap.mean()) < 0.1 * float(full.mean())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_where_the_teacher_is_certain_stay_finite(divergence):
    certain = TopKTargets(
        vocab_size=4,
        temperature=1.0,
        row_splits=torch.tensor([0, 1, 2]),
        token_ids=torch.tensor([2, 0]),
        logprobs=torch.zeros(2),
        tail_logprob=torch.full((2,), -torch.inf),
    )
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0], [200.0, 0.0, 0.0, 0.0]], requires_grad=True)
    loss = distillation_loss(logits, certain, divergence=divergence, reduction="none")
    found = gradient(loss.sum(), logits)
    assert torch.isfinite(found).all()
    assert 0 < float(loss[0].detach()) < 104
    assert float(loss[1].detach()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("spec", ["dense:f32", "top_k:5"])
def test_padding_counts_for_neither_teacher_nor_student(divergence, spec):
    torch.manual_seed(1)
    teacher = torch.randn(ROWS, 40)
    teacher[:, 36:] = -torch.inf
    targets = select(teacher, f"{spec},realized=0")
    whole = select(teacher[:, :36], f"{spec},realized=0")
    student = torch.randn(ROWS, 44, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(36, (ROWS,))
    options = {"divergence": divergence, "labels": labels, "ce_weight": 0.5}
    loss = distillation_loss(student, targets, effective_vocab_size=36, **options)
    wanted = distillation_loss(student[:, :36], whole, **options)
    assert torch.allclose(loss, wanted, rtol=1e-12)
    found = gradient(loss, student)
    assert torch.allclose(found, gradient(wanted, student), rtol=1e-10)
    assert (found[:, 36:] == 0).all()


def test_renormalize_is_the_kl_from_the_kept_entries_made_to_sum_to_one():
    student, targets, p = make("top_k:5")
    kept = targets.to_dense().double()
    wanted = dense_kl(student, kept / kept.sum(1, keepdim=True), 1.0).mean()
    loss = distillation_loss(student, targets, renormalize=True)
    assert torch.allclose(loss, wanted, rtol=1e-6)
    # The bias that its documentation speaks of: a student that is the teacher is not left alone.
    same = p.log().requires_grad_()
    biased = gradient(distillation_loss(same, targets, renormalize=True), same)
    bucket = gradient(distillation_loss(same, targets), same)
    assert float(biased.norm()) > 20 * float(bucket.norm())


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("top_k:5", {"divergence": "reverse_kl"}),
        ("top_k:5", {"divergence": "skew_reverse_kl", "beta": 0.0}),
        ("dense:f32", {}),
        ("sampled:16", {}),
    ],
)
def test_renormalize_is_refused_where_it_means_nothing(spec, options):
    student, targets, _ = make(spec)
    with pytest.raises(UnsuitableTargets, match="renormali"):
        distillation_loss(student, targets, renormalize=True, **options)


@pytest.mark.parametrize(
    "divergence", ["reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation"]
)
def test_sampled_targets_refuse_other_divergences_and_say_what_to_use(divergence):
    student, targets, _ = make("sampled:16")
    with pytest.raises(UnsuitableTargets, match=rf"{divergence} .*forward_kl.*targets='top_k:"):
        distillation_loss(student, targets, divergence=divergence)


def test_sampled_targets_are_never_made_dense(monkeypatch):
    student, targets, _ = make("sampled:16")
    monkeypatch.setattr(SampledTargets, "to_dense", None)
    gradient(distillation_loss(student, targets), student)


def test_loss_is_a_lower_bound_of_full_kl_that_rises_with_k():
    bounds = []
    for k in (1, 4, 16, VOCAB):
        student, targets, p = make(f"top_k:{k}")
        bounds.append(float(distillation_loss(student.detach(), targets)))
    full = float(dense_kl(student.detach(), p, 1.0).mean())
    assert bounds == sorted(bounds)
    assert bounds[-1] == pytest.approx(full, abs=1e-5)
    assert bounds[0] < full - 0.01


def test_everything_kept_leaves_no_tail_and_no_nan():
    student, targets, p = make(f"top_k:{VOCAB}")
    targets = Targets.cat([targets])
    loss = distillation_loss(student, targets)
    found = gradient(loss, student)
    assert torch.isfinite(found).all()
    assert torch.allclose(found, (student.softmax(1) - p) / ROWS, atol=1e-6)


def test_ids_of_probability_zero_add_nothing_and_make_no_nan():
    student, targets, _ = make("dense:f32")
    assert isinstance(targets, DenseTargets)
    logprobs = targets.logprobs.clone()
    logprobs[:, 40:] = -torch.inf
    cut = DenseTargets(vocab_size=VOCAB, temperature=1.0, logprobs=logprobs.log_softmax(1))
    loss = distillation_loss(student, cut)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient(loss, student)).all()


def test_a_tiny_student_tail_is_summed_not_cancelled():
    teacher = torch.tensor([[10.0, 0.0, 0.0, 0.0]])
    targets = select(teacher, parse_targets("top_k:1,realized=0"))
    logits = torch.tensor([[15.0, 0.0, 0.1, -0.2]])
    single = distillation_loss(logits, targets)
    double = distillation_loss(logits.double(), targets)
    assert float(single) == pytest.approx(float(double), rel=1e-3)


def test_mixes_with_cross_entropy_and_leaves_ignored_labels_out():
    student, targets, p = make("dense:f32")
    labels = torch.randint(VOCAB, (ROWS,))
    labels[3] = -100
    loss = distillation_loss(student, targets, labels=labels, kd_weight=0.25, ce_weight=0.75)
    ce = torch.nn.functional.cross_entropy(student, labels, reduction="sum")
    wanted = (0.25 * dense_kl(student, p, 1.0).sum() + 0.75 * ce) / ROWS
    assert torch.allclose(loss, wanted, atol=1e-6)


def test_labels_alone_are_plain_cross_entropy():
    student, targets, _ = make("top_k:4", temperature=2.0)
    labels = torch.randint(VOCAB, (ROWS,))
    loss = distillation_loss(student, targets, labels=labels, kd_weight=0.0, ce_weight=1.0)
    assert torch.allclose(loss, torch.nn.functional.cross_entropy(student, labels))


def test_masked_rows_count_neither_above_nor_below_the_line():
    student, targets, _ = make("top_k:4")
    mask = torch.arange(ROWS) % 3 != 0
    poisoned = student.detach().clone()
    poisoned[0] = torch.nan
    poisoned.requires_grad_()
    loss = distillation_loss(poisoned, targets, mask=mask)
    each = distillation_loss(student, targets, reduction="none")
    assert torch.allclose(loss, each[mask].mean())
    assert not mask[0]
    found = gradient(loss, poisoned)
    assert torch.equal(found[~mask], torch.zeros_like(found[~mask]))
    assert torch.allclose(found, gradient(each[mask].mean(), student))


def test_reductions_and_num_items():
    student, targets, _ = make("top_k:4")
    each = distillation_loss(student, targets, reduction="none")
    assert each.shape == (ROWS,)
    assert torch.allclose(distillation_loss(student, targets, reduction="sum"), each.sum())
    assert torch.allclose(distillation_loss(student, targets, num_items=100), each.sum() / 100)
    mask = torch.zeros(ROWS, dtype=torch.bool)
    assert float(distillation_loss(student, targets, mask=mask).detach()) == 0.0


def test_half_precision_logits_are_computed_in_float32():
    student, targets, _ = make("top_k:8")
    half = student.detach().bfloat16()
    assert distillation_loss(half, targets).dtype == torch.float32
    assert float(distillation_loss(half, targets)) == pytest.approx(
        float(distillation_loss(half.double(), targets)), rel=1e-5
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {"logits": s[:-1]}, [str(ROWS), "logits[0, :-1]"]),
        (lambda s: {"logits": s[:, :2]}, ["ids from 2", f"of {VOCAB}", "resize_token_embeddings"]),
        (lambda s: {"logits": s[None]}, ["(R, V)"]),
        (lambda s: {"divergence": "backward"}, ["forward_kl", "total_variation", "backward"]),
        (lambda s: {"divergence": "jsd", "beta": 0.0}, ["between 0 and 1", "0.0", "forward_kl"]),
        (lambda s: {"divergence": "skew_kl", "beta": 1.0}, ["below 1", "1.0"]),
        (lambda s: {"effective_vocab_size": VOCAB + 1}, [f"1 to {VOCAB}", str(VOCAB + 1)]),
        (lambda s: {"effective_vocab_size": 1}, ["ids from 1", "leave effective_vocab_size out"]),
        (
            lambda s: {"ce_weight": 1.0, "labels": torch.full((ROWS,), VOCAB)},
            [f"label {VOCAB}", f"{VOCAB} ids"],
        ),
        (lambda s: {"reduction": "median"}, ["mean, sum or none", "median"]),
        (lambda s: {"ce_weight": 1.0}, ["labels"]),
        (lambda s: {"ce_weight": 1.0, "labels": torch.zeros(3).long()}, [str(ROWS), "(3,)"]),
        (lambda s: {"mask": torch.ones(2).bool()}, [str(ROWS), "(2,)"]),
    ],
)
def test_what_does_not_fit_is_refused_with_got_and_allowed(change, words):
    student, targets, _ = make("top_k:4")
    arguments = {"logits": student, **change(student)}
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the words are checked below)
        distillation_loss(arguments.pop("logits"), targets, **arguments)
    assert all(word in str(caught.value) for word in words)
