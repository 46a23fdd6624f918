"""Turns every way in which a library reports a full disk into NotWritten, and reserves room.

OSError, RuntimeError (torch), SafetensorError and bare Exception (tokenizers) all become one error
that names the place and the reason.
"""

import ctypes
import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from logitstream.files import write_atomically
from student_trainer.errors import NotWritten

ROOM = ".room"
"""File in an output folder that reserves the room of what is written last."""
SYSTEM_ERROR = re.compile(r"(?:os error|code:) (\d+)")
"""How Rust writes an errno."""
NO_RESERVING = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""Errors of file systems that cannot reserve room."""


@contextmanager
def writing(path: Path, what: str = "") -> Iterator[None]:
    """Turns what a block raises into NotWritten; the block only writes, to `path`."""
    try:
        yield
    except NotWritten:
        raise
    except Exception as error:
        is_bare = type(error) is Exception  # of tokenizers
        if not (is_bare or isinstance(error, OSError | RuntimeError | SafetensorError)):
            raise
        raise NotWritten(f"cannot write {what or path}: {_reason(path, error)}") from error


def _reason(path: Path, error: Exception) -> str:
    """Returns the system's words for an error, where they can be found."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    if (found := SYSTEM_ERROR.search(str(error))) is not None:
        return os.strerror(int(found.group(1)))
    folder = next(place for place in (path, *path.absolute().parents) if place.is_dir())
    if shutil.disk_usage(folder).free < 1 << 20:  # torch does not say why
        return os.strerror(errno.ENOSPC)
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def put(path: Path, content: bytes | str) -> Path:
    """Makes or replaces a file. Raises NotWritten if that fails; then nothing has changed."""
    with writing(path):
        write_atomically(path, content)
    return path


def keep_room(folder: Path, nbytes: int, what: str) -> None:
    """Reserves the room of what a run writes last, until `give_room`.

    Raises NotWritten if there is less. Where the file system cannot reserve room, this only checks
    how much is free.
    """
    path = folder / ROOM
    try:
        with path.open("wb") as file:
            _allocate(file.fileno(), nbytes)
    except OSError as error:
        give_room(folder)
        free = shutil.disk_usage(folder).free
        if error.errno in NO_RESERVING and free >= nbytes:
            return
        known = error.errno not in NO_RESERVING
        reason = os.strerror(error.errno if known and error.errno else errno.ENOSPC)
        raise NotWritten(
            f"no room for {what} in {folder}: {reason} ({_mib(nbytes)} are needed, {_mib(free)} are "
            "free). Make room, or give another --output"
        ) from error


def give_room(folder: Path) -> None:
    """Frees what `keep_room` reserved."""
    (folder / ROOM).unlink(missing_ok=True)


def _allocate(descriptor: int, nbytes: int) -> None:
    """Calls Linux's fallocate; os.posix_fallocate would write zeros where it is not supported."""
    try:
        allocate = ctypes.CDLL(None, use_errno=True).fallocate64
    except (AttributeError, OSError):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
    allocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if allocate(descriptor, 0, 0, nbytes):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.1f} MiB"
