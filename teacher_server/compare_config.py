"""Declares the options of `teacher-server compare`."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from logitstream.options import Json, LogOptions, Settings
from teacher_server.config import Quantization

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class _TwoTeachers(Settings):
    a: str = Field(kw_only=False)
    """Folder or hub id of the teacher A, usually the more exact one."""
    b: str = Field(kw_only=False)
    """Folder or hub id of the teacher B, of the same vocabulary; it may be A again."""


class CompareConfig(LogOptions, _TwoTeachers):  # pydantic puts fields of the last base first
    """Compare the distributions of two teachers, or of two precisions of one, on a text.

    Prints KL(A || B) and KL(B || A) per token in nats, how often both find the same token likeliest,
    and the bytes of their weights. They are loaded one after the other."""

    text: Path
    """UTF-8 text to compare them on, like the students' training data."""
    max_tokens: int = Field(default=4096, ge=2)
    """Maximum number of tokens to read."""
    sequence_tokens: int = Field(default=512, ge=2)
    """Tokens of a sequence, less where a teacher's context is shorter; the text is cut into such."""
    dtype_a: Dtype = "auto"
    """Type of A's weights and forward pass; auto is the type that the model was saved in."""
    dtype_b: Dtype = "auto"
    """The same for B."""
    quantization_a: Quantization = "none"
    """How A's linear layers are quantised while they are loaded; none: as the model was saved."""
    quantization_b: Quantization = "none"
    """The same for B."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    as_json: Json = False
    """Print JSON."""
