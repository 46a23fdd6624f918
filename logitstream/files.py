"""Writes files and folders whole or not at all, locks folders, and finds the cache folder."""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

PARTIAL = ".partial"
"""Ends the hidden names under which files and folders are written before they are renamed."""
ABANDONED_S = 600.0
"""A partial file that was not written to for this long has no writer any more."""
CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP)
"""Errors of file systems that cannot force a folder to the disk."""


def write_atomically(
    path: Path, content: bytes | memoryview | str, mode: int | None = None
) -> None:
    """Makes or replaces a file so that readers see the old content or the new, never a part.

    That holds across a power failure too. mode: the permissions; by default the umask decides.
    Raises OSError if the file cannot be written; then nothing has changed.
    """
    # The name tells `remove_partial_files` which process writes it; the random part keeps two
    # threads that write the same file apart.
    writer = f"{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
    partial = path.with_name(f".{path.name}.{writer}{PARTIAL}")
    try:
        # Created with its final mode: nobody may read a private key, not even for a moment.
        permissions = 0o666 if mode is None else mode
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, permissions)
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            if mode is not None:  # the umask may have taken some of it
                os.fchmod(handle, mode)
            os.fsync(handle)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    force_to_disk(path.parent)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a folder to fill; it replaces `path` when the block ends without an error.

    One process at a time may write a folder. Raises OSError; then nothing has changed.
    """
    partial = path.with_name(f".{path.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)  # left by a writer that was killed
    try:
        partial.mkdir(parents=True)
        yield partial
        for entry in (*partial.rglob("*"), partial):
            if entry.is_file() or entry.is_dir():
                force_to_disk(entry)
        if path.exists():  # a folder that is not empty cannot be replaced in one step
            old = path.with_name(f".{path.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
            partial.rename(path)
            shutil.rmtree(old)
        else:
            partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # so that its room is free again
        raise
    force_to_disk(path.parent)


def remove_partial_files(folder: Path) -> None:
    """Removes what killed writers left of files in a folder and in those inside it."""
    for path in folder.rglob(f".*{PARTIAL}"):
        if path.is_file() and (
            time.time() - path.stat().st_mtime > ABANDONED_S or _writer_has_exited(path.name)
        ):
            path.unlink(missing_ok=True)


def make_private(folder: Path) -> None:
    """Makes a folder, and the missing ones above it, that only its owner can enter.

    Folders that exist stay as they are. Raises OSError.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    for place in reversed(missing):
        place.mkdir(mode=0o700, exist_ok=True)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lets one process at a time into the block. Locks the folder: files in it may be replaced."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def cache_folder() -> Path:
    """Returns $LOGITSTREAM_CACHE, or `logitstream` in the user's cache folder."""
    if folder := os.environ.get("LOGITSTREAM_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "logitstream"


def force_to_disk(path: Path) -> None:
    """Returns when a file, or what a folder lists, is on the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise
    finally:
        os.close(handle)


def _writer_has_exited(partial: str) -> bool:
    """Whether a partial file belongs to a process on this host that has exited."""
    place, _, _ = partial.removesuffix(PARTIAL).rpartition(".")
    host, _, pid = place.rpartition(".")
    if not host.endswith(f".{socket.gethostname()}") or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it runs, as another user
        return False
    return False
