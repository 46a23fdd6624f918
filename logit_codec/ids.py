"""Writes and reads the byte layout of ids: those of kept entries, as planes of bits.

Letters: R rows, V vocabulary, E entries of all rows together, B buckets of a table.

There are two codings, and the shorter one is written. Fixed width is the number of entries of each
row, then every id. Elias-Fano writes the ranks that an `IdTable` gives to ids, and only two things
per entry: one bit in a row of cells (row, bucket), which costs 1 bit per entry and 1 per cell, and
the offset in the bucket, which costs `shift` bits. With buckets that hold about 0.7 entries of a
row, that is close to the entropy of the ids under their average frequencies.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from logit_codec import bits as bitpack
from logit_codec.errors import CodecError
from logit_codec.header import ELIAS_FANO_IDS, FIXED_WIDTH_IDS, NO_IDS, Header
from logit_codec.id_table import (
    IDENTITY_DIGEST,
    IdTable,
    id_width,
    identity_shift,
    num_identity_buckets,
)
from logit_codec.planes import PlaneReader, refuse_rows
from logit_codec.targets import SparseTargets


@dataclass(frozen=True, slots=True, eq=False)
class CodedIds:
    """Holds the ids of R rows, ready to be written as two Elias-Fano planes."""

    ones: Tensor
    """(E,) int64: where the ones of the occupancy plane are."""
    offsets: Tensor
    """(E,) int64: place in the bucket, in the order of (row, rank)."""
    widths: Tensor
    """(E,) int64: bits of each offset."""
    num_cells: int
    """R * B."""

    @property
    def num_words(self) -> int:
        """Words of both planes."""
        return (self.num_cells + len(self.ones) + 31) // 32 + (int(self.widths.sum()) + 31) // 32

    def planes(self) -> list[Tensor]:
        """Packs the words of the occupancy and of the offsets plane."""
        return [
            bitpack.pack_ones(self.ones, self.num_cells + len(self.ones)),
            bitpack.pack_varying(self.offsets, self.widths),
        ]


def code_ids(table: IdTable, rows: Tensor, token_ids: Tensor, num_rows: int) -> CodedIds:
    """Codes (E,) rows and ids, ascending by row and then by id, as cells and offsets of a table."""
    ranks = token_ids
    if table.ranks is not None:
        keys = rows * table.vocab_size + table.ranks[token_ids]
        ranks = keys.sort().values - rows * table.vocab_size
    buckets = torch.searchsorted(table.starts, ranks, right=True) - 1
    num_buckets = len(table.shifts)
    cells = rows * num_buckets + buckets
    return CodedIds(
        ones=cells + torch.arange(len(cells), device=cells.device),
        offsets=ranks - table.starts[buckets],
        widths=table.shifts[buckets],
        num_cells=num_rows * num_buckets,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Entries:
    """Holds the ids of R rows, as they were read."""

    rows: np.ndarray
    """(E,) int64: the row of each entry."""
    counts: np.ndarray
    """(R,) int64: entries of each row, at least 1."""
    splits: np.ndarray
    """(R+1,) int64: where the entries of each row begin, and the end."""
    ids: np.ndarray
    """(E,) int64: ascending in each row, and below V."""

    @classmethod
    def of(cls, rows: np.ndarray, counts: np.ndarray, ids: np.ndarray) -> "Entries":
        """Adds the splits that follow from the counts."""
        splits = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=splits[1:])
        return cls(rows, counts, splits, ids)


@dataclass(frozen=True, slots=True, eq=False)
class WrittenIds:
    """Holds the planes of the ids in the shorter coding, and the header's fields about them."""

    coding: int = NO_IDS
    table_digest: bytes = IDENTITY_DIGEST
    planes: tuple[Tensor, ...] = ()

    @property
    def num_words(self) -> int:
        """Words of all planes."""
        return sum(len(words) for words in self.planes)


def write_ids(targets: SparseTargets, id_table: IdTable | None, most_entries: int) -> WrittenIds:
    """Writes the ids of R rows, each with at most `most_entries`; equal lengths are fixed width.

    Raises ValueError for a table of another vocabulary.
    """
    num_rows, vocab_size = targets.num_rows, targets.vocab_size
    num_entries = len(targets.token_ids)
    if id_table is None:
        table = IdTable.identity(vocab_size, num_rows, num_entries, targets.device)
    elif id_table.vocab_size != vocab_size:
        raise ValueError(
            f"the id table is for a vocabulary of {id_table.vocab_size} ids, the targets have "
            f"{vocab_size}"
        )
    else:
        table = id_table.to(targets.device)
    coded = code_ids(table, targets.entry_rows(), targets.token_ids, num_rows)
    sizes = _fixed_width_sizes(num_rows, num_entries, vocab_size, most_entries)
    if coded.num_words < sum(sizes.values()):
        return WrittenIds(ELIAS_FANO_IDS, table.digest, tuple(coded.planes()))
    planes = (
        bitpack.pack(targets.row_splits.diff(), most_entries.bit_length()),
        bitpack.pack(targets.token_ids, id_width(vocab_size)),
    )
    return WrittenIds(FIXED_WIDTH_IDS, IDENTITY_DIGEST, planes)


