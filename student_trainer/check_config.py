"""Declares the options of `student-trainer check`."""

import re
from pathlib import Path

from pydantic import field_validator

from logitstream.options import AddressedService, Json


def parse_count(text: str) -> int:
    """1000, 300M, 1.5B -> a number of tokens. Raises ValueError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kKmMbBtT]?)", text.strip())
    if match is None:
        raise ValueError(f"a number of tokens is written like 1000, 300M or 1.5B; got {text!r}")
    scale = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}[match.group(2).lower()]
    return round(float(match.group(1)) * scale)


class CheckConfig(AddressedService):
    """Check that a teacher fits the student and its targets the text, and measure its speed."""

    student: Path | None = None
    """Hugging Face folder or hub id of the student: its tokenizer is compared with the
    teacher's."""
    tokens: str | None = None
    """Estimate hours, bytes and disk for this many tokens, such as 1B or 300M."""
    targets: str = "sampled"
    """Targets to request."""
    as_json: Json = False
    """Print JSON."""

    @field_validator("tokens")
    @classmethod
    def _check_tokens(cls, tokens: str | None) -> str | None:
        if tokens is not None:
            parse_count(tokens)
        return tokens
