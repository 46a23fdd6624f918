"""Defines how much a request may ask for."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request and one stream may ask for; sizes in tokens and bytes."""

    max_sequence_tokens: int
    max_request_tokens: int
    max_request_sequences: int
    max_request_nbytes: int
    max_top_k: int
    max_reply_nbytes: int
    max_stream_nbytes: int
    max_queued_tokens: int
    max_answers_nbytes: int = 1 << 30
    """Of unfinished answers of all streams of a replica."""
    max_part_nbytes: int = 1 << 20
