"""Both losses under random settings, against the divergences written with probabilities in float64.

The oracle shares no code with the losses. It knows the targets as anybody reads them: fields, not
methods. A setting is drawn from its seed and number, which a failure shows.

Letters: R rows, V ids of the teacher, S ids of the student's head, W ids that both have, D hidden size.
"""

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from logit_codec import (
    DenseTargets,
    GivenIdsTargets,
    HiddenTargets,
    SampledTargets,
    Targets,
    TeacherHead,
    TopKTargets,
    decode,
    encode,
    parse_targets,
    select,
)
from student_trainer import UnsuitableTargets, distillation_loss, fused_distillation_loss
from student_trainer.losses.fused_chunk import RowStatistics
from tests.conftest import one_torch_thread

one_thread = pytest.fixture(autouse=True)(one_torch_thread)

NUM_SEEDS, NUM_SETTINGS = 20, 75
QUICK_SEEDS = (7, 10)
WITH_BETA = ("jsd", "skew_kl", "skew_reverse_kl")
WITHOUT_BETA = ("forward_kl", "reverse_kl", "total_variation")
BETAS = (0.0, 1e-45, 1e-9, 0.1, 0.5, 0.9, 1 - 1e-9, 1.0)
SMALLEST = 2.0**-149
"""What a probability of 0 counts as where a divergence divides by it."""


