"""Defines the kind `sampled`: how often each id was drawn in N draws from a row.

The draws are systematic: unbiased, and steadier than independent draws. One number u in [0, 1)
decides all draws of a row: draw i is the id where the running sum of the probabilities passes
(i + u) / N. For u uniform the expected count of an id is exactly N * p, its count is never further
than 1 from that, and the counts of a row add up to N (systematic sampling, Madow and Madow 1944).

Letters: R rows, C rows of a chunk, V columns of the logits, B blocks of them, N draws per row, H
blocks looked into, W columns of a block,
E entries of all rows, K entries per row at most, S counts that are stated.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from logit_codec import bits as bitpack
from logit_codec.blocks import BLOCK, RowMasses, num_blocks
from logit_codec.errors import CodecError
from logit_codec.header import Header
from logit_codec.id_table import IdTable
from logit_codec.ids import Entries, write_ids
from logit_codec.inputs import RowInputs
from logit_codec.kinds.base import LOWEST, Cell, Content, PaddedEntries, SparseCells, SparseKind
from logit_codec.planes import (
    PlaneReader,
    RowCheck,
    least_words,
    pad_words,
    read_row_fields,
    refuse_rows,
)
from logit_codec.spec import OptionText, TargetSpec
from logit_codec.targets import UNKNOWN, SparseTargets, row_splits_of

MAX_DRAWS = 65_536
"""Draws per row that `sampled` offers at most."""


@dataclass(frozen=True, slots=True)
class SampledSpec(TargetSpec):
    """Asks for systematic counts of n draws: unbiased for forward KL, and no floats to send.

    `log_z` is off unless asked for: the one loss that takes sampled targets has no use for it.
    Raises ValueError for values out of range.
    """

    kind: ClassVar[str] = "sampled"
    needs_uniforms: ClassVar[bool] = True

    n: int = 64
    """Draws per row, 1 to MAX_DRAWS."""
    log_z: bool = field(default=False, kw_only=True)
    """The logsumexp of the raw logits / temperature."""

    def __post_init__(self) -> None:
        if not 1 <= self.n <= MAX_DRAWS:
            raise ValueError(f"sampled must have between 1 and {MAX_DRAWS} draws, got {self.n}")

    def max_row_nbytes(self, vocab_size: int) -> float:
        most = min(self.n, vocab_size)
        id_bits = most.bit_length() + most * max(1, (vocab_size - 1).bit_length())
        # m counts above 1 take at most 2 * log2(n / m) bits each on average; m = n / e is worst.
        several = min(vocab_size, self.n / math.e)
        row_bits = id_bits + most + 2 * several * math.log2(self.n / several)
        row_bits = max(row_bits, 8 * most)
        return row_bits / 8 + TargetSpec.max_row_nbytes(self, vocab_size)

    def max_decoded_row_nbytes(self, vocab_size: int) -> float:
        # 16: two elements of row_splits, if the row is alone.
        common = TargetSpec.max_decoded_row_nbytes(self, vocab_size)
        return common + 16 + 16 * min(self.n, vocab_size)

    def scratch_row_nbytes(self, vocab_size: int) -> int:
        return 6 * BLOCK * min(self.n, num_blocks(vocab_size)) + 64 * self.n

    def select(self, masses: RowMasses | None, inputs: RowInputs) -> dict[str, Tensor]:
        assert masses is not None
        assert inputs.uniforms is not None
        return {"draws": _systematic_draws(masses, inputs.uniforms, self.n)}

    def compact(self, columns: dict[str, Tensor], common: dict[str, Any]) -> "SampledTargets":
        draws_RN = columns["draws"].numpy()
        is_first_RN = np.ones(draws_RN.shape, np.bool_)
        np.not_equal(draws_RN[:, 1:], draws_RN[:, :-1], out=is_first_RN[:, 1:])
        is_first_RN &= draws_RN[:, :1] >= 0
        first_E = np.flatnonzero(is_first_RN)
        # A run of equal ids ends where the next one begins, or at the end of its row.
        row_end_E = (first_E // self.n + 1) * self.n
        next_E = np.minimum(np.append(first_E[1:], row_end_E[-1:]), row_end_E)
        return SampledTargets(
            row_splits=row_splits_of(torch.from_numpy(is_first_RN.sum(1))),
            token_ids=torch.from_numpy(draws_RN.reshape(-1)[first_E].astype(np.int64)),
            counts=torch.from_numpy(next_E - first_E),
            num_draws=self.n,
            **common,
        )

    @classmethod
    def parse(cls, text: OptionText) -> "SampledSpec":
        return cls(n=text.integer("n", text.first or "64"), **text.common)

    def __str__(self) -> str:
        return "sampled:" + ",".join([str(self.n), *self._changed_options()])


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class SampledTargets(SparseTargets):
    """Counts how often each id was drawn; counts / num_draws is an unbiased estimate of the row.

    The draws are systematic, so an id of probability p has a count within 1 of num_draws * p.
    """

    kind: ClassVar[str] = "sampled"
    entry_fields: ClassVar[dict[str, torch.dtype]] = {
        "token_ids": torch.int64,
        "counts": torch.int64,
    }
    ranked_by: ClassVar[str] = "counts"

    counts: Tensor
    """(E,) int64, at least 1; those of a row add up to num_draws."""
    num_draws: int
    """Draws per row, N."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_draws <= MAX_DRAWS:
            raise ValueError(f"num_draws must be 1 to {MAX_DRAWS}, got {self.num_draws}")
        SparseTargets.__post_init__(self)

    def to_dense(self) -> Tensor:
        """Returns (R, V) float32 probabilities: counts / num_draws."""
        return self._spread(self.counts.float() / self.num_draws)

    def entry_logprobs(self) -> tuple[Tensor, Tensor]:
        """Returns (E,) log of each id's share of the draws, and that of a single draw."""
        return (self.counts / self.num_draws).log(), torch.tensor(1 / self.num_draws).log()


