"""Defines how much a request may ask for."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds what one request and one stream may ask for, in tokens and bytes."""

    max_sequence_tokens: int
    max_request_tokens: int
    max_request_sequences: int
    max_request_nbytes: int
    max_top_k: int
    max_reply_nbytes: int
    max_stream_nbytes: int
    max_queued_tokens: int
    max_answers_nbytes: int = 1 << 30
    """Bound of the unfinished answers of all streams of a replica."""
    max_part_nbytes: int = 1 << 20