@dataclass(frozen=True)
class Setting:
    """One call of both losses."""

    number: str
    spec: str
    divergence: str
    beta: float
    temperature: float
    rows: int
    ids: int
    """W, without what only one side has."""
    teacher_padding: int
    """More ids of the teacher, never likely."""
    padding_logit: float
    student_padding: int
    """More ids of the student."""
    effective: bool
    """effective_vocab_size is given."""
    teacher_sharpness: float
    student_sharpness: float
    dtype: torch.dtype
    softcap: float | None
    logit_scale: float
    bias: bool
    renormalize: bool
    kd_weight: float
    ce_weight: float
    temperature_scaling: bool
    mask: str
    reduction: str
    num_items: int | None
    chunk_rows: int | None
    statistics: bool
    coded: bool
    """The targets went through bytes."""

    @classmethod
    def draw(cls, seed: int, number: int) -> "Setting":
        chance = random.Random(f"{seed} {number}")
        pick = chance.choice
        ids = pick((1, 2, 3, 7, 19, 40, 67))
        teacher_padding = pick((0, 0, 3))
        k = chance.randint(1, ids + teacher_padding)
        sampled = f"sampled:{pick((1, 4, 64))},entropy={pick((0, 1))}"
        least = f"min_p=1/{pick((2, 16, 256))},max_k={k}"
        kept = pick(
            (f"top_k:{k}", f"top_k:{min(k, 4)}", f"top_k:{least}", f"top_k:{ids + teacher_padding}")
        )
        given = f"given_ids:bits={pick((16, 32))}"
        hidden = f"hidden:{pick(('int8', 'bf16'))}"
        spec = pick(
            ("dense:f32", "dense:bf16", sampled, kept, kept, kept, given, given, hidden, hidden)
        )
        divergence = pick(WITHOUT_BETA + WITH_BETA)
        if "sampled" in spec and chance.random() < 0.9:
            divergence = "forward_kl"
        kd_weight, ce_weight = pick(((1.0, 0.0), (1.0, 0.0), (0.3, 0.6), (0.0, 1.0)))
        return cls(
            number=f"{seed} {number}",
            spec=spec,
            divergence=divergence,
            beta=pick(BETAS),
            temperature=pick((1.0, 1.0, 0.5, 2.0, 3.7)),
            rows=pick((1, 2, 5, 13)),
            ids=ids,
            teacher_padding=teacher_padding,
            padding_logit=pick((-float("inf"), -40.0)),
            student_padding=pick((0, 0, 5)) if not teacher_padding else 0,
            effective=chance.random() < 0.2,
            teacher_sharpness=pick((0.1, 1.0, 3.0, 20.0, 80.0)),
            student_sharpness=pick((0.1, 1.0, 3.0, 10.0)),
            dtype=pick((torch.float64, torch.float32)),
            softcap=pick((None, None, 3.0, 30.0)),
            logit_scale=pick((1.0, 1.0, 0.0625, 2.0)),
            bias=pick((True, False)),
            renormalize="top_k" in spec and chance.random() < 0.15,
            kd_weight=kd_weight,
            ce_weight=ce_weight,
            temperature_scaling=pick((True, False)),
            mask=pick(("", "", "some", "none counts")),
            reduction=pick(("mean", "mean", "sum", "none")),
            num_items=pick((None, None, 7)),
            chunk_rows=pick((None, 1, 3, 100)),
            statistics=pick((True, False)),
            coded=pick((True, False)),
        )

    @property
    def refused(self) -> type[ValueError] | None:
        """What must be raised."""
        if "sampled" in self.spec and self.divergence != "forward_kl":
            return UnsuitableTargets
        ends = (0.0, 1.0) if self.divergence == "jsd" else (1.0,)
        if self.divergence in WITH_BETA and self.beta in ends:
            return ValueError
        divides = self.divergence == "reverse_kl" or (
            self.divergence == "skew_reverse_kl" and self.beta == 0
        )
        return UnsuitableTargets if self.renormalize and divides else None

    def make(self) -> dict[str, Any]:
        """Hidden states, head, bias, targets, labels, mask, and weights of the rows."""
        torch.manual_seed(random.Random(self.number).randrange(2**31))
        size, head_size = self.ids + self.teacher_padding, self.ids + self.student_padding
        teacher = torch.randn(self.rows, size) * self.teacher_sharpness
        largest = teacher[:, : self.ids].amax(1, keepdim=True)
        teacher[:, self.ids :] = largest + self.padding_logit
        width = size if self.padding_logit > -100 else self.ids
        teacher_head = self.make_head(size)
        targets = select(
            teacher,
            f"{self.spec},realized=0{',log_z=0' * ('hidden' in self.spec)}",
            temperature=self.temperature,
            uniforms=torch.rand(self.rows, dtype=torch.float64),
            given_ids=torch.randint(width, (self.rows, 3)) if "given" in self.spec else None,
            hidden=torch.randn(self.rows, teacher_head.hidden_size),
        )
        if isinstance(targets, HiddenTargets):
            targets = replace(targets, head_fingerprint=teacher_head.fingerprint)
        if self.coded:
            data = encode(targets, bits=parse_targets(self.spec).code_bits)
            given = targets.given if isinstance(targets, GivenIdsTargets) else None
            targets = decode(data, given_ids=given)
        dim = 5
        hidden = torch.randn(self.rows, dim, dtype=self.dtype)
        head = torch.randn(head_size, dim, dtype=self.dtype) * self.student_sharpness
        labels = torch.randint(self.ids, (self.rows,))
        labels[torch.rand(self.rows) < 0.2] = -100
        mask = None
        if self.mask:
            mask = torch.rand(self.rows) < (0.6 if self.mask == "some" else 0.0)
        return {
            "hidden": hidden.requires_grad_(),
            "head": head.requires_grad_(),
            "bias": torch.randn(head_size, dtype=self.dtype).requires_grad_()
            if self.bias
            else None,
            "targets": targets,
            "teacher_head": teacher_head if isinstance(targets, HiddenTargets) else None,
            "labels": labels,
            "mask": mask,
            "row_weights": torch.rand(self.rows, dtype=torch.float64),
        }

    def make_head(self, size: int) -> TeacherHead:
        """The teacher's, for hidden targets; what is padding has a bias of -40, or is named so."""
        dim = 4
        # A softcap would lift what is far below: then padding is named.
        is_named = self.padding_logit < -100 or self.softcap is not None
        is_padding = torch.arange(size) >= self.ids
        bias = torch.randn(size) - 40.0 / self.logit_scale * is_padding
        return TeacherHead(
            weight=torch.randn(size, dim) * self.teacher_sharpness / 2 * ~is_padding[:, None],
            bias=bias if self.bias or not is_named else None,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            effective_vocab_size=self.ids if is_named else size,
            fingerprint="5a" * 16,
        )

    def options(self, made: dict[str, Any]) -> dict[str, Any]:
        """What both losses are given beside their input."""
        return {
            "divergence": self.divergence,
            "beta": self.beta,
            "labels": made["labels"],
            "kd_weight": self.kd_weight,
            "ce_weight": self.ce_weight,
            "mask": made["mask"],
            "temperature_scaling": self.temperature_scaling,
            "renormalize": self.renormalize,
            "teacher_head": made["teacher_head"],
            "effective_vocab_size": self.ids if self.effective else None,
            "reduction": self.reduction,
            "num_items": self.num_items,
        }


