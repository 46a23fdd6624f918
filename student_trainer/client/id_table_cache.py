"""Id tables on disk: each is fetched once from a teacher and kept under its digest."""

import logging
import os
import tempfile
from pathlib import Path

from logit_codec import CodecError, IdTable

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """$LOGITSTREAM_CACHE, or logitstream in the user's cache folder."""
    if folder := os.environ.get("LOGITSTREAM_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "logitstream"


def cached_id_table(digest: bytes) -> IdTable | None:
    """The table with this digest, if it was kept and is whole."""
    path = _path(digest)
    try:
        table = IdTable.from_bytes(path.read_bytes())
    except OSError:
        return None
    except CodecError as error:
        logger.warning("%s is damaged and is fetched again: %s", path, error)
        return None
    return table if table.digest == digest else None


def cache_id_table(table: IdTable) -> None:
    """Keeps a table; a folder that cannot be written costs a download, nothing else."""
    path = _path(table.digest)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(table.to_bytes())
        os.replace(file.name, path)
    except OSError as error:
        logger.warning("cannot keep an id table in %s: %s", path.parent, error)


def _path(digest: bytes) -> Path:
    return cache_folder() / "id_tables" / f"{digest.hex()}.bin"
