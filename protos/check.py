"""`ScoreResponse.check`: binds an answer to the request it is for; see teacher.proto."""

import struct

import xxhash

from protos import teacher_pb2

PART = struct.Struct("<IIIB")
ERROR = struct.Struct("<iQ")
CONTAINER_DIGEST_NBYTES = 16


def request_digest(request: teacher_pb2.ScoreRequest) -> bytes:
    """XXH3-128 of all that a request says."""
    return xxhash.xxh3_128_digest(request.SerializeToString(deterministic=True))


def answer_check(digest: bytes, response: teacher_pb2.ScoreResponse) -> bytes:
    """What `check` must be in an answer to the request with this digest."""
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
