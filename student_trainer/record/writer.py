"""Seals rows in Parquet shards, and keeps a manifest of them."""

import json
import secrets
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from student_trainer.record.folder import BESIDE, Folder
from student_trainer.record.provenance import Provenance
from student_trainer.record.schema import METADATA, SCHEMA, WRITTEN_SCHEMA, Row, Written

GROUP_NBYTES = 128 << 10
"""Content of a row group, all of which is read to get one row.

That takes a third of the time that decoding takes. Groups of half the size are read a third faster,
but make a shard 0.7 % larger, and 1.4 times as slow to write.
"""


class Writer:
    """Writes shards of one provenance to a folder, and the manifest that lists them."""

    def __init__(
        self, folder: Folder, provenance: Provenance, lost: Sequence[str] = (), first: int = 0
    ) -> None:
        """lost: shards that were missing or damaged already, and were reported. first: the number of
        the first shard.

        Raises RecordError at once where nothing can be written.
        """
        self._folder = folder
        self._provenance = provenance
        self._lost = list(lost)
        self._first = first
        self._id = secrets.token_hex(4)
        self._sealed: list[dict[str, Any]] = []
        folder.remove_abandoned()
        self._put_manifest()

    def seal(self, rows: Sequence[Row], **numbers: float) -> str:
        """Writes a shard and returns its name. Raises RecordError; earlier shards stay intact.

        numbers: more about it, for the manifest.
        """
        content = encode_shard(rows, self._provenance)
        number = f"{self._first + len(self._sealed):05}-{self._id}"
        name = f"shard-{number}-{xxhash.xxh3_128_hexdigest(content)}.parquet"
        self._folder.put(name, content)
        sealed = {"name": name, "sequences": len(rows), "nbytes": content.size}
        self._sealed.append({**sealed, **numbers})
        self._put_manifest()
        return name

    def _put_manifest(self) -> None:
        content = {**self._provenance.to_json(), "shards": self._sealed, "lost": self._lost}
        self._folder.put(
            f"{BESIDE}/manifest-{self._id}.json", json.dumps(content, indent=1).encode()
        )


def encode_shard(
    rows: Sequence[Row], provenance: Provenance, *, compression: str = "none"
) -> pa.Buffer:
    """Returns the bytes of a shard; of its rows, all or none were written by the teacher.

    Ids are packed by DELTA_BINARY_PACKED, which is as small as zstd and takes half the time. Targets
    are stored as they are, since nothing makes them smaller (`python -m benchmarks.record`).
    """
    sink = pa.BufferOutputStream()
    are_written = rows[0].written is not None
    repeated, ids = ["teacher", "spec"], ["input_ids"]
    if are_written:
        repeated, ids = [*repeated, "prompt", "finish", "settings"], [*ids, "token_ids"]
    with pq.ParquetWriter(
        sink,
        WRITTEN_SCHEMA if are_written else SCHEMA,
        compression=compression,
        use_dictionary=repeated,  # type: ignore[arg-type]
        column_encoding={f"{name}.list.element": "DELTA_BINARY_PACKED" for name in ids},
        write_statistics=False,
        store_schema=False,
        write_page_checksum=True,
    ) as writer:
        start, nbytes = 0, 0
        for stop, row in enumerate(rows, 1):
            nbytes += row.nbytes
            if nbytes >= GROUP_NBYTES or stop == len(rows):
                writer.write_table(_table(rows[start:stop], provenance))
                start, nbytes = stop, 0
        writer.add_key_value_metadata({METADATA: provenance.signed()})
    return sink.getvalue()


def _table(rows: Sequence[Row], provenance: Provenance) -> pa.Table:
    columns = {
        "key": [row.key for row in rows],
        "seed": [row.seed for row in rows],
        "epoch": [row.epoch for row in rows],
        "row_mask": [row.row_mask for row in rows],
        "input_ids": _list_ids([row.token_ids for row in rows]),
        "targets": [list(row.payloads) for row in rows],
        "teacher": [provenance.fingerprint] * len(rows),
        "spec": [provenance.spec] * len(rows),
        "temperature": [provenance.temperature] * len(rows),
    }
    texts = [(row.token_ids, row.written) for row in rows if row.written is not None]
    if not texts:
        return pa.table(columns, schema=SCHEMA)
    starts = [(ids[: text.prompt_tokens], ids[text.prompt_tokens :]) for ids, text in texts]
    columns |= {
        "prompt_key": [xxhash.xxh3_128_digest(prompt.tobytes()) for prompt, _ in starts],
        "token_ids": _list_ids([ids for _, ids in starts]),
    }
    for name in (field.name for field in fields(Written)):
        columns[name] = [getattr(text, name) for _, text in texts]
    return pa.table(columns, schema=WRITTEN_SCHEMA)


def _list_ids(sequences: Sequence[np.ndarray]) -> pa.ListArray:
    """Returns (L,) int32 arrays as a column."""
    offsets = np.cumsum([0, *map(len, sequences)]).astype(np.int32)
    return pa.ListArray.from_arrays(
        offsets, pa.array(np.concatenate(sequences)), type=SCHEMA.field("input_ids").type
    )
