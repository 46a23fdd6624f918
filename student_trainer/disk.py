"""Files that appear whole or not at all, room that is kept for one, and what a full disk is called.

Each library says "no room" in its own way: OSError, a RuntimeError of torch, SafetensorError, a bare
Exception of tokenizers. What trains gets one of them all, `NotWritten`, with the place and the reason.
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

from student_trainer.errors import NotWritten

ROOM = ".room"
"""File in an output folder that holds the place of what will be written last."""
SYSTEM_ERROR = re.compile(r"(?:os error|code:) (\d+)")
"""How Rust writes an errno."""
NO_RESERVING = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""Of file systems that cannot keep room."""


@contextmanager
def writing(path: Path, what: str = "") -> Iterator[None]:
    """Around code that does nothing but write to `path`: what it raises there becomes NotWritten."""
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
    """In the system's words, where they can be found."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    if (found := SYSTEM_ERROR.search(str(error))) is not None:
        return os.strerror(int(found.group(1)))
    folder = next(one for one in (path, *path.absolute().parents) if one.is_dir())
    if shutil.disk_usage(folder).free < 1 << 20:  # torch does not say why
        return os.strerror(errno.ENOSPC)
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def put(path: Path, content: bytes | str) -> Path:
    """Makes a file, or replaces it. Raises NotWritten if it cannot; then nothing changed."""
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        try:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    return path


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` once the block has ended well; else nothing changed."""
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            yield partial
            if path.exists():
                old = path.with_name(f".{path.name}.old")
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
                partial.rename(path)
                shutil.rmtree(old)
            else:
                partial.rename(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def keep_room(folder: Path, nbytes: int, what: str) -> None:
    """Takes the room of what will be written to a folder in the end, until `give_room`.

    Raises NotWritten if there is not so much. Where the file system cannot keep room, it is only
    looked for.
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
    """Frees what `keep_room` took."""
    (folder / ROOM).unlink(missing_ok=True)


def _allocate(descriptor: int, nbytes: int) -> None:
    """Linux's fallocate: os.posix_fallocate would write all of it where it cannot be kept."""
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
