"""Defines the kind `given_ids`: the logprobs of ids that the client names, and the mass of all others.

Letters: R rows, V vocabulary, E ids of all rows, M ids of a row at most, W columns of a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from logit_codec import bits as bitpack
from logit_codec.blocks import BLOCK, NO_MASS, RowMasses, exp_of_differences
from logit_codec.errors import CodecError
from logit_codec.given_ids import GivenIds
from logit_codec.header import HAS_RANKS, NO_IDS, ROW_FIELD_FLAGS, Header
from logit_codec.id_table import IdTable, id_width
from logit_codec.inputs import RowInputs
from logit_codec.kinds.base import Content, SparseKind
from logit_codec.kinds.tail import TailCells, TailTargets, check_tail_entries
from logit_codec.planes import PlaneReader, RowCheck, raw_words, read_row_fields
from logit_codec.spec import OptionText, TargetSpec
from logit_codec.targets import UNKNOWN, row_splits_of

CODES_PER_NAT = 512
"""Scale of the 16-bit codes: steps of 1/512 nat up to 127.998; the largest code means 'or more'."""
LARGEST_CODE = 0xFFFF
USUAL_IDS = 32
"""Ids of a row that bounds assume where the rows are not known yet."""


@dataclass(frozen=True, slots=True)
class GivenIdsSpec(TargetSpec):
    """Asks for the logprobs of ids that come with the request. Raises ValueError for bad values."""

    kind: ClassVar[str] = "given_ids"
    option_names: ClassVar[tuple[str, ...]] = ("bits", "ranks")
    set_by_server: ClassVar[tuple[str, ...]] = ("most",)
    needs_given_ids: ClassVar[bool] = True

    bits: int = 16
    """Per logprob. 16: off by at most 1/1024 nat; 32: float32."""
    ranks: bool = False
    """Whether to tell how many ids are likelier than each; one more pass over the logits."""
    most: int = 0
    """Ids of a row at most; 0 where that is not known."""

    def __post_init__(self) -> None:
        if self.bits not in (16, 32):
            raise ValueError(f"bits must be 16 or 32 for given_ids, got {self.bits}")

    def for_rows(self, most_given: int) -> Self:
        return replace(self, most=most_given)

    @property
    def code_bits(self) -> int:
        return self.bits

    def max_row_nbytes(self, vocab_size: int) -> float:
        id_bits = self.bits + (id_width(vocab_size) if self.ranks else 0)
        common = TargetSpec.max_row_nbytes(self, vocab_size)
        return 4.0 + (self.most or USUAL_IDS) * id_bits / 8 + common

    def max_decoded_row_nbytes(self, vocab_size: int) -> float:
        # 20: two elements of row_splits, if the row is alone, and the tail.
        common = TargetSpec.max_decoded_row_nbytes(self, vocab_size)
        return common + 20 + (self.most or USUAL_IDS) * (16 if self.ranks else 12)

    def check_vocabulary(self, vocab_size: int) -> None:
        if self.most > vocab_size:
            raise ValueError(
                f"{self.most} ids are given for a row, the vocabulary has {vocab_size}"
            )

    def scratch_row_nbytes(self, vocab_size: int) -> int:
        ranked = 8 * vocab_size if self.ranks else 0
        return ranked + (self.most or USUAL_IDS) * (8 * BLOCK + 64)

    def select(self, masses: RowMasses | None, inputs: RowInputs) -> dict[str, Tensor]:
        assert masses is not None
        ids_RM = inputs.given_ids
        assert ids_RM is not None
        logits_RM = masses.logits_at(ids_RM)
        logprobs_RM = logits_RM.double() / masses.temperature - masses.log_z_R[:, None]
        columns = {
            "ids": ids_RM.int(),
            "logprobs": logprobs_RM.float(),
            "tail_logprob": _tail_logprob(masses, ids_RM, logprobs_RM),
        }
        if self.ranks:
            ranks_RM = _count_likelier(masses.logits, logits_RM)
            columns["ranks"] = ranks_RM if masses.part is None else masses.part.add(ranks_RM)
        return columns

    def compact(self, columns: dict[str, Tensor], common: dict[str, Any]) -> "GivenIdsTargets":
        ids_RM = columns["ids"].long()
        is_first_RM = _is_first(ids_RM)
        ranks = columns.get("ranks")
        return GivenIdsTargets(
            row_splits=row_splits_of(is_first_RM.sum(1)),
            token_ids=ids_RM[is_first_RM],
            logprobs=columns["logprobs"][is_first_RM],
            tail_logprob=columns["tail_logprob"],
            ranks=None if ranks is None else ranks[is_first_RM],
            **common,
        )

    @classmethod
    def parse(cls, text: OptionText) -> "GivenIdsSpec":
        if text.first is not None:
            raise ValueError(
                f"the ids of given_ids come with the request, got {text.first!r} in {text.text!r}; "
                "write 'given_ids' or 'given_ids:bits=32'"
            )
        bits, ranks = text.take_integer("bits", "16"), text.take("ranks", "0")
        if ranks not in ("0", "1"):
            raise ValueError(f"ranks must be 0 or 1, got {ranks!r} in {text.text!r}")
        return cls(bits=bits, ranks=ranks == "1", **text.common)

    def __str__(self) -> str:
        options = [f"bits={self.bits}", *(["ranks=1"] if self.ranks else [])]
        return "given_ids:" + ",".join([*options, *self._changed_options()])


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class GivenIdsTargets(TailTargets):
    """Holds the logprobs of the ids that were asked for, and the exact mass of the others."""

    kind: ClassVar[str] = "given_ids"
    entry_fields: ClassVar[dict[str, torch.dtype]] = {
        **TailTargets.entry_fields,
        "ranks": torch.int32,
    }

    ranks: Tensor | None = None
    """(E,) int32: how many ids are likelier; equally likely ones share a rank."""

    @property
    def given(self) -> GivenIds:
        """The ids that were asked for."""
        return GivenIds(self.row_splits, self.token_ids)

    def mode(self) -> tuple[Tensor, Tensor]:
        largest_R = self.logprobs.new_full((self.num_rows,), -torch.inf)
        largest_R.scatter_reduce_(0, self.entry_rows(), self.logprobs, "amax")
        # Any of the others may have all of the tail.
        best_R = self.most_likely().where(largest_R > self.tail_logprob, UNKNOWN)
        return best_R, largest_R.exp()


class GivenIdsCells(TailCells[GivenIdsTargets]):
    """Makes each given id a cell, and all other ids together one more: the tail bucket."""


class GivenIdsKind(SparseKind[GivenIdsTargets]):
    """Writes logprobs and the tail; both sides know the ids, and the header has their digest.

    As float32, a logprob may be -inf; as a code, everything from -128 nats down is the last one.
    """

    number = 4
    spec, targets, cells = GivenIdsSpec, GivenIdsTargets, GivenIdsCells
    id_codings = (NO_IDS,)
    value_bits = (16, 32)
    default_bits = 16
    flags = ROW_FIELD_FLAGS | HAS_RANKS

    def _check_counts(self, header: Header) -> None:
        if not 1 <= header.max_entries <= header.vocab_size:
            raise CodecError(
                f"max_entries must be 1 to vocab_size ({header.vocab_size}), "
                f"got {header.max_entries}"
            )

    def find_needed(
        self, header: Header, id_tables: Sequence[IdTable], given_ids: GivenIds | None
    ) -> GivenIds:
        if given_ids is None:
            raise CodecError(
                "the ids that these targets were asked for are needed to read them: "
                "decode(data, given_ids=...)"
            )
        if given_ids.digest() != header.needed:
            raise CodecError(
                f"the container is for other given ids ({header.needed.hex()}) than those it is "
                f"read with ({given_ids.digest().hex()})"
            )
        sizes = given_ids.num_rows, len(given_ids.token_ids), max(1, given_ids.most)
        if sizes != (header.num_rows, header.num_entries, header.max_entries):
            raise CodecError(
                f"the header counts {header.num_rows} rows, {header.num_entries} ids and at most "
                f"{header.max_entries} in a row; the given ids are {sizes[0]}, {sizes[1]} and "
                f"{sizes[2]}"
            )
        if sizes[1] and int(given_ids.token_ids.max()) >= header.vocab_size:
            raise CodecError(f"a given id is not below the vocabulary's {header.vocab_size}")
        return given_ids

    def plane_sizes(self, header: Header, needed: Any) -> dict[str, int | None]:
        sizes: dict[str, int | None] = {
            "values": bitpack.num_words(header.num_entries, header.value_bits),
            "tail": header.num_rows,
        }
        if header.flags & HAS_RANKS:
            sizes["ranks"] = bitpack.num_words(header.num_entries, id_width(header.vocab_size))
        return sizes

    def _check_entries(
        self, targets: GivenIdsTargets, rows: Tensor, check: RowCheck, tolerance: float = 1e-3
    ) -> None:
        check_tail_entries(targets, rows, check, any_ids=True, tolerance=tolerance)
        ranks = targets.ranks
        if ranks is not None:
            is_bad = (ranks < 0) | (ranks >= targets.vocab_size)
            check.refuse(is_bad, "its ranks are not below the vocabulary's size", rows)

    def write(self, targets: GivenIdsTargets, bits: int, id_table: IdTable | None) -> Content:
        if bits not in self.value_bits:
            raise ValueError(f"bits must be one of {self.value_bits} for given_ids, got {bits}")
        if bits == 32:
            values = raw_words(targets.logprobs)
        else:
            codes = (targets.logprobs.double() * -CODES_PER_NAT).round_().clamp_(0, LARGEST_CODE)
            values = bitpack.pack(codes.long(), 16)
        planes, flags = [values, raw_words(targets.tail_logprob)], 0
        if targets.ranks is not None:
            planes.append(bitpack.pack(targets.ranks.long(), id_width(targets.vocab_size)))
            flags = HAS_RANKS
        given = targets.given
        return Content(
            planes,
            bits,
            max_entries=max(1, given.most),
            num_entries=len(targets.token_ids),
            flags=flags,
            needed=given.digest(),
        )

    def read(self, reader: PlaneReader, header: Header, needed: Any) -> GivenIdsTargets:
        given: GivenIds = needed
        count, bits = header.num_entries, header.value_bits
        if bits == 32:
            logprobs = reader.take_floats("values")
        else:
            codes = reader.take_numbers("values", count, bits)
            logprobs = (codes / -CODES_PER_NAT).astype(np.float32)
        tail = reader.take_floats("tail")
        ranks = None
        if header.flags & HAS_RANKS:
            numbers = reader.take_numbers("ranks", count, id_width(header.vocab_size))
            ranks = torch.from_numpy(numbers.astype(np.int32))
        targets = GivenIdsTargets(
            vocab_size=header.vocab_size,
            temperature=header.temperature,
            row_splits=given.row_splits,
            token_ids=given.token_ids,
            logprobs=torch.from_numpy(logprobs),
            tail_logprob=torch.from_numpy(tail),
            ranks=ranks,
            **read_row_fields(reader, header.num_rows),
        )
        check = RowCheck(0)
        # A code is off by up to 1/1024 nat, and so is the mass.
        self._check_entries(targets, targets.entry_rows(), check, 1e-3 if bits == 32 else 4e-3)
        check.refuse_row_fields(targets)
        return targets


def _tail_logprob(masses: RowMasses, ids_RM: Tensor, logprobs_RM: Tensor) -> Tensor:
    """Computes (R,) float32 log of the mass of all other ids. Overwrites the shares.

    What is left of a block is added up without the given ids: subtracting them would cancel.
    """
    blocks_RM = masses.blocks_of(ids_RM)
    values_RMW, first_RM = masses.block_logits(blocks_RM)
    exp_of_differences(values_RMW, masses.peak_R[:, None, None], masses.temperature, out=values_RMW)
    # Several ids may lie in one block: the first of them stands for it, without any of them.
    leader_RM = torch.searchsorted(blocks_RM, blocks_RM)
    weights_RK = values_RMW.flatten(1)
    places_RM = leader_RM * BLOCK + (ids_RM - first_RM)
    weights_RK.scatter_(1, places_RM, 0.0)
    left_RM = values_RMW.sum(2)
    left_RM = left_RM.masked_fill_(left_RM <= NO_MASS, 0.0)
    is_leader_RM = leader_RM == torch.arange(ids_RM.shape[1], device=ids_RM.device)
    scale_R1 = (masses.log_z_R - masses.peak_R.double() / masses.temperature).exp()[:, None]
    left_R = (left_RM.double().where(is_leader_RM, 0.0) / scale_R1).sum(1)
    shares_RB = masses.shares_RB.scatter_(1, blocks_RM, 0.0)
    rest_R = left_R + shares_RB.sum(1)
    given_R = logprobs_RM.exp().where(_is_first(ids_RM), 0.0).sum(1)
    # Of 1 - given and the sum of the rest, each is exact where the other one cancels.
    tail_R = torch.where(given_R < 0.5, torch.log1p(-given_R), rest_R.log())
    return tail_R.clamp_(max=0.0).float()


def _is_first(ids_RM: Tensor) -> Tensor:
    """Returns (R, M) bool: false where an ascending id repeats the one before it."""
    changes_RM = ids_RM[:, 1:] != ids_RM[:, :-1]
    return torch.nn.functional.pad(changes_RM, (1, 0), value=True)


def _count_likelier(logits: Tensor, given_RM: Tensor) -> Tensor:
    """Counts (R, M) int32: logits of the row that are larger than each of its given ones."""
    given_RM, order_RM = given_RM.sort(1)
    # Between which of the given logits does each logit lie? Then from the top: how many are above.
    place_RV = torch.searchsorted(given_RM, logits.contiguous())
    counts_RN = given_RM.new_zeros(len(given_RM), given_RM.shape[1] + 1, dtype=torch.int32)
    ones_RV = torch.ones((), dtype=torch.int32, device=logits.device).expand_as(place_RV)
    counts_RN.scatter_add_(1, place_RV, ones_RV)
    above_RM = counts_RN.flip(1).cumsum(1, dtype=torch.int32).flip(1)[:, 1:]
    return torch.empty_like(above_RM).scatter_(1, order_RM, above_RM)


KIND = GivenIdsKind()
