"""Defines the kind `top_k`: the likeliest ids of each row, and the exact mass of all others.

Letters: R rows, C rows of a chunk, V vocabulary, H blocks of columns that hold entries, E kept
entries of all rows, K entries per row at most. Ties go to the lowest id.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from logit_codec import bits as bitpack
from logit_codec.blocks import BLOCK, RowMasses, block_logits
from logit_codec.codes import (
    CODE_BITS,
    LEVEL_BITS,
    RANGE_BITS,
    dequantise,
    pack_codes,
    quantise,
    unpack_codes,
)
from logit_codec.errors import CodecError
from logit_codec.header import Header
from logit_codec.id_table import IdTable
from logit_codec.ids import write_ids
from logit_codec.kinds.base import LOWEST, Cell, Content, PaddedEntries, SparseCells, SparseKind
from logit_codec.largest import ids_from, likeliest_ids, rank_in_row, top_ids
from logit_codec.planes import PlaneReader, RowCheck, raw_words, read_row_fields, refuse_rows
from logit_codec.spec import OptionText, TargetSpec
from logit_codec.targets import UNKNOWN, SparseTargets, row_splits_of

SMALLEST_MIN_P = 1 / 1024
"""From here up, the blocks that can hold an entry of min_p are few: at most 1 / min_p of a row."""


@dataclass(frozen=True, slots=True)
class TopKSpec(TargetSpec):
    """Asks for the most likely ids with quantised logprobs, and the exact mass of the others.

    Raises ValueError for values out of range.
    """

    kind: ClassVar[str] = "top_k"
    option_names: ClassVar[tuple[str, ...]] = ("min_p", "max_k", "bits")

    k: int
    """Entries per row; with `min_p`, at most this many."""
    min_p: float = 0.0
    """0: k entries (fewer only if fewer ids have a probability above 0); else every id with
    p >= min_p, at least one, at most k."""
    bits: int = 7
    """Bits per logprob: one of CODE_BITS."""

    def __post_init__(self) -> None:
        if not 1 <= self.k < 2**31:
            raise ValueError(f"top_k must be between 1 and 2**31 - 1, got {self.k}")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p must be between 0 and 1, got {self.min_p}")
        if self.bits not in CODE_BITS:
            raise ValueError(
                f"bits must be one of {', '.join(map(str, CODE_BITS))} for top_k, got {self.bits}"
            )

    @property
    def code_bits(self) -> int:
        return self.bits

    def max_row_nbytes(self, vocab_size: int) -> float:
        id_bits = max(1, (vocab_size - 1).bit_length())
        code_bits = self.bits - LEVEL_BITS + (1 << LEVEL_BITS) - 1
        row_bits = 2 * self.k.bit_length() + min(self.k, vocab_size) * (id_bits + code_bits)
        return 4.0 + (RANGE_BITS + row_bits) / 8 + TargetSpec.max_row_nbytes(self, vocab_size)

    def max_decoded_row_nbytes(self, vocab_size: int) -> float:
        # 16: two elements of row_splits, if the row is alone; 4: the tail.
        common = TargetSpec.max_decoded_row_nbytes(self, vocab_size)
        return common + 16 + 4 + 12 * min(self.k, vocab_size)

    def select(
        self, masses: RowMasses, uniforms: Tensor | None = None, *, overwrite: bool = False
    ) -> "TopKTargets":
        vocab_size = masses.logits.shape[1]
        if not self.min_p and self.k > vocab_size:
            raise ValueError(
                f"top_k must be at most the {vocab_size} ids of the vocabulary, got {self.k}"
            )
        counts_R, ids_E, logprobs_E = _keep_top(masses, self)
        most = min(self.k, vocab_size)
        tail_R = _tail_logprob(masses, counts_R, ids_E, logprobs_E, most)
        return TopKTargets(
            vocab_size=vocab_size,
            temperature=masses.temperature,
            row_splits=row_splits_of(counts_R),
            token_ids=ids_E,
            logprobs=logprobs_E.float(),
            tail_logprob=tail_R,
        )

    @classmethod
    def parse(cls, text: OptionText) -> "TopKSpec":
        bits = text.take_integer("bits", "7")
        if text.first is not None:
            for name in ("min_p", "max_k"):
                if name in text.named:
                    raise ValueError(
                        f"{name} does not go with a fixed number of entries in {text.text!r}; "
                        "write 'top_k:min_p=1/256,max_k=128' or 'top_k:64'"
                    )
            return cls(k=text.integer("k", text.first), bits=bits, **text.common)
        min_p = _fraction("min_p", text.take("min_p", "1/256"), text.text)
        if min_p <= 0.0:
            raise ValueError(f"min_p must be greater than 0, got {min_p} in {text.text!r}")
        max_k = text.take_integer("max_k", "128")
        return cls(k=max_k, min_p=min_p, bits=bits, **text.common)

    def __str__(self) -> str:
        head = [f"min_p={self.min_p!r}", f"max_k={self.k}"] if self.min_p else [str(self.k)]
        return "top_k:" + ",".join([*head, f"bits={self.bits}", *self._changed_options()])


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class TopKTargets(SparseTargets):
    """Holds the most likely ids of each row, their logprobs, and the exact mass of the others."""

    kind: ClassVar[str] = "top_k"
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

    def mode(self) -> tuple[Tensor, Tensor]:
        rows_E = self.entry_rows()
        largest_R = self.logprobs.new_full((self.num_rows,), -torch.inf)
        largest_R.scatter_reduce_(0, rows_E, self.logprobs, "amax")
        # Logprobs are rounded to few bits: of two that became equal, either may have been larger.
        num_equal_R = torch.zeros_like(largest_R).index_add_(
            0, rows_E, (self.logprobs == largest_R[rows_E]).to(largest_R.dtype)
        )
        best_R = self.most_likely().where(num_equal_R == 1, UNKNOWN)
        # Nothing is kept of a row only if the tail is all of it.
        best_R[largest_R.isinf()] = UNKNOWN
        return best_R, largest_R.exp()


class TopKCells(SparseCells[TopKTargets]):
    """Makes each kept id a cell, and all other ids together one more: the tail bucket."""

    has_tail = True

    def within(self, width: int) -> tuple[TopKTargets, Tensor]:
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

    def renormalized(self) -> TopKTargets:
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


class TopK(SparseKind[TopKTargets]):
    """Writes ids, then their logprobs as quantised codes, and the tail as float32."""

    number = 2
    spec, targets, cells = TopKSpec, TopKTargets, TopKCells
    value_bits = CODE_BITS

    def _check_counts(self, header: Header) -> None:
        if not 1 <= header.max_entries <= header.vocab_size:
            raise CodecError(
                f"max_entries must be 1 to vocab_size ({header.vocab_size}), "
                f"got {header.max_entries}"
            )
        if header.num_rows == 0 and header.max_entries != 1:
            raise CodecError(f"max_entries must be 1 without rows, got {header.max_entries}")

    def plane_sizes(self, header: Header, table: IdTable | None) -> dict[str, int | None]:
        return {
            **super().plane_sizes(header, table),
            "ranges": bitpack.num_words(header.num_rows, RANGE_BITS),
            "codes": None,
            "tail": header.num_rows,
        }

    def _check_entries(self, targets: TopKTargets, rows: Tensor, check: RowCheck) -> None:
        tail = targets.tail_logprob
        bad = ~torch.isfinite(targets.logprobs)
        if bool(torch.isnan(tail).any()):
            bad |= torch.isnan(tail)[rows]
        check.refuse(bad, "its logprobs are not finite numbers", rows)
        check.refuse(tail >= 0, "its tail logprob is not below 0: nothing would be kept")
        mass = targets.logprobs.new_zeros(targets.num_rows, dtype=torch.float64)
        mass.index_add_(0, rows, targets.logprobs.double().exp_())
        mass += tail.double().exp()
        check.refuse_mass(mass)

    def write(self, targets: TopKTargets, bits: int, id_table: IdTable | None) -> Content:
        if bits not in CODE_BITS:
            raise ValueError(f"bits must be one of {CODE_BITS} for top_k, got {bits}")
        num_rows, sizes = targets.num_rows, targets.row_splits.diff()
        most = int(sizes.max()) if num_rows else 1
        ids = write_ids(targets, id_table, most)
        ranges, codes, best = quantise(targets.logprobs, targets.entry_rows(), num_rows, bits)
        planes = [
            *ids.planes,
            bitpack.pack(ranges, RANGE_BITS),
            pack_codes(codes, best, sizes, bits, ids.num_words),
            raw_words(targets.tail_logprob),
        ]
        return Content(planes, bits, ids, max_entries=most, num_entries=len(targets.token_ids))

    def read(self, reader: PlaneReader, header: Header, table: IdTable | None) -> TopKTargets:
        # What `check_rows` checks cannot be otherwise here, or is refused where it is read: a row's
        # probabilities, for example, add up to 1 by the formula that they are made with.
        entries, fields = self._read_entries(reader, header, table)
        num_rows, bits = header.num_rows, header.value_bits
        if num_rows and int(entries.counts.max()) != header.max_entries:
            raise CodecError("no row has the header's largest number of entries")
        id_words = reader.taken
        ranges = reader.take_numbers("ranges", num_rows, RANGE_BITS)
        codes = unpack_codes(reader.take("codes", reader.spare), entries, bits, id_words)
        tail = reader.take_floats("tail")
        refuse_rows(~(tail < 0), "its logprobs are not finite numbers")
        fields |= read_row_fields(reader, num_rows)
        logprobs = dequantise(codes, ranges, entries, tail, bits)
        return TopKTargets(logprobs=logprobs, tail_logprob=torch.from_numpy(tail), **fields)


def _fraction(name: str, value: str, spec: str) -> float:
    """Reads a number such as 0.004 or 1/256. Raises ValueError, which names the option."""
    numerator, _, denominator = value.partition("/")
    try:
        number = float(numerator) / float(denominator or "1")
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f"{name} must be a number such as 0.004 or 1/256, got {value!r} in {spec!r}"
        ) from None
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {value!r} in {spec!r}")
    return number


def _keep_top(masses: RowMasses, spec: TopKSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Returns entries per row (R,), ids (E,) ascending per row, and their float64 logprobs (E,)."""
    logits, log_z_R, temperature = masses.logits, masses.log_z_R, masses.temperature
    num_rows, vocab_size = logits.shape
    most = min(spec.k, vocab_size)
    if spec.min_p >= SMALLEST_MIN_P:
        rows_E, ids_E = ids_from(masses, spec.min_p)
    else:
        rows_E, ids_E = likeliest_ids(masses, most)
    logits_E = logits[rows_E, ids_E].float()
    logprobs_E = logits_E.double() / temperature - log_z_R[rows_E]
    # An id of probability 0 is no entry.
    floor = math.log(spec.min_p) if spec.min_p else torch.finfo(torch.float32).min
    keep_E = logprobs_E.float() >= floor
    counts_R = torch.zeros(num_rows, dtype=torch.int64, device=logits.device)
    counts_R.index_add_(0, rows_E, keep_E.long())
    over_R = counts_R > most
    if bool(over_R.any()):
        over_E = over_R[rows_E].nonzero()[:, 0]
        values_E = logits_E[over_E].where(keep_E[over_E], -torch.inf)
        keep_E[over_E] &= rank_in_row(rows_E[over_E], values_E) < most
        counts_R.clamp_(max=most)
    empty = (counts_R == 0).nonzero()[:, 0]
    if len(empty) == 0:
        return counts_R, ids_E[keep_E], logprobs_E[keep_E]
    # Rows in which no id reaches min_p, or that are not finite, keep their best id.
    best_E = top_ids(logits[empty].float(), 1)[:, 0]
    rows_E = torch.cat([rows_E[keep_E], empty])
    ids_E = torch.cat([ids_E[keep_E], best_E])
    best_logprobs = logits[empty, best_E].double() / temperature - log_z_R[empty]
    order = rows_E.sort(stable=True).indices
    logprobs_E = torch.cat([logprobs_E[keep_E], best_logprobs])
    return counts_R.clamp_(min=1), ids_E[order], logprobs_E[order]


