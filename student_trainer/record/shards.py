"""Reads the sealed Parquet shards of a record.

    shard-00000-1f2e3d4c-<digest>.parquet   sealed; the digest is XXH3-128 of the whole file, hex
    __record__/                             for this code alone; readers of the folder skip it
        manifest-1f2e3d4c.json              what one writer has sealed, so that a loss is noticed
        id_table-<digest>.bin               tables that targets are coded with
        quarantine/                         files that were found damaged

A shard is written under a hidden name, forced to the disk and renamed: a file with its name was
whole once, and its name tells whether it still is. Reads are checked even where no whole file was
compared with its name: pages, targets and provenance have digests of their own, and each row says
which one it is. Several writers may share a folder. docs/recording.md describes the columns for
readers without this code.
"""

import errno
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from tqdm import tqdm

from student_trainer.errors import RecordError
from student_trainer.record.folder import Folder
from student_trainer.record.provenance import Provenance
from student_trainer.record.schema import IDENTITY, METADATA, SCHEMA, WRITTEN_SCHEMA

OPEN_SHARDS = 128
"""Shards whose footer is kept in memory."""
CHUNK_NBYTES = 4 << 20
VERIFY_THREADS = 4
DAMAGE = (pa.ArrowException, OSError, KeyError, ValueError, IndexError)
"""What reading a damaged file can raise. Whole files raise them too: `is_whole` decides."""


class DamagedShard(Exception):
    """A shard is not what was sealed."""

    def __init__(self, shard: str) -> None:
        super().__init__(shard)
        self.shard = shard


class Shards:
    """Reads the shards of a folder, and keeps the footers of some in memory."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._files: OrderedDict[str, tuple[pq.ParquetFile, np.ndarray]] = OrderedDict()
        """Open files, the least recently used first, with the first row of each row group."""

    def names(self) -> list[str]:
        """Lists all shards, damaged or not, in the order of their writers' numbers."""
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
        except Exception as error:  # the libraries of stores raise errors of their own
            if isinstance(error, OSError) and error.errno == errno.EIO:  # the disk lost it
                return False
            raise RecordError(f"cannot read {name} in {self._folder.root}: {error}") from error
        return name == f"{name.rpartition('-')[0]}-{digest.hexdigest()}.parquet"

    def find_damaged(self, names: Sequence[str]) -> Iterator[str]:
        """Reads all these shards whole, in several threads, and yields the damaged ones."""
        with ThreadPoolExecutor(VERIFY_THREADS) as threads:
            results = threads.map(self.is_whole, names)
            shown = tqdm(results, desc="checking shards", total=len(names), leave=False, delay=2.0)
            for name, is_whole in zip(names, shown, strict=True):
                if not is_whole:
                    yield name

    def provenance(self, name: str) -> Provenance:
        """Reads what a shard was made of. Raises one of DAMAGE."""
        metadata = self._file(name)[0].metadata.metadata or {}
        return Provenance.from_signed(metadata[METADATA.encode()])

    def is_written(self, name: str) -> bool:
        """Whether its rows are texts that the teacher wrote. Raises one of DAMAGE."""
        return "prompt_tokens" in self._file(name)[0].schema_arrow.names

    def read(self, name: str, columns: Sequence[str]) -> pa.Table:
        """Reads some columns of all rows. Raises one of DAMAGE."""
        return self._file(name)[0].read(columns=list(columns), use_threads=False)

    def column_nbytes(self, name: str, column: str) -> int:
        """Returns what a column takes in the file, without reading it. Raises one of DAMAGE."""
        metadata = self._file(name)[0].metadata
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        chunks = [group.column(at) for group in groups for at in range(group.num_columns)]
        return sum(
            chunk.total_compressed_size
            for chunk in chunks
            if chunk.path_in_schema.partition(".")[0] == column
        )

    def identities(self, name: str) -> pa.Table:
        """Reads the IDENTITY columns of all rows. Raises one of DAMAGE."""
        table = self.read(name, IDENTITY)
        if any(table.column(column).null_count for column in ("key", "seed", "epoch")):
            raise ValueError("a row does not say which sequence it holds")
        return table

    def payloads(self, name: str, row: int, identity: tuple[bytes, int, int]) -> list[bytes]:
        """Reads the targets of a row that has this key, seed and epoch. Raises one of DAMAGE."""
        file, firsts = self._file(name)
        group = int(np.searchsorted(firsts, row, side="right")) - 1
        columns = ["key", "seed", "epoch", "targets"]
        table = file.read_row_group(group, columns=columns, use_threads=False)
        *stored, payloads = (
            table.column(column)[row - int(firsts[group])].as_py() for column in columns
        )
        if tuple(stored) != identity:
            raise ValueError(f"row {row} of {name} is not the row that the index has")
        if not payloads or None in payloads:
            raise ValueError(f"row {row} of {name} has no targets")
        return payloads

    def raise_damage(self, name: str, error: BaseException) -> NoReturn:
        """Raises DamagedShard if damage explains an error; the error if it is not in DAMAGE.

        Raises RecordError for a shard that cannot be read although it is exactly what was sealed.
        """
        if not isinstance(error, DAMAGE):
            raise error
        if self.is_whole(name):
            raise RecordError(
                f"{name} in {self._folder.root} cannot be read although it is exactly what was "
                f"sealed: {error}. If the store was unreachable for a moment, try again; otherwise "
                "a newer version may have written it."
            ) from error
        raise DamagedShard(name) from error

    def forget(self, name: str) -> None:
        """Closes the file of a shard."""
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
            if not any(file.schema_arrow.equals(known) for known in (SCHEMA, WRITTEN_SCHEMA)):
                raise ValueError(f"{name} has other columns than a shard")
        except BaseException:
            source.close()
            raise
        counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        self._files[name] = file, np.cumsum([0, *counts])[:-1]
        return self._files[name]
