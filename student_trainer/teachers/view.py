"""Shows a teacher another text than the student's, for the same trained tokens.

L: tokens of the student's sequence. N: its trained rows. M: tokens of the teacher's. Row t of a sequence
predicts token t+1.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from student_trainer.errors import InvalidRequest
from student_trainer.teachers.layout import as_token_ids, read_row, split_batch
from student_trainer.teachers.request import Piece

TeacherView = Callable[[Tensor, Mapping[str, Any]], Any]
"""Takes (L,) ids of a sequence and the columns of its row of the batch; returns what the teacher reads.

That is (M,) ids, or a tuple of these and (L-1,) rows: row i of the student's text belongs to row rows[i]
of the teacher's, -1 if to none. Ids alone must end as the student's text does, from its first trained
token on, or hold the student's tokens from the first to the last trained one exactly once. A view must
return the same for the same arguments: it is called again after a resume.
"""


class PrefixView:
    """Shows a teacher one text in front of every sequence, behind the begin token if it has one."""

    def __init__(self, text: str, tokenizer: Any) -> None:
        """text: special tokens in it count as such. Raises ValueError if it has no token."""
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if not ids:
            raise ValueError(f"the text {text!r} that the teacher is to read has no token")
        self._ids = torch.tensor(ids)
        self._begin = tokenizer.bos_token_id

    def __len__(self) -> int:
        """How many tokens more the teacher reads."""
        return len(self._ids)

    def __call__(self, ids: Tensor, row: Mapping[str, Any]) -> Tensor:
        """Returns what the teacher reads."""
        at = int(self._begin is not None and int(ids[0]) == self._begin)
        return torch.cat([ids[:at], self._ids, ids[at:]])


def divide_batch(
    batch: Mapping[str, Any], number: int, view: TeacherView | None = None, tokenizer: Any = None
) -> dict[str, Piece]:
    """Returns what a teacher reads of a batch, by the name that errors give each piece.

    tokenizer: for the text in errors. Raises InvalidRequest if nothing is trained, and if the teacher's
    tokens of a view are not the student's.
    """
    pieces: dict[str, Piece] = {}
    for piece in split_batch(batch, number):
        where = f"batch {number}, row {piece.batch_row}"
        same = sum(other.batch_row == piece.batch_row for other in pieces.values())
        pieces[f"{where}, sequence {same}" if same else where] = piece
    if view is None:
        return pieces
    return {where: _show(piece, view, batch, where, tokenizer) for where, piece in pieces.items()}


def _show(
    piece: Piece, view: TeacherView, batch: Mapping[str, Any], where: str, tokenizer: Any
) -> Piece:
    """Returns the piece of the teacher's text whose rows belong to those of a student's piece."""
    try:
        found = view(piece.token_ids, read_row(batch, piece.batch_row))
    except Exception as error:
        error.add_note(f"raised by teacher_view for {where}")
        raise
    rows = None
    if isinstance(found, tuple):
        if len(found) != 2:
            raise InvalidRequest(
                f"{where}: teacher_view must return ids, or (ids, rows), got {len(found)} values"
            )
        found, rows = found
    ids = as_token_ids(found, f"{where}: what teacher_view returned")
    assert piece.rows is not None
    next_ids_N = piece.token_ids[piece.rows + 1]
    if rows is None:
        rows_N = _find_rows(piece.token_ids, piece.rows, ids, where)
    else:
        rows_N = _pick_rows(rows, piece, len(ids), where)
    is_other_N = _read(ids, rows_N + 1) != next_ids_N
    if is_other_N.any():
        first = int(is_other_N.nonzero()[0])
        ours, theirs = int(piece.rows[first]) + 1, int(rows_N[first]) + 1
        theirs_is = "outside of its text"
        if 1 <= theirs < len(ids):
            theirs_is = _describe(int(ids[theirs]), tokenizer)
        raise InvalidRequest(
            f"{where}: teacher_view must show the student's trained tokens: token {ours} of the "
            f"student's text is {_describe(int(next_ids_N[first]), tokenizer)}, and token {theirs} of "
            f"the teacher's {theirs_is}. Return (ids, rows) if they are elsewhere."
        )
    return replace(piece, token_ids=ids, rows=rows_N)


def _find_rows(student_ids: Tensor, rows_N: Tensor, ids: Tensor, where: str) -> Tensor:
    """Returns (N,) rows of the teacher's text, from its end or from the one place that agrees."""
    from_end_N = rows_N + (len(ids) - len(student_ids))
    if bool((_read(ids, from_end_N + 1) == student_ids[rows_N + 1]).all()):
        return from_end_N
    first, last = int(rows_N[0]), int(rows_N[-1])
    starts = _find_run(student_ids[first + 1 : last + 2], ids)
    if len(starts) > 1:
        raise InvalidRequest(
            f"{where}: teacher_view shows the student's tokens {first + 1} to {last + 1} several times, "
            f"at {starts[0]} and {starts[1]}. Return (ids, rows) to say which of them are meant."
        )
    return rows_N + (starts[0] - 1 - first) if starts else from_end_N


def _find_run(run: Tensor, ids: Tensor) -> list[int]:
    """Returns the first two places at which all of `run` lies within ids[1:]."""
    wanted, text = (one.to(torch.int32).numpy().tobytes() for one in (run, ids))
    found: list[int] = []
    at = 4
    while len(found) < 2 and (at := text.find(wanted, at)) >= 0:
        if at % 4 == 0:
            found.append(at // 4)
        at += 1
    return found


def _pick_rows(rows: Any, piece: Piece, num_tokens: int, where: str) -> Tensor:
    """Returns (N,) rows of the teacher's text, as the view names them for all rows."""
    rows_L = torch.as_tensor(rows)
    wanted = piece.num_tokens - 1
    if rows_L.shape != (wanted,) or rows_L.is_floating_point() or rows_L.dtype == torch.bool:
        raise InvalidRequest(
            f"{where}: the rows of teacher_view must be {wanted} whole numbers, one for each row of the "
            f"student's text (-1 for none), got {str(rows_L.dtype).removeprefix('torch.')} of shape "
            f"{tuple(rows_L.shape)}"
        )
    rows_N = rows_L.to("cpu", torch.int64)[piece.rows]
    is_out_N = (rows_N < 0) | (rows_N >= num_tokens - 1)
    is_out_N[1:] |= rows_N.diff() <= 0
    if is_out_N.any():
        first = int(is_out_N.nonzero()[0])
        assert piece.rows is not None
        raise InvalidRequest(
            f"{where}: the rows of teacher_view must go up from 0 to at most {num_tokens - 2} where the "
            f"student is trained; for the student's row {int(piece.rows[first])} it is "
            f"{int(rows_N[first])}"
        )
    return rows_N


def _read(ids: Tensor, places_N: Tensor) -> Tensor:
    """Returns (N,) ids, -1 where a place is no token that follows another."""
    is_in_N = (places_N >= 1) & (places_N < len(ids))
    return ids[places_N.clamp(0, len(ids) - 1)].where(is_in_N, -1)


def _describe(token_id: int, tokenizer: Any) -> str:
    return f"{token_id}" if tokenizer is None else f"{token_id} ({tokenizer.decode([token_id])!r})"
