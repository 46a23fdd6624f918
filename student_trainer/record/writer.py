"""Seals rows in Parquet shards, and keeps a manifest of them."""

import json
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from student_trainer.record.folder import BESIDE, Folder
from student_trainer.record.provenance import Provenance
from student_trainer.record.schema import METADATA, SCHEMA, Row

GROUP_NBYTES = 128 << 10
"""Content of a row group, all of which is read to get one row.

That takes a third of the time that decoding takes. Groups of half the size are read a third faster,
but make a shard 0.7 % larger, and 1.4 times as slow to write.
"""


class Writer:
    """Writes shards of one provenance to a folder, and the manifest that lists them."""

    def __init__(self, folder: Folder, provenance: Provenance, lost: Sequence[str] = ()) -> None:
        """lost: shards that were missing or damaged already, and were reported.

        Raises RecordError at once where nothing can be written.
        """
        self._folder = folder
        self._provenance = provenance
        self._lost = list(lost)
        self._id = secrets.token_hex(4)
        self._sealed: list[dict[str, Any]] = []
        folder.remove_abandoned()
        self._put_manifest()

    def seal(self, rows: Sequence[Row]) -> str:
        """Writes a shard and returns its name. Raises RecordError; earlier shards stay intact."""
        content = encode_shard(rows, self._provenance)
        number = f"{len(self._sealed):05}-{self._id}"
        name = f"shard-{number}-{xxhash.xxh3_128_hexdigest(content)}.parquet"
        self._folder.put(name, content)
        self._sealed.append({"name": name, "sequences": len(rows), "nbytes": content.size})
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
    """Returns the bytes of a shard.

    Ids are packed by DELTA_BINARY_PACKED, which is as small as zstd and takes half the time. Targets
    are stored as they are, since nothing makes them smaller (`python -m benchmarks.record`).
    """
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        SCHEMA,
        compression=compression,
        use_dictionary=["teacher", "spec"],  # type: ignore[arg-type]
        column_encoding={"input_ids.list.element": "DELTA_BINARY_PACKED"},
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
    offsets = np.cumsum([0, *(len(row.token_ids) for row in rows)]).astype(np.int32)
    ids = pa.ListArray.from_arrays(
        offsets,
        pa.array(np.concatenate([row.token_ids for row in rows])),
        type=SCHEMA.field("input_ids").type,
    )
    columns = {
        "key": [row.key for row in rows],
        "seed": [row.seed for row in rows],
        "epoch": [row.epoch for row in rows],
        "row_mask": [row.row_mask for row in rows],
        "input_ids": ids,
        "targets": [list(row.payloads) for row in rows],
        "teacher": [provenance.fingerprint] * len(rows),
        "spec": [provenance.spec] * len(rows),
        "temperature": [provenance.temperature] * len(rows),
    }
    return pa.table(columns, schema=SCHEMA)
