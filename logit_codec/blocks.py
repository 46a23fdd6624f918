"""Finds where the mass of a row lies: sums its softmax over blocks of 64 columns.

Letters: R rows, V columns of the logits, B blocks of a row, H blocks picked from each row, W
columns of a block, P parts of a row, S columns of a part, Q parts of all rows together.

A vocabulary has a thousand times more columns than entries that matter. So the (R, V) work is one
exp into a scratch buffer that stays in the cache, a few rows at a time; what comes later reads
the sums and maxima of blocks and the logits of the few blocks that they point to. Every shape
follows from the logits' shape, and a row's numbers do not depend on the rows beside it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from logit_codec.vocabulary_part import VocabularyPart

BLOCK = 64
"""Columns of a block; the last block of a row may have fewer. Blocks of 256 make the sums a little
faster and everything after them 2 to 3 times slower at V = 32,768."""

SCRATCH_NBYTES = 512 << 10
"""Size of the scratch buffer on a CPU: it should stay in a core's own cache, beside what is read.
Rows that do not fit are worked on in parts (64 rows of 262,144 columns take 15 % longer whole)."""
LAUNCHES = 16
"""On an accelerator the rows are worked on in this many parts: the buffers beside the logits get
smaller with each, and the launches more."""

SMALLEST_EXPONENT = -87.0
"""exp of less is a denormal float32, and arithmetic on those takes a CPU many times longer."""
NO_MASS = 1.1e-36
"""A bit more than the sum of a block of exp(SMALLEST_EXPONENT)."""


@dataclass(frozen=True, slots=True, eq=False)
class RowMasses:
    """Holds R rows of logits, and where the mass of their softmax lies; a selection reads it.

    A row whose softmax is not finite has NaN shares and a NaN log_z.
    """

    logits: Tensor
    """(R, V) of a floating dtype."""
    temperature: float
    shares_RB: Tensor
    """(R, B) float64: the share of each block in its row. A selection may overwrite them."""
    maxima_RB: Tensor | None
    """(R, B) float32: the largest logit of each block, if asked for."""
    peak_R: Tensor
    """(R,) float32: the largest logit."""
    log_z_R: Tensor
    """(R,) float64: logsumexp(logits / temperature)."""
    entropy_R: Tensor | None
    """(R,) float64, in nats, if asked for."""
    part: "VocabularyPart | None" = None
    """Which columns `logits` has, if other processes hold the others; all else is of whole rows."""

    @property
    def vocab_size(self) -> int:
        """V, of the whole rows."""
        return self.logits.shape[1] if self.part is None else self.part.vocab_size

    @classmethod
    def of(
        cls,
        logits: Tensor,
        temperature: float,
        *,
        maxima: bool = False,
        entropy: bool = False,
        scratch: Tensor | None = None,
        part: "VocabularyPart | None" = None,
    ) -> "RowMasses":
        """Sums up the rows; scratch: what `new_scratch` returned for rows of this length."""
        if scratch is None:
            scratch = new_scratch(logits, part)
        num_rows, num_columns = logits.shape
        step, width = scratch.shape
        # Each part of a row is summed relative to its own peak. P = 1, unless rows are very long.
        logits_QS = logits.view(-1, width) if width < num_columns else logits
        sums_QB = logits.new_empty(len(logits_QS), num_blocks(width), dtype=torch.float32)
        maxima_QB = torch.empty_like(sums_QB) if maxima else None
        plogp_QB = torch.empty_like(sums_QB) if entropy else None
        peak_Q = sums_QB.new_empty(len(logits_QS))
        for first in range(0, len(logits_QS), step):
            rows = slice(first, first + step)
            chunk = logits_QS[rows]
            weights = scratch[: len(chunk)]
            if logits.device.type == "cpu":  # whose cache then holds them, and as float32
                chunk = weights.copy_(chunk)
            if maxima_QB is not None:
                maxima_QB[rows] = _over_blocks(chunk, torch.amax, -torch.inf)
                peak_Q[rows] = maxima_QB[rows].amax(1)
            else:
                peak_Q[rows] = chunk.amax(1)
            peak_Q1 = peak_Q[rows, None]
            if width < num_columns or part:  # then a part may be nothing but -inf
                peak_Q1 = peak_Q1.clamp(min=torch.finfo(torch.float32).min)
            exp_of_differences(chunk, peak_Q1, temperature, out=weights)
            sums_QB[rows] = _over_blocks(weights, torch.sum, 0.0)
            if plogp_QB is not None:
                torch.special.entr(weights, out=weights)
                plogp_QB[rows] = _over_blocks(weights, torch.sum, 0.0)
        sums_QB.masked_fill_(sums_QB <= NO_MASS, 0.0)
        if part:  # Q = R here, and R * P from here on: no row was worked on in parts
            peak_Q, sums_QB, maxima_QB, plogp_QB = (
                None if each is None else each.flatten(0, 1)
                for each in part.gather_blocks(peak_Q, sums_QB, maxima_QB, plogp_QB)
            )
            assert peak_Q is not None
            assert sums_QB is not None
        shares_RPB = sums_QB.double().unflatten(0, (num_rows, -1))
        peak_RP = peak_Q.view(num_rows, -1)
        peak_R = peak_RP.amax(1)
        scale_RP1 = (peak_RP - peak_R[:, None]).double().div_(temperature).exp_()[:, :, None]
        # A plain sum of a row would be off by 1e-5 at V = 262,144; the blocks are added up pairwise
        # and then in float64.
        mass_R = shares_RPB.sum(2, keepdim=True).mul_(scale_RP1).sum((1, 2))
        entropy_R = None
        if plogp_QB is not None:
            plogp_RPB = plogp_QB.view_as(shares_RPB).double()
            plogp_RPB.mul_(scale_RP1).add_(shares_RPB * torch.special.entr(scale_RP1))
            entropy_R = plogp_RPB.sum((1, 2)) / mass_R + mass_R.log()
        shares_RPB.mul_(scale_RP1 / mass_R[:, None, None])
        return cls(
            logits,
            temperature,
            shares_RB=shares_RPB.flatten(1),
            maxima_RB=None if maxima_QB is None else maxima_QB.view(num_rows, -1),
            peak_R=peak_R,
            log_z_R=peak_R.double() / temperature + mass_R.log(),
            entropy_R=entropy_R,
            part=part,
        )

    def block_logits(self, blocks_RH: Tensor, *, is_own: bool = False) -> tuple[Tensor, Tensor]:
        """Gathers blocks as `block_logits` does.

        is_own: those of other processes hold 0 instead of their logits.
        """
        if self.part is None:
            return block_logits(self.logits, blocks_RH)
        return self.part.block_logits(self.logits, blocks_RH, is_shared=not is_own)

    def logits_at(self, ids_RM: Tensor) -> Tensor:
        """Gathers (R, M) logits of single ids."""
        if self.part is None:
            return self.logits.gather(1, ids_RM)
        return self.part.logits_at(self.logits, ids_RM)

    def blocks_of(self, ids_RM: Tensor) -> Tensor:
        """Returns (R, M) numbers of the blocks that hold these ids."""
        return ids_RM // BLOCK if self.part is None else self.part.blocks_of(ids_RM)


def new_scratch(logits: Tensor, part: "VocabularyPart | None" = None) -> Tensor:
    """Allocates the float32 buffer for the rows, or parts of rows, that are worked on at a time."""
    num_rows, num_columns = logits.shape
    step = -(-num_rows // LAUNCHES)
    if logits.device.type == "cpu":
        most = SCRATCH_NBYTES // 4
        num_parts = -(-num_columns // most)
        # Processes with parts of a vocabulary must divide rows alike, and so not at all.
        if num_columns % (num_parts * BLOCK) == 0 and logits.is_contiguous() and not part:
            num_rows, num_columns = num_rows * num_parts, num_columns // num_parts
        step = min(num_rows, max(1, most // num_columns))
    return logits.new_empty(step, num_columns, dtype=torch.float32)


def exp_of_differences(logits: Tensor, peaks: Tensor, temperature: float, *, out: Tensor) -> Tensor:
    """Computes exp((logits - peaks) / temperature) into `out`, at least exp(-87) on a CPU."""
    torch.sub(logits, peaks, out=out)
    if temperature != 1.0:
        out.div_(temperature)
    if out.device.type == "cpu":
        out.clamp_(min=SMALLEST_EXPONENT)
    return out.exp_()


def block_logits(logits: Tensor, blocks_RH: Tensor) -> tuple[Tensor, Tensor]:
    """Gathers blocks of each row as (R, H, W) float32 logits, and the columns where they begin.

    Where the last block would have fewer columns it begins earlier, and the columns that belong to
    the block before it are -inf.
    """
    num_rows, num_columns = logits.shape
    if num_columns < BLOCK:
        logits = torch.nn.functional.pad(logits, (0, BLOCK - num_columns), value=-torch.inf)
    last = max(num_columns, BLOCK) - BLOCK
    # Overlapping windows: one that begins at each column. Indexing with two tensors takes five
    # times as long.
    size = ((num_rows - 1) * logits.stride(0) + last + 1, BLOCK)
    windows = logits.as_strided(size, (1, 1))
    first_RH = (blocks_RH * BLOCK).clamp_(max=last)
    row_R1 = torch.arange(num_rows, device=logits.device)[:, None] * logits.stride(0)
    values = windows.index_select(0, (first_RH + row_R1).flatten()).float()
    values = values.view(*blocks_RH.shape, BLOCK)
    if last % BLOCK:
        place_W = torch.arange(BLOCK, device=logits.device)
        twice_RHW = place_W < (blocks_RH * BLOCK - first_RH)[:, :, None]
        values.masked_fill_(twice_RHW, -torch.inf)
    return values, first_RH


def num_blocks(num_columns: int) -> int:
    """Returns how many blocks cover the columns."""
    return (num_columns + BLOCK - 1) // BLOCK


def _over_blocks(values: Tensor, reduce: Callable[..., Tensor], nothing: float) -> Tensor:
    """Reduces (R, V) over blocks to (R, B); `nothing` stands for columns that do not exist."""
    num_rest = values.shape[1] % BLOCK
    if num_rest == 0:
        return reduce(values.unflatten(1, (-1, BLOCK)), 2)
    whole, rest = values[:, :-num_rest], values[:, -num_rest:]
    # So that columns of -inf round like columns that do not exist.
    rest = torch.nn.functional.pad(rest, (0, BLOCK - num_rest), value=nothing)
    reduced = reduce(rest.unflatten(1, (-1, BLOCK)), 2)
    if whole.shape[1] == 0:
        return reduced
    return torch.cat([reduce(whole.unflatten(1, (-1, BLOCK)), 2), reduced], 1)
