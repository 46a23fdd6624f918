"""Encodes targets as containers and decodes them, in the order of FORMAT.md.

The planes that only one kind has are in its file in `logit_codec/kinds/`, ids in `ids.py`, and what
all kinds share in `planes.py`. The decoder checks every size against the bytes that are there
before it allocates anything, so its memory is at most 72 times the input; whatever is malformed
raises CodecError.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import xxhash

from logit_codec.errors import CodecError
from logit_codec.given_ids import GivenIds
from logit_codec.header import DIGEST_NBYTES, OVERHEAD_NBYTES, Header, read_header
from logit_codec.id_table import IdTable
from logit_codec.kinds import kind_named, kind_numbered
from logit_codec.kinds.base import Kind
from logit_codec.planes import PlaneReader, RowCheck, pack_row_fields, row_plane_sizes
from logit_codec.spec import TargetSpec
from logit_codec.targets import Targets


def encode(targets: Targets, *, bits: int | None = None, id_table: IdTable | None = None) -> bytes:
    """Writes all rows of `targets` as one container.

    bits: of each logprob of `top_k` (default 7) and `given_ids` (default 16). id_table: that of the teacher, None for the built-in identity;
    ids are written with it unless a fixed width takes no more bytes. The planes are made on the
    targets' device; only the packed words are copied from it. Raises CodecError, with the row, for
    rows that are not finite, not normalised or not sorted, and ValueError for a table of another
    vocabulary.
    """
    return _encode(targets, bits, id_table, 0)


def _encode(targets: Targets, bits: int | None, id_table: IdTable | None, first_row: int) -> bytes:
    """Encodes as `encode` does; `first_row` is the number of the first row in error messages."""
    kind = kind_named(targets.kind)
    check = RowCheck(first_row)
    kind.check_rows(targets, check)
    check.refuse_row_fields(targets)
    content = kind.write(targets, kind.default_bits if bits is None else bits, id_table)
    flags, row_planes = pack_row_fields(targets, kind.flags)
    header = Header(
        kind=kind.number,
        id_coding=content.ids.coding,
        value_bits=content.value_bits,
        flags=flags | content.flags,
        num_rows=targets.num_rows,
        vocab_size=targets.vocab_size,
        max_entries=content.max_entries,
        num_entries=content.num_entries,
        temperature=targets.temperature,
        needed=content.needed or content.ids.table_digest,
    )
    body = torch.cat([*content.planes, *row_planes]).cpu().numpy()
    digest = xxhash.xxh3_128(head := header.pack())
    digest.update(body.data)
    return b"".join((head, body.data, digest.digest()))


def encode_parts(
    targets: Targets, spec: TargetSpec, *, max_nbytes: int, id_table: IdTable | None = None
) -> Iterator[tuple[int, int, bytes]]:
    """Writes `targets` as containers of at most `max_nbytes` each, unless one row alone is larger.

    Yields (first row, number of rows, container). Where a sequence is split depends on the spec
    and the vocabulary only, so that the same rows always give the same bytes. spec: what `for_rows`
    and `for_head` returned, of a kind that needs them.
    """
    room = max_nbytes - OVERHEAD_NBYTES - 4 * 8  # every plane may end in up to 3 bytes of padding
    step = max(1, int(room / spec.max_row_nbytes(targets.vocab_size)))
    kind_named(targets.kind).check_span(targets)  # slicing would hide entries that no row has
    for first in range(0, targets.num_rows, step):
        rows = targets[first : first + step]
        yield first, rows.num_rows, _encode(rows, spec.code_bits, id_table, first)


def decode(
    data: bytes | bytearray | memoryview,
    *,
    id_tables: Sequence[IdTable] = (),
    given_ids: GivenIds | None = None,
) -> Targets:
    """Reads the targets of one container, on the CPU.

    id_tables: those that the container may name, beside the built-in identity. given_ids: those
    that the targets of kind `given_ids` were asked for, of exactly the container's rows. Raises
    CodecError for anything that is not exactly one well-formed container of this version, and for
    one that names another table or other ids.
    """
    view = memoryview(data).cast("B")
    kind, header = _read_checked_header(view)
    needed = kind.find_needed(header, id_tables, given_ids)
    sizes = {**kind.plane_sizes(header, needed), **row_plane_sizes(header)}
    is_exact = None not in sizes.values()
    # A byte per entry at least: so what is made per entry is bounded by the bytes that are there.
    content_nbytes = max(4 * sum(size or 0 for size in sizes.values()), header.num_entries)
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
    return kind.read(PlaneReader(np.frombuffer(view, np.uint8), sizes), header, needed)


def decode_parts(
    parts: Sequence[bytes], *, id_tables: Sequence[IdTable] = (), given_ids: GivenIds | None = None
) -> Targets:
    """Reads containers whose rows follow each other; given_ids: of all their rows.

    Raises CodecError as `decode` does, and ValueError if the containers do not fit together.
    """
    decoded, first = [], 0
    for part in parts:
        given = given_ids
        if given is not None:
            given = given[first : first + read_header(memoryview(part)).num_rows]
        decoded.append(decode(part, id_tables=id_tables, given_ids=given))
        first += decoded[-1].num_rows
    return Targets.cat(decoded)


def _read_checked_header(view: memoryview) -> tuple[Kind[Any], Header]:
    """Reads a header and checks it by the rules of its kind. Raises CodecError."""
    header = read_header(view)
    kind = kind_numbered(header.kind)
    if kind is None:
        raise CodecError(f"kind number {header.kind} is not known to this logit_codec")
    kind.check_header(header)
    return kind, header
