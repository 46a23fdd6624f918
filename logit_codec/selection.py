"""Selects targets from logits: what a spec asks for of each row, on the logits' own device.

Letters: R rows, V columns of the logits.

`select_rows` has fixed shapes and never waits for the device; `Selection.compact` makes targets of
its result, on a CPU.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from logit_codec.blocks import LAUNCHES, RowMasses, new_scratch
from logit_codec.given_ids import GivenIds
from logit_codec.inputs import RowInputs
from logit_codec.parsing import parse_targets
from logit_codec.spec import TargetSpec
from logit_codec.targets import Targets
from logit_codec.vocabulary_part import VocabularyPart

ARITHMETIC = "shares-4"
"""Names how shares are added up: another order rounds otherwise, and may draw another id. Part of a
teacher's fingerprint."""

PIECE_NBYTES = 2 << 20
"""Memory of the gathered logits and what is computed from them, on a CPU: its cache should hold it.
In pieces of 1 MiB the calls take longer than the work at V = 262,144."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Selection:
    """Holds what was selected from R rows of logits, in tensors of a fixed shape per row.

    Raises ValueError if the columns differ in their number of rows.
    """

    spec: TargetSpec
    vocab_size: int
    temperature: float
    columns: dict[str, Tensor]
    """Tensors whose first dimension is R: those that every kind has, named like the fields of
    `Targets`, and the kind's own."""

    def __post_init__(self) -> None:
        if len({len(column) for column in self.columns.values()}) != 1:
            shapes = {name: tuple(column.shape) for name, column in self.columns.items()}
            raise ValueError(f"the columns must have one number of rows, got {shapes}")

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __repr__(self) -> str:
        parts = [f"{self.spec}", f"{len(self)} rows", f"vocab_size={self.vocab_size}"]
        for name, value in self.columns.items():
            parts.append(f"{name}={str(value.dtype).removeprefix('torch.')}{list(value.shape)}")
        return f"Selection({', '.join(parts)}, temperature={self.temperature})"

    @property
    def nbytes(self) -> int:
        """Memory of all columns."""
        return sum(column.nbytes for column in self.columns.values())

    def __getitem__(self, rows: slice) -> "Selection":
        """Returns consecutive rows without copying."""
        return self._with({name: column[rows] for name, column in self.columns.items()})

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Selection":
        """Returns the same rows with every column on `device`."""
        moved = {
            name: column.to(device, non_blocking=non_blocking)
            for name, column in self.columns.items()
        }
        return self._with(moved)

    def empty_like(self, num_rows: int, *, pin_memory: bool = False) -> "Selection":
        """Allocates columns for `num_rows` rows of this kind, with undefined content.

        pin_memory: in pinned memory of the CPU, instead of on the device of these rows.
        """
        empty = {}
        for name, column in self.columns.items():
            empty[name] = torch.empty(
                (num_rows, *column.shape[1:]),
                dtype=column.dtype,
                device="cpu" if pin_memory else column.device,
                pin_memory=pin_memory,
            )
        return self._with(empty)

    def copy_to(self, other: "Selection", first_row: int = 0) -> None:
        """Copies all rows into those of `other` from `first_row` on; waits for no pinned memory."""
        for name, column in self.columns.items():
            place = other.columns[name][first_row : first_row + len(column)]
            place.copy_(column, non_blocking=True)

    def compact(self) -> Targets:
        """Makes targets of the rows, on the CPU."""
        columns = {name: column.cpu() for name, column in self.columns.items()}
        per_row = {name: columns.pop(name) for name in Targets.row_fields if name in columns}
        common = {"vocab_size": self.vocab_size, "temperature": self.temperature, **per_row}
        return self.spec.compact(columns, common)

    def _with(self, columns: dict[str, Tensor]) -> "Selection":
        return replace(self, columns=columns)

    @staticmethod
    def cat(parts: Sequence["Selection"]) -> "Selection":
        """Joins the rows of all parts, one part after the other.

        Raises ValueError if there is no part, or if parts differ in spec, vocabulary or
        temperature.
        """
        if not parts:
            raise ValueError("Selection.cat needs at least one part")
        first = parts[0]
        for other in parts[1:]:
            for name in ("spec", "vocab_size", "temperature"):
                mine, others = getattr(first, name), getattr(other, name)
                if mine != others:
                    raise ValueError(
                        f"cannot join selections of different {name}: {mine}, {others}"
                    )
        if len(parts) == 1:
            return first
        joined = {name: torch.cat([part.columns[name] for part in parts]) for name in first.columns}
        return first._with(joined)