class SampledCells(SparseCells[SampledTargets]):
    """Makes each drawn id a cell with its share of the draws as p; p of other ids is 0."""

    is_estimate = True

    @property
    def stray_mass(self) -> float:
        return 4 / self.targets.num_draws  # a few draws may always hit padding

    def within(self, width: int) -> tuple[SampledTargets, Tensor]:
        targets = self.targets
        is_shared_E = targets.token_ids < width
        rows_E = targets.entry_rows()
        mass_E = targets.counts.double() / targets.num_draws
        lost_R = mass_E.new_zeros(targets.num_rows)
        lost_R = lost_R.index_add(0, rows_E, mass_E.masked_fill(is_shared_E, 0.0))
        return targets.keep(is_shared_E, vocab_size=width), lost_R

    def divergence(self, scaled: Tensor, cell: Cell) -> Tensor:
        """Estimates forward KL, the one divergence that is linear in p; `cell` is not used.

        Without the teacher's entropy it is the cross-entropy of the draws, with the same gradient.
        """
        targets = self.targets
        rows = targets.entry_rows()
        # Not num_draws: a draw of an id that is not shared was left out.
        draws_R = torch.zeros_like(targets.row_splits[1:]).index_add(0, rows, targets.counts)
        share_E = targets.counts.to(scaled.dtype) / draws_R[rows]
        mean_R = scaled.new_zeros(targets.num_rows)
        mean_R = mean_R.index_add(0, rows, share_E * scaled[rows, targets.token_ids])
        loss_R = scaled.logsumexp(1) - mean_R
        if targets.entropy is not None:
            loss_R = loss_R - targets.entropy
        return loss_R.where(draws_R > 0, 0.0)

    def _logp(self, entries: PaddedEntries, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        counts_CK = self.targets.counts[entries.entry_CK].masked_fill(~entries.real_CK, 0)
        # Not num_draws: a draw of an id that is not shared was left out.
        logp_CK = (counts_CK.to(dtype) / counts_CK.sum(1, keepdim=True).clamp(min=1)).log()
        return logp_CK, logp_CK.new_full((len(logp_CK), 1), -torch.inf)

    def chunk_divergence(
        self, entries: PaddedEntries, logp_CK1: Tensor, logq_CK1: Tensor, cell: Cell
    ) -> Tensor:
        """Estimates (C, 1) forward KL; `cell` is not used."""
        loss_C1 = -(logp_CK1.exp() * logq_CK1.clamp(min=LOWEST)).sum(1, keepdim=True)
        entropy_R = self.targets.entropy
        if entropy_R is not None:
            loss_C1 -= entropy_R[entries.rows][:, None].where(entries.size_C1 > 0, 0.0)
        return loss_C1


class Sampled(SparseKind[SampledTargets]):
    """Writes ids, and then their counts as Elias gamma codes."""

    number = 3
    spec, targets, cells = SampledSpec, SampledTargets, SampledCells
    value_bits = (0,)

    def _check_counts(self, header: Header) -> None:
        if not 1 <= header.max_entries <= MAX_DRAWS:
            raise CodecError(f"the draws must be 1 to {MAX_DRAWS}, got {header.max_entries}")

    def plane_sizes(self, header: Header, needed: Any) -> dict[str, int | None]:
        return {**super().plane_sizes(header, needed), "draws": None}

    def _check_entries(self, targets: SampledTargets, rows: Tensor, check: RowCheck) -> None:
        check.refuse(targets.counts < 1, "its counts are not all at least 1", rows)
        draws = targets.counts.new_zeros(targets.num_rows).index_add_(0, rows, targets.counts)
        why = f"its counts do not add up to the {targets.num_draws} draws"
        check.refuse(draws != targets.num_draws, why)

    def write(self, targets: SampledTargets, bits: int, id_table: IdTable | None) -> Content:
        num_draws = targets.num_draws
        ids = write_ids(targets, id_table, min(num_draws, targets.vocab_size))
        draws = _pack_draws(targets.counts, targets.entry_rows(), num_draws, ids.num_words)
        return Content(
            [*ids.planes, draws],
            value_bits=0,
            ids=ids,
            max_entries=num_draws,
            num_entries=len(targets.token_ids),
        )

    def read(self, reader: PlaneReader, header: Header, needed: Any) -> SampledTargets:
        # What `check_rows` checks cannot be otherwise here, or is refused where it is read.
        entries, fields = self._read_entries(reader, header, needed)
        id_words, num_draws = reader.taken, header.max_entries
        counts = _unpack_draws(reader.take("draws", reader.spare), entries, num_draws, id_words)
        fields |= read_row_fields(reader, header.num_rows)
        return SampledTargets(counts=torch.from_numpy(counts), num_draws=num_draws, **fields)


def _systematic_draws(masses: RowMasses, uniforms_R: Tensor, num_draws: int) -> Tensor:
    """Makes num_draws draws from each row: (R, N) int32 ids, ascending.

    An id of probability 0 is never drawn. The ids of a row whose shares are NaN are UNKNOWN.
    """
    shares_RB = masses.shares_RB
    num_rows, blocks = shares_RB.shape
    draws_N = torch.arange(num_draws, dtype=torch.float64, device=shares_RB.device)
    ends_RB = shares_RB.cumsum(1)
    total_R1 = ends_RB[:, -1:]
    at_RN = (draws_N + uniforms_R[:, None]) / num_draws * total_R1
    at_RN = torch.minimum(at_RN, _just_below(total_R1))
    # The first block whose running sum is above `at` has a share above 0, whatever was rounded.
    block_RN = torch.searchsorted(ends_RB, at_RN, right=True).clamp_(max=blocks - 1)
    share_RN = shares_RB.gather(1, block_RN)
    into_RN = (at_RN - (ends_RB.gather(1, block_RN) - share_RN)) / share_RN  # of the block's mass

    # Each draw looks into a copy of its block, unless there are more draws than blocks.
    if num_draws < blocks:
        gathered_RH = block_RN
        hit_RN = torch.arange(num_draws, device=shares_RB.device).expand(num_rows, -1)
    else:
        gathered_RH = torch.arange(blocks, device=shares_RB.device).expand(num_rows, -1)
        hit_RN = block_RN
    weights_RHW, first_RH = masses.block_logits(gathered_RH, is_own=True)
    weights_RHW.sub_(weights_RHW.amax(2, keepdim=True))
    if masses.temperature != 1.0:
        weights_RHW.div_(masses.temperature)
    weights_RHW.exp_()
    ends_RHW = weights_RHW.cumsum_(2)  # a fresh float64 buffer takes longer than the work
    total_RN = ends_RHW[:, :, -1].gather(1, hit_RN).double()
    at_RN = torch.minimum(into_RN.clamp_(min=0.0) * total_RN, _just_below(total_RN))
    ids_RN = first_RH.gather(1, hit_RN) + _first_above(ends_RHW, hit_RN, at_RN)
    if masses.part is not None:  # each id was found by the process that holds its block
        ids_RN = masses.part.keep_own(ids_RN.int(), block_RN)
    return ids_RN.masked_fill_(~torch.isfinite(total_R1), UNKNOWN).int()


def _first_above(ends_RHW: Tensor, hit_RN: Tensor, at_RN: Tensor) -> Tensor:
    """Finds (R, N): the first column of block hit_RN of its row that is above at_RN, by bisection."""
    ends_RK = ends_RHW.flatten(1)
    begin_RN = hit_RN * BLOCK
    place_RN = begin_RN
    step = BLOCK // 2
    while step:
        passed_RN = ends_RK.gather(1, place_RN + (step - 1)) <= at_RN
        place_RN = place_RN + passed_RN * step
        step //= 2
    return place_RN - begin_RN


def _just_below(values: Tensor) -> Tensor:
    return torch.nextafter(values, torch.zeros_like(values))


def _pack_draws(counts: Tensor, rows: Tensor, num_draws: int, id_words: int) -> Tensor:
    """Packs the draws plane: (E,) counts, of which those of a row add up to N.

    Elias gamma codes, level by level instead of count by count: whether each count is at least 2;
    of those, whether it is at least 4, 8 and so on; then the bits below the leading one. The first
    count of a row that is not 1 is left out after its first level: it follows from N. `least_words`
    may make the plane longer.
    """
    several = counts > 1
    values, widths = [several.long()], [torch.ones_like(counts)]
    stated = counts[_stated(several, rows)]
    log2 = torch.ones_like(stated)
    alive = stated
    for level in range(2, num_draws.bit_length()):
        higher = alive >= 1 << level
        values.append(higher.long())
        widths.append(torch.ones_like(alive))
        log2 += stated >= 1 << level
        alive = alive[higher]
    values.append(stated - (1 << log2))
    widths.append(log2)
    words = bitpack.pack_varying(torch.cat(values), torch.cat(widths))
    return pad_words(words, least_words(len(rows), id_words))


def _unpack_draws(
    string: bitpack.BitString, entries: Entries, num_draws: int, id_words: int
) -> np.ndarray:
    """Inverts `_pack_draws`: reads (E,) int64 counts.

    Raises CodecError for words that `_pack_draws` would not write.
    """
    rows, num_entries = entries.rows, len(entries.ids)
    several = np.flatnonzero(string.flags(num_entries))
    rows_of_several = rows.take(several)
    is_first = np.ones(len(several), np.bool_)
    np.not_equal(rows_of_several[1:], rows_of_several[:-1], out=is_first[1:])
    implied, rows_of_implied = several.compress(is_first), rows_of_several.compress(is_first)
    stated = several.compress(~is_first)
    log2 = np.ones(len(stated), np.int64)
    alive = np.arange(len(stated))
    for level in range(2, num_draws.bit_length()):
        alive = alive.compress(string.flags(len(alive)))
        log2[alive] = level
    low = string.varying(log2)
    string.end(least_words(num_entries, id_words))
    counts = np.ones(num_entries, np.int64)
    counts[stated] = low + (1 << log2)
    draws_R = np.add.reduceat(counts, entries.splits[:-1]) if num_entries else counts
    missing = num_draws - draws_R.take(rows_of_implied)  # beside the 1 that they count as
    if (missing < 1).any():
        raise CodecError(f"the counts of a row add up to more than its {num_draws} draws")
    counts[implied] += missing
    draws_R[rows_of_implied] = num_draws
    refuse_rows(draws_R != num_draws, f"its counts do not add up to the {num_draws} draws")
    return counts


def _stated(several: Tensor, rows: Tensor) -> Tensor:
    """Marks (E,) bool: the counts written in full, above 1 and not the first such of their row."""
    index = several.nonzero()[:, 0]
    first = torch.ones_like(index, dtype=torch.bool)
    torch.ne(rows[index[1:]], rows[index[:-1]], out=first[1:])
    stated = several.clone()
    stated[index[first]] = False
    return stated


KIND = Sampled()
