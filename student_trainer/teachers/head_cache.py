"""Keeps vocabulary heads on disk under their fingerprint; all processes of a host share the file.

A head may have gigabytes. So it is fetched once, on from where the last attempt ended, into a file that
is mapped and not read.
"""

import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
import xxhash
from torch import Tensor

from logit_codec import CodecError, TeacherHead
from logit_codec.teacher_head import PIECE_NBYTES, read_head
from logitstream.files import cache_folder
from student_trainer.errors import ProtocolError, TeacherError

logger = logging.getLogger(__name__)

Fetch = Callable[[BinaryIO], None]
"""Appends to a file what it lacks of the head."""
FETCH_ATTEMPTS = 3


def load_head(fingerprint: str, fetch: Fetch | None, where: str) -> TeacherHead:
    """Returns the head with this fingerprint from the disk; fetches it first if it is not there.

    fetch: None if there is nobody to fetch it from. where: the place that it would come from, for
    messages. Raises ProtocolError if it arrives damaged in every attempt, and TeacherError if it
    cannot be kept or fetched.
    """
    path = cache_folder() / "heads" / f"{fingerprint}.bin"
    try:
        raw = _read(path, fingerprint)  # a folder that holds it may be read-only
        if raw is None and fetch is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_suffix(".lock")):
                raw = _read(path, fingerprint)  # another process may have fetched it meanwhile
                if raw is None:
                    _fetch(path, fingerprint, fetch, where)
                    raw = _map(path)
    except OSError as error:
        if isinstance(error, TeacherError):
            raise
        raise TeacherError(
            f"the vocabulary head {fingerprint} cannot be kept in {path.parent}: {error}. Make "
            "room there, or set LOGITSTREAM_CACHE to a folder that can be written to."
        ) from error
    if raw is None:
        raise TeacherError(
            f"the vocabulary head {fingerprint} is not in {path.parent}, and {where} cannot give it. "
            "Connect to the teacher, which has it: teacher.head() keeps it there."
        )
    try:
        return read_head(raw, fingerprint)
    except CodecError as error:
        raise ProtocolError(f"the vocabulary head from {where} cannot be read: {error}") from error


def _fetch(path: Path, fingerprint: str, fetch: Fetch, where: str) -> None:
    """Makes the file, or goes on with what an interrupted attempt left of it."""
    part = path.with_suffix(".part")
    for _ in range(FETCH_ATTEMPTS):
        with part.open("ab") as file:
            fetch(file)
        if _digest_of(part) == fingerprint:
            part.replace(path)
            return
        logger.warning("the vocabulary head arrived damaged, fetching it again")
        part.unlink()
    raise ProtocolError(
        f"the vocabulary head {fingerprint} arrived damaged from {where} {FETCH_ATTEMPTS} times"
    )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lets one process at a time fetch a head; the others then find it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _read(path: Path, fingerprint: str) -> Tensor | None:
    """Maps a file; None if it is missing or damaged."""
    if not path.exists():
        return None
    if _digest_of(path) != fingerprint:
        logger.warning("%s is damaged and will be fetched again", path)
        return None
    return _map(path)


def _map(path: Path) -> Tensor:
    return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)


def _digest_of(path: Path) -> str:
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(PIECE_NBYTES):
            state.update(piece)
    return state.hexdigest()
