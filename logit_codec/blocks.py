"""Finds where the mass of a row lies: sums its softmax over blocks of 64 columns.

Letters: R rows, V columns of the logits, B blocks of a row, H blocks picked from all rows together.

A vocabulary has a thousand times more columns than entries that matter. So the (R, V) work is one
exp into a scratch buffer that stays in the cache, a few rows at a time; what comes later reads
the sums of blocks and the logits of the few blocks that they point to. A row's numbers do not
depend on the rows beside it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64
"""Columns of a block; the last block of a row may have fewer. Blocks of 256 make the sums a little
faster and everything after them 2 to 3 times slower at V = 32,768."""

SCRATCH_NBYTES = {"cpu": 1 << 20, "cuda": 256 << 20}
"""Size of the scratch buffer: on a CPU it should stay in a core's own cache (1 MiB: 64 rows of
262,144 columns take 17 ms, 21 ms in 2 MiB, 37 ms and more in a fresh buffer of all rows); on a GPU
it should be a few launches."""

PEAK_COLUMNS = 1024
"""Columns whose largest logit stands in for the row's: a pass over all of them to find it costs a
quarter of the whole. Any that is not far below it does: float32 has as many digits everywhere."""
LARGEST_MASS = 1e34
"""A row with more, or with what is no number, is added up anew, from its true peak. Its p * log(p)
would not be far from float32's largest number."""
SMALLEST_EXPONENT = -87.0
"""exp of less is a denormal float32, and arithmetic on those takes a CPU many times longer."""
NO_MASS = 1.1e-36
"""A bit more than the sum of a block of exp(SMALLEST_EXPONENT)."""


@dataclass(frozen=True, slots=True, eq=False)
class RowMasses:
    """Holds R rows of logits, and where the mass of their softmax lies; a selection reads it."""

    logits: Tensor
    """(R, V) of a floating dtype."""
    temperature: float
    shares_RB: Tensor
    """(R, B) float64: the share of each block in its row. A selection may overwrite them."""
    log_z_R: Tensor
    """(R,) float64: logsumexp(logits / temperature)."""

    @classmethod
    def of(
        cls, logits: Tensor, temperature: float, *, entropy: bool = False
    ) -> tuple["RowMasses", Tensor | None]:
        """Sums up the rows; also returns their (R,) float64 entropies if asked for."""
        shares_RB, entropy_R = block_masses(logits, temperature, entropy=entropy)
        log_z_R = log_partition(logits, shares_RB, temperature)
        return cls(logits, temperature, shares_RB, log_z_R), entropy_R


def block_masses(
    logits: Tensor, temperature: float, *, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Computes (R, B) float64 shares of softmax(logits / temperature), and the entropies.

    The shares of a row sum to 1; the (R,) float64 entropies, in nats, are None unless asked for. A
    row whose softmax is not finite has NaN shares.
    """
    num_rows, num_columns = logits.shape
    nbytes = SCRATCH_NBYTES.get(logits.device.type, SCRATCH_NBYTES["cuda"])
    step = max(1, nbytes // (4 * num_columns))
    scratch = logits.new_empty(min(step, num_rows), num_columns, dtype=torch.float32)
    sums_RB = logits.new_empty(num_rows, num_blocks(num_columns), dtype=torch.float64)
    plogp_RB = torch.empty_like(sums_RB) if entropy else None

    def add_up(rows: slice | Tensor, peak_columns: int) -> None:
        chunk = logits[rows]
        weights = _weights(chunk, temperature, scratch[: len(chunk)], peak_columns)
        sums_RB[rows] = _block_sums(weights).double()
        if plogp_RB is not None:
            plogp_RB[rows] = _block_sums(torch.special.entr(weights, out=weights)).double()

    for first in range(0, num_rows, step):
        add_up(slice(first, first + step), PEAK_COLUMNS)
    for rows in (~(sums_RB.sum(1) < LARGEST_MASS)).nonzero()[:, 0].split(step):
        add_up(rows, num_columns)
    sums_RB.masked_fill_(sums_RB <= NO_MASS, 0.0)
    # A plain sum of a row would be off by 1e-5 at V = 262,144; the blocks are added up pairwise and
    # then in float64.
    mass_R1 = sums_RB.sum(1, keepdim=True)
    entropy_R = None
    if plogp_RB is not None:
        entropy_R = plogp_RB.sum(1) / mass_R1[:, 0] + mass_R1[:, 0].log()
    return sums_RB.div_(mass_R1), entropy_R


def _weights(logits: Tensor, temperature: float, out: Tensor, peak_columns: int) -> Tensor:
    """Computes exp(logits / temperature) times a number per row, at least exp(-87) on a CPU.

    The largest of the first `peak_columns` becomes exp(0), so a row may overflow.
    """
    if logits.device.type != "cpu":  # one launch instead of four
        if temperature != 1.0 or logits.dtype != torch.float32:
            logits = torch.div(logits.float(), temperature, out=out)
        return torch.softmax(logits, 1, out=out)
    torch.sub(logits, logits[:, :peak_columns].amax(1, keepdim=True).float(), out=out)
    if temperature != 1.0:
        out.div_(temperature)
    return out.clamp_(min=SMALLEST_EXPONENT).exp_()


def block_logits(logits: Tensor, rows: Tensor, blocks: Tensor, size: int = BLOCK) -> Tensor:
    """Gathers (H,) blocks of rows as (H, size) float32 logits, -inf beyond the last column."""
    whole = logits.shape[1] // size
    if whole * size == logits.shape[1] and logits.is_contiguous():
        return logits.view(-1, size).index_select(0, rows * whole + blocks).float()
    rest = logits[:, whole * size :]
    rest = torch.nn.functional.pad(rest, (0, size - rest.shape[1]), value=-torch.inf)
    if whole == 0:
        return rest[rows].float()
    grouped = logits[:, : whole * size].unflatten(1, (whole, size))
    values = grouped[rows, blocks.clamp(max=whole - 1)].float()
    last = (blocks == whole).nonzero()[:, 0]
    values[last] = rest[rows[last]].float()
    return values


def log_partition(logits: Tensor, shares_RB: Tensor, temperature: float) -> Tensor:
    """Computes (R,) float64 logsumexp(logits / temperature) from the heaviest block's share."""
    share_R, heaviest_R = shares_RB.max(1)
    rows = torch.arange(len(logits), device=logits.device)
    heaviest_RW = block_logits(logits, rows, heaviest_R).double() / temperature
    return heaviest_RW.logsumexp(1) - share_R.log()


def num_blocks(num_columns: int) -> int:
    """Returns how many blocks cover the columns."""
    return (num_columns + BLOCK - 1) // BLOCK


def _block_sums(weights: Tensor) -> Tensor:
    """Sums (R, V) float32 over blocks to (R, B)."""
    whole = weights.shape[1] // BLOCK * BLOCK
    sums = weights[:, :whole].unflatten(1, (-1, BLOCK)).sum(2) if whole else weights[:, :0]
    if whole == weights.shape[1]:
        return sums
    return torch.cat([sums, weights[:, whole:].sum(1, keepdim=True)], 1)