def _tail_logprob(
    masses: RowMasses, counts_R: Tensor, ids_E: Tensor, logprobs_E: Tensor, most: int
) -> Tensor:
    """Computes (R,) float32 log of what the kept entries leave. Overwrites the shares."""
    logits, shares_RB = masses.logits, masses.shares_RB
    num_rows, num_blocks = shares_RB.shape
    rows_E = torch.repeat_interleave(
        torch.arange(num_rows, device=ids_E.device), counts_R, output_size=len(ids_E)
    )
    slot_E = torch.arange(len(ids_E), device=ids_E.device) - (counts_R.cumsum(0) - counts_R)[rows_E]
    kept_RK = shares_RB.new_zeros(num_rows, most)
    kept_RK[rows_E, slot_E] = logprobs_E.exp()
    kept_R = kept_RK.sum(1)

    # In the blocks that hold entries, only what is not kept counts.
    block_H, hit_E = (rows_E * num_blocks + ids_E // BLOCK).unique_consecutive(return_inverse=True)
    rows_H, block_H = block_H // num_blocks, block_H % num_blocks
    weights_HW = block_logits(logits, rows_H, block_H)
    weights_HW.sub_(weights_HW.amax(1, keepdim=True)).div_(masses.temperature).exp_()
    total_H = weights_HW.sum(1)
    weights_HW[hit_E, ids_E % BLOCK] = 0.0
    shares_RB[rows_H, block_H] *= (weights_HW.sum(1) / total_H).double()
    # Of 1 - kept and the sum of the rest, each is exact where the other one cancels.
    tail_R = torch.where(kept_R < 0.5, torch.log1p(-kept_R), shares_RB.sum(1).log())
    return tail_R.clamp_(max=0.0).float()


KIND = TopK()
