"""Targets to bytes and back, in the order of FORMAT.md.

Letters: R rows, V vocabulary, E kept entries of all rows together.
The decoder checks every size against the bytes that are there before it allocates anything, so its
memory is at most 72 times the input; whatever is malformed raises CodecError.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

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
from logit_codec.ids import IDENTITY_DIGEST, IdTable, code_ids, identity_shift, read_cells, read_ids
from logit_codec.spec import CODE_BITS, RANGE_BITS, TargetSpec
from logit_codec.targets import (
    DenseTargets,
    SampledTargets,
    SparseTargets,
    Targets,
    TopKTargets,
    _splits,
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
    least = OVERHEAD_NBYTES + 4 * sum(size or 0 for size in planes.values())
    if len(view) < least or (None not in planes.values() and len(view) > least):
        at_least = "at least " if None in planes.values() else ""
        raise CodecError(
            f"the container has {len(view)} bytes, its header implies {at_least}{least}"
        )
    if len(view) % 4:
        raise CodecError(f"a container is a whole number of words, got {len(view)} bytes")
    if xxhash.xxh3_128_digest(view[:-DIGEST_NBYTES]) != view[-DIGEST_NBYTES:]:
        raise CodecError("the digest does not match: the bytes were changed on the way; ask again")
    body = (
        torch.frombuffer(bytearray(view[HEADER.size : -DIGEST_NBYTES]), dtype=torch.int32)
        if len(view) > OVERHEAD_NBYTES
        else torch.empty(0, dtype=torch.int32)
    )
    plane = _PlaneReader(body, planes)
    if header.kind == DENSE:
        targets: Targets = _read_dense(plane, header)
    elif header.kind == SAMPLED:
        targets = _read_sampled(plane, header, table)
    else:
        targets = _read_top_k(plane, header, table)
    targets = replace(targets, **_read_per_row(plane, header.num_rows))
    if plane.spare:
        raise CodecError(f"the container has {4 * plane.spare} bytes more than its planes")
    _check_rows(targets)
    return targets


class _PlaneReader:
    """Hands out the planes of a body in order, none beyond its end."""

    def __init__(self, body: Tensor, planes: dict[str, int | None]) -> None:
        self._rest = body
        self._sizes = planes
        self.spare = len(body) - sum(size or 0 for size in planes.values())
        """Words that no plane of known size needs."""
        self.taken = 0
        """Words handed out so far."""

    def take(self, name: str, num_words: int | None = None) -> Tensor:
        """The next plane. `num_words` is for one whose size does not follow from the header."""
        size = self._sizes[name]
        if size is None:
            assert num_words is not None
            if num_words > self.spare:
                raise CodecError(f"the container ends in its {name} plane")
            self.spare -= num_words
            size = num_words
        self.taken += size
        words, self._rest = self._rest[:size], self._rest[size:]
        return words

    def __contains__(self, name: str) -> bool:
        return name in self._sizes


def _read_dense(plane: _PlaneReader, header: Header) -> DenseTargets:
    num_rows, vocab_size = header.num_rows, header.vocab_size
    dtype = torch.float32 if header.value_bits == 32 else torch.bfloat16
    values = plane.take("values").view(dtype)
    if values.view(torch.uint8)[num_rows * vocab_size * dtype.itemsize :].any():
        raise CodecError("the padding of the values plane is not zero")
    return DenseTargets(
        vocab_size=vocab_size,
        temperature=header.temperature,
        logprobs=values[: num_rows * vocab_size].view(num_rows, vocab_size),
    )


def _read_sampled(plane: _PlaneReader, header: Header, table: IdTable | None) -> SampledTargets:
    rows, sizes, ids = _read_ids(plane, header, table)
    id_words = plane.taken
    words = plane.take("draws", plane.spare)
    counts = content.unpack_draws(words, rows, header.num_rows, header.max_entries, id_words)
    return SampledTargets(
        vocab_size=header.vocab_size,
        temperature=header.temperature,
        row_splits=_splits(sizes),
        token_ids=ids,
        counts=counts,
        num_draws=header.max_entries,
    )


def _read_top_k(plane: _PlaneReader, header: Header, table: IdTable | None) -> TopKTargets:
    rows, sizes, ids = _read_ids(plane, header, table)
    if len(sizes) and int(sizes.max()) != header.max_entries:
        raise CodecError("no row has the header's largest number of entries")
    id_words, bits = plane.taken, header.value_bits
    num_rows = header.num_rows
    ranges = content.unpack_plane(plane.take("ranges"), num_rows, RANGE_BITS, "ranges")
    words = plane.take("codes", plane.spare)
    codes = content.unpack_codes(words, sizes, bits, id_words)
    tail = plane.take("tail").view(torch.float32)
    return TopKTargets(
        vocab_size=header.vocab_size,
        temperature=header.temperature,
        row_splits=_splits(sizes),
        token_ids=ids,
        logprobs=content.dequantise(codes, ranges, rows, tail, bits),
        tail_logprob=tail,
    )


def _read_per_row(plane: _PlaneReader, num_rows: int) -> dict[str, Tensor]:
    """The planes that every kind may end with."""
    fields = {}
    if "realized" in plane:
        fields["realized_logprob"] = -content.unpack_codes16(plane.take("realized"), num_rows)
    if "entropy" in plane:
        fields["entropy"] = content.unpack_codes16(plane.take("entropy"), num_rows)
    if "log_z" in plane:
        fields["log_z"] = plane.take("log_z").view(torch.float32)
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
    return ((header.vocab_size - 1) >> shift) + 1


def _read_ids(
    plane: _PlaneReader, header: Header, table: IdTable | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Row of each entry (E,), entries of each row (R,), ids (E,)."""
    num_rows, num_entries = header.num_rows, header.num_entries
    if header.id_coding == FIXED_WIDTH_IDS:
        width = header.most_entries.bit_length()
        counts = content.unpack_plane(plane.take("counts"), num_rows, width, "counts")
        if int(counts.sum()) != num_entries or (num_rows and int(counts.min()) < 1):
            raise CodecError("the entry counts of the rows do not add up to the header's")
        width = id_width(header.vocab_size)
        ids = content.unpack_plane(plane.take("ids"), num_entries, width, "ids")
        rows = torch.repeat_interleave(torch.arange(num_rows), counts, output_size=num_entries)
        return rows, counts, ids
    if table is None:
        table = IdTable.identity(header.vocab_size, num_rows, num_entries)
    rows, buckets = read_cells(table, plane.take("occupancy"), num_rows, num_entries)
    counts = torch.bincount(rows, minlength=num_rows)
    if num_rows and int(counts.min()) < 1:
        raise CodecError("a row has no entry")
    widths = table.shifts[buckets]
    first = widths.cumsum(0)
    num_bits = int(first[-1]) if num_entries else 0
    words = plane.take("offsets", (num_bits + 31) // 32)
    content.check_padding(words, num_bits, "offsets")
    offsets = bitpack.unpack_varying(words, first.sub_(widths), widths)
    del first, widths
    return rows, counts, read_ids(table, rows, buckets, offsets)


def _check_rows(targets: Targets, first_row: int = 0) -> None:
    """Refuses rows that are not finite, not normalised, or whose ids are not ascending."""

    def refuse(bad: Tensor, rows: Tensor | None, why: str) -> None:
        _refuse_rows(bad, rows, why, first_row)

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


def _refuse_rows(bad: Tensor, rows: Tensor | None, why: str, first_row: int) -> None:
    """Raises for the first row that is bad; `rows` says which row each element of `bad` is of."""
    if bool(bad.any()):
        index = int(bad.nonzero()[0, 0])
        row = first_row + (index if rows is None else int(rows[index]))
        raise CodecError(f"row {row} cannot be a target: {why}", row)
