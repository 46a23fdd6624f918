"""Computes the loss and its gradients for one chunk of rows of the fused loss."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from logit_codec import DenseTargets, SampledTargets, SparseTargets, Targets, TopKTargets
from student_trainer.losses.checks import IGNORE_INDEX
from student_trainer.losses.divergences import LOWEST, _pulls, cells

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]

CHUNK_BYTES = {"cpu": 96 << 20}
"""Of the (C, V) buffers. Small enough not to matter; with half of it the head and its gradient are
read twice as often, and a step takes a sixth longer."""


CHUNK_BYTES_ELSEWHERE = 512 << 20
"""A GPU would wait for the head's weights with fewer rows."""


@dataclass(frozen=True, slots=True, eq=False)
class RowStatistics:
    """What fused_distillation_loss fills in for each row that counts; other rows stay as they are."""

    divergence: Tensor
    """(R,) float32: D(p, q), without weight and T^2; 0 if kd_weight is 0."""
    cross_entropy: Tensor
    """(R,) float32: -log q(label) at T = 1; 0 without labels, or for a label of -100."""
    best: Tensor
    """(R,) int64: the student's likeliest id."""

    @classmethod
    def zeros(cls, num_rows: int, device: torch.device | str | None = None) -> "RowStatistics":
        """To be filled in."""
        return cls(
            torch.zeros(num_rows, device=device),
            torch.zeros(num_rows, device=device),
            torch.zeros(num_rows, dtype=torch.int64, device=device),
        )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Problem:
    """All that has no gradient."""

    targets: Targets
    labels: Tensor | None
    """(R, 1) int64."""
    rows: Tensor | None
    """(counted rows,) int64; None for all."""
    divergence: str
    beta: float
    kd_weight: float
    """T^2 included."""
    ce_weight: float
    softcap: float | None
    logit_scale: float
    width: int
    """Ids that have a probability; those above are padding."""
    chunk_rows: int | None
    dtype: torch.dtype
    """Of hidden states and head."""
    statistics: RowStatistics | None
    most: int
    """Kept entries of a row, at most."""


def _run(
    problem: _Problem,
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    weight_R: Tensor | None,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Gradients]:
    """(R,) losses, and the gradients of their sum, weighted by `weight_R`, that are wanted."""
    low = hidden.dtype
    high = _statistics_dtype(low)
    buffers = _Buffers(hidden.device)
    num_rows, dim = hidden.shape
    loss_R = hidden.new_zeros(num_rows, dtype=high)
    grad_hidden, grad_head, grad_bias = (
        value.new_zeros(value.shape, dtype=high) if want and value is not None else None
        for value, want in zip((hidden, head, bias), wanted, strict=True)
    )
    head, bias = head[: problem.width], None if bias is None else bias[: problem.width]
    count = num_rows if problem.rows is None else len(problem.rows)
    size = _chunk_rows(problem, count, high, hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, count, size):
            where = slice(start, min(start + size, count))
            if problem.rows is not None:
                where = problem.rows[where]
            hidden_CD = hidden[where]
            units_CV = _project(problem, hidden_CD, head, bias, high, buffers)
            weight_C1 = None if weight_R is None else weight_R[where][:, None]
            if problem.statistics is not None:
                problem.statistics.best[where] = units_CV.argmax(1)
            loss_R[where], gradient_CV = _loss(
                problem, where, units_CV, weight_C1, problem.most, buffers, any(wanted)
            )
            if gradient_CV is None:
                continue
            if grad_bias is not None:
                grad_bias[: problem.width].add_(gradient_CV.sum(0), alpha=problem.logit_scale)
            if low != high:
                narrow = buffers.get("narrow", gradient_CV.shape, low)
                gradient_CV = narrow.copy_(gradient_CV)
            if grad_hidden is not None:
                grad_hidden[where] = torch.mm(gradient_CV, head).to(high) * problem.logit_scale
            if grad_head is not None and low == high:
                part = grad_head[: problem.width]
                part.addmm_(gradient_CV.T, hidden_CD, alpha=problem.logit_scale)
            elif grad_head is not None:
                product = buffers.get("head", (problem.width, dim), low)
                torch.mm(gradient_CV.T, hidden_CD, out=product)
                grad_head[: problem.width].add_(product, alpha=problem.logit_scale)
    return loss_R, (grad_hidden, grad_head, grad_bias)


