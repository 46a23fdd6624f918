"""Holds the ids that a client names for each row, and says which they are by a digest.

Letters: R rows, E ids of all rows together, M ids of a row at most.
"""

from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from logit_codec.targets import UNKNOWN, row_splits_of

MAX_ID = 2**31 - 1


@dataclass(frozen=True, slots=True, eq=False)
class GivenIds:
    """Names at least one id for each of R rows; `of` makes one of ids in any order.

    Both sides hold the same ids, so that the answer does not repeat them.
    """

    row_splits: Tensor
    """(R+1,) int64: the ids of row r are row_splits[r] : row_splits[r+1]."""
    token_ids: Tensor
    """(E,) int64, ascending within a row, none twice."""

    @classmethod
    def of(cls, ids: "GivenIds | Tensor | tuple[Tensor, Tensor]") -> "GivenIds":
        """Sorts the ids of each row and leaves out those that come twice.

        ids: (R, M) of whole numbers, where -1 fills a row up, or a pair of (R+1,) row splits and
        (E,) ids. Raises ValueError for another shape, for an id that is negative or above 2**31-1,
        and for a row without an id.
        """
        if isinstance(ids, GivenIds):
            return ids
        if isinstance(ids, tuple):
            rows_E, ids_E, num_rows = _read_splits(*ids)
        else:
            rows_E, ids_E, num_rows = _read_rectangle(torch.as_tensor(ids))
        keys_E = torch.unique(rows_E << 32 | ids_E)
        sizes_R = torch.bincount(keys_E >> 32, minlength=num_rows)
        if num_rows and int(sizes_R.min()) == 0:
            row = int((sizes_R == 0).nonzero()[0])
            raise ValueError(f"row {row} names no id; every row needs at least one")
        return cls(row_splits_of(sizes_R), keys_E & 0xFFFFFFFF)

    @property
    def num_rows(self) -> int:
        """R, also `len()`."""
        return len(self.row_splits) - 1

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, rows: slice) -> "GivenIds":
        """Returns consecutive rows without copying."""
        start, stop, step = rows.indices(self.num_rows)
        if step != 1:
            raise ValueError(f"given ids are sliced in steps of 1, got {step}")
        splits = self.row_splits[start : max(start, stop) + 1]
        first, last = int(splits[0]), int(splits[-1])
        return GivenIds(splits - first, self.token_ids[first:last])

    @property
    def sizes(self) -> Tensor:
        """(R,) int64: ids of each row."""
        return self.row_splits.diff()

    @property
    def most(self) -> int:
        """Ids of the row that has most; 0 without rows."""
        return int(self.sizes.max()) if self.num_rows else 0

    @property
    def nbytes(self) -> int:
        """Memory of both tensors."""
        return self.row_splits.nbytes + self.token_ids.nbytes

    def digest(self) -> bytes:
        """Hashes R sizes and then E ids, as little-endian int32: XXH3-128, canonical form."""
        numbers = torch.cat([self.sizes, self.token_ids]).cpu().numpy().astype("<i4")
        return xxhash.xxh3_128_digest(numbers.tobytes())

    def padded(self) -> Tensor:
        """Returns (R, M) int64; a shorter row repeats its last id."""
        last_R1 = self.row_splits[1:, None] - 1
        places_RM = self.row_splits[:-1, None] + torch.arange(max(1, self.most))
        return self.token_ids[torch.minimum(places_RM, last_R1)]


def _read_splits(splits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, int]:
    splits, ids = torch.as_tensor(splits), torch.as_tensor(ids)
    fits = splits.dim() == ids.dim() == 1 and len(splits) and not splits.is_floating_point()
    if not fits or int(splits[0]) or int(splits[-1]) != len(ids) or bool((splits.diff() < 0).any()):
        raise ValueError(
            "given ids as a pair are row splits, which ascend from 0 to the number of ids, and ids; "
            f"got shapes {tuple(splits.shape)} and {tuple(ids.shape)}"
        )
    num_rows = len(splits) - 1
    rows_E = torch.repeat_interleave(torch.arange(num_rows), splits.diff().cpu())
    return rows_E, _check_ids(ids, 0), num_rows


def _read_rectangle(ids: Tensor) -> tuple[Tensor, Tensor, int]:
    if ids.dim() != 2:
        raise ValueError(f"given ids must be (rows, ids per row), got shape {tuple(ids.shape)}")
    ids_RM = _check_ids(ids, UNKNOWN)
    is_real_RM = ids_RM >= 0
    rows_RM = torch.arange(len(ids_RM))[:, None].expand_as(ids_RM)
    return rows_RM[is_real_RM], ids_RM[is_real_RM], len(ids_RM)


def _check_ids(ids: Tensor, lowest: int) -> Tensor:
    """Returns int64 on the CPU. Raises ValueError for what is no id."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"given ids must be whole numbers, got {ids.dtype}")
    ids = ids.to("cpu", torch.int64)
    if ids.numel():
        low, high = (int(value) for value in ids.aminmax())
        if low < lowest or high > MAX_ID:
            filler = ", or -1 to fill a row up" if lowest < 0 else ""
            raise ValueError(
                f"given ids are 0 to {MAX_ID}{filler}; got {low if low < lowest else high}"
            )
    return ids
