"""What is kept of the teacher's distributions, one frozen dataclass per kind.

Letters: R rows, V vocabulary, E kept entries of all rows together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from logit_codec.spec import MAX_DRAWS, DenseSpec, SampledSpec, TargetSpec, TopKSpec


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class Targets:
    """R rows of the teacher's distribution over V ids, at a temperature that is part of the value.

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
                _expect(name, value, torch.float32, (self.num_rows,))

    @property
    def num_rows(self) -> int:
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
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
        """The same targets with every tensor on `device`."""
        moved = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in self._tensors().items()
        }
        return replace(self, **moved)

    def to_dense(self) -> Tensor:
        """(R, V) float32 probabilities as the losses read them; for tests and a small V."""
        raise NotImplementedError

    def __getitem__(self, rows: "slice | Tensor") -> Self:
        """Some consecutive rows, without copying; or those of (N,) int64 row numbers."""
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
        """As tensors are indexed: in this order, and as often as a row is named."""
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
        """The rows of all parts, one after the other.

        Raises ValueError if there is no part, or if parts differ in kind, vocabulary, temperature
        or in which fields they carry.
        """
        if not parts:
            raise ValueError("Targets.cat needs at least one part")
        first = parts[0]
        if len(parts) == 1:
            return first
        for other in parts[1:]:
            for name, mine, theirs in (
                ("kind", first.kind, other.kind),
                ("vocab_size", first.vocab_size, other.vocab_size),
                ("temperature", first.temperature, other.temperature),
                ("num_draws", *(getattr(part, "num_draws", None) for part in (first, other))),
                ("fields", _dtypes(first), _dtypes(other)),
            ):
                if mine != theirs:
                    raise ValueError(f"cannot join targets of different {name}: {mine}, {theirs}")
        joined = {
            name: torch.cat([getattr(part, name) for part in parts])
            for name in first._tensors()
            if name != "row_splits"
        }
        if isinstance(first, SparseTargets):
            sizes = [part.row_splits.diff() for part in parts if isinstance(part, SparseTargets)]
            joined["row_splits"] = _splits(torch.cat(sizes))
        return replace(first, **joined)


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class SparseTargets(Targets):
    """Targets that keep a few entries of each row."""

    entry_fields: ClassVar[dict[str, torch.dtype]] = {"token_ids": torch.int64}
    """Tensors with one element per entry, and their types."""

    row_splits: Tensor
    """(R+1,) int64: the entries of row r are row_splits[r] : row_splits[r+1]."""
    token_ids: Tensor
    """(E,) int64, ascending within a row."""

    def __post_init__(self) -> None:
        _expect("row_splits", self.row_splits, torch.int64, _row(self.row_splits))
        if len(self.row_splits) == 0:
            raise ValueError("row_splits needs R+1 elements, got none")
        for name, dtype in self.entry_fields.items():
            _expect(name, getattr(self, name), dtype, _row(self.token_ids))
        Targets.__post_init__(self)

    @property
    def num_rows(self) -> int:
        return len(self.row_splits) - 1

    @property
    def device(self) -> torch.device:
        return self.token_ids.device

    def entry_rows(self) -> Tensor:
        """(E,) int64: the row that each entry belongs to."""
        rows = torch.arange(self.num_rows, device=self.device)
        return torch.repeat_interleave(
            rows, self.row_splits.diff(), output_size=len(self.token_ids)
        )

    def _dense_of(self, values: Tensor) -> Tensor:
        """(E,) float32 -> (R, V), 0 where there is no entry."""
        dense = torch.zeros(self.num_rows, self.vocab_size, device=self.device)
        dense[self.entry_rows(), self.token_ids] = values
        return dense

    def _slice(self, start: int, stop: int) -> Self:
        splits = self.row_splits[start : stop + 1]
        first, last = int(splits[0]), int(splits[-1])
        entries = {name: getattr(self, name)[first:last] for name in self.entry_fields}
        return replace(
            self, row_splits=splits - first, **entries, **self._row_tensors(slice(start, stop))
        )

    def _take(self, rows: Tensor) -> Self:
        sizes = self.row_splits.diff()[rows]
        splits = _splits(sizes)
        # Entry e of the result lies as far behind its row's first as it did.
        shifts = torch.repeat_interleave(self.row_splits[:-1][rows] - splits[:-1], sizes)
        places = torch.arange(len(shifts), device=self.device) + shifts
        taken = {name: getattr(self, name)[places] for name in self.entry_fields}
        return replace(self, row_splits=splits, **taken, **self._row_tensors(rows))


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class SampledTargets(SparseTargets):
    """How often each id was drawn; counts / num_draws is an unbiased estimate of the row.

    The draws are systematic (logit_codec/sampling.py), so an id of probability p has a count within
    1 of num_draws * p.
    """

    kind: ClassVar[str] = "sampled"
    entry_fields: ClassVar[dict[str, torch.dtype]] = {
        "token_ids": torch.int64,
        "counts": torch.int64,
    }

    counts: Tensor
    """(E,) int64, at least 1; those of a row add up to num_draws."""
    num_draws: int
    """Draws per row, N."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_draws <= MAX_DRAWS:
            raise ValueError(f"num_draws must be 1 to {MAX_DRAWS}, got {self.num_draws}")
        SparseTargets.__post_init__(self)

    def to_dense(self) -> Tensor:
        """(R, V) float32 probabilities: counts / num_draws."""
        return self._dense_of(self.counts.float() / self.num_draws)


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class TopKTargets(SparseTargets):
    """The most likely ids of each row, their logprobs, and the exact mass of all the others."""

    kind: ClassVar[str] = "top_k"
    row_fields: ClassVar[tuple[str, ...]] = (*Targets.row_fields, "tail_logprob")
    entry_fields: ClassVar[dict[str, torch.dtype]] = {
        "token_ids": torch.int64,
        "logprobs": torch.float32,
    }

    logprobs: Tensor
    """(E,) float32."""
    tail_logprob: Tensor
    """(R,) float32: log of 1 - kept mass; -inf if every id is kept."""

    def to_dense(self) -> Tensor:
        """(R, V) float32 probabilities: the kept entries; the tail is not spread over other ids."""
        return self._dense_of(self.logprobs.exp())


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class DenseTargets(Targets):
    """The logprob of every id."""

    kind: ClassVar[str] = "dense"

    logprobs: Tensor
    """(R, V) float32 or bfloat16; -inf where the teacher has a padding row."""

    def __post_init__(self) -> None:
        if self.logprobs.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"logprobs must be float32 or bfloat16, got {self.logprobs.dtype} for dense"
            )
        _expect("logprobs", self.logprobs, None, (*_row(self.logprobs), self.vocab_size))
        Targets.__post_init__(self)

    @property
    def num_rows(self) -> int:
        return len(self.logprobs)

    @property
    def device(self) -> torch.device:
        return self.logprobs.device

    def to_dense(self) -> Tensor:
        """(R, V) float32 probabilities."""
        return self.logprobs.float().exp()

    def _slice(self, start: int, stop: int) -> "DenseTargets":
        return replace(
            self, logprobs=self.logprobs[start:stop], **self._row_tensors(slice(start, stop))
        )

    def _take(self, rows: Tensor) -> "DenseTargets":
        return replace(self, logprobs=self.logprobs[rows], **self._row_tensors(rows))


def _row(value: Tensor) -> tuple[int, ...]:
    """The shape of a row as long as `value`; of length 1 if it has no dimension at all."""
    return tuple(value.shape[:1]) or (1,)


def _dtypes(targets: Targets) -> dict[str, str]:
    return {
        name: str(value.dtype).removeprefix("torch.") for name, value in targets._tensors().items()
    }


def _expect(name: str, value: Tensor, dtype: torch.dtype | None, shape: tuple[int, ...]) -> None:
    if (dtype is not None and value.dtype != dtype) or tuple(value.shape) != shape:
        raise ValueError(
            f"{name} must be {dtype or value.dtype} of shape {shape}, "
            f"got {value.dtype} of shape {tuple(value.shape)}"
        )


def _splits(sizes: Tensor) -> Tensor:
    """(R,) sizes -> (R+1,) where each row begins, and the end."""
    return torch.nn.functional.pad(sizes.cumsum(0), (1, 0))


def most_likely(targets: Targets) -> Tensor:
    """(R,) int64: the teacher's likeliest id of each row, the lowest of equals, as far as the
    targets tell."""
    if isinstance(targets, DenseTargets):
        return targets.logprobs.argmax(1)
    assert isinstance(targets, SampledTargets | TopKTargets)
    rows_E = targets.entry_rows()
    values_E = targets.counts if isinstance(targets, SampledTargets) else targets.logprobs
    values_E = values_E.float()
    best_R = values_E.new_full((targets.num_rows,), -torch.inf)
    best_R = best_R.scatter_reduce(0, rows_E, values_E, "amax")
    # Not chosen by a mask: how many are chosen would have to be known here, and waited for.
    ids_E = targets.token_ids.where(values_E == best_R[rows_E], targets.vocab_size)
    ids_R = torch.full_like(best_R, targets.vocab_size, dtype=torch.int64)
    return ids_R.scatter_reduce(0, rows_E, ids_E, "amin")


def max_row_nbytes(spec: TargetSpec, vocab_size: int) -> float:
    """Upper bound of the memory that one decoded row of the spec takes, in bytes."""
    nbytes = 4 * (spec.realized + spec.entropy + spec.log_z)
    if isinstance(spec, DenseSpec):
        return nbytes + vocab_size * spec.bits // 8
    nbytes += 16  # two elements of row_splits, if the row is alone
    if isinstance(spec, SampledSpec):
        return nbytes + 16 * min(spec.n, vocab_size)
    assert isinstance(spec, TopKSpec)
    return nbytes + 4 + 12 * min(spec.k, vocab_size)
