"""Lays documents out in the rows that a student is trained on.

L: tokens of a full row. A row is a dict of (T,) int32 arrays, T <= L: input_ids; labels, if some
tokens are not trained; position_ids, if the row has several documents that must not see each other.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from student_trainer.data.columns import Document
from student_trainer.teachers.layout import IGNORE_INDEX

Packing = Literal["concatenate", "isolate", "pad"]
Row = dict[str, Any]
OPEN_ROWS = 64
"""Rows that wait for documents that fit into them; a longer search would hardly fill them better."""


@dataclass(slots=True)
class Counts:
    """Counts what did not come through as it was."""

    documents: int = 0
    tokens: int = 0
    split_documents: int = 0
    cut_documents: int = 0
    cut_tokens: int = 0
    untrained_documents: int = 0
    untrained_rows: int = 0
    """Of concatenated documents."""

    def describe(self, length: int) -> list[str]:
        """Says in sentences what was cut, split, and left out."""
        notes = []
        if self.cut_documents:
            notes.append(
                f"{self.cut_documents:,} of {self.documents:,} documents are longer than "
                f"{length} tokens and were cut there; {self.cut_tokens:,} of {self.tokens:,} tokens "
                "are not used"
            )
        if self.split_documents:
            notes.append(
                f"{self.split_documents:,} of {self.documents:,} documents are longer than "
                f"{length} tokens and were split into several"
            )
        if self.untrained_documents:
            notes.append(
                f"{self.untrained_documents:,} of {self.documents:,} documents were left "
                f"out: nothing in their first {length} tokens is to be trained"
            )
        if self.untrained_rows:
            notes.append(
                f"{self.untrained_rows:,} rows of {length} tokens were left out: nothing in "
                "them is to be trained"
            )
        return notes


def lay_out(
    documents: Iterable[Document],
    length: int,
    packing: Packing,
    counts: Counts,
    *,
    has_labels: bool = False,
    keep_rest: bool = False,
    teacher_column: str = "",
) -> Iterator[Row]:
    """Yields the rows of documents, with at most `length` tokens each, and counts what is cut.

    concatenate: documents one after another, cut wherever a row is full; with keep_rest the last row
    may be shorter (of two tokens at least), or else it is left out. isolate: several whole documents in a row. pad: one document
    in a row; its teacher, if there are several, in teacher_column. has_labels: whether rows have
    labels; if so, those of documents without any are their ids.
    """
    counted = _count(documents, counts)
    if packing == "concatenate":
        rows = _concatenate(counted, length, counts, has_labels, keep_rest)
    else:
        fitting = _fit(counted, length, counts, may_split=packing == "isolate")
        if packing == "isolate":
            rows = _isolate(fitting, length, has_labels)
        else:
            rows = (
                _join([one], has_labels) | ({teacher_column: one.teacher} if teacher_column else {})
                for one in fitting
            )
    return rows


def _count(documents: Iterable[Document], counts: Counts) -> Iterator[Document]:
    for document in documents:
        counts.documents += 1
        counts.tokens += len(document.ids)
        yield document


def _concatenate(
    documents: Iterable[Document], length: int, counts: Counts, has_labels: bool, keep_rest: bool
) -> Iterator[Row]:
    waiting: list[Document] = []
    size = 0
    for document in documents:
        waiting.append(document)
        size += len(document.ids)
        if size < length:
            continue
        joined = _join(waiting, has_labels)
        end = size - size % length
        for start in range(0, end, length):
            row = {name: values[start : start + length] for name, values in joined.items()}
            if _is_trained(row):
                yield row
            else:
                counts.untrained_rows += 1
        rest = {name: values[end:] for name, values in joined.items()}
        waiting, size = [Document(rest["input_ids"], rest.get("labels"))], size - end
    if keep_rest and waiting and _is_trained(row := _join(waiting, has_labels)):
        yield row


def _is_trained(row: Row) -> bool:
    return bool((row.get("labels", row["input_ids"])[1:] != IGNORE_INDEX).any())


def _fit(
    documents: Iterable[Document], length: int, counts: Counts, may_split: bool
) -> Iterator[Document]:
    """Cuts or splits documents that are too long, and leaves out those with nothing to train."""
    for document in documents:
        size = len(document.ids)
        parts = [document]
        if size > length and may_split and document.may_split:
            counts.split_documents += 1
            bounds = [*range(0, size, length), size]
            bounds[-2] -= size % length == 1  # a token alone would train nothing
            parts = [_part(document, start, end) for start, end in pairwise(bounds)]
        elif size > length:
            counts.cut_documents += 1
            counts.cut_tokens += size - length
            parts = [_part(document, 0, length)]
        for part in parts:
            labels = part.ids if part.labels is None else part.labels
            if (labels[1:] != IGNORE_INDEX).any():
                yield part
            else:
                counts.untrained_documents += 1


def _isolate(documents: Iterable[Document], length: int, has_labels: bool) -> Iterator[Row]:
    """Puts each document into the first row that has room for it.

    At most OPEN_ROWS rows wait for more: this is a stream that may have no end.
    """
    rows: list[list[Document]] = []
    room: list[int] = []
    for document in documents:
        size = len(document.ids)
        at = next((at for at, free in enumerate(room) if free >= size), None)
        if at is None:
            if len(rows) == OPEN_ROWS:  # the fullest has waited enough
                fullest = room.index(min(room))
                room.pop(fullest)
                yield _join(rows.pop(fullest), has_labels, isolated=True)
            rows.append([])
            room.append(length)
            at = len(rows) - 1
        rows[at].append(document)
        room[at] -= size
        if room[at] < 2:  # no document is that short
            room.pop(at)
            yield _join(rows.pop(at), has_labels, isolated=True)
    for row in rows:
        yield _join(row, has_labels, isolated=True)


def _part(document: Document, start: int, end: int) -> Document:
    labels = document.labels
    return replace(
        document,
        ids=document.ids[start:end],
        labels=None if labels is None else labels[start:end],
    )


def _join(documents: list[Document], has_labels: bool, isolated: bool = False) -> Row:
    """Returns documents one after another as a row."""
    row = {"input_ids": np.concatenate([document.ids for document in documents])}
    if has_labels:
        labels = [one.ids if one.labels is None else one.labels for one in documents]
        row["labels"] = np.concatenate(labels)
    if isolated:
        lengths = [len(document.ids) for document in documents]
        row["position_ids"] = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
        if has_labels:  # the first token of a document follows nothing
            row["labels"] = np.where(row["position_ids"] == 0, IGNORE_INDEX, row["labels"])
    return row