def select(
    logits: Tensor,
    spec: str | TargetSpec,
    *,
    temperature: float = 1.0,
    uniforms: Tensor | None = None,
    realized_ids: Tensor | None = None,
    given_ids: GivenIds | Tensor | None = None,
    hidden: Tensor | None = None,
    features: Tensor | None = None,
) -> Targets:
    """Selects from softmax(logits / temperature) what `spec` asks for.

    logits: (R, V) of a floating dtype; -inf gives an id probability 0. uniforms: (R,) float64 in
    [0, 1), needed for sampled; `logit_codec.uniforms` makes them. realized_ids: (R,) int64, the
    tokens that really came next; needed if `spec.realized`. given_ids: for given_ids, what
    `GivenIds.of` takes. hidden: (R, D), for hidden; features: (R, layers, D), for features.

    Extra memory in a large vocabulary is a small part of the logits, and the result. A row that is
    not finite comes back so that `encode` refuses it, and leaves the others alone. Raises
    ValueError for a k above V and for uniforms, ids or states that are missing, have another shape
    or are out of range.
    """
    spec = parse_targets(spec)
    if spec.needs_uniforms and uniforms is not None:
        _refuse_values_outside(spec, uniforms, len(logits))
    padded = None
    if given_ids is not None:
        given = GivenIds.of(given_ids)
        largest = int(given.token_ids.max()) if len(given.token_ids) else -1
        if largest >= logits.shape[1]:
            raise ValueError(
                f"given ids must be below the vocabulary's {logits.shape[1]}, got {largest}"
            )
        spec, padded = spec.for_rows(given.most), given.padded().to(logits.device)
    rows = select_rows(
        logits,
        spec,
        temperature=temperature,
        realized_ids=realized_ids,
        uniforms=uniforms,
        given_ids=padded,
        hidden=hidden,
        features=features,
    )
    return rows.compact().to(logits.device)


