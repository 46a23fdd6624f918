"""Computes the loss of one chunk of rows from its logits, and the gradient of the logits.

Letters: R rows, C rows of one chunk, V vocabulary, K kept entries per row at most.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from logit_codec.kinds.base import LOWEST, FullCells, SparseCells
from student_trainer.losses.checks import IGNORE_INDEX
from student_trainer.losses.options import LossOptions, RowWeight

SHARES = 8
"""Into which the rows of a chunk are divided where p and q are compared in every id."""


@dataclass(frozen=True, slots=True, eq=False)
class RowStatistics:
    """Holds the numbers that fused_distillation_loss fills in for each row that counts."""

    divergence: Tensor
    """(R,) float32: D(p, q), without weight and T^2; 0 if kd_weight is 0."""
    cross_entropy: Tensor
    """(R,) float32: -log q(label) at T = 1; 0 without labels, or for a label of -100."""
    best: Tensor
    """(R,) int64: the student's likeliest id."""
    teacher_best: Tensor
    """(R,) int64: the teacher's, of targets that tell p of every id, if kd_weight is not 0."""

    @classmethod
    def zeros(cls, num_rows: int, device: torch.device | str | None = None) -> "RowStatistics":
        """Makes statistics to be filled in; rows that do not count stay 0."""
        return cls(
            torch.zeros(num_rows, device=device),
            torch.zeros(num_rows, device=device),
            torch.zeros(num_rows, dtype=torch.int64, device=device),
            torch.zeros(num_rows, dtype=torch.int64, device=device),
        )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Problem:
    """Holds everything about a loss that has no gradient."""

    cells: SparseCells | FullCells
    options: LossOptions
    weights: tuple[RowWeight, RowWeight]
    """Of divergence, T^2 included, and cross-entropy: numbers, or (R,) one for each row."""
    labels: Tensor | None
    """(R, 1) int64."""
    rows: Tensor | None
    """(counted rows,) int64; None for all."""
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

    @property
    def temperature(self) -> float:
        """That of the targets."""
        return self.cells.targets.temperature

    @property
    def sparse(self) -> SparseCells | None:
        """The cells, if the targets keep a few ids of each row."""
        return self.cells if isinstance(self.cells, SparseCells) else None

    @property
    def num_buffers(self) -> int:
        """(C, V) buffers that a chunk uses: logits, and results that must not overwrite them."""
        mixed = self.options.distils and self.labels is not None
        if self.sparse is None:
            # And the teacher's logits, and what is computed in a share of the rows at a time.
            return 3 + (self.softcap is not None or mixed) + (self.softcap is not None and mixed)
        return 1 + (self.softcap is not None) + (mixed and self.temperature != 1.0)

    def weigh(self, term: int, where: slice | Tensor) -> RowWeight:
        """Returns a number or (C, 1): the weight of the divergence (0) or the cross-entropy (1)."""
        weight = self.weights[term]
        return weight[where][:, None] if isinstance(weight, Tensor) else weight


class Buffers:
    """Keeps scratch memory by name: allocated on first use, by the largest chunk."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tensors: dict[str, Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Returns memory of this shape, with anything in it."""
        if name not in self._tensors:
            self._tensors[name] = torch.empty(shape, dtype=dtype, device=self._device)
        return self._tensors[name][: shape[0]]


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """Holds the labels of a chunk."""

    ids_C1: Tensor
    """int64; 0 where there is none."""
    given_C1: Tensor
    """bool: whether there is one."""
    weight_C1: Tensor
    """ce_weight; 0 where there is none."""

    @classmethod
    def of(cls, problem: Problem, where: slice | Tensor, dtype: torch.dtype) -> "Labels | None":
        """Takes the labels of some rows, if the loss looks at labels."""
        if problem.labels is None:
            return None
        ids_C1 = problem.labels[where]
        given_C1 = ids_C1 != IGNORE_INDEX
        weight_C1 = problem.weigh(1, where) * given_C1.to(dtype)
        return cls(ids_C1.where(given_C1, 0), given_C1, weight_C1)

    def subtract_from(self, gradient_CV: Tensor, weight_C1: Tensor | None) -> None:
        """Adds the part of a cross-entropy's gradient that is not q: -1 at the label."""
        share_C1 = -self.weight_C1 if weight_C1 is None else -self.weight_C1 * weight_C1
        gradient_CV.scatter_add_(1, self.ids_C1, share_C1)


