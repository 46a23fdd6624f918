"""Defines what a kind of target consists of: a spec, targets, planes in a container, loss cells.

Letters: R rows, C rows of a chunk, V vocabulary, E entries of all rows, K entries per row at most.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from logit_codec.errors import CodecError
from logit_codec.given_ids import GivenIds
from logit_codec.header import ELIAS_FANO_IDS, FIXED_WIDTH_IDS, ROW_FIELD_FLAGS, Header
from logit_codec.id_table import IDENTITY_DIGEST, IdTable
from logit_codec.ids import Entries, WrittenIds, id_plane_sizes, read_entries
from logit_codec.planes import PlaneReader, RowCheck
from logit_codec.spec import TargetSpec
from logit_codec.targets import SparseTargets, Targets

TargetsT = TypeVar("TargetsT", bound=Targets)
SparseT = TypeVar("SparseT", bound=SparseTargets)

LOWEST = -1e30
"""Stands for log(0): its exp is 0 and 0 times it is 0, where -inf would make NaN."""

Cell = Callable[[Tensor, Tensor], Tensor]
"""Logprobs of teacher and student in some cells -> what each cell adds to the divergence."""


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """Holds a kind's own planes of a container, and the header's fields that go with them."""

    planes: list[Tensor]
    value_bits: int
    ids: WrittenIds = field(default_factory=WrittenIds)
    max_entries: int = 0
    num_entries: int = 0
    flags: int = 0
    """Beside those of the row fields."""
    needed: bytes = b""
    """Digest of what a reader needs beside the container, unless that is an id table."""


class LossCells(ABC, Generic[TargetsT]):
    """Divides the rows of some targets into cells, in which a loss compares p and q.

    p is the teacher, q the student. A divergence is a sum over cells of a function of p and q.
    """

    is_estimate: ClassVar[bool] = False
    """Whether p is a random draw, so that only what is linear in p can be estimated."""
    has_tail: ClassVar[bool] = False
    """Whether all ids that are not kept share one cell, the tail bucket."""

    def __init__(self, targets: TargetsT) -> None:
        self.targets = targets

    @property
    def stray_mass(self) -> float:
        """Probability, over all rows, that chance alone may give to ids that are never used."""
        return 0.0

    @abstractmethod
    def within(self, width: int) -> tuple[TargetsT, Tensor]:
        """Returns the targets given that the id is below `width`, their new `vocab_size`.

        And the (R,) float64 probability of the ids that were left out.
        """

    @abstractmethod
    def divergence(self, scaled: Tensor, cell: Cell) -> Tensor:
        """Computes (R,) divergences from the student's (R, V) logits / T; plain, differentiable.

        Ids from `targets.vocab_size` on have logits of -inf.
        """

    def renormalized(self) -> TargetsT:
        """Returns the targets with everything in the tail taken away, for a kind that has one."""
        raise NotImplementedError


class FullCells(LossCells[TargetsT]):
    """Makes every id a cell, for targets that tell p of every id."""

    @abstractmethod
    def logits(self, rows: slice | Tensor) -> Tensor:
        """Returns (C, V) numbers of some rows from which `logp` follows row by row; not a copy."""

    @abstractmethod
    def logp(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns (C, V) log p of rows of what `logits` returned."""

    def divergence(self, scaled: Tensor, cell: Cell) -> Tensor:
        logp_RV = self.logp(self.logits(slice(None)), scaled.dtype)
        return cell(logp_RV, scaled.log_softmax(1)[:, : self.targets.vocab_size]).sum(1)


@dataclass(frozen=True, slots=True, eq=False)
class PaddedEntries:
    """Lays out the entries of some rows as a rectangle; a shorter row repeats its first entry."""

    rows: slice | Tensor
    """Which rows of the targets."""
    entry_CK: Tensor
    """(C, K) int64: numbers of the entries."""
    ids_CK: Tensor
    """(C, K) int64."""
    real_CK: Tensor
    """(C, K) bool: false where an entry only fills its row up."""
    size_C1: Tensor
    """(C, 1) int64: entries of each row."""


