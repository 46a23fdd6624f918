"""Carries columns of the data past a Trainer's collator to the teacher, and none of them to the student.

A Trainer removes columns that the student's forward does not take, and collators make tensors or fail.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from student_trainer.errors import InvalidRequest
from student_trainer.teachers.layout import ROW_COLUMNS


@dataclass(frozen=True, slots=True)
class CarryingCollator:
    """Makes batches with a Trainer's own collator, and puts columns of the rows beside them."""

    collate: Callable[[list[Any]], Mapping[str, Any]]
    known: Collection[str] | None
    """Columns that the collator gets; None for all."""
    column: str | None
    """The column that names the teacher of each row, if one does."""
    weigh: Callable[[Sequence[Any]], Any] | None
    """Turns the values of that column into a tensor, which every loader can divide and send."""
    carries_all: bool
    """Whether every other column is carried too, for a view."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns a batch that has the columns under ROW_COLUMNS. Raises InvalidRequest."""
        known = self.known
        if known is None:
            batch = self.collate(list(rows))
        else:
            batch = self.collate([{k: v for k, v in row.items() if k in known} for row in rows])
        carried: dict[str, Any] = {}
        if self.carries_all:
            names = [name for name in rows[0] if name not in batch]
            carried = {name: [row[name] for row in rows] for name in names}
        if self.column is not None and self.weigh is not None:
            lacking = next((row for row in rows if row.get(self.column) is None), None)
            if lacking is not None:
                raise InvalidRequest(
                    f"a row of the training data has no column {self.column!r}, which names its "
                    f"teacher; it has {', '.join(lacking)}"
                )
            carried[self.column] = self.weigh([row[self.column] for row in rows])
        return {**batch, ROW_COLUMNS: carried}
