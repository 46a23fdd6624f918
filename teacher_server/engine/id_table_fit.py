"""Fits an id table to a teacher, so that ids that it often keeps get short codes.

The table is fitted on half of the text's pieces and its gain is measured on the other half, in the
bytes of real containers. It is never fitted from what trainers send.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from logit_codec import IdTable, SampledSpec, encode, expected_inclusions, fit_id_table, select
from logitstream.files import write_atomically
from teacher_server.engine.model import TeacherModel
from teacher_server.errors import ModelError

SPEC = SampledSpec(n=64, realized=False)
"""What the table is fitted for; it suits top_k too, whose ids are much the same."""
PIECE_TOKENS = 512
CHUNK_ROWS = 128


@dataclass(frozen=True, slots=True)
class Fit:
    """Holds a table and what it gains on text that it was not fitted on."""

    table: IdTable
    fitted_rows: int
    measured_rows: int
    identity_nbytes: float
    """Bytes per row with the built-in table."""
    fitted_nbytes: float


def fit_ids(model: TeacherModel, text: str, *, max_tokens: int) -> Fit:
    """Fits a table for `model` to the first `max_tokens` tokens of `text`.

    Raises ModelError if the model has no tokenizer or the text is too short to fit and measure.
    """
    if model.tokenizer is None:
        raise ModelError("the model has no tokenizer, so it cannot read a text")
    ids = torch.tensor(model.tokenizer(text, add_special_tokens=False)["input_ids"][:max_tokens])
    length = min(PIECE_TOKENS, model.max_sequence_tokens, len(ids) // 2)
    if length < 2:
        raise ModelError(f"the text has {len(ids)} tokens; a few thousand are needed")
    pieces = [piece for piece in ids.split(length) if len(piece) > 1]
    fitted, measured = pieces[0::2], pieces[1::2]
    inclusions = torch.zeros(model.vocab_size, dtype=torch.float64)
    for logits in _logits(model, fitted):
        inclusions += expected_inclusions(logits, num_draws=SPEC.n)
    fitted_rows = sum(len(piece) - 1 for piece in fitted)
    table = fit_id_table(inclusions, fitted_rows)
    generator = torch.Generator().manual_seed(0)
    nbytes = {None: 0, table: 0}
    for logits in _logits(model, measured):
        draws = torch.rand(len(logits), generator=generator, dtype=torch.float64)
        targets = select(logits, SPEC, uniforms=draws.to(logits.device))
        for candidate in nbytes:
            nbytes[candidate] += len(encode(targets, id_table=candidate))
    rows = sum(len(piece) - 1 for piece in measured)
    return Fit(table, fitted_rows, rows, nbytes[None] / rows, nbytes[table] / rows)


def save(table: IdTable, path: Path) -> None:
    """Writes a table so that a reader sees the old file or the new one, whole. Raises OSError."""
    write_atomically(path, table.to_bytes())


@torch.inference_mode()
def _logits(model: TeacherModel, pieces: list[Tensor]) -> Iterator[Tensor]:
    """Yields the (C, V) float32 logits of the pieces' rows, a chunk at a time."""
    for piece in pieces:
        hidden = model.padded_hidden_states([piece])[0, : len(piece) - 1]
        for hidden_CD in hidden.split(CHUNK_ROWS):
            logits_CV = model.logits(hidden_CD).float()
            logits_CV[:, model.effective_vocab_size :] = -torch.inf
            yield logits_CV
