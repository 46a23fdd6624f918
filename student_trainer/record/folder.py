"""Lists, reads and writes the files of a record, on disk or in an object store."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from logitstream.files import remove_partial_files, write_atomically
from student_trainer.errors import RecordError

BESIDE = "__record__"
"""Folder of what is no shard. pandas leaves out names with one underscore, `datasets` with two."""


QUARANTINE = f"{BESIDE}/quarantine"


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
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                write_atomically(Path(path), memoryview(content))
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
            remove_partial_files(Path(self.root))

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}" if name else self.root


def _listed(found: Any) -> list[Any]:
    if not isinstance(found, list):
        raise TypeError(f"a list was expected, got {type(found).__name__}")
    return found


def _names(found: Iterable[Any]) -> set[str]:
    names = list(found)
    if not all(isinstance(name, str) for name in names):
        raise TypeError("the name of a shard is a text")
    return set(names)
