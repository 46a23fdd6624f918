"""Targets to bytes and back, in the order of FORMAT.md.

Letters: R rows, V vocabulary, E kept entries of all rows together.
The decoder computes the exact size of a container from its checked header before it allocates
anything, so its memory is at most 40 times the input; whatever is malformed raises CodecError.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from logit_codec import bits as bitpack
from logit_codec.errors import CodecError
from logit_codec.spec import CODE_BITS, TargetSpec
from logit_codec.targets import DenseTargets, Targets, TopKTargets, _splits

FORMAT_VERSION = 1
MAGIC = b"LSTG"
HEADER = struct.Struct("<4sBBBBIIIIQd16s")
DIGEST_NBYTES = 16
OVERHEAD_NBYTES = HEADER.size + DIGEST_NBYTES

KIND_NUMBERS = {"dense": 1, "top_k": 2}
NO_IDS, FIXED_WIDTH_IDS = 0, 1
HAS_REALIZED, HAS_ENTROPY, HAS_LOG_Z = 1, 2, 4
CODES_PER_NAT = 2048
"""Scale of the 16-bit codes of realized logprob and entropy: steps of 1/2048 up to 31.9995."""
RANGES_PER_NAT = 256
"""Scale of the 16-bit range of a row's logprobs: steps of 1/256 up to 255.996."""


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
    num_entries: int
    temperature: float
    id_table: bytes = bytes(16)

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

    def planes(self) -> list[tuple[str, int]]:
        """Name and size in 32-bit words of each plane, in order."""
        rows, entries = self.num_rows, self.num_entries
        half_words = bitpack.num_words(rows, 16)
        if self.kind == KIND_NUMBERS["dense"]:
            planes = [
                ("values", bitpack.num_words(rows * self.vocab_size, self.value_bits)),
            ]
        else:
            planes = [
                ("counts", bitpack.num_words(rows, self.max_entries.bit_length())),
                ("ids", bitpack.num_words(entries, _id_width(self.vocab_size))),
                ("ranges", half_words),
                ("codes", bitpack.num_words(entries, self.value_bits)),
                ("tail", rows),
            ]
        if self.flags & HAS_REALIZED:
            planes.append(("realized", half_words))
        if self.flags & HAS_ENTROPY:
            planes.append(("entropy", half_words))
        if self.flags & HAS_LOG_Z:
            planes.append(("log_z", rows))
        return planes


def encode(targets: Targets, *, bits: int = 7) -> bytes:
    """One container holding all rows of `targets`; `bits` per logprob applies to `top_k`.

    The planes are made on the targets' device; only the packed words are copied from it.
    Raises CodecError, with the row, for rows that are not finite, not normalised or not sorted.
    """
    return _encode(targets, bits, 0)


def _encode(targets: Targets, bits: int, first_row: int) -> bytes:
    """`encode`; `first_row` is the number of the first row in error messages."""
    _check_rows(targets, first_row)
    planes: list[Tensor] = []
    max_entries = num_entries = 0
    if isinstance(targets, TopKTargets):
        if bits not in CODE_BITS:
            raise ValueError(f"bits must be one of {CODE_BITS} for top_k, got {bits}")
        counts = targets.row_splits.diff()
        num_entries = len(targets.token_ids)
        max_entries = int(counts.max()) if targets.num_rows else 1
        ranges, codes = _quantise(targets, bits)
        planes = [
            bitpack.pack(counts, max_entries.bit_length()),
            bitpack.pack(targets.token_ids, _id_width(targets.vocab_size)),
            bitpack.pack(ranges, 16),
            bitpack.pack(codes, bits),
            _words(targets.tail_logprob),
        ]
        id_coding, value_bits = FIXED_WIDTH_IDS, bits
    elif isinstance(targets, DenseTargets):
        planes = [_words(targets.logprobs.reshape(-1))]
        id_coding, value_bits = NO_IDS, targets.logprobs.element_size() * 8
    else:
        raise ValueError(f"no encoding for {type(targets).__name__}")
    flags = 0
    if targets.realized_logprob is not None:
        flags |= HAS_REALIZED
        planes.append(_to_codes16(-targets.realized_logprob))
    if targets.entropy is not None:
        flags |= HAS_ENTROPY
        planes.append(_to_codes16(targets.entropy))
    if targets.log_z is not None:
        flags |= HAS_LOG_Z
        planes.append(_words(targets.log_z))
    header = Header(
        kind=KIND_NUMBERS[targets.kind],
        id_coding=id_coding,
        value_bits=value_bits,
        flags=flags,
        num_rows=targets.num_rows,
        vocab_size=targets.vocab_size,
        max_entries=max_entries,
        num_entries=num_entries,
        temperature=targets.temperature,
    )
    body = torch.cat(planes).cpu().numpy()
    digest = xxhash.xxh3_128(head := header.pack())
    digest.update(body.data)
    return b"".join((head, body.data, digest.digest()))


