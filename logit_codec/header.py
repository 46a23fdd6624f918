"""The fixed part of a container: its fields, what they may be, and the sizes that follow from them.

Letters: R rows, V vocabulary, E entries of all rows together, B buckets of an id table.
"""

import math
import struct
from dataclasses import dataclass

from logit_codec import bits as bitpack
from logit_codec.errors import CodecError
from logit_codec.ids import IDENTITY_DIGEST
from logit_codec.spec import CODE_BITS, MAX_DRAWS, RANGE_BITS

FORMAT_VERSION = 1
MAGIC = b"LSTG"
HEADER = struct.Struct("<4sBBBBIIIIQd16s")
DIGEST_NBYTES = 16
OVERHEAD_NBYTES = HEADER.size + DIGEST_NBYTES

DENSE, TOP_K, SAMPLED = 1, 2, 3
KIND_NUMBERS = {"dense": DENSE, "top_k": TOP_K, "sampled": SAMPLED}
NO_IDS, FIXED_WIDTH_IDS, ELIAS_FANO_IDS = 0, 1, 2
HAS_REALIZED, HAS_ENTROPY, HAS_LOG_Z = 1, 2, 4


@dataclass(frozen=True, slots=True)
class Header:
    """The fixed part of a container; see FORMAT.md for each field."""

    kind: int
    id_coding: int
    value_bits: int
    flags: int
    num_rows: int
    vocab_size: int
    max_entries: int
    """top_k: most entries of a row; sampled: draws of a row."""
    num_entries: int
    temperature: float
    id_table: bytes = IDENTITY_DIGEST

    def pack(self) -> bytes:
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
            self.id_table,
        )

    @property
    def most_entries(self) -> int:
        """The largest number of entries that a row can have."""
        return min(self.max_entries, self.vocab_size)

    def planes(self, num_buckets: int) -> dict[str, int | None]:
        """Size in 32-bit words of each plane, in order; None if it follows from other planes.

        `num_buckets` is that of the id table that the ids are coded with, if one is.
        """
        rows, entries = self.num_rows, self.num_entries
        half_words = bitpack.num_words(rows, 16)
        planes: dict[str, int | None] = {}
        if self.id_coding == FIXED_WIDTH_IDS:
            planes["counts"] = bitpack.num_words(rows, self.most_entries.bit_length())
            planes["ids"] = bitpack.num_words(entries, id_width(self.vocab_size))
        elif self.id_coding == ELIAS_FANO_IDS:
            planes["occupancy"] = bitpack.num_words(rows * num_buckets + entries, 1)
            planes["offsets"] = None
        if self.kind == DENSE:
            planes["values"] = bitpack.num_words(rows * self.vocab_size, self.value_bits)
        elif self.kind == TOP_K:
            planes["ranges"] = bitpack.num_words(rows, RANGE_BITS)
            planes["codes"] = None
            planes["tail"] = rows
        else:
            planes["draws"] = None
        if self.flags & HAS_REALIZED:
            planes["realized"] = half_words
        if self.flags & HAS_ENTROPY:
            planes["entropy"] = half_words
        if self.flags & HAS_LOG_Z:
            planes["log_z"] = rows
        return planes


def parse_header(view: memoryview) -> Header:
    """The checked header of a container. Raises CodecError."""
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
    if header.kind not in KIND_NUMBERS.values():
        raise CodecError(f"kind number {header.kind} is not known to this logit_codec")
    if header.flags & ~(HAS_REALIZED | HAS_ENTROPY | HAS_LOG_Z):
        raise CodecError(f"flags {header.flags:#x} are not known to this logit_codec")
    if not 1 <= header.vocab_size <= 2**31 - 1:
        raise CodecError(f"vocab_size must be 1 to 2**31-1, got {header.vocab_size}")
    if not (math.isfinite(header.temperature) and header.temperature > 0):
        raise CodecError(f"temperature must be positive and finite, got {header.temperature}")
    if header.kind == DENSE:
        codings, widths = (NO_IDS,), (16, 32)
        if header.max_entries or header.num_entries:
            raise CodecError("a dense container has zeros where others count entries")
    elif header.kind == SAMPLED:
        codings, widths = (FIXED_WIDTH_IDS, ELIAS_FANO_IDS), (0,)
        if not 1 <= header.max_entries <= MAX_DRAWS:
            raise CodecError(f"the draws must be 1 to {MAX_DRAWS}, got {header.max_entries}")
    else:
        codings, widths = (FIXED_WIDTH_IDS, ELIAS_FANO_IDS), CODE_BITS
        if not 1 <= header.max_entries <= header.vocab_size:
            raise CodecError(
                f"max_entries must be 1 to vocab_size ({header.vocab_size}), "
                f"got {header.max_entries}"
            )
        if header.num_rows == 0 and header.max_entries != 1:
            raise CodecError(f"max_entries must be 1 without rows, got {header.max_entries}")
    if header.id_coding not in codings:
        raise CodecError(f"id coding {header.id_coding} is not known to this logit_codec")
    if header.value_bits not in widths:
        raise CodecError(f"{header.value_bits} bits per value are not known to this logit_codec")
    if header.kind != DENSE and not (
        header.num_rows <= header.num_entries <= header.num_rows * header.most_entries
    ):
        raise CodecError(
            f"num_entries {header.num_entries} does not fit {header.num_rows} rows of 1 to "
            f"{header.most_entries} entries"
        )
    if header.id_coding != ELIAS_FANO_IDS and header.id_table != IDENTITY_DIGEST:
        raise CodecError(
            f"the id table {header.id_table.hex()} is named, but id coding {header.id_coding} "
            "takes none"
        )
    return header


def id_width(vocab_size: int) -> int:
    """Bits of an id of fixed width."""
    return max(1, (vocab_size - 1).bit_length())
