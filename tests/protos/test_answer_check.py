"""What binds an answer to its request, field by field."""

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash

from protos import teacher_pb2
from protos.answer_check import (
    answer_check,
    full_answer_check,
    generation_check,
    is_what_was_written,
    request_digest,
)

REQUEST = teacher_pb2.ScoreRequest(request_id=7, token_ids=bytes(12), lengths=[3])
PART = teacher_pb2.ScoreResponse(
    request_id=7,
    part=teacher_pb2.TargetsPart(
        sequence=1,
        first_row=2,
        num_rows=3,
        last=True,
        ids_digest=bytes(range(16)),
        payload=bytes(range(72)),
        teacher_fingerprint="ab" * 32,
        timing=teacher_pb2.Timing(
            queue_us=1,
            forward_us=2,
            head_us=3,
            encode_us=4,
            batch_sequences=5,
            batch_tokens=6,
        ),
    ),
)
ERROR = teacher_pb2.ScoreResponse(
    request_id=7,
    error=teacher_pb2.RequestError(
        code=8,
        message="come back later",
        field="lengths",
        retry_after_ms=9,
        reason="QUEUE_FULL",
        sequence=0,
        row=1,
    ),
)
DIGEST = request_digest(REQUEST)
NOT_COVERED = {"fill_us", "launch_us", "wait_us", "copy_us", "compact_us"}
"""Diagnostics that came later: a check that covers them would be another one to older clients."""
COVERED_OTHERWISE = {"request_id"}
"""request_id finds the request whose digest the answer is compared with."""


def signed(response: teacher_pb2.ScoreResponse) -> teacher_pb2.ScoreResponse:
    """A copy with what a service adds."""
    answer = teacher_pb2.ScoreResponse()
    answer.CopyFrom(response)
    answer.check = answer_check(DIGEST, answer)
    answer.full_check = full_answer_check(DIGEST, answer)
    return answer