def _project(
    problem: _Problem,
    hidden_CD: Tensor,
    head: Tensor,
    bias: Tensor | None,
    high: torch.dtype,
    buffers: "_Buffers",
) -> Tensor:
    """(C, V) logits; in units of the softcap, if there is one."""
    scale = problem.logit_scale / (problem.softcap or 1.0)
    shape = (len(hidden_CD), len(head))
    units_CV = buffers.get("units", shape, high)
    if hidden_CD.dtype == high:
        if bias is None:
            torch.mm(hidden_CD * scale, head.T, out=units_CV)
        else:
            torch.addmm(bias, hidden_CD, head.T, beta=scale, alpha=scale, out=units_CV)
    else:
        narrow = buffers.get("narrow", shape, hidden_CD.dtype)
        if bias is None:
            torch.mm(hidden_CD, head.T, out=narrow)
        else:
            torch.addmm(bias, hidden_CD, head.T, out=narrow)
        units_CV.copy_(narrow)
        if scale != 1.0:
            units_CV.mul_(scale)
    return units_CV if problem.softcap is None else units_CV.tanh_()


def _loss(
    problem: _Problem,
    where: slice | Tensor,
    units_CV: Tensor,
    weight_C1: Tensor | None,
    most: int,
    buffers: "_Buffers",
    differentiate: bool,
) -> tuple[Tensor, Tensor | None]:
    """(C,) losses, and their gradient on the logits before the softcap; `units_CV` is used up."""
    targets, softcap = problem.targets, problem.softcap
    shape, dtype = (len(units_CV), units_CV.shape[1]), units_CV.dtype
    gain = softcap or 1.0
    labels = _Labels.of(problem, where, dtype)
    distils = problem.kd_weight != 0
    joint = isinstance(targets, SparseTargets) and targets.temperature == 1.0
    divergence_C1 = cross_entropy_C1 = units_CV.new_zeros(len(units_CV), 1)
    gradient_CV = None
    if distils:
        factor = gain / targets.temperature
        if isinstance(targets, DenseTargets):
            divergence_C1, gradient_CV = _dense(problem, where, units_CV * factor, weight_C1)
        else:
            logits_CV = units_CV
            if softcap is not None or (labels and not joint):
                logits_CV = torch.mul(units_CV, factor, out=buffers.get("kd", shape, dtype))
            elif factor != 1.0:
                logits_CV.mul_(factor)
            divergence_C1, cross_entropy_C1, gradient_CV = _sparse(
                problem, where, logits_CV, weight_C1, most, labels if joint else None, differentiate
            )
    if labels and not (distils and joint):
        logits_CV = units_CV
        if softcap is not None:
            logits_CV = torch.mul(units_CV, gain, out=buffers.get("ce", shape, dtype))
        weighs = differentiate and problem.ce_weight != 0
        cross_entropy_C1, extra_CV = _cross_entropy(logits_CV, labels, weight_C1, weighs)
        if weighs:
            gradient_CV = extra_CV if gradient_CV is None else gradient_CV.add_(extra_CV)
    loss_C1 = problem.kd_weight * divergence_C1
    if labels and problem.ce_weight:
        loss_C1 = loss_C1 + labels.weight_C1 * cross_entropy_C1
    if problem.statistics is not None:
        problem.statistics.divergence[where] = divergence_C1[:, 0].float()
        if labels:
            given_C1 = cross_entropy_C1.where(labels.given_C1, 0.0)
            problem.statistics.cross_entropy[where] = given_C1[:, 0].float()
    if not differentiate or gradient_CV is None:
        return loss_C1[:, 0], None
    if softcap is not None:
        gradient_CV.mul_(units_CV.square_().neg_().add_(1.0))
    return loss_C1[:, 0], gradient_CV


@dataclass(frozen=True, slots=True, eq=False)
class _Labels:
    """The labels of a chunk."""

    ids_C1: Tensor
    """int64; 0 where there is none."""
    given_C1: Tensor
    """bool: whether there is one."""
    weight_C1: Tensor
    """ce_weight; 0 where there is none."""

    @classmethod
    def of(cls, problem: _Problem, where: slice | Tensor, dtype: torch.dtype) -> "_Labels | None":
        if problem.labels is None:
            return None
        ids_C1 = problem.labels[where]
        given_C1 = ids_C1 != IGNORE_INDEX
        return cls(ids_C1.where(given_C1, 0), given_C1, problem.ce_weight * given_C1.to(dtype))


