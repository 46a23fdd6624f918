"""Computes the checks of answers, such as `ScoreResponse.check`, which bind them to their requests.

teacher.proto defines them.
"""

import struct

import xxhash

from protos import teacher_pb2

PART = struct.Struct("<IIIB")
ERROR = struct.Struct("<iQ")
HEAD_CHUNK = struct.Struct("<QQ")
FULL_PART = struct.Struct("<BIIIB")
TIMING = struct.Struct("<QQQQII")
GENERATED_PART = struct.Struct("<BIIIB")
FULL_ERROR = struct.Struct("<BiQBIBI")
LENGTH = struct.Struct("<I")
CONTAINER_DIGEST_NBYTES = 16


def request_digest(request: teacher_pb2.ScoreRequest | teacher_pb2.GenerateRequest) -> bytes:
    """Hashes all fields of a request: XXH3-128 of its canonical bytes."""
    return xxhash.xxh3_128_digest(request.SerializeToString(deterministic=True))


def answer_check(digest: bytes, response: teacher_pb2.ScoreResponse) -> bytes:
    """Computes `check` of an answer to the request with this digest."""
    state = xxhash.xxh3_128(digest)
    if response.HasField("error"):
        error = response.error
        state.update(ERROR.pack(error.code, error.retry_after_ms))
        state.update(error.reason.encode())
        state.update(error.message.encode())
    else:
        part = response.part
        state.update(PART.pack(part.sequence, part.first_row, part.num_rows, part.last))
        state.update(part.payload[-CONTAINER_DIGEST_NBYTES:])
    return state.digest()


def head_check(chunk: teacher_pb2.HeadChunk) -> bytes:
    """Computes `check` of a piece of a vocabulary head."""
    state = xxhash.xxh3_128(HEAD_CHUNK.pack(chunk.offset, chunk.total_bytes))
    state.update(chunk.data)
    return state.digest()


def full_answer_check(digest: bytes, response: teacher_pb2.ScoreResponse) -> bytes:
    """Computes `full_check` of an answer to the request with this digest."""
    state = xxhash.xxh3_128(digest)
    if response.HasField("error"):
        return _error_check(digest, response.error)
    part, timing = response.part, response.part.timing
    state.update(
        FULL_PART.pack(
            teacher_pb2.ScoreResponse.PART_FIELD_NUMBER,
            part.sequence,
            part.first_row,
            part.num_rows,
            part.last,
        )
    )
    state.update(part.payload[-CONTAINER_DIGEST_NBYTES:])
    state.update(
        TIMING.pack(
            timing.queue_us,
            timing.forward_us,
            timing.head_us,
            timing.encode_us,
            timing.batch_sequences,
            timing.batch_tokens,
        )
    )
    texts = [part.ids_digest, part.teacher_fingerprint.encode()]
    for text in texts:
        state.update(LENGTH.pack(len(text)))
        state.update(text)
    return state.digest()


def is_what_was_written(digest: bytes, response: teacher_pb2.ScoreResponse) -> bool:
    """Tells whether an answer arrived as a service wrote it for the request with this digest.

    Services older than `full_check` leave it out: then fields that `check` does not cover may have
    been changed on the way.
    """
    if response.check != answer_check(digest, response):
        return False
    return response.full_check in (b"", full_answer_check(digest, response))


def generation_check(digest: bytes, response: teacher_pb2.GenerateResponse) -> bytes:
    """Computes `check` of an answer to the request for texts with this digest."""
    if response.HasField("error"):
        return _error_check(digest, response.error)
    part = response.part
    state = xxhash.xxh3_128(digest)
    state.update(
        GENERATED_PART.pack(
            teacher_pb2.GenerateResponse.PART_FIELD_NUMBER,
            part.sample,
            part.first,
            part.finish,
            part.last,
        )
    )
    container_digest = part.payload[-CONTAINER_DIGEST_NBYTES:]
    for piece in (part.token_ids, container_digest, part.teacher_fingerprint.encode()):
        state.update(LENGTH.pack(len(piece)))
        state.update(piece)
    return state.digest()


def _error_check(digest: bytes, error: teacher_pb2.RequestError) -> bytes:
    """Computes the check of every field of an error, the same for all methods."""
    state = xxhash.xxh3_128(digest)
    state.update(
        FULL_ERROR.pack(
            teacher_pb2.ScoreResponse.ERROR_FIELD_NUMBER,
            error.code,
            error.retry_after_ms,
            error.HasField("sequence"),
            error.sequence,
            error.HasField("row"),
            error.row,
        )
    )
    for text in (error.reason, error.message, error.field):
        state.update(LENGTH.pack(len(text.encode())))
        state.update(text.encode())
    return state.digest()