def fields(message: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all fields with a value, through messages."""
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            yield from fields(value, (*path, field.name))
        else:
            yield (*path, field.name)


def damaged(response: teacher_pb2.ScoreResponse, path: tuple[str, ...]) -> Any:
    """The answer with one bit of one field flipped."""
    answer = signed(response)
    message: Any = answer
    for name in path[:-1]:
        message = getattr(message, name)
    value = getattr(message, path[-1])
    if isinstance(value, str):
        value = chr(ord(value[0]) ^ 1) + value[1:]
    elif isinstance(value, bytes):
        value = value[:-1] + bytes([value[-1] ^ 1])
    else:
        value = type(value)(value ^ 1)
    setattr(message, path[-1], value)
    return answer


@pytest.mark.parametrize("whole", [PART, ERROR], ids=["part", "error"])
def test_every_field_of_these_answers_has_a_value(whole: teacher_pb2.ScoreResponse):
    """So that the next test is about all of them, also those that are added later."""

    def all_of(descriptor: Any) -> set[str]:
        return {field.name for field in descriptor.fields}

    answer = signed(whole)
    assert all_of(answer.DESCRIPTOR) - {"part", "error"} <= {path[0] for path in fields(answer)}
    (inner,) = (value for field, value in whole.ListFields() if field.name != "request_id")
    assert all_of(inner.DESCRIPTOR) == {path[1] for path in fields(whole) if len(path) > 1}
    timing = {path[0] for path in fields(PART.part.timing)}
    assert all_of(teacher_pb2.Timing.DESCRIPTOR) == timing | NOT_COVERED


@pytest.mark.parametrize(
    ("response", "path"),
    [
        pytest.param(response, path, id=".".join(path))
        for response in (signed(PART), signed(ERROR))
        for path in fields(response)
        if path[0] not in COVERED_OTHERWISE
    ],
)
def test_a_flipped_bit_in_any_field_of_an_answer_is_noticed(
    response: teacher_pb2.ScoreResponse, path: tuple[str, ...]
):
    assert is_what_was_written(DIGEST, signed(response))
    assert not is_what_was_written(DIGEST, damaged(response, path))


@pytest.mark.parametrize("name", ["sequence", "row"])
def test_a_place_of_an_error_that_is_0_is_not_one_that_is_missing(name: str):
    answer = signed(ERROR)
    setattr(answer.error, name, 0)
    zero = full_answer_check(DIGEST, answer)
    answer.error.ClearField(name)
    assert full_answer_check(DIGEST, answer) != zero


def test_texts_of_an_error_cannot_be_divided_otherwise():
    answer = signed(ERROR)
    answer.error.reason, answer.error.message = "QUEUE", "_FULLcome back later"
    assert answer_check(DIGEST, answer) == answer.check
    assert not is_what_was_written(DIGEST, answer)


def test_an_answer_of_before_full_check_is_taken():
    answer = signed(PART)
    answer.ClearField("full_check")
    assert is_what_was_written(DIGEST, answer)
    answer.part.num_rows += 1
    assert not is_what_was_written(DIGEST, answer)


def spelled_out(name: str, begin: str = "Canonical bytes of a request") -> bytes:
    """The bytes behind `name:` in an example of teacher.proto, up to the next name."""
    page = (Path(__file__).parents[2] / "protos" / "teacher.proto").read_text()
    lines = page.split(begin)[1].split("\n}\n")[0].splitlines()
    text = " ".join(line.strip().removeprefix("//") for line in lines)
    found = re.search(rf"(?<!for) {name}: +((?:[0-9a-f]{{2}}\b *)+)", text)
    assert found, f"{name} is not in the example"
    return bytes.fromhex(found[1])


def test_the_example_of_a_text_in_the_proto_is_what_is_computed():
    begin = "message GenerateResponse"
    request = teacher_pb2.GenerateRequest(
        request_id=7, prompt_ids=struct.pack("<3i", 3, 5, 300), max_new_tokens=2, seed=9
    )
    digest = request_digest(request)
    assert spelled_out("text request", begin) == request.SerializeToString(deterministic=True)
    part = teacher_pb2.GeneratedPart(
        first=3,
        token_ids=struct.pack("<2i", 8, 1),
        payload=b"anything" + bytes(range(16)),
        finish=teacher_pb2.FINISH_LENGTH,
        last=True,
        teacher_fingerprint="ab",
    )
    response = teacher_pb2.GenerateResponse(request_id=7, part=part)
    check = spelled_out("text check", begin)
    assert check == generation_check(digest, response)
    assert check == xxhash.xxh3_128_digest(digest + spelled_out("text part", begin))


def test_the_example_in_the_proto_is_what_is_computed():
    ids = struct.pack("<3i", 3, 5, 300)
    request = teacher_pb2.ScoreRequest(
        request_id=7,
        token_ids=ids,
        lengths=[3],
        targets=teacher_pb2.TargetSpec(top_k=teacher_pb2.TopK(k=4, bits=7)),
        temperature=1.0,
    )
    part = teacher_pb2.TargetsPart(
        num_rows=2,
        last=True,
        ids_digest=xxhash.xxh3_128_digest(ids),
        payload=b"anything" + bytes(range(16)),
        teacher_fingerprint="ab",
        timing=teacher_pb2.Timing(
            queue_us=1,
            forward_us=2000,
            head_us=300,
            encode_us=40,
            batch_sequences=1,
            batch_tokens=32,
        ),
    )
    response = teacher_pb2.ScoreResponse(request_id=7, part=part)
    assert request.SerializeToString(deterministic=True) == spelled_out("request")
    request_hash = spelled_out("XXH3-128")
    assert xxhash.xxh3_128_digest(spelled_out("request")) == request_hash
    assert request_digest(request) == request_hash
    for name, computed in (("check", answer_check), ("full_check", full_answer_check)):
        said = spelled_out(name)
        assert xxhash.xxh3_128_digest(request_hash + spelled_out(f"for {name}")) == said
        assert computed(request_hash, response) == said


@pytest.mark.parametrize(
    ("request_", "canonical"),
    [
        (teacher_pb2.ScoreRequest(temperature=0.0, session_id=b"", seed=0), ""),
        (teacher_pb2.ScoreRequest(targets=teacher_pb2.TargetSpec()), "3a00"),
        (
            teacher_pb2.ScoreRequest(targets=teacher_pb2.TargetSpec(top_k=teacher_pb2.TopK())),
            "3a020a00",
        ),
        (teacher_pb2.ScoreRequest(lengths=[1, 300]), "220301ac02"),
        # Not packed, not ascending, a default that was sent, a longer varint, and an unknown field.
        (
            teacher_pb2.ScoreRequest.FromString(bytes.fromhex("a006052001208200 1a00 10878000")),
            None,
        ),
    ],
    ids=["defaults", "an empty message", "an empty kind", "packed", "unusual"],
)
def test_a_request_is_hashed_in_its_canonical_bytes(
    request_: teacher_pb2.ScoreRequest, canonical: str | None
):
    expected = "100722020102" + "a00605" if canonical is None else canonical
    assert request_digest(request_) == xxhash.xxh3_128_digest(bytes.fromhex(expected))


def test_the_check_of_generated_parts_is_as_written_in_the_contract():
    request = teacher_pb2.GenerateRequest(request_id=7, prompt_ids=b"\3\0\0\0", max_new_tokens=4)
    digest = request_digest(request)
    assert digest == xxhash.xxh3_128_digest(bytes.fromhex("10072a04030000004004"))
    part = teacher_pb2.GeneratedPart(
        sample=2,
        first=5,
        token_ids=b"\1\0\0\0",
        payload=b"container" + bytes(range(16)),
        finish=teacher_pb2.FINISH_LENGTH,
        last=True,
        teacher_fingerprint="ab",
    )
    hexed = (
        "02 02000000 05000000 02000000 01  04000000 01000000"
        "10000000 000102030405060708090a0b0c0d0e0f  02000000 6162"
    )
    wanted = xxhash.xxh3_128_digest(digest + bytes.fromhex(hexed))
    assert generation_check(digest, teacher_pb2.GenerateResponse(part=part)) == wanted
    part.payload = b""
    empty = hexed.replace("10000000 000102030405060708090a0b0c0d0e0f", "00000000")
    wanted = xxhash.xxh3_128_digest(digest + bytes.fromhex(empty))
    assert generation_check(digest, teacher_pb2.GenerateResponse(part=part)) == wanted
    error = teacher_pb2.RequestError(code=8, message="full", field="x", retry_after_ms=20, row=0)
    assert generation_check(digest, teacher_pb2.GenerateResponse(error=error)) == full_answer_check(
        digest, teacher_pb2.ScoreResponse(error=error)
    )