def encode_parts(
    targets: Targets, spec: TargetSpec, *, max_nbytes: int
) -> Iterator[tuple[int, int, bytes]]:
    """`targets` in containers of at most `max_nbytes` each, unless one row alone is larger.

    Yields (first row, number of rows, container). Where a sequence is split depends on the spec
    and the vocabulary only, so that the same rows always give the same bytes.
    """
    room = max_nbytes - OVERHEAD_NBYTES - 4 * 8  # every plane may end in up to 3 bytes of padding
    step = max(1, int(room / spec.max_row_nbytes(targets.vocab_size)))
    value_bits = getattr(spec, "bits", 7)
    _check_span(targets)  # slicing would hide entries that no row has
    for first in range(0, targets.num_rows, step):
        rows = targets[first : first + step]
        yield first, rows.num_rows, _encode(rows, value_bits, first)


def decode(data: bytes | bytearray | memoryview) -> Targets:
    """The targets of one container, on the CPU.

    Raises CodecError for anything that is not exactly one well-formed container of this version.
    """
    view = memoryview(data).cast("B")
    header = _parse_header(view)
    planes = header.planes()
    expected = OVERHEAD_NBYTES + 4 * sum(size for _, size in planes)
    if len(view) != expected:
        raise CodecError(f"the container has {len(view)} bytes, its header implies {expected}")
    if xxhash.xxh3_128_digest(view[:-DIGEST_NBYTES]) != view[-DIGEST_NBYTES:]:
        raise CodecError("the digest does not match: the bytes were changed on the way; ask again")
    body = (
        torch.frombuffer(bytearray(view[HEADER.size : -DIGEST_NBYTES]), dtype=torch.int32)
        if (expected > OVERHEAD_NBYTES)
        else torch.empty(0, dtype=torch.int32)
    )
    sizes = [size for _, size in planes]
    plane = dict(zip([name for name, _ in planes], body.split(sizes), strict=True))

    rows, vocab_size = header.num_rows, header.vocab_size
    common = {"vocab_size": vocab_size, "temperature": header.temperature}
    if "realized" in plane:
        common["realized_logprob"] = -_from_codes16(plane["realized"], rows)
    if "entropy" in plane:
        common["entropy"] = _from_codes16(plane["entropy"], rows)
    if "log_z" in plane:
        common["log_z"] = plane["log_z"].view(torch.float32)
    if header.kind == KIND_NUMBERS["dense"]:
        dtype = torch.float32 if header.value_bits == 32 else torch.bfloat16
        values = plane["values"].view(dtype)
        if values.view(torch.uint8)[rows * vocab_size * dtype.itemsize :].any():
            raise CodecError("the padding of the values plane is not zero")
        logprobs = values[: rows * vocab_size].view(rows, vocab_size)
        targets: Targets = DenseTargets(logprobs=logprobs, **common)
    else:
        counts = _unpack(plane["counts"], rows, header.max_entries.bit_length(), "counts")
        if int(counts.sum()) != header.num_entries or (rows and int(counts.min()) < 1):
            raise CodecError("the entry counts of the rows do not add up to the header's")
        if rows and int(counts.max()) != header.max_entries:
            raise CodecError("no row has the header's largest number of entries")
        ids = _unpack(plane["ids"], header.num_entries, _id_width(vocab_size), "ids")
        ranges = _unpack(plane["ranges"], rows, 16, "ranges")
        codes = _unpack(plane["codes"], header.num_entries, header.value_bits, "codes")
        tail = plane["tail"].view(torch.float32)
        row_splits = _splits(counts)
        targets = TopKTargets(
            row_splits=row_splits,
            token_ids=ids,
            logprobs=_dequantise(codes, ranges, counts, tail, header.value_bits),
            tail_logprob=tail,
            **common,
        )
    _check_rows(targets)
    return targets


