"""Defines targets of kind `hidden` whose rows belong to several heads, or mix what several heads say.

They are made by clients and have no container: each teacher's states arrive on their own.

Letters: R rows, M rows of one share, C rows of a chunk, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from logit_codec.kinds.hidden import HeadTargets, HiddenTargets


@dataclass(frozen=True, slots=True, eq=False)
class HeadShare:
    """Holds what one head contributes to some of the rows."""

    targets: HiddenTargets
    """M rows, with their head."""
    rows: Tensor
    """(M,) int64, ascending, on the device of the targets: which of the R rows they are."""
    starts: Tensor
    """(R+1,) int64, on the host: how many of the M come before each of the R rows, and M."""
    log_weights: Tensor | None = None
    """(M,) float32, where several heads are mixed; None where this head alone decides the rows."""

    @classmethod
    def of(cls, targets: HiddenTargets, rows: Tensor, num_rows: int, **more: Tensor) -> "HeadShare":
        """Makes the share of a head in `num_rows` rows; all tensors are on the host."""
        counts_R = torch.zeros(num_rows, dtype=torch.int64)
        counts_R[rows] = 1
        starts = torch.nn.functional.pad(counts_R.cumsum(0), (1, 0))
        return cls(targets, rows, starts, **more)

    @property
    def nbytes(self) -> int:
        """The memory of all tensors but the head's."""
        weights = 0 if self.log_weights is None else self.log_weights.nbytes
        return self.targets.nbytes + self.rows.nbytes + self.starts.nbytes + weights

    def map_tensors(self, move: Callable[[Tensor], Tensor]) -> "HeadShare":
        """Returns the same share with `move` of every tensor that must be with the targets."""
        weights = None if self.log_weights is None else move(self.log_weights)
        return HeadShare(self.targets.map_tensors(move), move(self.rows), self.starts, weights)

    def cut(self, start: int, stop: int) -> "HeadShare":
        """Returns the share in consecutive rows, without copying and without asking the device."""
        first, last = int(self.starts[start]), int(self.starts[stop])
        weights = None if self.log_weights is None else self.log_weights[first:last]
        starts = self.starts[start : stop + 1] - first
        return HeadShare(self.targets[first:last], self.rows[first:last] - start, starts, weights)

    def take(self, rows: Tensor) -> "HeadShare":
        """Returns the share in rows that are named in any order."""
        rows = rows.cpu()
        has_R = self.starts.diff() > 0
        kept = has_R[rows].nonzero()[:, 0]
        places = self.starts[:-1][rows[kept]]
        device = self.rows.device
        weights = None if self.log_weights is None else self.log_weights[places.to(device)]
        share = HeadShare.of(self.targets[places.to(device)], kept, len(rows))
        return replace(share, rows=kept.to(device), log_weights=weights)


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class MixedHiddenTargets(HeadTargets):
    """Holds rows of several heads: p of a row is that of its head, or a mixture of what they say."""

    shares: tuple[HeadShare, ...]
    """At least one."""

    @property
    def num_rows(self) -> int:
        return len(self.shares[0].starts) - 1

    @property
    def device(self) -> torch.device:
        return self.shares[0].rows.device

    @property
    def nbytes(self) -> int:
        own = super(MixedHiddenTargets, self).nbytes
        return own + sum(share.nbytes for share in self.shares)

    @property
    def effective_vocab_size(self) -> int:
        return max(share.targets.effective_vocab_size for share in self.shares)

    def map_tensors(self, move: Callable[[Tensor], Tensor]) -> "MixedHiddenTargets":
        moved = super(MixedHiddenTargets, self).map_tensors(move)
        return replace(moved, shares=tuple(share.map_tensors(move) for share in self.shares))

    def logits(self, rows: slice | Tensor) -> Tensor:
        """Computes (C, V) float32 logits of some rows; where heads are mixed, T * log p."""
        chunk = self[rows]
        shape = chunk.num_rows, self.vocab_size
        logits_CV = torch.full(shape, -torch.inf, device=self.device)
        factor_C1 = torch.ones(chunk.num_rows, 1, device=self.device)
        for share in chunk.shares:
            if not share.targets.num_rows:
                continue
            some_MV = share.targets.logits(slice(None))
            if share.log_weights is not None:
                # Of all ids that the head has: what is not shared is left out of the mixture.
                some_MV = (some_MV / self.temperature).log_softmax(1)
                some_MV = (some_MV + share.log_weights[:, None])[:, : self.vocab_size]
                some_MV = torch.logaddexp(logits_CV[share.rows], some_MV)
                factor_C1.index_fill_(0, share.rows, self.temperature)
            logits_CV.index_copy_(0, share.rows, some_MV[:, : self.vocab_size])
        return logits_CV.mul_(factor_C1)

    def _slice(self, start: int, stop: int) -> "MixedHiddenTargets":
        shares = tuple(share.cut(start, stop) for share in self.shares)
        return replace(self, shares=shares, **self._row_tensors(slice(start, stop)))

    def _take(self, rows: Tensor) -> "MixedHiddenTargets":
        shares = tuple(share.take(rows) for share in self.shares)
        return replace(self, shares=shares, **self._row_tensors(rows))
