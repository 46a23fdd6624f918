"""Defines the kind `top_k`: the likeliest ids of each row, and the exact mass of all others.

Letters: R rows, C rows of a chunk, V vocabulary, H blocks of columns that hold entries, E kept
entries of all rows, K entries per row at most. Ties go to the lowest id.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from logit_codec import bits as bitpack
from logit_codec.blocks import (
    BLOCK,
    NO_MASS,
    RowMasses,
    exp_of_differences,
    num_blocks,
)
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
from logit_codec.inputs import RowInputs
from logit_codec.kinds.base import Content, SparseKind
from logit_codec.kinds.tail import TailCells, TailTargets, check_tail_entries
from logit_codec.largest import largest
from logit_codec.planes import PlaneReader, RowCheck, raw_words, read_row_fields, refuse_rows
from logit_codec.spec import OptionText, TargetSpec
from logit_codec.targets import UNKNOWN, row_splits_of


@dataclass(frozen=True, slots=True)
class TopKSpec(TargetSpec):
    """Asks for the most likely ids with quantised logprobs, and the exact mass of the others.

    Raises ValueError for values out of range.
    """

    kind: ClassVar[str] = "top_k"
    option_names: ClassVar[tuple[str, ...]] = ("min_p", "top_p", "max_k", "bits")
    needs_maxima: ClassVar[bool] = True

    k: int
    """Entries per row (fewer only if fewer ids have a probability above 0); with `min_p` or `top_p`
    at most this many, and at least one."""
    min_p: float = 0.0
    """Above 0: only ids with p >= min_p."""
    bits: int = 7
    """Bits per logprob: one of CODE_BITS."""
    top_p: float = 0.0
    """Above 0: only the smallest set of likeliest ids whose mass reaches top_p (nucleus, Holtzman et
    al. 2020). With a min_p too, an id is kept that both keep, as in samplers."""

    def __post_init__(self) -> None:
        if not 1 <= self.k < 2**31:
            raise ValueError(f"top_k must be between 1 and 2**31 - 1, got {self.k}")
        for name in ("min_p", "top_p"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if self.bits not in CODE_BITS:
            raise ValueError(
                f"bits must be one of {', '.join(map(str, CODE_BITS))} for top_k, got {self.bits}"
            )

    @property
    def has_fixed_k(self) -> bool:
        """Whether every row has k entries; else k is only the most that it can have."""
        return not (self.min_p or self.top_p)

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

    def check_vocabulary(self, vocab_size: int) -> None:
        if self.has_fixed_k and self.k > vocab_size:
            raise ValueError(
                f"top_k must be at most the {vocab_size} ids of the vocabulary, got {self.k}"
            )

    def scratch_row_nbytes(self, vocab_size: int) -> int:
        most = min(self.k, vocab_size)
        return 6 * BLOCK * min(most, num_blocks(vocab_size)) + 200 * most

    def select(self, masses: RowMasses | None, inputs: RowInputs) -> dict[str, Tensor]:
        assert masses is not None
        return _keep_top(masses, self)

    def compact(self, columns: dict[str, Tensor], common: dict[str, Any]) -> "TopKTargets":
        # One integer, to sort by id and take the logprob along: ids that are UNKNOWN stay negative.
        logprobs_RK = columns["logprobs"].numpy().view(np.uint32)
        keys_RK = columns["ids"].numpy().astype(np.int64) << 32 | logprobs_RK
        keys_RK.sort(1)
        is_kept_RK = keys_RK >= 0
        keys_E = keys_RK[is_kept_RK]
        return TopKTargets(
            row_splits=row_splits_of(torch.from_numpy(is_kept_RK.sum(1))),
            token_ids=torch.from_numpy(keys_E >> 32),
            logprobs=torch.from_numpy(keys_E.astype(np.uint32).view(np.float32)),
            tail_logprob=columns["tail_logprob"],
            **common,
        )

    @classmethod
    def parse(cls, text: OptionText) -> "TopKSpec":
        bits = text.take_integer("bits", "7")
        if text.first is not None:
            for name in ("min_p", "top_p", "max_k"):
                if name in text.named:
                    raise ValueError(
                        f"{name} does not go with a fixed number of entries in {text.text!r}; "
                        "write 'top_k:min_p=1/256,max_k=128' or 'top_k:64'"
                    )
            return cls(k=text.integer("k", text.first), bits=bits, **text.common)
        named = [name for name in ("min_p", "top_p") if name in text.named] or ["min_p"]
        limits = {name: _fraction(name, text.take(name, "1/256"), text.text) for name in named}
        for name, limit in limits.items():
            if limit <= 0.0:
                raise ValueError(f"{name} must be greater than 0, got {limit} in {text.text!r}")
        max_k = text.take_integer("max_k", "128")
        return cls(k=max_k, bits=bits, **limits, **text.common)

    def __str__(self) -> str:
        limits = {"min_p": self.min_p, "top_p": self.top_p}
        head = [f"{name}={limit!r}" for name, limit in limits.items() if limit]
        head = [str(self.k)] if self.has_fixed_k else [*head, f"max_k={self.k}"]
        return "top_k:" + ",".join([*head, f"bits={self.bits}", *self._changed_options()])


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class TopKTargets(TailTargets):
    """Holds the most likely ids of each row, their logprobs, and the exact mass of the others."""

    kind: ClassVar[str] = "top_k"

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


class TopKCells(TailCells[TopKTargets]):
    """Makes each kept id a cell, and all other ids together one more: the tail bucket."""


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

    def plane_sizes(self, header: Header, needed: Any) -> dict[str, int | None]:
        return {
            **super().plane_sizes(header, needed),
            "ranges": bitpack.num_words(header.num_rows, RANGE_BITS),
            "codes": None,
            "tail": header.num_rows,
        }

    def _check_entries(self, targets: TopKTargets, rows: Tensor, check: RowCheck) -> None:
        check_tail_entries(targets, rows, check)

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

    def read(self, reader: PlaneReader, header: Header, needed: Any) -> TopKTargets:
        # What `check_rows` checks cannot be otherwise here, or is refused where it is read: a row's
        # probabilities, for example, add up to 1 by the formula that they are made with.
        entries, fields = self._read_entries(reader, header, needed)
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


def _keep_top(masses: RowMasses, spec: TopKSpec) -> dict[str, Tensor]:
    """Makes the columns: (R, K) int32 ids and float32 logprobs, and the (R,) float32 tail.

    An id that only fills its row up is UNKNOWN.
    """
    assert masses.maxima_RB is not None
    # No more ids than 1 / min_p can reach it.
    most = min(spec.k, masses.vocab_size, int(1.001 / max(spec.min_p, 1e-9)))
    count = min(most, masses.maxima_RB.shape[1])
    # Only the blocks with the largest maxima can hold an entry; in their order, ties in the logits
    # go to the lowest id.
    block_RH = largest(masses.maxima_RB, count).sort(1).values
    values_RHW, first_RH, is_idle_RH = _read_blocks(masses, block_RH, spec.min_p)
    values_RK = values_RHW.flatten(1)
    place_RK = largest(values_RK, most, ordered=True)
    logits_RK = values_RK.gather(1, place_RK)
    logprobs_RK = logits_RK.double() / masses.temperature - masses.log_z_R[:, None]
    # An id of probability 0 is no entry.
    floor = math.log(spec.min_p) if spec.min_p else torch.finfo(torch.float32).min
    is_kept_RK = logprobs_RK.float() >= floor
    if spec.top_p:
        # An id is needed if the likelier ones do not reach top_p yet. In float32, to which what
        # the logits round off does not matter: four equal ids of 1/4 reach 0.75 after three.
        mass_RK = logprobs_RK.exp()
        is_kept_RK &= (mass_RK.cumsum(1) - mass_RK).float() < spec.top_p
    # Rows in which no id reaches min_p, or that are not finite, keep their best id.
    is_kept_RK[:, 0].fill_(True)
    ids_RK = first_RH.gather(1, place_RK // BLOCK) + place_RK % BLOCK
    return {
        "ids": ids_RK.masked_fill_(~is_kept_RK, UNKNOWN).int(),
        "logprobs": logprobs_RK.float(),
        "tail_logprob": _tail_logprob(
            masses, block_RH, is_idle_RH, values_RHW, place_RK, logprobs_RK, is_kept_RK
        ),
    }


def _read_blocks(
    masses: RowMasses, block_RH: Tensor, min_p: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gathers (R, H, W) logits and (R, H) columns as `block_logits` does.

    With a min_p also marks (R, H) blocks that hold no such id; their logits are -inf.
    """
    if min_p == 0.0:
        return *masses.block_logits(block_RH), None
    assert masses.maxima_RB is not None
    least_R = (masses.log_z_R + math.log(0.999 * min_p)) * masses.temperature
    least_R = (least_R - 1e-6 * least_R.abs()).float()  # what float32 rounds off is less
    maxima_RH = masses.maxima_RB.gather(1, block_RH)
    is_idle_RH = maxima_RH < torch.minimum(least_R, masses.peak_R)[:, None]
    # Most blocks are idle, and fetching one takes as long as adding it up. So one stands for all.
    best_R1 = block_RH.gather(1, maxima_RH.argmax(1, keepdim=True))
    values_RHW, first_RH = masses.block_logits(block_RH.where(~is_idle_RH, best_R1))
    offset_RH = torch.zeros_like(maxima_RH).masked_fill_(is_idle_RH, -torch.inf)
    return values_RHW.add_(offset_RH[:, :, None]), first_RH, is_idle_RH


