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
import os
import secrets
import socket
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from fsspec.implementations.local import LocalFileSystem
from google.protobuf.json_format import ParseDict, ParseError

from logit_codec import parse_targets
from protos import teacher_pb2
from student_trainer.errors import RecordError

SCHEMA = pa.schema(
    [
        ("key", pa.binary(16)),
        ("seed", pa.uint64()),
        ("epoch", pa.uint64()),
        ("row_mask", pa.binary()),
        ("input_ids", pa.list_(pa.field("element", pa.int32(), nullable=False))),
        ("targets", pa.list_(pa.field("element", pa.binary(), nullable=False))),
        ("teacher", pa.string()),
        ("spec", pa.string()),
        ("temperature", pa.float64()),
    ]
)
"""One row per sequence and draw; docs/recording.md says what each column holds."""
IDENTITY = ("key", "seed", "epoch", "row_mask")
"""The columns that say what a row is, without its content."""
BESIDE = "__record__"
"""Folder of what is no shard. pandas leaves out names with one underscore, `datasets` with two."""
QUARANTINE = f"{BESIDE}/quarantine"
METADATA = "logitstream"
"""Key of a shard's metadata under which its provenance is."""
GROUP_NBYTES = 128 << 10
"""Content of a row group, which is read whole to get at one row: a third of what decoding costs. Half of
it is read a third faster, for a shard that is 0.7 % larger and takes 1.4 times as long to make."""
CHUNK_NBYTES = 4 << 20
ABANDONED_S = 600.0
"""A partial file that was not written to for so long belongs to nobody any more."""
MAX_TEMPERATURE = 1e9
"""Far above any that means something."""
OPEN_SHARDS = 128
"""Shards of which the footer is kept in memory."""
DAMAGE = (pa.ArrowException, OSError, KeyError, ValueError, IndexError)
"""What reading a damaged file can raise; other things too, so `is_whole` has the last word."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """What is the same for every row of a record."""

    teacher: dict[str, Any]
    """Fields of TeacherInfo, as JSON has them."""
    spec: str
    """What was asked for, as `parse_targets` reads it."""
    temperature: float
    id_tables: tuple[str, ...] = ()
    """Digests, hex, of what the targets may be coded with."""

    @property
    def fingerprint(self) -> str:
        """Of the teacher: of everything that decides the bytes."""
        return self.teacher.get("teacher_fingerprint", "")

    @property
    def origin(self) -> tuple[str, ...]:
        """What has to be the same for rows to be of one record."""
        return origin_of(self.info())

    def to_json(self) -> dict[str, Any]:
        return {
            "teacher": self.teacher,
            "spec": self.spec,
            "temperature": self.temperature,
            "id_tables": list(self.id_tables),
        }

    def signed(self) -> str:
        """As JSON that says what its own digest is, for the metadata of a shard."""
        content = self.to_json()
        return json.dumps({**content, "digest": _digest_of(content)})

    @classmethod
    def from_signed(cls, text: bytes) -> Self:
        """Raises ValueError if it is not what `signed` made."""
        try:
            found = json.loads(text)
            if found.pop("digest") != _digest_of(found):
                raise ValueError("the provenance of a shard was changed")
            json.dumps(found, ensure_ascii=False).encode()  # half surrogate pairs are no text
            if not isinstance(found["teacher"], dict):
                raise ValueError("the teacher is not described")
            tables = [bytes.fromhex(table).hex() for table in _listed(found["id_tables"])]
            made = cls(found["teacher"], found["spec"], found["temperature"], tuple(tables))
            made.info()
            parse_targets(made.spec)
            if isinstance(made.temperature, bool) or not 0 < made.temperature < MAX_TEMPERATURE:
                raise ValueError("the temperature is not a number above 0")
        except RecursionError:
            raise ValueError("the provenance of a shard is nested too deep") from None
        except (KeyError, TypeError, AttributeError, ParseError) as error:
            raise ValueError(f"the provenance of a shard is not one ({error!r})") from None
        return made

    def info(self) -> teacher_pb2.TeacherInfo:
        """Who the teacher is; fields that this version does not know are left out."""
        return ParseDict(self.teacher, teacher_pb2.TeacherInfo(), ignore_unknown_fields=True)


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence with its targets."""

    key: bytes
    """`ids_digest` of the ids."""
    seed: int
    epoch: int
    row_mask: bytes | None
    """Bit i, the lowest first, says whether row i has targets; None: all have."""
    token_ids: np.ndarray
    """(L,) int32."""
    payloads: tuple[bytes, ...]
    """Containers of the codec, in the order of the rows."""

    @property
    def nbytes(self) -> int:
        return self.token_ids.nbytes + sum(map(len, self.payloads))


