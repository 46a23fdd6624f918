"""Targets to bytes and back, in the order of FORMAT.md.

Letters: R rows, V vocabulary, E kept entries of all rows together.
The decoder checks every size against the bytes that are there before it allocates anything, so its
memory is at most 72 times the input; whatever is malformed raises CodecError.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import xxhash
from torch import Tensor

from logit_codec import bits as bitpack
from logit_codec import planes as content
from logit_codec.errors import CodecError
from logit_codec.header import (
    DENSE,
    DIGEST_NBYTES,
    ELIAS_FANO_IDS,
    FIXED_WIDTH_IDS,
    HAS_ENTROPY,
    HAS_LOG_Z,
    HAS_REALIZED,
    HEADER,
    KIND_NUMBERS,
    NO_IDS,
    OVERHEAD_NBYTES,
    SAMPLED,
    Header,
    id_width,
    parse_header,
)
from logit_codec.ids import (
    IDENTITY_DIGEST,
    Entries,
    IdTable,
    code_ids,
    identity_shift,
    num_identity_buckets,
    read_ids,
)
from logit_codec.spec import CODE_BITS, RANGE_BITS, TargetSpec
from logit_codec.targets import (
    DenseTargets,
    SampledTargets,
    SparseTargets,
    Targets,
    TopKTargets,
)


def encode(targets: Targets, *, bits: int = 7, id_table: IdTable | None = None) -> bytes:
    """One container holding all rows of `targets`.

    bits: of each logprob of `top_k`. id_table: that of the teacher, None for the built-in identity;
    ids are written with it unless a fixed width takes no more bytes. The planes are made on the
    targets' device; only the packed words are copied from it. Raises CodecError, with the row, for
    rows that are not finite, not normalised or not sorted, and ValueError for a table of another
    vocabulary.
    """
    return _encode(targets, bits, id_table, 0)


def _encode(targets: Targets, bits: int, id_table: IdTable | None, first_row: int) -> bytes:
    """`encode`; `first_row` is the number of the first row in error messages."""
    _check_rows(targets, first_row)
    planes: list[Tensor] = []
    id_coding, table_digest = NO_IDS, IDENTITY_DIGEST
    max_entries = num_entries = 0
    if isinstance(targets, SparseTargets):
        num_entries = len(targets.token_ids)
        id_coding, table_digest, planes = _id_planes(targets, id_table)
    id_words = sum(len(words) for words in planes)
    if isinstance(targets, TopKTargets):
        if bits not in CODE_BITS:
            raise ValueError(f"bits must be one of {CODE_BITS} for top_k, got {bits}")
        max_entries = int(targets.row_splits.diff().max()) if targets.num_rows else 1
        ranges, codes, best = content.quantise(
            targets.logprobs, targets.entry_rows(), targets.num_rows, bits
        )
        planes += [
            bitpack.pack(ranges, RANGE_BITS),
            content.pack_codes(codes, best, targets.row_splits.diff(), bits, id_words),
            content.raw_words(targets.tail_logprob),
        ]
        value_bits = bits
    elif isinstance(targets, SampledTargets):
        max_entries = targets.num_draws
        rows = targets.entry_rows()
        planes.append(content.pack_draws(targets.counts, rows, targets.num_draws, id_words))
        value_bits = 0
    elif isinstance(targets, DenseTargets):
        planes += [content.raw_words(targets.logprobs.reshape(-1))]
        value_bits = targets.logprobs.element_size() * 8
    else:
        raise ValueError(f"no encoding for {type(targets).__name__}")
    flags = 0
    if targets.realized_logprob is not None:
        flags |= HAS_REALIZED
        planes.append(content.pack_codes16(-targets.realized_logprob))
    if targets.entropy is not None:
        flags |= HAS_ENTROPY
        planes.append(content.pack_codes16(targets.entropy))
    if targets.log_z is not None:
        flags |= HAS_LOG_Z
        planes.append(content.raw_words(targets.log_z))
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
        id_table=table_digest,
    )
    body = torch.cat(planes).cpu().numpy()
    digest = xxhash.xxh3_128(head := header.pack())
    digest.update(body.data)
    return b"".join((head, body.data, digest.digest()))


def _id_planes(targets: SparseTargets, id_table: IdTable | None) -> tuple[int, bytes, list[Tensor]]:
    """Coding, table digest and planes of the ids: the smaller of Elias-Fano and fixed width."""
    num_rows, vocab_size = targets.num_rows, targets.vocab_size
    if id_table is None:
        device = targets.device
        table = IdTable.identity(vocab_size, num_rows, len(targets.token_ids), device)
    elif id_table.vocab_size != vocab_size:
        raise ValueError(
            f"the id table is for a vocabulary of {id_table.vocab_size} ids, the targets have "
            f"{vocab_size}"
        )
    else:
        table = id_table.to(targets.device)
    coded = code_ids(table, targets.entry_rows(), targets.token_ids, num_rows)
    counts = targets.row_splits.diff()
    if isinstance(targets, SampledTargets):
        most = min(targets.num_draws, vocab_size)
    else:
        most = int(counts.max()) if num_rows else 1
    fixed_words = bitpack.num_words(num_rows, most.bit_length())
    fixed_words += bitpack.num_words(len(targets.token_ids), id_width(vocab_size))
    if coded.num_words < fixed_words:
        return ELIAS_FANO_IDS, table.digest, coded.planes()
    planes = [
        bitpack.pack(counts, most.bit_length()),
        bitpack.pack(targets.token_ids, id_width(vocab_size)),
    ]
    return FIXED_WIDTH_IDS, IDENTITY_DIGEST, planes


def encode_parts(
    targets: Targets, spec: TargetSpec, *, max_nbytes: int, id_table: IdTable | None = None
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
        yield first, rows.num_rows, _encode(rows, value_bits, id_table, first)


def decode(data: bytes | bytearray | memoryview, *, id_tables: Sequence[IdTable] = ()) -> Targets:
    """The targets of one container, on the CPU.

    id_tables: those that the container may name, beside the built-in identity. Raises CodecError
    for anything that is not exactly one well-formed container of this version, and for one that
    names another table.
    """
    view = memoryview(data).cast("B")
    header = parse_header(view)
    table = _find_table(header, id_tables)
    num_buckets = 0
    if header.id_coding == ELIAS_FANO_IDS:
        num_buckets = len(table.shifts) if table else _identity_buckets(header)
    planes = header.planes(num_buckets)
    is_exact = None not in planes.values()
    # A byte per entry at least: so what is made per entry is bounded by the bytes that are there.
    content_nbytes = max(4 * sum(size or 0 for size in planes.values()), header.num_entries)
    least = OVERHEAD_NBYTES + content_nbytes
    if len(view) < least or (is_exact and len(view) > least):
        at_least = "" if is_exact else "at least "
        raise CodecError(
            f"the container has {len(view)} bytes, its header implies {at_least}{least}"
        )
    if len(view) % 4:
        raise CodecError(f"a container is a whole number of words, got {len(view)} bytes")
    if xxhash.xxh3_128_digest(view[:-DIGEST_NBYTES]) != view[-DIGEST_NBYTES:]:
        raise CodecError("the digest does not match: the bytes were changed on the way; ask again")
    plane = _PlaneReader(np.frombuffer(view, np.uint8), planes)
    if header.kind == DENSE:
        return _read_dense(plane, header)
    if header.kind == SAMPLED:
        return _read_sampled(plane, header, table)
    return _read_top_k(plane, header, table)


class _PlaneReader:
    """Hands out the planes of a container in order, none beyond its end."""

    def __init__(self, raw: np.ndarray, planes: dict[str, int | None]) -> None:
        self._raw = raw  # the digest is behind the planes: a BitString may read a bit of it
        self._at = HEADER.size
        self._sizes = planes
        num_words = (len(raw) - OVERHEAD_NBYTES) // 4
        self.spare = num_words - sum(size or 0 for size in planes.values())
        """Words that no plane of known size needs."""

    @property
    def taken(self) -> int:
        """Words handed out so far."""
        return (self._at - HEADER.size) // 4

    def take(self, name: str, num_words: int | None = None) -> bitpack.BitString:
        """The next plane. `num_words` is for one whose size does not follow from the header."""
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

    def take_floats(self, name: str) -> np.ndarray:
        """(n,) float32, of a plane of nothing else."""
        return self.take(name).raw_bytes().view(np.float32)

    def __contains__(self, name: str) -> bool:
        return name in self._sizes


def _read_dense(plane: _PlaneReader, header: Header) -> DenseTargets:
    num_rows, vocab_size = header.num_rows, header.vocab_size
    raw = plane.take("values").raw_bytes()
    if raw[num_rows * vocab_size * header.value_bits // 8 :].any():
        raise CodecError("the padding of the values plane is not zero")
    if header.value_bits == 32:
        values = torch.from_numpy(raw.view(np.float32))
    else:  # numpy has no bfloat16
        values = torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16)
    targets = DenseTargets(
        vocab_size=vocab_size,
        temperature=header.temperature,
        logprobs=values[: num_rows * vocab_size].view(num_rows, vocab_size),
        **_read_per_row(plane, num_rows),
    )
    _check_rows(targets)
    return targets


# What `_check_rows` would check of the other kinds cannot be otherwise, or is refused where it is
# read: a row's probabilities, for one, add up to 1 by the formula that they are made with.


def _read_sampled(plane: _PlaneReader, header: Header, table: IdTable | None) -> SampledTargets:
    entries = _read_ids(plane, header, table)
    id_words = plane.taken
    draws = plane.take("draws", plane.spare)
    counts = content.unpack_draws(draws, entries, header.max_entries, id_words)
    return SampledTargets(
        vocab_size=header.vocab_size,
        temperature=header.temperature,
        row_splits=torch.from_numpy(entries.splits),
        token_ids=torch.from_numpy(entries.ids),
        counts=torch.from_numpy(counts),
        num_draws=header.max_entries,
        **_read_per_row(plane, header.num_rows),
    )


def _read_top_k(plane: _PlaneReader, header: Header, table: IdTable | None) -> TopKTargets:
    entries = _read_ids(plane, header, table)
    if header.num_rows and int(entries.counts.max()) != header.max_entries:
        raise CodecError("no row has the header's largest number of entries")
    id_words, bits = plane.taken, header.value_bits
    ranges_plane = plane.take("ranges")
    ranges = ranges_plane.numbers(header.num_rows, RANGE_BITS)
    ranges_plane.end()
    codes = content.unpack_codes(plane.take("codes", plane.spare), entries, bits, id_words)
    tail = plane.take_floats("tail")
    content.refuse_rows(~(tail < 0), "its logprobs are not finite numbers")
    return TopKTargets(
        vocab_size=header.vocab_size,
        temperature=header.temperature,
        row_splits=torch.from_numpy(entries.splits),
        token_ids=torch.from_numpy(entries.ids),
        logprobs=content.dequantise(codes, ranges, entries, tail, bits),
        tail_logprob=torch.from_numpy(tail),
        **_read_per_row(plane, header.num_rows),
    )


def _read_per_row(plane: _PlaneReader, num_rows: int) -> dict[str, Tensor]:
    """The planes that every kind may end with."""
    fields = {}
    if "realized" in plane:
        fields["realized_logprob"] = content.unpack_codes16(plane.take("realized"), num_rows).neg_()
    if "entropy" in plane:
        fields["entropy"] = content.unpack_codes16(plane.take("entropy"), num_rows)
    if "log_z" in plane:
        log_z = plane.take_floats("log_z")
        content.refuse_rows(~np.isfinite(log_z), "its log_z is not a finite number")
        fields["log_z"] = torch.from_numpy(log_z)
    return fields


def _find_table(header: Header, id_tables: Sequence[IdTable]) -> IdTable | None:
    """The table that the header names; None for the built-in identity."""
    if header.id_table == IDENTITY_DIGEST:
        return None
    for table in id_tables:
        if table.digest == header.id_table:
            if table.vocab_size != header.vocab_size:
                raise CodecError(
                    f"the id table {header.id_table.hex()} is for {table.vocab_size} ids, the "
                    f"container has {header.vocab_size}"
                )
            return table.to("cpu")
    raise CodecError(
        f"the id table {header.id_table.hex()} is needed to read this container; fetch it from the "
        "teacher that wrote it"
    )


def _identity_buckets(header: Header) -> int:
    shift = identity_shift(header.vocab_size, header.num_rows, header.num_entries)
    return num_identity_buckets(header.vocab_size, shift)


def _read_ids(plane: _PlaneReader, header: Header, table: IdTable | None) -> Entries:
    num_rows, num_entries, vocab_size = header.num_rows, header.num_entries, header.vocab_size
    if header.id_coding == ELIAS_FANO_IDS:
        return read_ids(
            table,
            vocab_size,
            num_rows,
            num_entries,
            plane.take("occupancy"),
            lambda num_bits: plane.take("offsets", (num_bits + 31) // 32),
        )
    counts_plane = plane.take("counts")
    counts = counts_plane.numbers(num_rows, header.most_entries.bit_length())
    counts_plane.end()
    if int(counts.sum()) != num_entries or (num_rows and int(counts.min()) < 1):
        raise CodecError("the entry counts of the rows do not add up to the header's")
    ids_plane = plane.take("ids")
    ids = ids_plane.numbers(num_entries, id_width(vocab_size))
    ids_plane.end()
    rows = np.repeat(np.arange(num_rows), counts)
    bad = ids >= vocab_size
    bad[1:] |= (ids[1:] <= ids[:-1]) & (rows[1:] == rows[:-1])
    content.refuse_rows(bad, "its ids are not ascending ids of the vocabulary", rows)
    return Entries.of(rows, counts, ids)


def _check_rows(targets: Targets, first_row: int = 0) -> None:
    """Refuses rows that are not finite, not normalised, or whose ids are not ascending."""

    def refuse(bad: Tensor, rows: Tensor | None, why: str) -> None:
        if bool(bad.any()):
            rows_of = None if rows is None else rows.cpu().numpy()
            content.refuse_rows(bad.cpu().numpy(), why, rows_of, first_row)

    tolerance = 1e-3
    mass = None
    if isinstance(targets, SparseTargets):
        ids, splits = targets.token_ids, targets.row_splits
        _check_span(targets)
        refuse(splits.diff() < 1, None, "it has no entry")
        rows = targets.entry_rows()
        bad = torch.zeros_like(ids, dtype=torch.bool)
        torch.logical_and(ids[1:] <= ids[:-1], rows[1:] == rows[:-1], out=bad[1:])
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < targets.vocab_size:
            bad |= (ids < 0) | (ids >= targets.vocab_size)
        refuse(bad, rows, "its ids are not ascending ids of the vocabulary")
        if isinstance(targets, SampledTargets):
            refuse(targets.counts < 1, rows, "its counts are not all at least 1")
            draws = targets.counts.new_zeros(targets.num_rows).index_add_(0, rows, targets.counts)
            why = f"its counts do not add up to the {targets.num_draws} draws"
            refuse(draws != targets.num_draws, None, why)
        elif isinstance(targets, TopKTargets):
            tail = targets.tail_logprob
            bad = ~torch.isfinite(targets.logprobs)
            if bool(torch.isnan(tail).any()):
                bad |= torch.isnan(tail)[rows]
            refuse(bad, rows, "its logprobs are not finite numbers")
            refuse(tail >= 0, None, "its tail logprob is not below 0: nothing would be kept")
            mass = targets.logprobs.new_zeros(targets.num_rows, dtype=torch.float64)
            mass.index_add_(0, rows, targets.logprobs.double().exp_())
            mass += tail.double().exp()
    elif isinstance(targets, DenseTargets):
        if targets.logprobs.dtype == torch.bfloat16:
            tolerance = 0.25  # a logprob rounded to 8 bits is off by up to 0.125
        mass = targets.logprobs.float().logsumexp(1).exp()
        refuse(~torch.isfinite(mass), None, "its logprobs are not finite numbers")
    else:
        raise ValueError(f"no encoding for {type(targets).__name__}")
    if mass is not None:
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
    if isinstance(targets, SparseTargets):
        first, last = int(targets.row_splits[0]), int(targets.row_splits[-1])
        if first != 0 or last != len(targets.token_ids):
            raise CodecError(
                f"row_splits must go from 0 to the {len(targets.token_ids)} entries, got {first} "
                f"to {last}"
            )