def _tail_logprob(
    masses: RowMasses,
    block_RH: Tensor,
    is_idle_RH: Tensor | None,
    values_RHW: Tensor,
    place_RK: Tensor,
    logprobs_RK: Tensor,
    is_kept_RK: Tensor,
) -> Tensor:
    """Computes (R,) float32 log of what the kept entries leave. Overwrites values and shares."""
    shares_RB, temperature = masses.shares_RB, masses.temperature
    kept_R = logprobs_RK.exp().where(is_kept_RK, 0.0).sum(1)
    # In the blocks that may hold entries, only what is not kept counts.
    exp_of_differences(values_RHW, masses.peak_R[:, None, None], temperature, out=values_RHW)
    weights_RK = values_RHW.flatten(1)
    left_RK = weights_RK.gather(1, place_RK).masked_fill_(is_kept_RK, 0.0)
    weights_RK.scatter_(1, place_RK, left_RK)
    left_RH = values_RHW.sum(2)
    left_RH = left_RH.masked_fill_(left_RH <= NO_MASS, 0.0)
    share_RH = left_RH / (masses.log_z_R - masses.peak_R.double() / temperature).exp()[:, None]
    if is_idle_RH is not None:
        share_RH = shares_RB.gather(1, block_RH).where(is_idle_RH, share_RH)
    shares_RB.scatter_(1, block_RH, share_RH)
    # Of 1 - kept and the sum of the rest, each is exact where the other one cancels.
    tail_R = torch.where(kept_R < 0.5, torch.log1p(-kept_R), shares_RB.sum(1).log())
    return tail_R.clamp_(max=0.0).float()


KIND = TopK()