def _parse_header(view: memoryview) -> Header:
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
    if header.id_table != bytes(16):
        raise CodecError(f"the id table {header.id_table.hex()} is needed to read this container")
    if header.kind == KIND_NUMBERS["dense"]:
        coding, widths = NO_IDS, (16, 32)
        if header.max_entries or header.num_entries:
            raise CodecError("a dense container has zeros where others count entries")
    else:
        coding, widths = FIXED_WIDTH_IDS, CODE_BITS
        if not 1 <= header.max_entries <= header.vocab_size:
            raise CodecError(
                f"max_entries must be 1 to vocab_size ({header.vocab_size}), "
                f"got {header.max_entries}"
            )
        if header.num_rows == 0 and header.max_entries != 1:
            raise CodecError(f"max_entries must be 1 without rows, got {header.max_entries}")
        if not header.num_rows <= header.num_entries <= header.num_rows * header.max_entries:
            raise CodecError(
                f"num_entries {header.num_entries} does not fit {header.num_rows} rows of 1 to "
                f"{header.max_entries} entries"
            )
    if header.id_coding != coding:
        raise CodecError(f"id coding {header.id_coding} is not known to this logit_codec")
    if header.value_bits not in widths:
        raise CodecError(f"{header.value_bits} bits per value are not known to this logit_codec")
    return header


def _check_rows(targets: Targets, first_row: int = 0) -> None:
    """Refuses rows that are not finite, not normalised, or whose ids are not ascending."""

    def refuse(bad: Tensor, rows: Tensor | None, why: str) -> None:
        _refuse_rows(bad, rows, why, first_row)

    tolerance = 1e-3
    if isinstance(targets, TopKTargets):
        ids, splits = targets.token_ids, targets.row_splits
        _check_span(targets)
        refuse(splits.diff() < 1, None, "it has no entry")
        rows = targets.entry_rows()
        rising = ids[1:] > ids[:-1]
        first_of_row = rows[1:] != rows[:-1]
        good = torch.ones_like(ids, dtype=torch.bool)
        good[1:] = rising | first_of_row
        good &= (ids >= 0) & (ids < targets.vocab_size)
        refuse(~good, rows, "its ids are not ascending ids of the vocabulary")
        tail = targets.tail_logprob
        finite = torch.isfinite(targets.logprobs) & ~torch.isnan(tail)[rows]
        refuse(~finite, rows, "its logprobs are not finite numbers")
        refuse(tail >= 0, None, "its tail logprob is not below 0: nothing would be kept")
        mass = targets.logprobs.new_zeros(targets.num_rows, dtype=torch.float64)
        mass.index_add_(0, rows, targets.logprobs.double().exp())
        mass += tail.double().exp()
    elif isinstance(targets, DenseTargets):
        if targets.logprobs.dtype == torch.bfloat16:
            tolerance = 0.25  # a logprob rounded to 8 bits is off by up to 0.125
        mass = targets.logprobs.float().logsumexp(1).exp()
        refuse(~torch.isfinite(mass), None, "its logprobs are not finite numbers")
    else:
        raise ValueError(f"no encoding for {type(targets).__name__}")
    refuse((mass - 1).abs() > tolerance, None, "its probabilities do not add up to 1")
    for name, bad in (
        ("log_z", None if targets.log_z is None else ~torch.isfinite(targets.log_z)),
        ("entropy", None if targets.entropy is None else ~torch.isfinite(targets.entropy)),
        (
            "realized_logprob",
            None if targets.realized_logprob is None else torch.isnan(targets.realized_logprob),
        ),
    ):
        if bad is not None:
            refuse(bad, None, f"its {name} is not a finite number")


