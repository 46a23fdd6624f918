"""Ids of kept entries as bits: a table that puts likely ids first, and Elias-Fano over its ranks.

Letters: R rows, V vocabulary, E entries of all rows together, B buckets of a table.

A table gives every id a rank and cuts the ranks into buckets of 2**shift. Of an entry only two
things are written: one bit in a row of cells (row, bucket), which costs 1 bit per entry and 1 per
cell, and its offset in the bucket, which costs `shift` bits. With buckets that hold about 0.7
entries of a row, that is close to the entropy of the ids under their average frequencies. The
identity table needs no fitting: the rank is the id, and all buckets have one size.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import xxhash
from torch import Tensor

from logit_codec import bits as bitpack
from logit_codec.blocks import SCRATCH_NBYTES
from logit_codec.errors import CodecError

IDENTITY_DIGEST = bytes(16)
TABLE_MAGIC = b"LSTI"
TABLE_VERSION = 1
TABLE_HEADER = struct.Struct("<4sB3xII")
DIGEST_NBYTES = 16
MAX_SHIFT = 31


@dataclass(frozen=True, eq=False, repr=False)
class IdTable:
    """Ranks of all ids of a vocabulary, and buckets of ranks.

    Both sides must hold the same table: a container names it by its digest. Raises ValueError if
    the ids are no permutation or the buckets do not cover the ranks exactly (the last one may
    reach beyond them).
    """

    vocab_size: int
    shifts: Tensor
    """(B,) int64, 0 to 31: bucket b holds 2**shifts[b] ranks, from where the one before it ends."""
    ids: Tensor | None
    """(V,) int64: the id of each rank; None if the rank is the id."""

    def __post_init__(self) -> None:
        starts = self.starts
        if (
            not 1 <= len(starts) <= self.vocab_size
            or int(self.shifts.min()) < 0
            or int(self.shifts.max()) > MAX_SHIFT
            or not int(starts[-1])
            < self.vocab_size
            <= int(starts[-1]) + (1 << int(self.shifts[-1]))
        ):
            raise ValueError(f"the buckets do not cover {self.vocab_size} ranks exactly")
        if self.ids is not None:
            seen = torch.zeros(self.vocab_size, dtype=torch.bool, device=self.ids.device)
            inside = self.ids[(self.ids >= 0) & (self.ids < self.vocab_size)]
            seen[inside] = True
            if self.ids.shape != (self.vocab_size,) or not bool(seen.all()):
                raise ValueError(f"the ids are no permutation of {self.vocab_size} ids")

    def __repr__(self) -> str:
        name = "identity" if self.ids is None else self.digest.hex()
        return f"IdTable({name}, vocab_size={self.vocab_size}, buckets={len(self.shifts)})"

    @staticmethod
    def identity(
        vocab_size: int, num_rows: int, num_entries: int, device: torch.device | str = "cpu"
    ) -> "IdTable":
        """The built-in table for R rows with E entries together, V > 0, E >= R.

        Its buckets have 2**s ranks each, s = floor(log2(V * R / E)), or 0 if R = 0. It takes
        memory for at most 2 * E / R + 1 buckets.
        """
        shift = identity_shift(vocab_size, num_rows, num_entries)
        buckets = num_identity_buckets(vocab_size, shift)
        shifts = torch.full((buckets,), shift, dtype=torch.int64, device=device)
        return IdTable(vocab_size=vocab_size, shifts=shifts, ids=None)

    @cached_property
    def starts(self) -> Tensor:
        """(B,) int64: the first rank of each bucket."""
        return (1 << self.shifts).cumsum(0) - (1 << self.shifts)

    @cached_property
    def ranks(self) -> Tensor | None:
        """(V,) int64: the rank of each id; None if it is the id."""
        if self.ids is None:
            return None
        ranks = torch.empty_like(self.ids)
        ranks[self.ids] = torch.arange(self.vocab_size, device=self.ids.device)
        return ranks

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that name the table: XXH3-128 of what `to_bytes` writes before it."""
        return IDENTITY_DIGEST if self.ids is None else self.to_bytes()[-DIGEST_NBYTES:]

    def to(self, device: torch.device | str) -> "IdTable":
        """The same table with its tensors on `device`; itself if they are there."""
        if self.shifts.device == torch.device(device):
            return self
        ids = None if self.ids is None else self.ids.to(device)
        return replace(self, shifts=self.shifts.to(device), ids=ids)

    def to_bytes(self) -> bytes:
        """The table's file; the layout is in FORMAT.md. Raises ValueError for the identity."""
        if self.ids is None:
            raise ValueError("the identity table is built in and has no file")
        width = max(1, (self.vocab_size - 1).bit_length())
        shifts = bytes(self.shifts.tolist())
        body = b"".join(
            (
                TABLE_HEADER.pack(TABLE_MAGIC, TABLE_VERSION, self.vocab_size, len(shifts)),
                shifts + bytes(-len(shifts) % 4),
                bitpack.pack(self.ids.cpu(), width).numpy().tobytes(),
            )
        )
        return body + xxhash.xxh3_128_digest(body)

    @staticmethod
    def from_bytes(data: bytes | bytearray | memoryview) -> "IdTable":
        """The table of a file. Raises CodecError for anything that is not exactly one table."""
        view = memoryview(data).cast("B")
        if len(view) < TABLE_HEADER.size + DIGEST_NBYTES:
            raise CodecError(f"an id table has more than {len(view)} bytes: truncated?")
        magic, version, vocab_size, buckets = TABLE_HEADER.unpack_from(view)
        if magic != TABLE_MAGIC:
            raise CodecError(f"not an id table: it begins with {magic!r}, not {TABLE_MAGIC!r}")
        if version != TABLE_VERSION:
            raise CodecError(
                f"id table version {version} is not supported; this logit_codec reads version "
                f"{TABLE_VERSION}. Upgrade the older of the two sides."
            )
        width = max(1, (vocab_size - 1).bit_length())
        ids_at = TABLE_HEADER.size + buckets + -buckets % 4
        expected = ids_at + 4 * bitpack.num_words(vocab_size, width) + DIGEST_NBYTES
        if not 1 <= vocab_size < 2**31 or len(view) != expected:
            raise CodecError(f"the id table has {len(view)} bytes, its header implies {expected}")
        if xxhash.xxh3_128_digest(view[:-DIGEST_NBYTES]) != view[-DIGEST_NBYTES:]:
            raise CodecError("the id table's digest does not match: fetch the table again")
        shifts = torch.tensor(list(view[TABLE_HEADER.size :][:buckets]), dtype=torch.int64)
        raw = np.frombuffer(view, np.uint8)
        ids_plane = bitpack.BitString(raw, ids_at, len(view) - DIGEST_NBYTES, "ids")
        ids = torch.from_numpy(ids_plane.numbers(vocab_size, width))
        try:
            table = IdTable(vocab_size=vocab_size, shifts=shifts, ids=ids)
        except ValueError as error:
            raise CodecError(f"the id table is malformed: {error}") from None
        if table.to_bytes() != view:
            raise CodecError("the padding of the id table is not zero")
        return table


