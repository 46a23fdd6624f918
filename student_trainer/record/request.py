"""Defines one request to a record, and the counters of what a record handed out."""

from dataclasses import dataclass

import xxhash

from logit_codec import ids_digest
from student_trainer.teachers.request import Answer, Piece, ScoreOptions, row_mask


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

    piece: Piece
    options: ScoreOptions
    key: bytes
    """Digest of the ids of the sequence and, if there are any, of those given for its rows."""
    row_mask: bytes | None

    @classmethod
    def of(cls, piece: Piece, options: ScoreOptions) -> "Request":
        key = ids_digest(piece.token_ids)
        if piece.given_ids is not None:
            key = xxhash.xxh3_128_digest(key + piece.given_ids.digest())
        return cls(piece, options, key, row_mask(piece.rows, piece.num_tokens - 1))
