"""Keeps an append-only journal of what a replica uses, until the directory has it.

A journal is a sequence of numbered segments. Records are appended to the last one until `seal` closes
it. A sealed segment goes to the directory as a whole, which applies it once, and is then dropped. Every
append is one write() without a buffer of ours and without fsync: it survives a SIGKILL of the process
at the price of a copy into the page cache. The process holds a lock while it lives; a journal whose
lock is free is an orphan, which any replica of the host may adopt (sync.py).

    NAME.lock           locked (flock) by the process that appends
    NAME.000001 ...     segments: records one after the other

A record, little-endian: XXH3-64 of everything after the length (8 bytes), length of that (2), kind (1),
day since 1970-01-01 UTC (4), two counts (8 each), key (16), the team's name in UTF-8.
"""

import errno
import fcntl
import logging
import os
import re
import secrets
import stat
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import date
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import xxhash

from logitstream.files import make_private

logger = logging.getLogger(__name__)

SEGMENT_NBYTES = 1 << 16
"""Largest segment; Ray sends up to 100 KB without its object store."""
_PREFIX = struct.Struct("<QH")
_BODY = struct.Struct("<BIQQ16s")
_FILE = re.compile(r"([0-9a-f]{16})\.(lock|[0-9]{6,18})")
LAST_DAY = (date.max - date(1970, 1, 1)).days
MAX_COUNT = 1 << 48
"""Counts are below this, so that sums of many fit into the ledger's 64 bits."""


class Kind(IntEnum):
    """Says what a record counts."""

    DISPATCHED = 1
    """number: sequences, amount: tokens."""
    DELIVERED = 2
    """number: rows, amount: bytes of payload; once per key."""
    REJECTED = 3
    """number: requests."""


class Record(NamedTuple):
    """Holds one entry of a journal."""

    kind: Kind
    team: str
    day: int
    """Since 1970-01-01, UTC."""
    number: int
    amount: int = 0
    key: bytes = bytes(16)


def to_bytes(record: Record) -> bytes:
    """Encodes one record as it is in a file."""
    body = _BODY.pack(record.kind, record.day, record.number, record.amount, record.key)
    body += record.team.encode()
    return _PREFIX.pack(xxhash.xxh3_64_intdigest(body), len(body)) + body


def from_bytes(data: bytes) -> Iterator[Record]:
    """Decodes the records of a segment up to the first damaged one, where a crash of the host cut it.

    An intact record that cannot be counted is skipped; those after it are not.
    """
    place = 0
    while place < len(data):
        end = place + _PREFIX.size
        if end > len(data):
            break
        digest, length = _PREFIX.unpack_from(data, place)
        body = data[end : end + length]
        if len(body) != length or length < _BODY.size or xxhash.xxh3_64_intdigest(body) != digest:
            break
        kind, day, number, amount, key = _BODY.unpack_from(body)
        place = end + length
        if kind not in Kind._value2member_map_:
            logger.error(
                "a journal has a record of kind %d, from a newer version; not counted", kind
            )
            continue
        try:
            team = body[_BODY.size :].decode()
        except UnicodeDecodeError:
            logger.error("a journal has a record whose team is not UTF-8; not counted")
            continue
        if day > LAST_DAY or max(number, amount) >= MAX_COUNT:
            logger.error("a journal has a record with impossible counts; not counted team=%s", team)
            continue
        yield Record(Kind(kind), team, day, number, amount, key)
    if place < len(data):
        logger.error("a journal is damaged, %d bytes of it are not counted", len(data) - place)


class Journal:
    """Appends to the journal of this process, in a folder or in memory. Thread-safe.

    Raises OSError if the folder cannot be used. Later errors are logged, and what could not be written
    waits in memory: a full disk stops no answer.
    """

    def __init__(self, folder: Path | None) -> None:
        self.name = secrets.token_hex(8)
        self._folder = folder
        self._mutex = threading.Lock()
        self._file: int | None = None
        self._size = 0
        self._number = 0
        self._kept: dict[int, bytearray] = {}
        """Records that are in no file, by segment; in a segment they come after those in its file."""
        self._sealed: list[int] = []
        self._lock_file: int | None = None
        if folder is not None:
            make_private(folder)
            self._lock_file = _lock(folder / f"{self.name}.lock")
            if self._lock_file is None:
                raise OSError(f"{folder}/{self.name}.lock is locked by another process")
        self._begin()

    def append(self, data: bytes) -> None:
        """Appends encoded records to the open segment, in one piece."""
        with self._mutex:
            if self._size and self._size + len(data) > SEGMENT_NBYTES:
                self._seal()
            self._size += len(data)
            # After a failed write the rest of its segment stays in memory, to keep records in order.
            is_whole = self._file is not None and self._number not in self._kept
            if is_whole and _write(self._file, data):
                return
            self._kept.setdefault(self._number, bytearray()).extend(data)

    def seal(self) -> None:
        """Closes the open segment, if there is anything in it."""
        with self._mutex:
            if self._size:
                self._seal()

    def oldest(self) -> tuple[int, bytes] | None:
        """Returns the first sealed segment, its number and records, or None."""
        with self._mutex:
            if not self._sealed:
                return None
            number = self._sealed[0]
        return number, self._read(number)

    @property
    def num_sealed(self) -> int:
        return len(self._sealed)

    def drop(self, number: int) -> None:
        """Removes a segment, which the directory has now."""
        with self._mutex:
            self._sealed.remove(number)
            self._kept.pop(number, None)
        if self._folder is not None:
            try:
                _segment(self._folder, self.name, number).unlink(missing_ok=True)
            except OSError as error:
                # Harmless: adopted after this process ends, it is skipped for its number.
                _complain(error)

    def close(self) -> None:
        """Ends the journal; segments that were not dropped stay for another replica to adopt."""
        with self._mutex:
            if self._size:
                self._seal()
            if self._file is not None:
                os.close(self._file)
                self._file = None
                assert self._folder is not None
                _segment(self._folder, self.name, self._number).unlink(missing_ok=True)
            if self._lock_file is not None:
                if not self._sealed:  # else the lock file stays too, and marks an orphan
                    assert self._folder is not None
                    (self._folder / f"{self.name}.lock").unlink(missing_ok=True)
                os.close(self._lock_file)
                self._lock_file = None

    def _begin(self) -> None:
        self._number += 1
        self._size = 0
        if self._folder is None:
            return
        try:
            path = _segment(self._folder, self.name, self._number)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        except OSError as error:
            _complain(error)

    def _seal(self) -> None:
        self._sealed.append(self._number)
        if self._file is not None:
            os.close(self._file)
            self._file = None
        self._begin()

    def _read(self, number: int) -> bytes:
        data = b""
        if self._folder is not None:
            path = _segment(self._folder, self.name, number)
            data = path.read_bytes() if path.exists() else b""
        return data + self._kept.get(number, b"")


