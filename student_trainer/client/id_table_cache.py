"""Id tables on disk: each is fetched once from a teacher and kept under its digest."""

import logging
from pathlib import Path

from logit_codec import CodecError, IdTable
from logitstream.files import cache_folder, write_atomically

logger = logging.getLogger(__name__)


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
        write_atomically(path, table.to_bytes())
    except OSError as error:
        logger.warning("cannot keep an id table in %s: %s", path.parent, error)


def _path(digest: bytes) -> Path:
    return cache_folder() / "id_tables" / f"{digest.hex()}.bin"