def _check_span(targets: Targets) -> None:
    if isinstance(targets, TopKTargets):
        first, last = int(targets.row_splits[0]), int(targets.row_splits[-1])
        if first != 0 or last != len(targets.token_ids):
            raise CodecError(
                f"row_splits must go from 0 to the {len(targets.token_ids)} entries, got {first} "
                f"to {last}"
            )


def _refuse_rows(bad: Tensor, rows: Tensor | None, why: str, first_row: int) -> None:
    """Raises for the first row that is bad; `rows` says which row each element of `bad` is of."""
    if bool(bad.any()):
        index = int(bad.nonzero()[0, 0])
        row = first_row + (index if rows is None else int(rows[index]))
        raise CodecError(f"row {row} cannot be a target: {why}", row)


def _quantise(targets: TopKTargets, bits: int) -> tuple[Tensor, Tensor]:
    """(R,) ranges and (E,) codes of `bits` bits; see `_dequantise` for what they mean."""
    rows = targets.entry_rows()
    logprobs = targets.logprobs.double()
    empty_R = logprobs.new_empty(targets.num_rows)
    high_R = empty_R.scatter_reduce(0, rows, logprobs, "amax", include_self=False)
    low_R = empty_R.scatter_reduce(0, rows, logprobs, "amin", include_self=False)
    ranges = ((high_R - low_R) * RANGES_PER_NAT).ceil_().clamp_(0, 0xFFFF)
    # A row whose entries are all equal has step 0; dividing by 1 gives it the codes 0.
    step_R = (ranges / (RANGES_PER_NAT * ((1 << bits) - 1))).masked_fill_(ranges == 0, 1.0)
    codes = ((high_R[rows] - logprobs) / step_R[rows]).round_().clamp_(0, (1 << bits) - 1)
    return ranges.long(), codes.long()


def _dequantise(codes: Tensor, ranges: Tensor, counts: Tensor, tail: Tensor, bits: int) -> Tensor:
    """(E,) codes -> (E,) logprobs.

    A code counts the steps of its row below the row's best entry; how high that one stands follows
    from the tail: the entries of a row hold exactly 1 - tail.
    """
    num_rows = len(counts)
    rows = torch.repeat_interleave(torch.arange(num_rows), counts, output_size=len(codes))
    step_R = ranges.double() / (RANGES_PER_NAT * ((1 << bits) - 1))
    below = codes.double() * step_R[rows]
    mass_R = torch.zeros(num_rows, dtype=torch.float64).index_add_(0, rows, (-below).exp())
    high_R = torch.log(-torch.expm1(tail.double())) - mass_R.log_()
    return (high_R[rows] - below).to(torch.float32)


def _to_codes16(nats: Tensor) -> Tensor:
    """(R,) nats >= 0, +inf allowed -> packed 16-bit codes; the largest code means 'or more'."""
    codes = (nats.double() * CODES_PER_NAT).round_().clamp_(0, 0xFFFF)
    return bitpack.pack(codes.long(), 16)


def _from_codes16(words: Tensor, count: int) -> Tensor:
    codes = _unpack(words, count, 16, "16-bit codes")
    return codes.to(torch.float32) / CODES_PER_NAT


def _unpack(words: Tensor, count: int, width: int, name: str) -> Tensor:
    used = count * width - 32 * (len(words) - 1)  # bits in use of the last word
    if len(words) and used < 32 and int(words[-1]) & 0xFFFFFFFF & ~((1 << used) - 1):
        raise CodecError(f"the padding of the {name} plane is not zero")
    return bitpack.unpack(words, count, width)


def _words(values: Tensor) -> Tensor:
    """A contiguous float tensor as int32 words, padded with zero bytes."""
    raw = values.contiguous().view(torch.uint8)
    return torch.nn.functional.pad(raw, (0, -len(raw) % 4)).view(torch.int32)


def _id_width(vocab_size: int) -> int:
    return max(1, (vocab_size - 1).bit_length())