def _sparse(
    problem: _Problem,
    where: slice | Tensor,
    logits_CV: Tensor,
    weight_C1: Tensor | None,
    most: int,
    labels: _Labels | None,
    differentiate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(C, 1) divergences, cross-entropies at T = 1 if there are labels (else 0), and in the memory
    of `logits_CV` the gradient of both, weighted."""
    targets = problem.targets
    assert isinstance(targets, SparseTargets)
    width, dtype = logits_CV.shape[1], logits_CV.dtype
    first_C1 = targets.row_splits[:-1][where][:, None]
    size_C1 = targets.row_splits[1:][where][:, None] - first_C1
    # Rows are K wide. What is too much repeats the row's first entry, with a probability of 0.
    slot_K = torch.arange(most, device=logits_CV.device)
    real_CK = slot_K < size_C1
    some_C1 = size_C1 > 0
    entry_CK = (first_C1 + slot_K.where(real_CK, 0)).clamp(max=len(targets.token_ids) - 1)
    ids_CK = targets.token_ids[entry_CK]
    label_C1 = logits_CV.gather(1, labels.ids_C1) if labels else logits_CV.new_zeros(())

    # The student's tail is summed over what is left: 1 - head would cancel.
    kept_CK = logits_CV.gather(1, ids_CK)
    logits_CV.scatter_(1, ids_CK, kept_CK.masked_fill(some_C1, -torch.inf))
    top_C1 = logits_CV.amax(1, keepdim=True).clamp(min=LOWEST)
    rest_CV = logits_CV.sub_(top_C1).exp_()
    rest_C1 = rest_CV.sum(1, keepdim=True)
    kept_CK = kept_CK.masked_fill(~real_CK, -torch.inf)
    # Relative to the largest logit: float32 is finer near 0, where a certain student's logprob is.
    largest_C1 = torch.cat([kept_CK, top_C1], 1).amax(1, keepdim=True)
    kept_CK = kept_CK - largest_C1
    tail_C1 = top_C1 - largest_C1 + rest_C1.log()
    log_sum_C1 = torch.logaddexp(kept_CK.logsumexp(1, keepdim=True), tail_C1)
    logq_CK1 = torch.cat([kept_CK, tail_C1], 1) - log_sum_C1

    if isinstance(targets, TopKTargets):
        logp_CK = targets.logprobs[entry_CK].to(dtype)
        logp_C1 = targets.tail_logprob[where][:, None].to(dtype)
    else:
        assert isinstance(targets, SampledTargets)
        counts_CK = targets.counts[entry_CK].masked_fill(~real_CK, 0)
        # Not num_draws: a draw of an id that is not shared was left out.
        logp_CK = (counts_CK.to(dtype) / counts_CK.sum(1, keepdim=True).clamp(min=1)).log()
        logp_C1 = torch.full_like(tail_C1, -torch.inf)
    logp_CK1 = torch.cat(
        [
            logp_CK.masked_fill(~real_CK, -torch.inf),
            logp_C1.masked_fill(size_C1 >= width, -torch.inf),
        ],
        1,
    )
    if isinstance(targets, TopKTargets):
        found_C1 = cells(problem.divergence, problem.beta, logp_CK1, logq_CK1).sum(1, keepdim=True)
    else:
        found_C1 = -(logp_CK1.exp() * logq_CK1.clamp(min=LOWEST)).sum(1, keepdim=True)
        if targets.entropy is not None:
            found_C1 -= targets.entropy[where][:, None].where(some_C1, 0.0)
    cross_entropy_C1 = torch.zeros_like(found_C1)
    if labels:
        cross_entropy_C1 = log_sum_C1 - (label_C1 - largest_C1)
    if not differentiate:
        return found_C1, cross_entropy_C1, rest_CV

    q_CK1 = logq_CK1.exp()
    pull_CK1 = _pulls(problem.divergence, problem.beta, logp_CK1, logq_CK1)
    gradient_CK1 = pull_CK1 - q_CK1 * pull_CK1.sum(1, keepdim=True)
    gradient_CK1 *= problem.kd_weight / targets.temperature
    if labels:
        gradient_CK1 += q_CK1 * labels.weight_C1
    if weight_C1 is not None:
        gradient_CK1 *= weight_C1
    gradient_CK, gradient_C1 = gradient_CK1[:, :-1], gradient_CK1[:, -1:]
    rest_CV.mul_(gradient_C1 / rest_C1.where(rest_C1 > 0, 1.0))
    gradient_CK = gradient_CK.where(real_CK, gradient_CK1[:, :1])
    rest_CV.scatter_(1, ids_CK, gradient_CK.where(some_C1, rest_CV.gather(1, ids_CK)))
    if labels:
        _subtract_labels(rest_CV, labels, weight_C1)
    return found_C1, cross_entropy_C1, rest_CV


def _dense(
    problem: _Problem, where: slice | Tensor, logits_CV: Tensor, weight_C1: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(C, 1) divergences and their weighted gradient, of targets that have every id."""
    targets = problem.targets
    assert isinstance(targets, DenseTargets)
    logq_CV = logits_CV.log_softmax(1)
    logp_CV = targets.logprobs[where].to(logq_CV.dtype)
    found_C1 = cells(problem.divergence, problem.beta, logp_CV, logq_CV).sum(1, keepdim=True)
    pull_CV = _pulls(problem.divergence, problem.beta, logp_CV, logq_CV)
    gradient_CV = pull_CV.addcmul_(logq_CV.exp_(), pull_CV.sum(1, keepdim=True), value=-1.0)
    gradient_CV *= problem.kd_weight / targets.temperature
    if weight_C1 is not None:
        gradient_CV *= weight_C1
    return found_C1, gradient_CV


def _cross_entropy(
    logits_CV: Tensor, labels: _Labels, weight_C1: Tensor | None, differentiate: bool
) -> tuple[Tensor, Tensor]:
    """(C, 1) cross-entropies and, in the memory of `logits_CV`, their weighted gradient."""
    label_C1 = logits_CV.gather(1, labels.ids_C1)
    top_C1 = logits_CV.amax(1, keepdim=True)
    q_CV = logits_CV.sub_(top_C1).exp_()
    sum_C1 = q_CV.sum(1, keepdim=True)
    found_C1 = top_C1 + sum_C1.log() - label_C1
    if differentiate:
        factor_C1 = labels.weight_C1 / sum_C1
        q_CV.mul_(factor_C1 if weight_C1 is None else factor_C1 * weight_C1)
        _subtract_labels(q_CV, labels, weight_C1)
    return found_C1, q_CV


def _subtract_labels(gradient_CV: Tensor, labels: _Labels, weight_C1: Tensor | None) -> None:
    share_C1 = -labels.weight_C1 if weight_C1 is None else -labels.weight_C1 * weight_C1
    gradient_CV.scatter_add_(1, labels.ids_C1, share_C1)


class _Buffers:
    """Scratch memory by name: allocated on first use, by the largest chunk."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kept: dict[str, Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if name not in self.kept:
            self.kept[name] = torch.empty(shape, dtype=dtype, device=self.device)
        return self.kept[name][: shape[0]]


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def most_entries(targets: Targets) -> int:
    """K; waits for the device that the targets are on."""
    if not isinstance(targets, SparseTargets) or not len(targets.token_ids):
        return 0
    return int(targets.row_splits.diff().max())


def _num_buffers(problem: _Problem) -> int:
    """(C, V) buffers that `_loss` uses: logits, and what must not overwrite them."""
    if isinstance(problem.targets, DenseTargets):
        return 8  # not reused: dense targets are for small vocabularies
    mixed = problem.kd_weight != 0 and problem.labels is not None
    return 1 + (problem.softcap is not None) + (mixed and problem.targets.temperature != 1.0)


def _chunk_rows(problem: _Problem, count: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of a chunk: all of the same size, but for the last."""
    limit = problem.chunk_rows
    if limit is None:
        nbytes = CHUNK_BYTES.get(device.type, CHUNK_BYTES_ELSEWHERE)
        limit = max(1, nbytes // (problem.width * dtype.itemsize * _num_buffers(problem)))
    return math.ceil(count / math.ceil(count / limit)) if count else 1
