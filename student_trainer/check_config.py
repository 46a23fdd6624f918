"""Declares the options of `student-trainer check`."""

import re
from pathlib import Path

from pydantic import field_validator, model_validator

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
    reference: str | None = None
    """Hugging Face folder or hub id of the model that the teacher should be, loaded here as it was
    saved: measures KL(reference || served) and top-1 agreement. Exact if the team may ask for dense
    targets, else a lower bound from top_k ones."""
    text: Path | None = None
    """With --reference: UTF-8 text to compare them on; by default the reference writes some."""
    targets: str = "sampled"
    """Targets to request."""
    as_json: Json = False
    """Print JSON."""

    @model_validator(mode="after")
    def _check_text(self) -> "CheckConfig":
        if self.text is not None and self.reference is None:
            raise ValueError("--text is what --reference is compared on; give both")
        return self

    @field_validator("tokens")
    @classmethod
    def _check_tokens(cls, tokens: str | None) -> str | None:
        if tokens is not None:
            parse_count(tokens)
        return tokens
