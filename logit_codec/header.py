"""Packs and reads the fixed part of a container.

Which values of the fields a kind allows is in its own file in `logit_codec/kinds/`.
"""

import math
import struct
from dataclasses import dataclass

from logit_codec.errors import CodecError
from logit_codec.id_table import IDENTITY_DIGEST

FORMAT_VERSION = 1
MAGIC = b"LSTG"
HEADER = struct.Struct("<4sBBBBIIIIQd16s")
DIGEST_NBYTES = 16
OVERHEAD_NBYTES = HEADER.size + DIGEST_NBYTES

NO_IDS, FIXED_WIDTH_IDS, ELIAS_FANO_IDS = 0, 1, 2
HAS_REALIZED, HAS_ENTROPY, HAS_LOG_Z = 1, 2, 4
ROW_FIELD_FLAGS = HAS_REALIZED | HAS_ENTROPY | HAS_LOG_Z
HAS_RANKS = 8


@dataclass(frozen=True, slots=True)
class Header:
    """Holds the fixed part of a container; FORMAT.md explains each field."""

    kind: int
    id_coding: int
    value_bits: int
    flags: int
    num_rows: int
    vocab_size: int
    max_entries: int
    """For top_k and given_ids the most entries of any row, for sampled the draws of each row, for
    hidden and features the numbers of a state."""
    num_entries: int
    """For features the layers of each row, for hidden 0."""
    temperature: float
    needed: bytes = IDENTITY_DIGEST
    """Digest of what is needed to read it: an id table, the given ids, or the vocabulary head."""

    def pack(self) -> bytes:
        """Writes the fields as bytes."""
        return HEADER.pack(
            MAGIC,
            FORMAT_VERSION,
            self.kind,
            self.id_coding,
            self.value_bits,
            self.flags,
            self.num_rows,
            self.vocab_size,
            self.max_entries,
            self.num_entries,
            self.temperature,
            self.needed,
        )

    @property
    def most_entries(self) -> int:
        """The largest number of entries that a row can have."""
        return min(self.max_entries, self.vocab_size)


def read_header(view: memoryview) -> Header:
    """Reads a header and checks what is the same for every kind. Raises CodecError."""
    if len(view) < OVERHEAD_NBYTES:
        raise CodecError(
            f"a container has at least {OVERHEAD_NBYTES} bytes, got {len(view)}: truncated?"
        )
    magic, version, *rest = HEADER.unpack_from(view)
    if magic != MAGIC:
        raise CodecError(f"not a targets container: it begins with {bytes(magic)!r}, not {MAGIC!r}")
    if version != FORMAT_VERSION:
        raise CodecError(
            f"format version {version} is not supported; this logit_codec reads version "
            f"{FORMAT_VERSION}. Upgrade the older of the two sides."
        )
    header = Header(*rest)
    if not 1 <= header.vocab_size <= 2**31 - 1:
        raise CodecError(f"vocab_size must be 1 to 2**31-1, got {header.vocab_size}")
    if not (math.isfinite(header.temperature) and header.temperature > 0):
        raise CodecError(f"temperature must be positive and finite, got {header.temperature}")
    return header
