"""Reads which positions of a batch are trained, and splits it into sequences."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from logit_codec import GivenIds
from student_trainer.errors import InvalidRequest
from student_trainer.teachers.request import Piece

IGNORE_INDEX = -100
ROW_COLUMNS = "teacher_columns"
"""The key of a batch under which a Trainer carries columns that only the teacher reads."""


def as_token_ids(sequence: Any, whose: str, *, at_least: int = 2) -> Tensor:
    """Makes (L,) int64 on the CPU from a tensor, an array or a list.

    Raises InvalidRequest; its message begins with `whose`, such as "sequence 3".
    """
    try:
        ids = torch.as_tensor(sequence)
    except (TypeError, ValueError, RuntimeError):
        raise InvalidRequest(
            f"{whose} must be a list or tensor of token ids, got {type(sequence).__name__}"
        ) from None
    if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InvalidRequest(
            f"{whose} must be one row of whole numbers, got "
            f"{str(ids.dtype).removeprefix('torch.')} of shape {tuple(ids.shape)}"
        )
    if len(ids) < at_least:
        why = "are needed for one row" if at_least == 2 else "is needed"
        raise InvalidRequest(f"{whose} has {len(ids)} tokens; at least {at_least} {why}")
    ids = ids.to("cpu", torch.int64)
    _check_ids(ids, whose)
    return ids


def as_given_ids(ids: Any, where: str) -> GivenIds | None:
    """Makes GivenIds of what `GivenIds.of` takes; None of None. Raises InvalidRequest."""
    if ids is None:
        return None
    try:
        return GivenIds.of(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidRequest(f"{where}: {error}") from None


def _batch_ids(batch: Any, number: int) -> Tensor:
    """Returns (B, T) int64 input_ids on the CPU. Raises InvalidRequest."""
    if not isinstance(batch, Mapping):
        raise InvalidRequest(
            f"batch {number} must be a mapping with input_ids, got {type(batch).__name__}"
        )
    if "input_ids" not in batch:
        raise InvalidRequest(f"batch {number} has no input_ids; it has {', '.join(batch)}")
    wanted = f"batch {number}: input_ids must be whole numbers of shape (B, T) or (T,)"
    try:
        ids = torch.atleast_2d(torch.as_tensor(batch["input_ids"]))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidRequest(f"{wanted}: {error}") from None
    if ids.dim() != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InvalidRequest(
            f"{wanted}, got {str(ids.dtype).removeprefix('torch.')} of shape {tuple(ids.shape)}"
        )
    return ids.to("cpu", torch.int64)


def _check_ids(ids: Tensor, whose: str) -> None:
    """Raises InvalidRequest for values that are not token ids."""
    if not ids.numel():
        return
    low, high = (int(value) for value in ids.aminmax())
    if low < 0 or high >= 2**31:
        raise InvalidRequest(
            f"{whose} has id {low if low < 0 else high}; ids are 0 to 2**31-1 "
            "(is this padded with labels such as -100?)"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Says which positions of a batch are trained and which belong together; (B, T), on the CPU."""

    ids: Tensor
    """int64."""
    real: Tensor
    """bool: not padding."""
    document: Tensor
    """int64: equal within a document of a row."""
    trained: Tensor
    """bool: position t is trained on predicting token t+1."""
    labels: Tensor
    """int64: the batch's own, or its ids."""

    @classmethod
    def of(cls, batch: Mapping[str, Any], number: int = 0) -> "Layout":
        """Reads a padded or packed batch with input_ids of (B, T) or (T,).

        Position t is trained on predicting token t+1 if both are real (attention_mask, where
        given), belong to one document and labels[t+1] is not -100 (where given). A document begins
        where position_ids do not go up by one, where seq_idx changes and where cu_seq_lens_q says so.
        Raises InvalidRequest for shapes that do not fit; its message names the batch by `number`.
        """
        ids = _batch_ids(batch, number)

        def optional(name: str) -> Tensor | None:
            """Returns an optional entry of the batch, which must have the shape of its ids."""
            if batch.get(name) is None:
                return None
            values = torch.atleast_2d(torch.as_tensor(batch[name])).cpu()
            if values.shape != ids.shape:
                raise InvalidRequest(
                    f"batch {number}: {name} must have the shape of input_ids "
                    f"{tuple(ids.shape)}, got {tuple(values.shape)}"
                )
            return values

        mask = optional("attention_mask")
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask == 1
        if mask is not None and bool((~real & (mask != 0)).any()):
            odd = mask[~real & (mask != 0)][0].item()
            raise InvalidRequest(
                f"batch {number}: attention_mask must be 1 for a token and 0 for padding, got {odd}"
            )
        _check_ids(ids[real], f"batch {number}")
        document = _find_starts(batch, ids, number).cumsum(1)
        trained = torch.zeros_like(real)
        trained[:, :-1] = real[:, :-1] & real[:, 1:] & (document[:, :-1] == document[:, 1:])
        labels = optional("labels")
        if labels is None:
            return cls(ids, real, document, trained, ids)
        trained[:, :-1] &= labels[:, 1:] != IGNORE_INDEX
        return cls(ids, real, document, trained, labels)

    def pieces(self) -> list[Piece]:
        """Returns the sequences with something to train, and their trained rows."""
        num_rows, num_tokens = self.ids.shape
        # One run per (row, document): where either changes, and where padding begins or ends.
        run = self.document + torch.arange(num_rows)[:, None] * (num_tokens + 1)
        edges = torch.ones_like(self.real)
        edges[:, 1:] = (run[:, 1:] != run[:, :-1]) | (self.real[:, 1:] != self.real[:, :-1])
        first = edges.flatten().nonzero()[:, 0]
        lengths = torch.diff(first, append=torch.tensor([self.ids.numel()]))
        flat_ids, flat_trained = self.ids.flatten(), self.trained.flatten()
        flat_real = self.real.flatten()
        pieces = []
        for start, length in zip(first.tolist(), lengths.tolist(), strict=True):
            rows = flat_trained[start : start + length].nonzero()[:, 0]
            if flat_real[start] and len(rows):
                ids = flat_ids[start : start + length]
                pieces.append(Piece(ids, rows, batch_row=start // num_tokens))
        return pieces


def _find_starts(batch: Mapping[str, Any], ids: Tensor, number: int) -> Tensor:
    """Returns (B, T) bool: where a document begins. Raises InvalidRequest."""
    starts = torch.zeros(ids.shape, dtype=torch.bool)
    # A position goes up by one within a document, and the index of a sequence stays.
    for name, step in (("position_ids", 1), ("seq_idx", 0)):
        if batch.get(name) is None:
            continue
        values = torch.atleast_2d(torch.as_tensor(batch[name])).cpu()
        if values.shape not in (ids.shape, (1, ids.shape[1])):
            raise InvalidRequest(
                f"batch {number}: {name} must have the shape of input_ids {tuple(ids.shape)}, or one "
                f"row for all, got {tuple(values.shape)}"
            )
        starts[:, 1:] |= values[:, 1:] != values[:, :-1] + step
    if batch.get("cu_seq_lens_q") is not None:
        ends = torch.as_tensor(batch["cu_seq_lens_q"]).cpu().flatten().long()
        if not len(ends) or ends[0] != 0 or (ends.diff() < 0).any() or ends[-1] > ids.numel():
            raise InvalidRequest(
                f"batch {number}: cu_seq_lens_q must go up from 0 to at most the {ids.numel()} tokens "
                f"of input_ids, got {ends.tolist()[:8]}"
            )
        starts.view(-1)[ends[ends < ids.numel()]] = True
    return starts


def split_batch(batch: Mapping[str, Any], number: int) -> list[Piece]:
    """Splits a padded or packed batch into sequences, each with the rows that are trained.

    Raises InvalidRequest if nothing is trained; `Layout.of` has the rules.
    """
    pieces = Layout.of(batch, number).pieces()
    if not pieces:
        raise InvalidRequest(f"batch {number} has no position to train on")
    return pieces


def spread_columns(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a batch with the columns under ROW_COLUMNS beside the others."""
    if ROW_COLUMNS not in batch:
        return batch
    return {**{k: v for k, v in batch.items() if k != ROW_COLUMNS}, **batch[ROW_COLUMNS]}


def read_row(batch: Mapping[str, Any], row: int) -> dict[str, Any]:
    """Returns the columns of one row of a batch: whatever has one value for each of its rows."""
    ids = batch["input_ids"]
    if torch.as_tensor(ids[0]).dim() == 0:  # (T,): the batch is one row
        return dict(batch)
    return {
        name: values[row]
        for name, values in batch.items()
        if hasattr(values, "__len__") and not isinstance(values, str) and len(values) == len(ids)
    }
