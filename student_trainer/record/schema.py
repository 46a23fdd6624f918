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
IDENTITY = ("key", "seed", "epoch", "row_mask")
"""The columns that say which row it is, without its content."""
METADATA = "logitstream"
"""Key in a shard's metadata that holds its provenance."""


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

    @property
    def nbytes(self) -> int:
        return self.token_ids.nbytes + sum(map(len, self.payloads))
