"""Defines what all targets have in common: rows of a teacher's distribution, compactly encoded.

The dataclass of each kind is in its own file in `logit_codec/kinds/`.

Letters: R rows, V vocabulary, E kept entries of all rows together.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

UNKNOWN = -1
"""Stands for an id that the targets do not tell."""


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class Targets:
    """Holds R rows of the teacher's distribution over V ids, at one temperature.

    Raises ValueError if shapes or dtypes do not fit together.
    """

    kind: ClassVar[str]
    row_fields: ClassVar[tuple[str, ...]] = ("realized_logprob", "entropy", "log_z")
    """Tensors with one element per row; each may be None unless a subclass says otherwise."""

    vocab_size: int
    temperature: float
    realized_logprob: Tensor | None = None
    """(R,) float32: logprob of the token that really came next."""
    entropy: Tensor | None = None
    """(R,) float32, nats: entropy of the teacher's full distribution."""
    log_z: Tensor | None = None
    """(R,) float32: logsumexp of the raw logits / temperature."""

    def __post_init__(self) -> None:
        if not 1 <= self.vocab_size < 2**31 or not 0 < self.temperature < math.inf:
            raise ValueError(
                "vocab_size and temperature must be positive and finite, got "
                f"{self.vocab_size} and {self.temperature}"
            )
        for name in self.row_fields:
            value = getattr(self, name)
            if value is not None:
                expect_tensor(name, value, torch.float32, (self.num_rows,))

    @property
    def num_rows(self) -> int:
        """R, also `len()`."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Memory of all tensors."""
        return sum(value.nbytes for value in self._tensors().values())

    def __len__(self) -> int:
        return self.num_rows

    def __repr__(self) -> str:
        parts = [f"{self.num_rows} rows", f"vocab_size={self.vocab_size}"]
        for name, value in self._tensors().items():
            parts.append(f"{name}={str(value.dtype).removeprefix('torch.')}{list(value.shape)}")
        return f"{type(self).__name__}({', '.join(parts)}, temperature={self.temperature})"

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """Returns the same targets with every tensor on `device`."""
        return self.map_tensors(lambda value: value.to(device, non_blocking=non_blocking))

    def map_tensors(self, move: Callable[[Tensor], Tensor]) -> Self:
        """Returns the same targets with `move` of every tensor."""
        return replace(self, **{name: move(value) for name, value in self._tensors().items()})

    def to_dense(self) -> Tensor:
        """Returns (R, V) float32 probabilities as the losses read them; for tests and a small V."""
        raise NotImplementedError

    def most_likely(self) -> Tensor:
        """Returns (R,) int64: the likeliest id of each row as far as known, ties to the lowest."""
        raise NotImplementedError

    def mode(self) -> tuple[Tensor, Tensor] | None:
        """Returns the likeliest id of each row for certain, or None if this kind never tells.

        (R,) int64 ids, UNKNOWN where the targets do not tell, and their (R,) probabilities.
        """
        return None

    def __getitem__(self, rows: "slice | Tensor") -> Self:
        """Returns consecutive rows without copying, or the rows of (N,) int64 row numbers."""
        if isinstance(rows, Tensor) and rows.dtype == torch.int64 and rows.dim() == 1:
            return self._take(rows)
        if not isinstance(rows, slice):
            raise TypeError(
                "targets are sliced by rows, such as targets[2:5], or taken by a tensor of row "
                f"numbers; got {rows!r}"
            )
        start, stop, step = rows.indices(self.num_rows)
        if step != 1:
            raise ValueError(f"targets are sliced in steps of 1, got {step}")
        return self._slice(start, max(start, stop))

    def _slice(self, start: int, stop: int) -> Self:
        raise NotImplementedError

    def _take(self, rows: Tensor) -> Self:
        """Indexes rows as tensors are indexed: in this order, as often as a row is named."""
        raise NotImplementedError

    def _row_tensors(self, rows: slice | Tensor) -> dict[str, Tensor]:
        return {
            name: getattr(self, name)[rows]
            for name in self.row_fields
            if getattr(self, name) is not None
        }

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    @staticmethod
    def cat(parts: Sequence["Targets"]) -> "Targets":
        """Joins the rows of all parts, one part after the other.

        Raises ValueError if there is no part, or if parts differ in kind, vocabulary, temperature
        or in which fields they carry.
        """
        if not parts:
            raise ValueError("Targets.cat needs at least one part")
        first = parts[0]
        if len(parts) == 1:
            return first
        constants = [
            field.name
            for field in fields(first)
            if isinstance(getattr(first, field.name), int | float | str | tuple)
        ]
        for other in parts[1:]:
            for name, mine, other_value in (
                ("kind", first.kind, other.kind),
                *((name, getattr(first, name), getattr(other, name, None)) for name in constants),
                ("fields", _dtypes(first), _dtypes(other)),
            ):
                if mine != other_value:
                    raise ValueError(
                        f"cannot join targets of different {name}: {mine}, {other_value}"
                    )
        joined = {
            name: torch.cat([getattr(part, name) for part in parts])
            for name in first._tensors()
            if name != "row_splits"
        }
        if "row_splits" in first._tensors():
            sizes = [part._tensors()["row_splits"].diff() for part in parts]
            joined["row_splits"] = row_splits_of(torch.cat(sizes))
        return replace(first, **joined)


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class SparseTargets(Targets):
    """Holds a few ids of each row, its entries."""

    entry_fields: ClassVar[dict[str, torch.dtype]] = {"token_ids": torch.int64}
    """Tensors with one element per entry, and their types; some may be None."""
    ranked_by: ClassVar[str]
    """The field of which a likelier id has more."""

    row_splits: Tensor
    """(R+1,) int64: the entries of row r are row_splits[r] : row_splits[r+1]."""
    token_ids: Tensor
    """(E,) int64, ascending within a row."""

    def __post_init__(self) -> None:
        expect_tensor("row_splits", self.row_splits, torch.int64, first_dimension(self.row_splits))
        if len(self.row_splits) == 0:
            raise ValueError("row_splits needs R+1 elements, got none")
        for name in self._entry_tensors():
            dtype = self.entry_fields[name]
            expect_tensor(name, getattr(self, name), dtype, first_dimension(self.token_ids))
        Targets.__post_init__(self)

    @property
    def num_rows(self) -> int:
        return len(self.row_splits) - 1

    @property
    def device(self) -> torch.device:
        return self.token_ids.device

    def entry_rows(self) -> Tensor:
        """Returns (E,) int64: the row that each entry belongs to."""
        rows = torch.arange(self.num_rows, device=self.device)
        return torch.repeat_interleave(
            rows, self.row_splits.diff(), output_size=len(self.token_ids)
        )

    def entry_logprobs(self) -> tuple[Tensor, Tensor]:
        """Returns (E,) logprobs, and the logprob of all other ids together: (R,), or () for all."""
        raise NotImplementedError

    def most_likely(self) -> Tensor:
        """Returns (R,) int64: the id of each row's largest entry, the lowest of equal ones."""
        rows_E = self.entry_rows()
        values_E = getattr(self, self.ranked_by).float()
        best_R = values_E.new_full((self.num_rows,), -torch.inf)
        best_R = best_R.scatter_reduce(0, rows_E, values_E, "amax")
        # A boolean mask would have to wait for the device to learn how many entries it keeps.
        ids_E = self.token_ids.where(values_E == best_R[rows_E], self.vocab_size)
        ids_R = torch.full_like(best_R, self.vocab_size, dtype=torch.int64)
        return ids_R.scatter_reduce(0, rows_E, ids_E, "amin")

    def keep(self, keep_E: Tensor, **changed: Any) -> Self:
        """Returns the targets with only some of the entries; `changed` replaces other fields."""
        entries = {name: value[keep_E] for name, value in self._entry_tensors().items()}
        sizes_R = torch.zeros_like(self.row_splits[1:])
        sizes_R = sizes_R.index_add(0, self.entry_rows(), keep_E.long())
        return replace(self, **{**entries, "row_splits": row_splits_of(sizes_R), **changed})

    def _entry_tensors(self) -> dict[str, Tensor]:
        values = {name: getattr(self, name) for name in self.entry_fields}
        return {name: value for name, value in values.items() if value is not None}

    def _spread(self, values: Tensor) -> Tensor:
        """Spreads (E,) float32 values over (R, V), with 0 where there is no entry."""
        dense = torch.zeros(self.num_rows, self.vocab_size, device=self.device)
        dense[self.entry_rows(), self.token_ids] = values
        return dense

    def _slice(self, start: int, stop: int) -> Self:
        splits = self.row_splits[start : stop + 1]
        first, last = int(splits[0]), int(splits[-1])
        entries = {name: value[first:last] for name, value in self._entry_tensors().items()}
        return replace(
            self, row_splits=splits - first, **entries, **self._row_tensors(slice(start, stop))
        )

    def _take(self, rows: Tensor) -> Self:
        sizes = self.row_splits.diff()[rows]
        splits = row_splits_of(sizes)
        # Entry e of the result is as far after the first of its row as before.
        shifts = torch.repeat_interleave(self.row_splits[:-1][rows] - splits[:-1], sizes)
        places = torch.arange(len(shifts), device=self.device) + shifts
        taken = {name: value[places] for name, value in self._entry_tensors().items()}
        return replace(self, row_splits=splits, **taken, **self._row_tensors(rows))


def first_dimension(value: Tensor) -> tuple[int, ...]:
    """Returns the first dimension of a tensor as a shape, (1,) for a tensor without dimensions."""
    return tuple(value.shape[:1]) or (1,)


def _dtypes(targets: Targets) -> dict[str, str]:
    return {
        name: str(value.dtype).removeprefix("torch.") for name, value in targets._tensors().items()
    }


def expect_tensor(
    name: str, value: Tensor, dtype: torch.dtype | None, shape: tuple[int, ...]
) -> None:
    """Raises ValueError unless the tensor has this dtype, if one is given, and this shape."""
    if (dtype is not None and value.dtype != dtype) or tuple(value.shape) != shape:
        raise ValueError(
            f"{name} must be {dtype or value.dtype} of shape {shape}, "
            f"got {value.dtype} of shape {tuple(value.shape)}"
        )


def row_splits_of(sizes: Tensor) -> Tensor:
    """Turns (R,) sizes into (R+1,) positions: where each row begins, and the end."""
    return torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
