"""Defines one request to a record, and the counters of what a record handed out."""

from dataclasses import dataclass

from torch import Tensor

from logit_codec import ids_digest
from student_trainer.teachers.request import Answer, ScoreOptions, row_mask


@dataclass(slots=True)
class RecordCounters:
    """Counts what a record has handed out so far."""

    rows: int = 0
    payload_nbytes: int = 0
    replayed: int = 0
    """Sequences that came from the record."""
    asked: int = 0
    """Sequences that the live teacher was asked for."""
    quarantined: int = 0
    """Shards that turned out to be damaged."""

    def hand_out(self, answer: Answer, request: "Request") -> Answer:
        """Counts an answer and returns it, without its payloads unless they were asked for."""
        self.rows += answer.targets.num_rows
        self.payload_nbytes += sum(map(len, answer.payloads))
        return answer if request.options.keep_payloads else Answer(answer.targets)


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One sequence, the rows of it that are wanted, and the draw that was chosen for it."""

    token_ids: Tensor
    rows: Tensor | None
    options: ScoreOptions
    key: bytes
    row_mask: bytes | None

    @classmethod
    def of(cls, token_ids: Tensor, rows: Tensor | None, options: ScoreOptions) -> "Request":
        mask = row_mask(rows, len(token_ids) - 1)
        return cls(token_ids, rows, options, ids_digest(token_ids), mask)