@torch.no_grad()
def select_rows(
    logits: Tensor,
    spec: str | TargetSpec,
    *,
    temperature: float = 1.0,
    part: VocabularyPart | None = None,
    **inputs: Tensor | None,
) -> Selection:
    """Selects what `select` does, in fixed shapes and without waiting for the logits' device.

    logits: (R, V); unless `spec.reads_logits`, only their shape is looked at. inputs: those of
    `RowInputs`, on the same device; that the uniforms are in [0, 1) and given ids in the vocabulary
    is not checked. part: which columns `logits` has, where other processes hold the others; all of
    them call this at once, and each gets the whole selection.
    `compact` of the result is what `select` returns. A row's result does not depend on the rows
    beside it. Extra memory beside the result is at most a quarter of the logits as float32 from 128
    rows of 32,000 columns on. Raises ValueError as `select` does.
    """
    spec, rows = parse_targets(spec), RowInputs(**inputs)
    num_rows, vocab_size = logits.shape
    if part is not None:
        vocab_size = part.vocab_size
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    _check_inputs(spec, rows, num_rows)
    spec.check_vocabulary(vocab_size)
    if num_rows == 0:  # reductions over no rows are not defined on every device
        made = {
            name: value.new_zeros((1, *value.shape[1:])) for name, value in rows.tensors().items()
        }
        row = logits.new_zeros(1, logits.shape[1])
        return select_rows(row, spec, temperature=temperature, part=part, **made)[:0]
    if logits.stride(1) != 1:
        logits = logits.contiguous()

    if not spec.reads_logits:
        step = num_rows
    elif logits.device.type == "cpu":
        step = max(1, PIECE_NBYTES // spec.scratch_row_nbytes(vocab_size))
    else:
        step = -(-num_rows // LAUNCHES)
    scratch = new_scratch(logits, part) if spec.reads_logits else None
    whole = None
    for first in range(0, num_rows, step):
        some = slice(first, first + step)
        columns = _select_piece(logits[some], spec, temperature, rows[some], scratch, part)
        piece = Selection(spec, vocab_size, temperature, columns)
        if step >= num_rows:
            return piece
        if whole is None:
            whole = piece.empty_like(num_rows)
        piece.copy_to(whole, first)
    assert whole is not None
    return whole


def _select_piece(
    logits: Tensor,
    spec: TargetSpec,
    temperature: float,
    inputs: RowInputs,
    scratch: Tensor | None,
    part: VocabularyPart | None,
) -> dict[str, Tensor]:
    """Makes all columns of a few rows."""
    if not spec.reads_logits:
        return spec.select(None, inputs)
    masses = RowMasses.of(
        logits,
        temperature,
        maxima=spec.needs_maxima,
        entropy=spec.entropy,
        scratch=scratch,
        part=part,
    )
    columns = {}
    if spec.log_z:
        columns["log_z"] = masses.log_z_R.float()
    if spec.realized:
        assert inputs.realized_ids is not None
        realized_logit_R = masses.logits_at(inputs.realized_ids.long()[:, None])[:, 0].double()
        columns["realized_logprob"] = (realized_logit_R / temperature - masses.log_z_R).float()
    if masses.entropy_R is not None:
        columns["entropy"] = masses.entropy_R.float()
    return columns | spec.select(masses, inputs)


def _check_inputs(spec: TargetSpec, inputs: RowInputs, num_rows: int) -> None:
    """Raises ValueError unless everything that the spec needs is there, with the right shape."""
    realized = inputs.realized_ids
    if spec.realized and (realized is None or realized.shape != (num_rows,)):
        got = "none" if realized is None else f"shape {tuple(realized.shape)}"
        raise ValueError(
            f"realized_ids must have shape ({num_rows},) unless the spec says realized=0, got {got}"
        )
    if spec.needs_uniforms:
        _check_uniforms(spec, inputs.uniforms, num_rows)
    if spec.needs_given_ids:
        inputs.check("given_ids", num_rows, torch.int64, 2)
    if spec.needs_hidden:
        inputs.check("hidden", num_rows, None, 2)
    if spec.feature_layers:
        inputs.check("features", num_rows, None, 3)


def _check_uniforms(spec: TargetSpec, uniforms: Tensor | None, num_rows: int) -> None:
    """Raises ValueError unless there is one uniform number for each row."""
    wanted = f"{spec.kind} targets need uniforms, ({num_rows},) float64 in [0, 1)"
    if uniforms is None:
        raise ValueError(f"{wanted}, got none; logit_codec.uniforms makes them")
    if uniforms.shape != (num_rows,) or uniforms.dtype != torch.float64:
        raise ValueError(f"{wanted}, got {uniforms.dtype} of shape {tuple(uniforms.shape)}")


def _refuse_values_outside(spec: TargetSpec, uniforms: Tensor, num_rows: int) -> None:
    """Raises ValueError unless all uniform numbers are in [0, 1)."""
    _check_uniforms(spec, uniforms, num_rows)
    if not bool(((uniforms >= 0) & (uniforms < 1)).all()):
        raise ValueError(
            f"{spec.kind} targets need uniforms, ({num_rows},) float64 in [0, 1), got values "
            "outside"
        )
