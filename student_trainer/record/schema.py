"""Defines the columns of a shard."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

SCHEMA = pa.schema(
    [
        ("key", pa.binary(16)),
        ("seed", pa.uint64()),
        ("epoch", pa.uint64()),
        ("row_mask", pa.binary()),
        ("input_ids", pa.list_(pa.field("element", pa.int32(), nullable=False))),
        ("targets", pa.list_(pa.field("element", pa.binary(), nullable=False))),
        ("teacher", pa.string()),
        ("spec", pa.string()),
        ("temperature", pa.float64()),
    ]
)
"""One row per sequence and draw; docs/recording.md says what each column holds."""
WRITTEN_SCHEMA = pa.schema(
    [
        *SCHEMA,
        ("prompt_key", pa.binary(16)),
        ("prompt", pa.string()),
        ("text", pa.string()),
        ("token_ids", pa.list_(pa.field("element", pa.int32(), nullable=False))),
        ("prompt_tokens", pa.int32()),
        ("sample", pa.int32()),
        ("finish", pa.string()),
        ("entropy", pa.float32()),
        ("nats", pa.float32()),
        ("repetition", pa.float32()),
        ("settings", pa.string()),
    ]
)
"""The same of texts that a teacher wrote; docs/generating.md says what each further column holds."""
IDENTITY = ("key", "seed", "epoch", "row_mask")
"""The columns that say which row it is, without its content."""
METADATA = "logitstream"
"""Key in a shard's metadata that holds its provenance."""


@dataclass(frozen=True, slots=True)
class Written:
    """Says how a text came about that a teacher wrote after a prompt."""

    prompt: str
    text: str
    """What was written, without special tokens."""
    prompt_tokens: int
    """P: the first token that was written is number P of the sequence."""
    sample: int
    finish: str
    entropy: float | None
    """Mean entropy of the distributions that its tokens were drawn from; None: the targets have none."""
    nats: float | None
    """Mean of minus the logprobs of its tokens; None: the targets have none."""
    repetition: float
    """Share of its runs of four tokens that were in it before."""
    settings: str
    """How tokens were drawn, as JSON."""


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence with its targets."""

    key: bytes
    """`ids_digest` of the ids."""
    seed: int
    epoch: int
    row_mask: bytes | None
    """Bit i, the lowest first, says whether row i has targets; None: all rows have."""
    token_ids: np.ndarray
    """(L,) int32."""
    payloads: tuple[bytes, ...]
    """Containers of the codec, in the order of the rows."""
    written: Written | None = None
    """None: the sequence was there before, and was only scored."""

    @property
    def nbytes(self) -> int:
        return self.token_ids.nbytes + sum(map(len, self.payloads))
