"""Lists, reads and writes the files of a record, on disk or in an object store."""

import os
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from logitstream.files import remove_partial_files, write_atomically
from student_trainer.errors import RecordError

BESIDE = "__record__"
"""Folder for everything that is not a shard; readers skip it.

pandas skips names with one leading underscore, `datasets` those with two.
"""
QUARANTINE = f"{BESIDE}/quarantine"


class Folder:
    """The folder of a record; every file in it appears whole or not at all."""

    def __init__(self, where: str | os.PathLike[str]) -> None:
        """where: a path, or a URL such as s3://bucket/targets. Raises RecordError."""
        try:
            self._files, self.root = fsspec.core.url_to_fs(os.fspath(where))
        except (ValueError, ImportError) as error:
            raise RecordError(f"cannot use {where}: {error}") from None
        self.is_local = isinstance(self._files, LocalFileSystem)

    def names(self, below: str = "") -> set[str]:
        """Lists the files in the folder, or in one inside it; none if it does not exist."""
        self._files.invalidate_cache()  # other writers may have added some
        try:
            paths = self._files.ls(self._path(below), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return set()
        return {path.rstrip("/").rpartition("/")[2] for path in paths}

    def open(self, name: str) -> Any:
        """Opens a file for reading at any position.

        It is not memory-mapped: truncating a mapped file kills the process that reads it.
        """
        if self.is_local:
            return pa.OSFile(self._path(name))
        return self._files.open(self._path(name), "rb", cache_type="readahead")

    def read(self, name: str) -> bytes:
        """Returns the whole content of a file."""
        return self._files.cat_file(self._path(name))

    def put(self, name: str, content: bytes | pa.Buffer) -> None:
        """Makes or replaces a file. Raises RecordError if that fails; then nothing has changed."""
        path = self._path(name)
        try:
            if self.is_local:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                write_atomically(Path(path), memoryview(content))
            else:  # object stores show a file only once all of it has arrived
                self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
                self._files.pipe_file(path, bytes(content))
        except Exception as error:  # the libraries of stores raise errors of their own
            reason = getattr(error, "strerror", None) or error
            raise RecordError(
                f"cannot write {path}: {reason}. What was sealed before is intact: remove the cause "
                "and run the same command again to resume."
            ) from error

    def quarantine(self, name: str) -> None:
        """Moves a damaged file out of the way. Raises OSError."""
        aside = f"{QUARANTINE}/{name.rpartition('/')[2]}"
        self._files.makedirs(self._path(QUARANTINE), exist_ok=True)
        self._files.mv(self._path(name), self._path(aside))

    def remove_abandoned(self) -> None:
        """Removes the partial files of writers that were killed."""
        if self.is_local:  # stores have none
            remove_partial_files(Path(self.root))

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}" if name else self.root


def id_table_file(digest: str) -> str:
    """Names the file of the id table with this digest, in hex."""
    return f"{BESIDE}/id_table-{digest}.bin"