def id_plane_sizes(header: Header, table: IdTable | None) -> dict[str, int | None]:
    """Returns the words of the id planes, in order; None if they follow from other planes.

    table: the one that the ids are coded with, None for the identity.
    """
    rows, entries, vocab_size = header.num_rows, header.num_entries, header.vocab_size
    if header.id_coding == FIXED_WIDTH_IDS:
        return {**_fixed_width_sizes(rows, entries, vocab_size, header.most_entries)}
    if header.id_coding != ELIAS_FANO_IDS:
        return {}
    if table is None:
        buckets = num_identity_buckets(vocab_size, identity_shift(vocab_size, rows, entries))
    else:
        buckets = len(table.shifts)
    return {"occupancy": bitpack.num_words(rows * buckets + entries, 1), "offsets": None}


def read_entries(reader: PlaneReader, header: Header, table: IdTable | None) -> Entries:
    """Reads the id planes in the coding that the header names. Raises CodecError.

    table: the one that the ids are coded with, on the CPU; None for the identity.
    """
    num_rows, num_entries, vocab_size = header.num_rows, header.num_entries, header.vocab_size
    if header.id_coding == ELIAS_FANO_IDS:
        return read_ids(
            table,
            vocab_size,
            num_rows,
            num_entries,
            reader.take("occupancy"),
            lambda num_bits: reader.take("offsets", (num_bits + 31) // 32),
        )
    counts = reader.take_numbers("counts", num_rows, header.most_entries.bit_length())
    if int(counts.sum()) != num_entries or (num_rows and int(counts.min()) < 1):
        raise CodecError("the entry counts of the rows do not add up to the header's")
    ids = reader.take_numbers("ids", num_entries, id_width(vocab_size))
    rows = np.repeat(np.arange(num_rows), counts)
    bad = ids >= vocab_size
    bad[1:] |= (ids[1:] <= ids[:-1]) & (rows[1:] == rows[:-1])
    refuse_rows(bad, "its ids are not ascending ids of the vocabulary", rows)
    return Entries.of(rows, counts, ids)


def _fixed_width_sizes(
    num_rows: int, num_entries: int, vocab_size: int, most_entries: int
) -> dict[str, int]:
    return {
        "counts": bitpack.num_words(num_rows, most_entries.bit_length()),
        "ids": bitpack.num_words(num_entries, id_width(vocab_size)),
    }


def read_ids(
    table: IdTable | None,
    vocab_size: int,
    num_rows: int,
    num_entries: int,
    occupancy: bitpack.BitString,
    take_offsets: Callable[[int], bitpack.BitString],
) -> Entries:
    """Reads the entries of two Elias-Fano planes; the table is on the CPU, None for the identity.

    take_offsets: number of bits -> the plane that has them. Raises CodecError unless there are
    `num_entries` entries in the cells of `num_rows` rows, some in each row, whose ranks ascend
    below V.
    """
    shift = identity_shift(vocab_size, num_rows, num_entries) if table is None else 0
    num_buckets = num_identity_buckets(vocab_size, shift) if table is None else len(table.shifts)
    occupied = occupancy.flags(occupancy.num_bits)
    num_ones = int(np.count_nonzero(occupied))
    if num_ones != num_entries:
        raise CodecError(f"the occupancy plane has {num_ones} entries, not {num_entries}")
    cells = np.flatnonzero(occupied)
    del occupied
    cells -= np.arange(num_entries)
    if num_entries and int(cells[-1]) >= num_rows * num_buckets:
        raise CodecError("the occupancy plane has entries beyond its last cell")
    rows = cells // num_buckets
    counts = np.bincount(rows, minlength=num_rows)
    if num_rows and int(counts.min()) < 1:
        raise CodecError("a row has no entry")
    # Ranks ascend from cell to cell of a row in any case, so it is enough if offsets do in a cell.
    if table is None:
        offsets = take_offsets(num_entries * shift)
        cells <<= shift
        cells |= offsets.numbers(num_entries, shift)
        offsets.end()
        ascending = cells[1:] > cells[:-1]
        ranks = cells
        ranks -= rows * (num_buckets << shift)
    else:
        buckets = cells - rows * num_buckets
        widths = table.shifts.numpy().take(buckets)
        plane = take_offsets(int(widths.sum()))
        offsets_E = plane.varying(widths)
        plane.end()
        ascending = (offsets_E[1:] > offsets_E[:-1]) | (cells[1:] != cells[:-1])
        del cells, widths
        ranks = table.starts.numpy().take(buckets)
        ranks += offsets_E
        del buckets, offsets_E
    if not ascending.all():
        raise CodecError("the ranks of a row do not ascend")
    if num_entries and int(ranks.max()) >= vocab_size:
        raise CodecError(f"an id's rank is not below the vocabulary's {vocab_size}")
    if table is None or table.ids is None:
        return Entries.of(rows, counts, ranks)
    first_keys = rows * vocab_size
    keys = table.ids.numpy().take(ranks)
    keys += first_keys
    keys.sort()
    keys -= first_keys
    return Entries.of(rows, counts, keys)