@contextmanager
def orphans(
    folder: Path, logged: set[Path] | None = None
) -> Iterator[list[tuple[str, list[tuple[int, Path]]]]]:
    """Yields the journals whose process has died: name, and number and file of each segment in order.

    They are locked within the block, so that one replica adopts each. A journal whose files the block
    removes is forgotten. Other files are left alone and logged, once if `logged` is kept from call to
    call. Raises OSError if the folder cannot be read.
    """
    logged = set() if logged is None else logged
    logged.difference_update([path for path in logged if not os.path.lexists(path)])
    locks: dict[str, int] = {}
    journals: list[tuple[str, list[tuple[int, Path]]]] = []
    try:
        contents = _contents(folder)
        for path in contents.strays:
            complain_once(logged, path, "does not belong to a journal and is left alone")
        for name, path in contents.locks.items():
            try:
                lock = _lock(path)
            except OSError as error:
                complain_once(logged, path, f"cannot be locked: {error.strerror}")
                continue
            if lock is not None:
                locks[name] = lock
        # Listed again: a process that died between listing and lock may have added a segment.
        segments = _contents(folder).segments
        journals += [(name, segments.get(name, [])) for name in locks]
        yield journals
    finally:
        for name, files in journals:
            if not any(path.exists() for _, path in files):
                with suppress(OSError):  # the next look tries again
                    (folder / f"{name}.lock").unlink(missing_ok=True)
        for lock in locks.values():
            os.close(lock)


def complain_once(logged: set[Path], path: Path, what: str) -> None:
    """Logs what is wrong with a file among the journals, once for as long as `logged` has it."""
    if path not in logged:
        logged.add(path)
        logger.error("%s %s", path, what)


class _Contents(NamedTuple):
    """Lists a folder of journals."""

    locks: dict[str, Path]
    """By journal."""
    segments: dict[str, list[tuple[int, Path]]]
    """By journal, in the order of their numbers."""
    strays: list[Path]
    """Everything else: copies, files of editors and file systems, folders, links."""


def _contents(folder: Path) -> _Contents:
    contents = _Contents({}, {}, [])
    for path in sorted(folder.iterdir()):
        try:
            is_file = stat.S_ISREG(path.lstat().st_mode)
        except FileNotFoundError:
            continue  # its owner has just removed it
        parts = _FILE.fullmatch(path.name) if is_file else None
        if parts is None:
            contents.strays.append(path)
        elif parts[2] == "lock":
            contents.locks[parts[1]] = path
        elif path == _segment(folder, parts[1], int(parts[2])):
            contents.segments.setdefault(parts[1], []).append((int(parts[2]), path))
        else:
            contents.strays.append(path)
    for segments in contents.segments.values():
        segments.sort()
    return contents


def _segment(folder: Path, name: str, number: int) -> Path:
    return folder / f"{name}.{number:06}"


def _lock(path: Path) -> int | None:
    """Opens and locks a file; None if another process holds it or has just removed it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The lock may be on a file that its last owner removed between our open and lock.
        if os.stat(path).st_ino == os.fstat(file).st_ino:
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(file)
    return None


def _write(file: int | None, data: bytes) -> bool:
    """Writes all of the data or none of it; returns which."""
    assert file is not None
    size = os.fstat(file).st_size
    try:
        if os.write(file, data) == len(data):
            return True
        os.ftruncate(file, size)
        _complain(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    except OSError as error:
        _complain(error)
    return False


def _complain(error: OSError) -> None:
    logger.error("cannot write the journal of this replica: %s", error.strerror)