def logits_of(setting: Setting, hidden: Tensor, head: Tensor, bias: Tensor | None) -> Tensor:
    logits = hidden @ head.T
    logits = setting.logit_scale * (logits if bias is None else logits + bias)
    cap = setting.softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def hidden_probabilities(
    setting: Setting, targets: HiddenTargets, head: TeacherHead
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = targets.values.double()
    hidden = hidden if targets.scale is None else hidden * targets.scale.double()[:, None]
    logits = hidden @ head.weight.double().T
    logits = head.logit_scale * (logits if head.bias is None else logits + head.bias.double())
    cap = head.softcap
    logits = (logits if cap is None else cap * torch.tanh(logits / cap))[:, : setting.ids]
    p = (logits / setting.temperature).softmax(1)
    return p, torch.ones_like(p, dtype=torch.bool), p.new_zeros(len(p))


def shared_probabilities(setting: Setting, made: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """(R, W) probabilities, (R, W) which of them are cells of their own, (R,) the tail's.

    Given that the id is shared: what lies on others is spread over all in proportion.
    """
    width, targets = setting.ids, made["targets"]
    if isinstance(targets, HiddenTargets):
        return hidden_probabilities(setting, targets, made["teacher_head"])
    whole = torch.zeros(targets.num_rows, targets.vocab_size, dtype=torch.float64)
    kept = torch.zeros_like(whole, dtype=torch.bool)
    tail = torch.zeros(targets.num_rows, dtype=torch.float64)
    if isinstance(targets, DenseTargets):
        whole, kept = targets.logprobs.double().exp(), ~kept
    else:
        assert isinstance(targets, SampledTargets | TopKTargets | GivenIdsTargets)
        for row in range(targets.num_rows):
            some = slice(int(targets.row_splits[row]), int(targets.row_splits[row + 1]))
            kept[row, targets.token_ids[some]] = True
            if isinstance(targets, SampledTargets):
                values = targets.counts[some].double() / targets.num_draws
            else:
                values = targets.logprobs[some].double().exp()
            whole[row, targets.token_ids[some]] = values
        if not isinstance(targets, SampledTargets) and not setting.renormalize:
            tail = targets.tail_logprob.double().exp()
    before = whole.sum(1) + tail * ~kept.all(1)
    tail = tail * ~kept[:, :width].all(1)
    shared, after = whole[:, :width], whole[:, :width].sum(1) + tail
    scale = 1 / after if setting.renormalize else before / after
    return shared * scale[:, None], kept[:, :width], tail * scale


def oracle(setting: Setting, logits: Tensor, made: dict[str, Any]) -> tuple[Tensor, ...]:
    """(R, S) float64 logits -> (R,) divergences, (R,) cross-entropies."""
    targets: Targets = made["targets"]
    logits = logits[:, : setting.ids]
    logq = (logits / setting.temperature).log_softmax(1)
    p, kept, tail = shared_probabilities(setting, made)
    if isinstance(targets, SampledTargets):
        found = -(p * logq).sum(1)
        found = found if targets.entropy is None else found - targets.entropy.double()
    else:
        has_rest = ~kept.all(1)
        rest = logq.masked_fill(kept & has_rest[:, None], -torch.inf).logsumexp(1)
        each = divergence(p, logq, setting.divergence, setting.beta) * kept
        found = each.sum(1) + divergence(tail, rest, setting.divergence, setting.beta) * has_rest
    ce = torch.nn.functional.cross_entropy(logits, made["labels"], reduction="none")
    return found, ce


def divergence(p: Tensor, logq: Tensor, name: str, beta: float) -> Tensor:
    """What each cell adds."""
    q = logq.exp()
    some = p.clamp(min=SMALLEST)
    plogp = torch.special.xlogy(p, p)
    if name == "forward_kl" or (name == "skew_kl" and beta == 0):
        return plogp - p * logq
    if name == "reverse_kl" or (name == "skew_reverse_kl" and beta == 0):
        return q * (logq - some.log())
    if name == "jsd":
        m = (beta * some + (1 - beta) * q).log()
        return beta * (plogp - p * m) + (1 - beta) * q * (logq - m)
    if name == "skew_kl":
        return plogp - p * (beta * some + (1 - beta) * q).log()
    if name == "skew_reverse_kl":
        return q * (logq - ((1 - beta) * some + beta * q).log())
    assert name == "total_variation"
    return 0.5 * (p - q).abs()


def wanted_loss(setting: Setting, logits: Tensor, made: dict[str, Any]) -> tuple[Tensor, ...]:
    """(R,) losses, not counted ones 0; () reduced; divergences and cross-entropies."""
    d, ce = oracle(setting, logits, made)
    scale = setting.temperature**2 if setting.temperature_scaling else 1.0
    each = setting.kd_weight * scale * d + setting.ce_weight * ce
    mask = made["mask"]
    if mask is not None:
        each = each * mask
    if setting.reduction == "none":
        return each, (each * made["row_weights"]).sum(), d, ce
    count = setting.rows if mask is None else int(mask.sum())
    divisor = max(1, count if setting.num_items is None else setting.num_items)
    return each, each.sum() / (1 if setting.reduction == "sum" else divisor), d, ce


def reduced(setting: Setting, loss: Tensor, made: dict[str, Any]) -> Tensor:
    if setting.reduction != "none":
        return loss
    assert loss.shape == (setting.rows,)
    return (loss.double() * made["row_weights"]).sum()


def assert_close(setting: Setting, what: str, found: Tensor, wanted: Tensor, scale: float) -> None:
    """Up to rounding: of values of about `scale`, and of what is found."""
    # Targets that were renormalised are float32 again.
    single = setting.dtype == torch.float32 or setting.renormalize or setting.teacher_padding
    single = single or "hidden" in setting.spec  # the teacher's logits are
    tolerance = (1e-6 if single else 1e-10) * (scale + float(wanted.detach().abs().amax()))
    difference = float((found.detach().double() - wanted.detach()).abs().amax())
    assert difference <= tolerance, f"{what} is off by {difference} of {tolerance}: {setting}"


def compare(setting: Setting) -> None:
    """Raises AssertionError unless both losses are the oracle's."""
    made = setting.make()
    hidden, head, bias, targets = (made[name] for name in ("hidden", "head", "bias", "targets"))
    options = setting.options(made)
    affine = {"head_bias": bias, "softcap": setting.softcap, "logit_scale": setting.logit_scale}
    logits = logits_of(setting, hidden, head, bias).detach()
    if setting.refused is not None:
        for call in (
            lambda: distillation_loss(logits, targets, **options),
            lambda: fused_distillation_loss(hidden, head, targets, **affine, **options),
        ):
            with pytest.raises(setting.refused):
                call()
        return

    inputs = [one for one in (hidden, head, bias) if one is not None]
    exact = [None if one is None else one.detach().double() for one in (hidden, head, bias)]
    exact_inputs = [one.requires_grad_() for one in exact if one is not None]
    wanted_logits = logits_of(setting, *exact)  # type: ignore[arg-type]
    _, wanted, wanted_d, wanted_ce = wanted_loss(setting, wanted_logits, made)
    wanted_gradients = torch.autograd.grad(wanted, [wanted_logits, *exact_inputs])
    # Rounding of one logit of this size moves the loss by as much.
    largest = float(wanted_logits.detach().abs().amax()) + 1
    smooth = setting.divergence != "total_variation" or setting.dtype == torch.float64
    factor = max(1.0, setting.temperature**2, 1 / setting.temperature) * setting.rows

    # Rows that do not count may hold anything.
    poisoned = logits.clone()
    mask = made["mask"]
    if mask is not None:
        poisoned[~mask] = random.Random(setting.number).choice((torch.inf, torch.nan, 0.0))
    poisoned.requires_grad_()
    loss = reduced(setting, distillation_loss(poisoned, targets, **options), made)
    assert_close(setting, "distillation_loss", loss, wanted, factor * largest)
    (gradient,) = torch.autograd.grad(loss, poisoned)
    if smooth:
        assert_close(setting, "its gradient", gradient, wanted_gradients[0], factor * largest)
    assert not gradient[:, setting.ids :].any(), setting

    statistics = RowStatistics.zeros(setting.rows) if setting.statistics else None
    fused = fused_distillation_loss(
        hidden,
        head,
        targets,
        chunk_rows=setting.chunk_rows,
        statistics=statistics,
        **affine,
        **options,
    )
    fused = reduced(setting, fused, made)
    assert_close(setting, "fused_distillation_loss", fused, wanted, factor * largest)
    for name, one, right in zip(
        ("hidden", "head", "bias"),
        torch.autograd.grad(fused, inputs),
        wanted_gradients[1:],
        strict=False,
    ):
        if smooth:
            scale = factor * largest * max(1.0, setting.logit_scale) * setting.student_sharpness
            assert_close(setting, f"the gradient of {name}", one, right, max(scale, factor))
        assert torch.isfinite(one).all(), setting
    if statistics is not None:
        counts = torch.ones(setting.rows, dtype=torch.bool) if mask is None else mask
        d = wanted_d if setting.kd_weight else torch.zeros_like(wanted_d)
        for name, found, right in (
            ("divergence", statistics.divergence, d),
            ("cross_entropy", statistics.cross_entropy, wanted_ce),
        ):
            right = right.detach().where(counts, 0.0)
            error = float((found.double() - right).abs().max())
            assert error <= 2e-5 * (largest + float(right.abs().max())), f"{name} of {setting}"
        if setting.dtype == torch.float64:
            best = wanted_logits[:, : setting.ids].argmax(1)
            assert torch.equal(statistics.best, best.where(counts, 0)), setting


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(seed, marks=[] if seed in QUICK_SEEDS else [pytest.mark.slow])
        for seed in range(NUM_SEEDS)
    ],
)
def test_both_losses_and_their_gradients_are_those_of_the_dense_oracle(seed):
    """20 seeds, 1,500 settings."""
    for number in range(NUM_SETTINGS):
        compare(Setting.draw(seed, number))