class Chunk:
    """Computes the loss of some rows, and its gradient on their logits before the softcap."""

    def __init__(
        self,
        problem: Problem,
        where: slice | Tensor,
        units_CV: Tensor,
        weight_C1: Tensor | None,
        buffers: Buffers,
        differentiate: bool,
    ) -> None:
        """units_CV: logits in units of the softcap; used up. weight_C1: of each row; None for 1."""
        self._problem, self._where, self._units_CV = problem, where, units_CV
        self._weight_C1, self._buffers, self._differentiate = weight_C1, buffers, differentiate
        self._labels = Labels.of(problem, where, units_CV.dtype)
        self._gain = problem.softcap or 1.0
        # At T = 1 one softmax over the kept ids and the rest serves the cross-entropy too.
        is_joint = problem.sparse is not None and problem.temperature == 1.0
        self._joint_labels = self._labels if is_joint and problem.options.distils else None
        self._kd_weight = problem.weigh(0, where)
        self._divergence_C1 = self._cross_entropy_C1 = units_CV.new_zeros(len(units_CV), 1)
        self._gradient_CV: Tensor | None = None

    def solve(self) -> tuple[Tensor, Tensor | None]:
        """Returns (C,) losses and, if there is one, the gradient on the logits."""
        problem, labels = self._problem, self._labels
        if problem.options.distils:
            if isinstance(problem.cells, SparseCells):
                self._distil_kept(problem.cells)
            else:
                self._distil_all(problem.cells)
        if labels and not self._joint_labels:  # needs logits at T = 1, which it overwrites
            self._add_cross_entropy(labels)
        loss_C1 = self._kd_weight * self._divergence_C1
        if labels and problem.options.uses_labels:
            loss_C1 = loss_C1 + labels.weight_C1 * self._cross_entropy_C1
        self._fill_statistics()
        if not self._differentiate or self._gradient_CV is None:
            return loss_C1[:, 0], None
        if problem.softcap is not None:
            self._gradient_CV.mul_(self._units_CV.square_().neg_().add_(1.0))
        return loss_C1[:, 0], self._gradient_CV

    def _distil_kept(self, cells: SparseCells) -> None:
        """Computes the divergence of targets that keep a few ids; overwrites its logits."""
        problem, labels = self._problem, self._joint_labels
        factor = self._gain / problem.temperature
        logits_CV = self._units_CV
        if problem.softcap is not None or (self._labels and not labels):
            buffer = self._buffers.get("kd", tuple(logits_CV.shape), logits_CV.dtype)
            logits_CV = torch.mul(logits_CV, factor, out=buffer)
        elif factor != 1.0:
            logits_CV.mul_(factor)
        kept = KeptCells(problem, cells, self._where, logits_CV, labels)
        self._divergence_C1 = kept.divergence()
        if labels:
            self._cross_entropy_C1 = kept.cross_entropy()
        if self._differentiate:
            self._gradient_CV = kept.gradient(self._kd_weight, self._weight_C1)

    def _distil_all(self, cells: FullCells) -> None:
        """Computes the divergence of targets that tell p of every id; may overwrite its logits.

        The teacher's logits are made for all rows at once, so that its head is read once; the
        arithmetic, which takes many times that memory, goes over a share of the rows at a time.
        """
        problem, units_CV = self._problem, self._units_CV
        self._divergence_C1 = units_CV.new_zeros(len(units_CV), 1)
        gradient_CV = units_CV
        if self._differentiate and (problem.softcap is not None or self._labels):
            # The units are still needed.
            gradient_CV = self._buffers.get("kd", tuple(units_CV.shape), units_CV.dtype)
        teacher_CV = cells.logits(self._where)
        if problem.statistics is not None:
            problem.statistics.teacher_best[self._where] = teacher_CV.argmax(1)
        size = math.ceil(len(units_CV) / SHARES)
        for start in range(0, len(units_CV), size):
            some = slice(start, start + size)
            logq_CV = (units_CV[some] * (self._gain / problem.temperature)).log_softmax(1)
            logp_CV = cells.logp(teacher_CV[some], logq_CV.dtype)
            each_CV = problem.options.cell(logp_CV, logq_CV)
            self._divergence_C1[some] = each_CV.sum(1, keepdim=True)
            del each_CV
            if self._differentiate:
                pull_CV = problem.options.pull(logp_CV, logq_CV)
                sum_C1 = pull_CV.sum(1, keepdim=True)
                gradient_CV[some] = pull_CV.addcmul_(logq_CV.exp_(), sum_C1, value=-1.0)
        if self._differentiate:
            factor = self._kd_weight / problem.temperature
            factor = factor if self._weight_C1 is None else factor * self._weight_C1
            self._gradient_CV = gradient_CV.mul_(factor)

    def _add_cross_entropy(self, labels: Labels) -> None:
        """Computes the cross-entropy on its own, and adds its gradient."""
        problem, logits_CV = self._problem, self._units_CV
        if problem.softcap is not None:
            buffer = self._buffers.get("ce", tuple(logits_CV.shape), logits_CV.dtype)
            logits_CV = torch.mul(logits_CV, self._gain, out=buffer)
        label_C1 = logits_CV.gather(1, labels.ids_C1)
        top_C1 = logits_CV.amax(1, keepdim=True)
        q_CV = logits_CV.sub_(top_C1).exp_()
        sum_C1 = q_CV.sum(1, keepdim=True)
        self._cross_entropy_C1 = top_C1 + sum_C1.log() - label_C1
        if self._differentiate and problem.options.uses_labels:
            factor_C1 = labels.weight_C1 / sum_C1
            weight_C1 = self._weight_C1
            q_CV.mul_(factor_C1 if weight_C1 is None else factor_C1 * weight_C1)
            labels.subtract_from(q_CV, weight_C1)
            gradient_CV = self._gradient_CV
            self._gradient_CV = q_CV if gradient_CV is None else gradient_CV.add_(q_CV)

    def _fill_statistics(self) -> None:
        statistics, labels = self._problem.statistics, self._labels
        if statistics is None:
            return
        statistics.divergence[self._where] = self._divergence_C1[:, 0].float()
        if labels:
            given_C1 = self._cross_entropy_C1.where(labels.given_C1, 0.0)
            statistics.cross_entropy[self._where] = given_C1[:, 0].float()