def identity_shift(vocab_size: int, num_rows: int, num_entries: int) -> int:
    """The bits of an offset in the identity table for R rows with E entries together."""
    return (vocab_size * num_rows // num_entries).bit_length() - 1 if num_rows else 0


def num_identity_buckets(vocab_size: int, shift: int) -> int:
    """How many buckets of 2**shift ranks cover the vocabulary."""
    return ((vocab_size - 1) >> shift) + 1


def fit_id_table(inclusions: Tensor, num_rows: int) -> IdTable:
    """A table from how often each id is kept in `num_rows` rows of text that is like the use.

    inclusions: (V,) of the times that an id was seen among the kept ones or, far better from
    little text, was expected there (`expected_inclusions`); 1,000 rows are enough for that. Ids
    never seen share what Good and Turing give them: as much as the ids seen once. Raises ValueError
    for numbers that are negative or not finite, and for a num_rows below 1.
    """
    kept_V = inclusions.detach().cpu().double()
    if kept_V.dim() != 1 or not bool((torch.isfinite(kept_V) & (kept_V >= 0)).all()):
        raise ValueError("inclusions must be (V,) finite numbers of at least 0")
    if num_rows < 1:
        raise ValueError(f"num_rows must be at least 1, got {num_rows}")
    unseen_V = kept_V == 0
    if bool(unseen_V.any()):
        share = float((kept_V == 1).sum()) / int(unseen_V.sum())
        kept_V = torch.where(unseen_V, min(share, 1.0), kept_V)
    density_V, ids = kept_V.sort(descending=True, stable=True)
    return IdTable(vocab_size=len(ids), shifts=_cheapest_buckets(density_V / num_rows), ids=ids)


def expected_inclusions(logits: Tensor, *, num_draws: int = 64, temperature: float = 1.0) -> Tensor:
    """(R, V) logits -> (V,) float64, on the CPU: in how many of the rows each id is drawn on average.

    An id of probability p is among the systematic draws of a row with probability min(1, N * p).
    Rows that are not finite count as nothing.
    """
    num_columns = logits.shape[1]
    step = max(1, SCRATCH_NBYTES["cpu"] // (4 * num_columns))
    total_V = torch.zeros(num_columns, dtype=torch.float64)
    for rows in logits.split(step):
        weights = torch.softmax(rows.float() / temperature, 1)
        total_V += weights.mul_(num_draws).clamp_(max=1.0).nan_to_num_(0.0).sum(0).cpu()
    return total_V


def _cheapest_buckets(density_V: Tensor) -> Tensor:
    """(V,) expected entries per row of each rank -> (B,) shifts of the cheapest buckets.

    Chosen among all ways of halving the ranks and their halves again: a bucket with on average
    `load` entries costs 1 + load * (1 + shift) bits per row.
    """
    vocab_size = len(density_V)
    levels = (vocab_size - 1).bit_length()
    load = torch.nn.functional.pad(density_V, (0, (1 << levels) - vocab_size))
    used = torch.arange(1 << levels) < vocab_size
    cost = (1 + load) * used
    halved = []  # for each level above the first, which buckets are cheaper in halves
    for shift in range(1, levels + 1):
        load = load[0::2] + load[1::2]
        used = used[0::2]
        whole = (1 + load * (1 + shift)) * used
        halves = cost[0::2] + cost[1::2]
        halved.append(halves < whole)
        cost = torch.minimum(halves, whole)
    open_buckets = torch.zeros(1, dtype=torch.int64)
    found = []  # (first rank, shift)
    for shift in range(levels, -1, -1):
        halve = halved[shift - 1][open_buckets] if shift else torch.zeros_like(open_buckets) > 0
        final = open_buckets[~halve]
        found.append(torch.stack([final << shift, torch.full_like(final, shift)], 1))
        children = (open_buckets[halve, None] * 2 + torch.arange(2)).flatten()
        open_buckets = children[(children << max(shift - 1, 0)) < vocab_size]
    buckets = torch.cat(found)
    return buckets[buckets[:, 0].argsort(), 1]


@dataclass(frozen=True, slots=True, eq=False)
class CodedIds:
    """The ids of R rows, ready to be written as two planes."""

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
        """The words of the occupancy and of the offsets plane."""
        return [
            bitpack.pack_ones(self.ones, self.num_cells + len(self.ones)),
            bitpack.pack_varying(self.offsets, self.widths),
        ]


def code_ids(table: IdTable, rows: Tensor, token_ids: Tensor, num_rows: int) -> CodedIds:
    """(E,) rows and ids, ascending by row and then by id, as cells and offsets of a table."""
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
    """Which ids R rows have, as they were read."""

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
        """With the splits that follow from the counts."""
        splits = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=splits[1:])
        return cls(rows, counts, splits, ids)


def read_ids(
    table: IdTable | None,
    vocab_size: int,
    num_rows: int,
    num_entries: int,
    occupancy: bitpack.BitString,
    take_offsets: Callable[[int], bitpack.BitString],
) -> Entries:
    """The entries of two Elias-Fano planes; the table is on the CPU, None for the identity.

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
