"""Fetches each id table once from a teacher and keeps it on disk under its digest."""

import logging
from pathlib import Path

import grpc

from logit_codec import CodecError, IdTable
from logitstream.files import cache_folder, write_atomically
from protos import teacher_pb2, teacher_pb2_grpc
from student_trainer.client.describe import NOT_A_MESSAGE, Metadata
from student_trainer.errors import ProtocolError

logger = logging.getLogger(__name__)

FETCH_S = 60.0
"""How long an id table may take; it has about 2.3 bytes per id of the vocabulary."""
FETCH_ATTEMPTS = 3


async def load_id_table(
    digest: bytes, stub: teacher_pb2_grpc.TeacherStub, metadata: Metadata, where: str
) -> IdTable:
    """Returns the table with this digest, from the cache or from the teacher at `where`.

    Raises ProtocolError if it arrives damaged, or not at all, in every attempt.
    """
    if (table := _read(digest)) is not None:
        return table
    request = teacher_pb2.FetchIdTableRequest(digest=digest)
    problem = ""
    for _ in range(FETCH_ATTEMPTS):
        try:
            response = await stub.FetchIdTable(request, timeout=FETCH_S, metadata=metadata)
            if response is None:  # gRPC hands out None for bytes that are not a message
                problem = NOT_A_MESSAGE
                continue
            table = IdTable.from_bytes(response.data)
        except (grpc.aio.AioRpcError, CodecError) as error:
            problem = str(error)
            continue
        if table.digest == digest:
            _write(table)
            return table
        problem = f"got another table, {table.digest.hex()}"
    raise ProtocolError(
        f"cannot fetch the id table {digest.hex()} from {where} in {FETCH_ATTEMPTS} attempts: {problem}"
    )


def _read(digest: bytes) -> IdTable | None:
    """Reads a table from the cache; None if it is missing or damaged."""
    path = _path(digest)
    try:
        table = IdTable.from_bytes(path.read_bytes())
    except OSError:
        return None
    except CodecError as error:
        logger.warning("%s is damaged and will be fetched again: %s", path, error)
        return None
    return table if table.digest == digest else None


def _write(table: IdTable) -> None:
    """Keeps a table; a folder that cannot be written costs a download, nothing else."""
    path = _path(table.digest)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, table.to_bytes())
    except OSError as error:
        logger.warning("cannot keep an id table in %s: %s", path.parent, error)


def _path(digest: bytes) -> Path:
    return cache_folder() / "id_tables" / f"{digest.hex()}.bin"
