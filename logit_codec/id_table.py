"""Ranks the ids of a vocabulary so that likely ids take few bits; fits such tables to a teacher.

Letters: R rows, V vocabulary, E entries of all rows together, B buckets of a table.

A table gives every id a rank and cuts the ranks into buckets of 2**shift; `logit_codec/ids.py`
writes ids with it. The identity table needs no fitting: the rank is the id, and all buckets have
one size.
"""

import struct
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
    """Ranks all ids of a vocabulary, and cuts the ranks into buckets.

    Both sides must hold the same table: a container names it by its digest. Raises ValueError if
    the ids are no permutation or the buckets do not cover the ranks exactly (the last one may
    reach beyond them).
    """

    vocab_size: int
    shifts: Tensor
    """(B,) int64, 0 to 31: bucket b holds 2**shifts[b] ranks, from where the one before ends."""
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
        """Makes the built-in table for R rows with E entries together, V > 0, E >= R.

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
        """Returns the same table with its tensors on `device`."""
        if self.shifts.device == torch.device(device):
            return self
        ids = None if self.ids is None else self.ids.to(device)
        return replace(self, shifts=self.shifts.to(device), ids=ids)

    def to_bytes(self) -> bytes:
        """Writes the table's file, laid out as in FORMAT.md. Raises ValueError for the identity."""
        if self.ids is None:
            raise ValueError("the identity table is built in and has no file")
        width = id_width(self.vocab_size)
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
        """Reads a table's file. Raises CodecError for anything that is not exactly one table."""
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
        width = id_width(vocab_size)
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
    """Returns the bits of an offset in the identity table for R rows with E entries together."""
    return (vocab_size * num_rows // num_entries).bit_length() - 1 if num_rows else 0


def num_identity_buckets(vocab_size: int, shift: int) -> int:
    """Returns how many buckets of 2**shift ranks cover the vocabulary."""
    return ((vocab_size - 1) >> shift) + 1


def id_width(vocab_size: int) -> int:
    """Returns the bits of an id of fixed width."""
    return max(1, (vocab_size - 1).bit_length())


def fit_id_table(inclusions: Tensor, num_rows: int) -> IdTable:
    """Fits a table to how often each id is kept in `num_rows` rows of representative text.

    inclusions: (V,) times that each id was among the kept ones or, far better from little text, is
    expected to be (`expected_inclusions`); 1,000 rows are enough for that. Ids never seen share
    what Good and Turing give them: as much as the ids seen once. Raises ValueError for numbers that
    are negative or not finite, and for a num_rows below 1.
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
    """Computes (V,) float64 on the CPU: in how many of the rows each id is drawn on average.

    An id of probability p is among the systematic draws of a row with probability min(1, N * p).
    Rows that are not finite count as nothing.
    """
    num_columns = logits.shape[1]
    step = max(1, SCRATCH_NBYTES // (4 * num_columns))
    total_V = torch.zeros(num_columns, dtype=torch.float64)
    for rows in logits.split(step):
        weights = torch.softmax(rows.float() / temperature, 1)
        total_V += weights.mul_(num_draws).clamp_(max=1.0).nan_to_num_(0.0).sum(0).cpu()
    return total_V


def _cheapest_buckets(density_V: Tensor) -> Tensor:
    """Turns (V,) expected entries per row of each rank into (B,) shifts of the cheapest buckets.

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
    chosen = []  # (first rank, shift)
    for shift in range(levels, -1, -1):
        halve = halved[shift - 1][open_buckets] if shift else torch.zeros_like(open_buckets) > 0
        final = open_buckets[~halve]
        chosen.append(torch.stack([final << shift, torch.full_like(final, shift)], 1))
        children = (open_buckets[halve, None] * 2 + torch.arange(2)).flatten()
        open_buckets = children[(children << max(shift - 1, 0)) < vocab_size]
    buckets = torch.cat(chosen)
    return buckets[buckets[:, 0].argsort(), 1]
