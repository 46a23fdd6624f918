"""Counts what one client sent, received and asked for again."""

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Holds the totals of one client since it connected."""

    requests: int = 0
    rows: int = 0
    payload_nbytes: int = 0
    sent_nbytes: int = 0
    """Size of all requests as messages, repeated ones included; HTTP/2 adds its frames."""
    received_nbytes: int = 0
    """Size of all answers as messages."""
    texts: int = 0
    """Texts that the teacher wrote to their ends."""
    new_tokens: int = 0
    """Tokens of these texts."""
    resent: int = 0
    reconnects: int = 0
    """Streams that were lost while answers were outstanding."""
    stalled: int = 0
    """Those of them whose replica had fallen silent or was stuck."""
    corrupt: int = 0
