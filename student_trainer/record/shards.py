"""A record on disk: sealed Parquet shards in a folder, local or wherever fsspec reaches.

    shard-00000-1f2e3d4c-<digest>.parquet   sealed; the digest is XXH3-128 of the whole file, hex
    __record__/                             for this code alone: readers of the folder leave it out
        manifest-1f2e3d4c.json              what one writer has sealed, so that a loss is noticed
        id_table-<digest>.bin               tables that targets are coded with
        quarantine/                         what was found damaged

A shard is written aside, forced to the disk and renamed: a file with its name is whole, or was
damaged later, which its name tells. What is read of a file that was not compared with its name first
is checked too: pages, targets and provenance have digests of their own, and a row says which it is.
Several writers may share a folder. docs/recording.md describes the columns for readers without this
code.
"""

import errno
import json
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from student_trainer.errors import RecordError
from student_trainer.record.folder import BESIDE, QUARANTINE, Folder, _listed, _names
from student_trainer.record.schema import IDENTITY, METADATA, SCHEMA, Provenance
from student_trainer.record.writer import CHUNK_NBYTES

OPEN_SHARDS = 128
"""Shards of which the footer is kept in memory."""


class Shards:
    """The sealed shards of a folder, and where their rows are."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._files: OrderedDict[str, tuple[pq.ParquetFile, np.ndarray]] = OrderedDict()
        """With the first row of each row group."""

    def names(self) -> list[str]:
        """Of all that are there, damaged or not, in the order of their writers' numbers."""
        return sorted(
            name
            for name in self._folder.names()
            if name.startswith("shard-") and name.endswith(".parquet")
        )

    def is_whole(self, name: str) -> bool:
        """Whether the file still is what was sealed. Raises RecordError if it cannot be read."""
        digest = xxhash.xxh3_128()
        try:
            with self._folder.open(name) as file:
                while chunk := file.read(CHUNK_NBYTES):
                    digest.update(chunk)
        except FileNotFoundError:
            return False
        except Exception as error:  # the libraries of stores have errors of their own
            if isinstance(error, OSError) and error.errno == errno.EIO:
                return False
            raise RecordError(f"cannot read {name} in {self._folder.root}: {error}") from error
        return name == f"{name.rpartition('-')[0]}-{digest.hexdigest()}.parquet"

    def provenance(self, name: str) -> Provenance:
        """Raises one of DAMAGE."""
        metadata = self._file(name)[0].metadata.metadata or {}
        return Provenance.from_signed(metadata[METADATA.encode()])

    def identities(self, name: str) -> pa.Table:
        """The columns IDENTITY of all rows. Raises one of DAMAGE."""
        found = self._file(name)[0].read(columns=list(IDENTITY), use_threads=False)
        if any(found.column(column).null_count for column in ("key", "seed", "epoch")):
            raise ValueError("a row does not say which sequence it is of")
        return found

    def payloads(self, name: str, row: int, identity: tuple[bytes, int, int]) -> list[bytes]:
        """The targets of a row that has this key, seed and epoch. Raises one of DAMAGE."""
        file, firsts = self._file(name)
        group = int(np.searchsorted(firsts, row, side="right")) - 1
        columns = ["key", "seed", "epoch", "targets"]
        found = file.read_row_group(group, columns=columns, use_threads=False)
        *said, payloads = (
            found.column(column)[row - int(firsts[group])].as_py() for column in columns
        )
        if tuple(said) != identity:
            raise ValueError(f"row {row} of {name} is another one than the shard said at first")
        if not payloads or None in payloads:
            raise ValueError(f"row {row} of {name} has no targets")
        return payloads

    def forget(self, name: str) -> None:
        """Closes its file."""
        if name in self._files:
            self._files.pop(name)[0].close(force=True)

    def close(self) -> None:
        """Closes all files."""
        for name in list(self._files):
            self.forget(name)

    def _file(self, name: str) -> tuple[pq.ParquetFile, np.ndarray]:
        if name in self._files:
            self._files.move_to_end(name)
            return self._files[name]
        while len(self._files) >= OPEN_SHARDS:
            self.forget(next(iter(self._files)))
        source = self._folder.open(name)
        try:
            file = pq.ParquetFile(source, pre_buffer=False, page_checksum_verification=True)
            if not file.schema_arrow.equals(SCHEMA):
                raise ValueError(f"{name} has other columns than a shard")
        except BaseException:
            source.close()
            raise
        counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        self._files[name] = file, np.cumsum([0, *counts])[:-1]
        return self._files[name]


def missing_shards(folder: Folder, present: Sequence[str]) -> tuple[list[str], list[str]]:
    """Shards that a manifest has and the folder has not, and manifests that cannot be read."""
    expected: set[str] = set()
    known: set[str] = {*present, *folder.names(QUARANTINE)}
    unreadable = []
    for file in sorted(folder.names(BESIDE)):
        if not (file.startswith("manifest-") and file.endswith(".json")):
            continue
        name = f"{BESIDE}/{file}"
        try:
            manifest = json.loads(folder.read(name))
            sealed = _names(shard["name"] for shard in _listed(manifest["shards"]))
            known |= _names(_listed(manifest["lost"]))
            expected |= sealed
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            unreadable.append(name)
    return sorted(expected - known), unreadable


def id_table_file(digest: str) -> str:
    """Where a folder has the id table with this digest, in hex."""
    return f"{BESIDE}/id_table-{digest}.bin"
