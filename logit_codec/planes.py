"""Reads and writes the planes that all kinds share, and checks the rows that go into them.

A plane is one array of a container; what a kind writes on its own is in `logit_codec/kinds/`.

Letters: R rows, E entries of all rows together.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from logit_codec import bits as bitpack
from logit_codec.errors import CodecError
from logit_codec.header import (
    HAS_ENTROPY,
    HAS_LOG_Z,
    HAS_REALIZED,
    HEADER,
    OVERHEAD_NBYTES,
    Header,
)
from logit_codec.targets import Targets

CODES_PER_NAT = 2048
"""Scale of the 16-bit codes of realized logprob and entropy: steps of 1/2048 up to 31.9995."""


class PlaneReader:
    """Hands out the planes of a container in order, and none beyond its end."""

    def __init__(self, raw: np.ndarray, sizes: dict[str, int | None]) -> None:
        self._raw = raw  # ends in the digest: a BitString may read some bits after its plane
        self._at = HEADER.size
        self._sizes = sizes
        num_words = (len(raw) - OVERHEAD_NBYTES) // 4
        self.spare = num_words - sum(size or 0 for size in sizes.values())
        """Words that no plane of known size needs."""

    @property
    def taken(self) -> int:
        """Words handed out so far."""
        return (self._at - HEADER.size) // 4

    def take(self, name: str, num_words: int | None = None) -> bitpack.BitString:
        """Returns the next plane; `num_words` is for one whose size the header does not give."""
        size = self._sizes[name]
        if size is None:
            assert num_words is not None
            if num_words > self.spare:
                raise CodecError(f"the container ends in its {name} plane")
            self.spare -= num_words
            size = num_words
        first = self._at
        self._at += 4 * size
        return bitpack.BitString(self._raw, first, self._at, name)

    def take_numbers(self, name: str, count: int, width: int) -> np.ndarray:
        """Reads a plane of (count,) int64 numbers of one width and nothing else."""
        plane = self.take(name)
        numbers = plane.numbers(count, width)
        plane.end()
        return numbers

    def take_floats(self, name: str) -> np.ndarray:
        """Reads a plane of (n,) float32 and nothing else."""
        return self.take(name).raw_bytes().view(np.float32)

    def take_values(self, name: str, count: int, bits: int) -> Tensor:
        """Reads a plane of (count,) int8, bfloat16 or float32, by their bits, and nothing else."""
        raw = self.take(name).raw_bytes()
        if raw[count * bits // 8 :].any():
            raise CodecError(f"the padding of the {name} plane is not zero")
        if bits == 16:  # numpy has no bfloat16
            return torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16)[:count]
        return torch.from_numpy(raw.view(np.int8 if bits == 8 else np.float32))[:count]

    def __contains__(self, name: str) -> bool:
        return name in self._sizes


class RowCheck:
    """Refuses rows that cannot be encoded, by the number that they have in the caller's targets."""

    def __init__(self, first_row: int) -> None:
        self._first_row = first_row

    def refuse(self, bad: Tensor, why: str, rows: Tensor | None = None) -> None:
        """Raises CodecError for the first bad row; `rows` says which row each element is of."""
        if bool(bad.any()):
            rows_of = None if rows is None else rows.cpu().numpy()
            refuse_rows(bad.cpu().numpy(), why, rows_of, self._first_row)

    def refuse_mass(self, mass_R: Tensor, tolerance: float = 1e-3) -> None:
        """Raises CodecError for the first row whose probabilities do not add up to 1."""
        self.refuse((mass_R - 1).abs() > tolerance, "its probabilities do not add up to 1")

    def refuse_row_fields(self, targets: Targets) -> None:
        """Raises CodecError for the first row in which a field of every kind is not a number."""
        for name, is_good in (
            ("log_z", torch.isfinite),
            ("entropy", torch.isfinite),
            ("realized_logprob", lambda values: ~torch.isnan(values)),
        ):
            values = getattr(targets, name)
            if values is not None:
                self.refuse(~is_good(values), f"its {name} is not a finite number")


def row_plane_sizes(header: Header) -> dict[str, int | None]:
    """Returns the words of the planes that every kind may end with, in order."""
    half_words = bitpack.num_words(header.num_rows, 16)
    planes: dict[str, int | None] = {}
    if header.flags & HAS_REALIZED:
        planes["realized"] = half_words
    if header.flags & HAS_ENTROPY:
        planes["entropy"] = half_words
    if header.flags & HAS_LOG_Z:
        planes["log_z"] = header.num_rows
    return planes


def pack_row_fields(targets: Targets, allowed: int) -> tuple[int, list[Tensor]]:
    """Returns the header's flags and the planes that every kind may end with.

    allowed: the flags of the kind; it writes other fields itself.
    """
    flags, planes = 0, []
    if targets.realized_logprob is not None and allowed & HAS_REALIZED:
        flags |= HAS_REALIZED
        planes.append(pack_codes16(-targets.realized_logprob))
    if targets.entropy is not None:
        flags |= HAS_ENTROPY
        planes.append(pack_codes16(targets.entropy))
    if targets.log_z is not None:
        flags |= HAS_LOG_Z
        planes.append(raw_words(targets.log_z))
    return flags, planes


def read_row_fields(reader: PlaneReader, num_rows: int) -> dict[str, Any]:
    """Reads the planes that every kind may end with. Raises CodecError."""
    fields = {}
    if "realized" in reader:
        fields["realized_logprob"] = unpack_codes16(reader.take("realized"), num_rows).neg_()
    if "entropy" in reader:
        fields["entropy"] = unpack_codes16(reader.take("entropy"), num_rows)
    if "log_z" in reader:
        log_z = reader.take_floats("log_z")
        refuse_rows(~np.isfinite(log_z), "its log_z is not a finite number")
        fields["log_z"] = torch.from_numpy(log_z)
    return fields


def least_words(num_entries: int, id_words: int) -> int:
    """Returns what `id_words` words of ids leave of a byte per entry; tiny vocabularies need it.

    It bounds a reader's memory by a multiple of the bytes that it is sent.
    """
    return (num_entries + 3) // 4 - id_words


def pad_words(words: Tensor, least: int) -> Tensor:
    """Appends words of 0 until there are at least `least`."""
    return torch.nn.functional.pad(words, (0, max(0, least - len(words))))


def pack_codes16(nats: Tensor) -> Tensor:
    """Packs (R,) nats >= 0, +inf allowed, as 16-bit codes; the largest code means 'or more'."""
    codes = (nats.double() * CODES_PER_NAT).round_().clamp_(0, 0xFFFF)
    return bitpack.pack(codes.long(), 16)


def unpack_codes16(string: bitpack.BitString, count: int) -> Tensor:
    """Inverts `pack_codes16`: reads (count,) float32."""
    nats = string.numbers(count, 16).astype(np.float32)
    string.end()
    nats /= CODES_PER_NAT
    return torch.from_numpy(nats)


def refuse_rows(
    bad: np.ndarray, why: str, rows: np.ndarray | None = None, first_row: int = 0
) -> None:
    """Raises CodecError for the first bad row; `rows` says which row each element is of."""
    if bad.any():
        index = int(bad.argmax())
        row = first_row + (index if rows is None else int(rows[index]))
        raise CodecError(f"row {row} cannot be a target: {why}", row)


def raw_words(values: Tensor) -> Tensor:
    """Views a contiguous float tensor as int32 words, padded with zero bytes."""
    raw = values.contiguous().view(torch.uint8)
    return torch.nn.functional.pad(raw, (0, -len(raw) % 4)).view(torch.int32)