def origin_of(info: teacher_pb2.TeacherInfo) -> tuple[str, ...]:
    """Weights and tokenizer of a teacher, or all of its fingerprint if it does not say which."""
    if not info.weights_fingerprint:
        return (info.teacher_fingerprint,)
    return info.weights_fingerprint, info.tokenizer_fingerprint


class Folder:
    """Where a record is; every file in it appears whole or not at all."""

    def __init__(self, where: str | os.PathLike[str]) -> None:
        """where: a path, or a URL such as s3://bucket/targets. Raises RecordError."""
        try:
            self._files, self.root = fsspec.core.url_to_fs(os.fspath(where))
        except (ValueError, ImportError) as error:
            raise RecordError(f"cannot use {where}: {error}") from None
        self.is_local = isinstance(self._files, LocalFileSystem)

    def names(self, below: str = "") -> set[str]:
        """Of the files in the folder, or in one below it; none if it does not exist."""
        self._files.invalidate_cache()
        try:
            found = self._files.ls(self._path(below), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return set()
        return {path.rstrip("/").rpartition("/")[2] for path in found}

    def open(self, name: str) -> Any:
        """For reading, at any place. Not mapped: a mapped file that is cut off kills the process."""
        if self.is_local:
            return pa.OSFile(self._path(name))
        return self._files.open(self._path(name), "rb", cache_type="readahead")

    def read(self, name: str) -> bytes:
        return self._files.cat_file(self._path(name))

    def put(self, name: str, content: bytes | pa.Buffer) -> None:
        """Makes a file, or replaces it. Raises RecordError if it cannot; then nothing changed."""
        path = self._path(name)
        try:
            if self.is_local:
                _write_local(Path(path), content)
            else:  # object stores show a file once it is there as a whole
                self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
                self._files.pipe_file(path, bytes(content))
        except Exception as error:  # the libraries of stores have errors of their own
            reason = getattr(error, "strerror", None) or error
            raise RecordError(
                f"cannot write {path}: {reason}. What was sealed before is intact; once the cause is "
                "removed, the same command goes on from there."
            ) from error

    def quarantine(self, name: str) -> None:
        """Puts a damaged file aside. Raises OSError."""
        aside = f"{QUARANTINE}/{name.rpartition('/')[2]}"
        self._files.makedirs(self._path(QUARANTINE), exist_ok=True)
        self._files.mv(self._path(name), self._path(aside))

    def remove_abandoned(self) -> None:
        """Removes what killed writers left half written."""
        if self.is_local:
            for path in Path(self.root).rglob(".*.partial"):
                if time.time() - path.stat().st_mtime > ABANDONED_S or _is_of_the_dead(path.name):
                    path.unlink(missing_ok=True)

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}" if name else self.root


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


class Writer:
    """Seals shards of one provenance in a folder, and keeps its manifest."""

    def __init__(self, folder: Folder, provenance: Provenance, lost: Sequence[str] = ()) -> None:
        """lost: shards that were missing when this writer began, and were told of. Raises
        RecordError at once where nothing can be written."""
        self._folder = folder
        self._provenance = provenance
        self._lost = list(lost)
        self._id = secrets.token_hex(4)
        self._sealed: list[dict[str, Any]] = []
        folder.remove_abandoned()
        self._put_manifest()

    def seal(self, rows: Sequence[Row]) -> str:
        """Writes a shard; returns its name. Raises RecordError; what was sealed before is intact."""
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
    """The bytes of a shard.

    Ids are packed by DELTA_BINARY_PACKED, which takes as few bytes as zstd at half the time; target
    bytes are as dense as they get, and are stored as they are (`python -m benchmarks.record`).
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


def _listed(found: Any) -> list[Any]:
    if not isinstance(found, list):
        raise TypeError(f"a list was expected, got {type(found).__name__}")
    return found


def _names(found: Iterable[Any]) -> set[str]:
    names = list(found)
    if not all(isinstance(name, str) for name in names):
        raise TypeError("the name of a shard is a text")
    return set(names)


def id_table_file(digest: str) -> str:
    """Where a folder has the id table with this digest, in hex."""
    return f"{BESIDE}/id_table-{digest}.bin"


def _digest_of(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


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


def _write_local(path: Path, content: bytes | pa.Buffer) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_of_the_dead(partial: str) -> bool:
    """Whether a partial file belongs to a process of this host that is no more."""
    host, _, pid = partial.removesuffix(".partial").rpartition(".")
    if not host.endswith(f".{socket.gethostname()}") or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
