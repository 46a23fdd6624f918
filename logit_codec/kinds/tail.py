"""Defines targets that keep the logprobs of some ids, and the exact mass of all others in one number.

Letters: R rows, C rows of a chunk, V vocabulary, E kept entries of all rows, K entries of a row at most.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from logit_codec.kinds.base import LOWEST, Cell, PaddedEntries, SparseCells
from logit_codec.planes import RowCheck
from logit_codec.targets import SparseTargets

TailT = TypeVar("TailT", bound="TailTargets")


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class TailTargets(SparseTargets):
    """Holds some ids of each row, their logprobs, and the exact mass of the others."""

    row_fields: ClassVar[tuple[str, ...]] = (*SparseTargets.row_fields, "tail_logprob")
    entry_fields: ClassVar[dict[str, torch.dtype]] = {
        "token_ids": torch.int64,
        "logprobs": torch.float32,
    }
    ranked_by: ClassVar[str] = "logprobs"

    logprobs: Tensor
    """(E,) float32."""
    tail_logprob: Tensor
    """(R,) float32: log of 1 - kept mass; -inf if every id is kept."""

    def to_dense(self) -> Tensor:
        """Returns (R, V) float32 probabilities of the kept entries; the tail is not spread."""
        return self._spread(self.logprobs.exp())

    def entry_logprobs(self) -> tuple[Tensor, Tensor]:
        return self.logprobs, self.tail_logprob


class TailCells(SparseCells[TailT]):
    """Makes each kept id a cell, and all other ids together one more: the tail bucket."""

    has_tail = True

    def within(self, width: int) -> tuple[TailT, Tensor]:
        targets = self.targets
        is_shared_E = targets.token_ids < width
        rows_E = targets.entry_rows()
        mass_E = targets.logprobs.double().exp()
        lost_R = mass_E.new_zeros(targets.num_rows)
        lost_R = lost_R.index_add(0, rows_E, mass_E.masked_fill(is_shared_E, 0.0))
        tail_R = targets.tail_logprob.double().exp()
        sizes_R = torch.zeros_like(targets.row_splits[1:]).index_add(0, rows_E, is_shared_E.long())
        # The tail of a row that keeps every shared id has nothing shared.
        lost_R = lost_R + tail_R.where(sizes_R == width, 0.0)
        tail_R = tail_R.masked_fill(sizes_R == width, 0.0)
        left_R = tail_R.index_add(0, rows_E, mass_E.where(is_shared_E, 0.0))
        # A row that has nothing shared becomes one tail: nothing else is known of it.
        is_shared_E = is_shared_E & (left_R > 0)[rows_E]
        share_R = (left_R / (left_R + lost_R)).log()
        tail_logprob = (tail_R.log() - share_R).float().where(left_R > 0, 0.0)
        logprobs = (targets.logprobs - share_R[rows_E]).float()
        rescaled = replace(targets, logprobs=logprobs, tail_logprob=tail_logprob)
        return rescaled.keep(is_shared_E, vocab_size=width), lost_R

    def divergence(self, scaled: Tensor, cell: Cell) -> Tensor:
        """Sums over the kept ids and the tail bucket: a lower bound of the divergence."""
        targets, width = self.targets, self.targets.vocab_size
        logq_RV = scaled.log_softmax(1)
        rows = targets.entry_rows()
        logp_E = targets.logprobs.to(scaled.dtype)
        logq_E = logq_RV[rows, targets.token_ids]
        # The student's tail is summed, not 1 - head, which would cancel (error 1.5 at a tail of
        # 5e-7). A row that keeps everything goes through the sum whole, so that no gradient is NaN.
        has_tail_R = targets.row_splits.diff() < width
        nothing_E = logq_E.masked_fill(has_tail_R[rows], -torch.inf)
        others_RV = logq_RV.index_put((rows, targets.token_ids), nothing_E)
        logq_tail_R = others_RV.logsumexp(1).where(has_tail_R, LOWEST)
        logp_tail_R = targets.tail_logprob.to(scaled.dtype)
        tail_R = cell(logp_tail_R, logq_tail_R).where(has_tail_R, 0.0)
        return tail_R.index_add(0, rows, cell(logp_E, logq_E))

    def kept_divergence(self, scaled: Tensor, cell: Cell) -> Tensor:
        """Sums over the kept ids alone: (R,) from the student's (R, V) logits / T."""
        targets = self.targets
        rows = targets.entry_rows()
        logq_E = scaled.log_softmax(1)[rows, targets.token_ids]
        each_E = cell(targets.logprobs.to(scaled.dtype), logq_E)
        return scaled.new_zeros(targets.num_rows).index_add(0, rows, each_E)

    def renormalized(self) -> TailT:
        targets = self.targets
        rows = targets.entry_rows()
        kept_R = targets.logprobs.new_zeros(targets.num_rows, dtype=torch.float64)
        kept_R = kept_R.index_add(0, rows, targets.logprobs.double().exp())
        logprobs = (targets.logprobs - kept_R.log()[rows]).float()
        nothing = torch.full_like(targets.tail_logprob, -torch.inf)
        return replace(targets, logprobs=logprobs, tail_logprob=nothing)

    def _logp(self, entries: PaddedEntries, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        targets = self.targets
        logp_CK = targets.logprobs[entries.entry_CK].to(dtype)
        return logp_CK, targets.tail_logprob[entries.rows][:, None].to(dtype)


def check_tail_entries(
    targets: TailTargets,
    rows: Tensor,
    check: RowCheck,
    *,
    any_ids: bool = False,
    tolerance: float = 1e-3,
) -> None:
    """Raises CodecError for logprobs that are not finite, or do not add up to 1 with the tail.

    rows: (E,), of each entry. any_ids: the ids may have probability 0, alone and all together.
    tolerance: of the sum.
    """
    tail = targets.tail_logprob
    bad = ~(targets.logprobs < torch.inf) if any_ids else ~torch.isfinite(targets.logprobs)
    if bool(torch.isnan(tail).any()):
        bad |= torch.isnan(tail)[rows]
    check.refuse(bad, "its logprobs are not finite numbers", rows)
    if any_ids:
        check.refuse(tail > 0, "its tail logprob is above 0")
    else:
        check.refuse(tail >= 0, "its tail logprob is not below 0: nothing would be kept")
    mass = targets.logprobs.new_zeros(targets.num_rows, dtype=torch.float64)
    mass.index_add_(0, rows, targets.logprobs.double().exp_())
    mass += tail.double().exp()
    check.refuse_mass(mass, tolerance)
