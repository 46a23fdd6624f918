"""Fetches a vocabulary head: from any replica of the service, each going on where the last one ended."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import BinaryIO

import grpc

from logitstream.connection import Connection
from protos import teacher_pb2, teacher_pb2_grpc
from protos.answer_check import head_check
from student_trainer.client.counters import Counters
from student_trainer.client.describe import RETRIED, explain
from student_trainer.client.discovery import CHANNEL_OPTIONS, Discovery
from student_trainer.errors import BY_CODE, ProtocolError

logger = logging.getLogger(__name__)

PAUSE_S = 0.2
"""Between two attempts."""


async def fetch_head(
    fingerprint: str,
    file: BinaryIO,
    connection: Connection,
    discovery: Discovery,
    linked: Callable[[], list[str]],
    counters: Counters,
    patience_s: float,
) -> None:
    """Appends to a file what it lacks of the vocabulary head with this fingerprint.

    linked: lists the replicas that are known to live, which are asked first. What is written stays
    if this is interrupted. Raises TeacherUnavailable if nothing comes for
    `patience_s`, what the service refuses with, and OSError of the file.
    """
    came_s, size = time.monotonic(), file.tell()
    num_refused = 0
    while True:
        # Not over the links of the requests: they may be given up at any time, and a call with them.
        known = [address for address, _ in discovery.known_addresses()]
        for address in dict.fromkeys([*linked(), *known]):
            try:
                async with connection.channel(address, CHANNEL_OPTIONS) as channel:
                    if await _append(channel, connection, fingerprint, file, counters):
                        return
            except grpc.aio.AioRpcError as error:
                discovery.last_error = f"{address}: {explain(error)}"
                if error.code() is grpc.StatusCode.INVALID_ARGUMENT and file.tell():
                    file.truncate(0)  # what was there is longer than the head
                    file.seek(0)
                elif error.code() not in RETRIED:
                    num_refused += 1
                    if num_refused > 1:  # once may be a flipped bit
                        kind = BY_CODE.get(error.code().value[0], ProtocolError)
                        raise kind(
                            f"the vocabulary head cannot be fetched: {explain(error)}"
                        ) from None
        now = time.monotonic()
        if file.tell() != size:
            came_s, size = now, file.tell()
        if now - came_s >= patience_s:
            raise discovery.make_unavailable(now - came_s, ())
        await asyncio.sleep(PAUSE_S)


async def _append(
    channel: grpc.aio.Channel,
    connection: Connection,
    fingerprint: str,
    file: BinaryIO,
    counters: Counters,
) -> bool:
    """Appends what comes of one call; whether that was the rest. Raises grpc.aio.AioRpcError."""
    request = teacher_pb2.FetchHeadRequest(fingerprint=fingerprint, offset=file.tell())
    stub = teacher_pb2_grpc.TeacherStub(channel)
    chunks = stub.FetchHead(request, metadata=connection.metadata)
    total = file.tell()  # if nothing comes, nothing was lacking
    try:
        async for chunk in chunks:
            # gRPC hands out None for bytes that are not a message.
            if chunk is None or chunk.check != head_check(chunk) or chunk.offset != file.tell():
                counters.corrupt += 1
                logger.warning("a piece of the vocabulary head arrived damaged, fetching it again")
                return False
            total = chunk.total_bytes
            counters.received_nbytes += chunk.ByteSize()
            await asyncio.to_thread(file.write, chunk.data)  # a disk may be slow
    finally:
        chunks.cancel()
    return file.tell() == total