class SparseCells(LossCells[SparseT]):
    """Makes each kept id a cell, and all other ids together one more."""

    def pad(self, rows: slice | Tensor, most: int) -> PaddedEntries:
        """Lays out the entries of some rows, at most `most` in each, as a rectangle."""
        targets = self.targets
        first_C1 = targets.row_splits[:-1][rows][:, None]
        size_C1 = targets.row_splits[1:][rows][:, None] - first_C1
        most = min(most, len(targets.token_ids))  # 0 where no row has an entry: nothing to look up
        slot_K = torch.arange(most, device=targets.device)
        real_CK = slot_K < size_C1
        # The clamp is for rows without entries after the last entry of all.
        entry_CK = (first_C1 + slot_K.where(real_CK, 0)).clamp(max=len(targets.token_ids) - 1)
        return PaddedEntries(rows, entry_CK, targets.token_ids[entry_CK], real_CK, size_C1)

    def logp(self, entries: PaddedEntries, dtype: torch.dtype) -> Tensor:
        """Computes (C, K+1) log p of the entries and of all other ids together."""
        logp_CK, rest_C1 = self._logp(entries, dtype)
        # A row that keeps every shared id has no other ids.
        is_whole_C1 = entries.size_C1 >= self.targets.vocab_size
        return torch.cat(
            [
                logp_CK.masked_fill(~entries.real_CK, -torch.inf),
                rest_C1.masked_fill(is_whole_C1, -torch.inf),
            ],
            1,
        )

    @abstractmethod
    def _logp(self, entries: PaddedEntries, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Computes (C, K) log p of the entries and (C, 1) of all other ids together."""

    def chunk_divergence(
        self, entries: PaddedEntries, logp_CK1: Tensor, logq_CK1: Tensor, cell: Cell
    ) -> Tensor:
        """Sums (C, 1) divergences over (C, K+1) cells."""
        return cell(logp_CK1, logq_CK1).sum(1, keepdim=True)


class Kind(ABC, Generic[TargetsT]):
    """Defines one kind of target: its classes, and how it lies in a container.

    What every kind carries per row is read and written by `logit_codec/planes.py`.
    """

    number: ClassVar[int]
    """In the header of a container."""
    spec: ClassVar[type[TargetSpec]]
    targets: ClassVar[type[Targets]]
    cells: ClassVar[type[SparseCells] | type[FullCells] | None] = None
    """None for a kind that no loss can use."""
    id_codings: ClassVar[tuple[int, ...]]
    value_bits: ClassVar[tuple[int, ...]]
    default_bits: ClassVar[int] = 7
    """Bits per logprob of `encode`, for a kind that has a choice of them there."""
    scope: ClassVar[str] = "score"
    """What a team must be allowed to do to ask for it."""
    flags: ClassVar[int] = ROW_FIELD_FLAGS
    """Those that a header may have."""

    @property
    def name(self) -> str:
        """The name in specs, messages and texts."""
        return self.spec.kind

    def check_header(self, header: Header) -> None:
        """Raises CodecError for a header that this kind does not allow."""
        if header.flags & ~self.flags:
            raise CodecError(f"flags {header.flags:#x} are not known to this logit_codec")
        self._check_counts(header)
        if header.id_coding not in self.id_codings:
            raise CodecError(f"id coding {header.id_coding} is not known to this logit_codec")
        if header.value_bits not in self.value_bits:
            raise CodecError(
                f"{header.value_bits} bits per value are not known to this logit_codec"
            )

    @abstractmethod
    def _check_counts(self, header: Header) -> None:
        """Raises CodecError if max_entries or num_entries is not allowed."""

    def find_needed(
        self, header: Header, id_tables: Sequence[IdTable], given_ids: GivenIds | None
    ) -> Any:
        """Finds what is needed beside the container to read it. Raises CodecError.

        None for the built-in id table, and for kinds that need nothing.
        """
        if header.needed != IDENTITY_DIGEST:
            raise CodecError(
                f"the header names {header.needed.hex()}, but id coding {header.id_coding} of "
                f"{self.name} takes none"
            )
        return None

    @abstractmethod
    def plane_sizes(self, header: Header, needed: Any) -> dict[str, int | None]:
        """Returns the words of the kind's planes, in order; None if they follow from others."""

    def check_span(self, targets: TargetsT) -> None:
        """Raises CodecError unless the rows cover all entries; a slice of rows would hide it."""
        return

    @abstractmethod
    def check_rows(self, targets: TargetsT, check: RowCheck) -> None:
        """Raises CodecError for rows that are not finite, sorted and normalised."""

    @abstractmethod
    def write(self, targets: TargetsT, bits: int, id_table: IdTable | None) -> Content:
        """Makes the kind's planes on the device of the targets."""

    @abstractmethod
    def read(self, reader: PlaneReader, header: Header, needed: Any) -> TargetsT:
        """Reads all planes; needed: what `find_needed` returned. Raises CodecError."""


class SparseKind(Kind[SparseT]):
    """Defines a kind that keeps a few ids of each row: its first planes are those of the ids."""

    id_codings = (FIXED_WIDTH_IDS, ELIAS_FANO_IDS)

    def check_header(self, header: Header) -> None:
        super().check_header(header)
        # Bounds the sizes of the id planes before anything is computed from num_entries.
        if not header.num_rows <= header.num_entries <= header.num_rows * header.most_entries:
            raise CodecError(
                f"num_entries {header.num_entries} does not fit {header.num_rows} rows of 1 to "
                f"{header.most_entries} entries"
            )

    def find_needed(
        self, header: Header, id_tables: Sequence[IdTable], given_ids: GivenIds | None
    ) -> Any:
        """Finds the `IdTable` that the header names; None for the built-in identity."""
        if header.needed == IDENTITY_DIGEST:
            return None
        if header.id_coding != ELIAS_FANO_IDS:
            return Kind.find_needed(self, header, id_tables, given_ids)
        for table in id_tables:
            if table.digest == header.needed:
                if table.vocab_size != header.vocab_size:
                    raise CodecError(
                        f"the id table {header.needed.hex()} is for {table.vocab_size} ids, the "
                        f"container has {header.vocab_size}"
                    )
                return table.to("cpu")
        raise CodecError(
            f"the id table {header.needed.hex()} is needed to read this container; fetch it from "
            "the teacher that wrote it"
        )

    def plane_sizes(self, header: Header, needed: Any) -> dict[str, int | None]:
        """Returns the words of the id planes."""
        return id_plane_sizes(header, needed)

    def check_span(self, targets: SparseT) -> None:
        num_entries = len(targets.token_ids)
        first, last = int(targets.row_splits[0]), int(targets.row_splits[-1])
        if first != 0 or last != num_entries:
            raise CodecError(
                f"row_splits must go from 0 to the {num_entries} entries, got {first} to {last}"
            )

    def check_rows(self, targets: SparseT, check: RowCheck) -> None:
        self.check_span(targets)
        ids = targets.token_ids
        check.refuse(targets.row_splits.diff() < 1, "it has no entry")
        rows = targets.entry_rows()
        bad = torch.zeros_like(ids, dtype=torch.bool)
        torch.logical_and(ids[1:] <= ids[:-1], rows[1:] == rows[:-1], out=bad[1:])
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < targets.vocab_size:
            bad |= (ids < 0) | (ids >= targets.vocab_size)
        check.refuse(bad, "its ids are not ascending ids of the vocabulary", rows)
        self._check_entries(targets, rows, check)

    def _read_entries(
        self, reader: PlaneReader, header: Header, table: IdTable | None
    ) -> tuple[Entries, dict[str, Any]]:
        """Reads the id planes, as entries and as the fields of targets that follow from them."""
        entries = read_entries(reader, header, table)
        return entries, {
            "vocab_size": header.vocab_size,
            "temperature": header.temperature,
            "row_splits": torch.from_numpy(entries.splits),
            "token_ids": torch.from_numpy(entries.ids),
        }

    @abstractmethod
    def _check_entries(self, targets: SparseT, rows: Tensor, check: RowCheck) -> None:
        """Raises CodecError for bad values of the entries; `rows` says which row each is of."""