class KeptCells:
    """Compares p and q in K kept ids of each row of a chunk, and in all other ids together."""

    def __init__(
        self,
        problem: Problem,
        cells: SparseCells,
        where: slice | Tensor,
        logits_CV: Tensor,
        labels: Labels | None,
    ) -> None:
        """logits_CV: the student's, at the temperature of the targets; overwritten."""
        self._problem, self._cells, self._labels = problem, cells, labels
        self._entries = entries = cells.pad(where, problem.most)
        self._some_C1 = entries.size_C1 > 0
        if labels:  # before the logits are overwritten
            self._label_C1 = logits_CV.gather(1, labels.ids_C1)
        # The student's tail is summed over what is left: 1 - head would cancel.
        kept_CK = logits_CV.gather(1, entries.ids_CK)
        logits_CV.scatter_(1, entries.ids_CK, kept_CK.masked_fill(self._some_C1, -torch.inf))
        top_C1 = logits_CV.amax(1, keepdim=True).clamp(min=LOWEST)
        self._rest_CV = logits_CV.sub_(top_C1).exp_()
        self._rest_C1 = self._rest_CV.sum(1, keepdim=True)
        kept_CK = kept_CK.masked_fill(~entries.real_CK, -torch.inf)
        # Relative to the largest logit: float32 is finer near 0, where a sure student's logprob is.
        self._largest_C1 = torch.cat([kept_CK, top_C1], 1).amax(1, keepdim=True)
        kept_CK = kept_CK - self._largest_C1
        tail_C1 = top_C1 - self._largest_C1 + self._rest_C1.log()
        self._log_sum_C1 = torch.logaddexp(kept_CK.logsumexp(1, keepdim=True), tail_C1)
        self._logq_CK1 = torch.cat([kept_CK, tail_C1], 1) - self._log_sum_C1
        self._logp_CK1 = cells.logp(entries, logits_CV.dtype)

    def divergence(self) -> Tensor:
        """Computes (C, 1) divergences."""
        options = self._problem.options
        # With the correction, the tail has no cell.
        some = slice(-1) if options.correction else slice(None)
        logp, logq = self._logp_CK1[:, some], self._logq_CK1[:, some]
        return self._cells.chunk_divergence(self._entries, logp, logq, options.cell)

    def cross_entropy(self) -> Tensor:
        """Computes (C, 1) cross-entropies of the labels at T = 1."""
        return self._log_sum_C1 - (self._label_C1 - self._largest_C1)

    def gradient(self, kd_weight: RowWeight, weight_C1: Tensor | None) -> Tensor:
        """Computes the weighted gradient of both on the logits, in their memory."""
        problem, labels, entries = self._problem, self._labels, self._entries
        q_CK1 = self._logq_CK1.exp()
        pull_CK1 = problem.options.pull(self._logp_CK1, self._logq_CK1)
        if problem.options.correction:
            pull_CK1[:, -1] = 0.0
        gradient_CK1 = pull_CK1 - q_CK1 * pull_CK1.sum(1, keepdim=True)
        gradient_CK1 *= kd_weight / problem.temperature
        if labels:
            gradient_CK1 += q_CK1 * labels.weight_C1
        if weight_C1 is not None:
            gradient_CK1 *= weight_C1
        # The tail's gradient is shared out among its ids in proportion to q.
        rest_CV, rest_C1 = self._rest_CV, self._rest_C1
        rest_CV.mul_(gradient_CK1[:, -1:] / rest_C1.where(rest_C1 > 0, 1.0))
        gradient_CK = gradient_CK1[:, :-1].where(entries.real_CK, gradient_CK1[:, :1])
        kept_CK = gradient_CK.where(self._some_C1, rest_CV.gather(1, entries.ids_CK))
        rest_CV.scatter_(1, entries.ids_CK, kept_CK)
        if labels:
            labels.subtract_from(rest_CV, weight_C1)
        return rest_CV
