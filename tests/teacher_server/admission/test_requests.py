import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import grpc
import numpy as np
import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from logit_codec import DenseSpec, TopKSpec, encode_parts
from logit_codec.wire import OVERHEAD_NBYTES
from protos import teacher_pb2
from teacher_server.admission.limits import Limits
from teacher_server.admission.requests import Admission
from teacher_server.engine.engine import Engine
from teacher_server.engine.loading import prepare
from teacher_server.engine.model import TeacherModel
from teacher_server.errors import RequestRefused
from teacher_server.scheduling.job import SequenceJob
from tests.support import tiny

VOCAB, EFFECTIVE = 1001, 990
LIMITS = Limits(
    max_sequence_tokens=20,
    max_request_tokens=50,
    max_request_sequences=6,
    max_request_nbytes=10_000,
    max_top_k=64,
    max_reply_nbytes=10**6,
    max_stream_nbytes=1 << 20,
    max_queued_tokens=1 << 20,
)
TOP_8 = teacher_pb2.TargetSpec(top_k=teacher_pb2.TopK(k=8, bits=7))
DENSE = teacher_pb2.TargetSpec(dense=teacher_pb2.Dense(bits=32))
GIVEN_IDS = teacher_pb2.TargetSpec(given_ids=teacher_pb2.GivenIds(bits=16))
Change = Callable[[teacher_pb2.ScoreRequest], object]


@pytest.fixture(scope="module")
def model() -> TeacherModel:
    """A head of 1,001 rows of which the last 11 are padding."""
    return replace(prepare(tiny.make_model("Gemma2", VOCAB)), effective_vocab_size=EFFECTIVE)


@pytest.fixture(scope="module")
def admission(model: TeacherModel) -> Admission:
    return Admission(model, LIMITS)


def make_request(
    *lengths: int, targets: teacher_pb2.TargetSpec = TOP_8, **fields: object
) -> teacher_pb2.ScoreRequest:
    """Sequences of the ids 0, 1, 2, ... going on from one to the next."""
    ids = np.arange(sum(lengths), dtype="<i4").tobytes()
    return teacher_pb2.ScoreRequest(token_ids=ids, lengths=lengths, targets=targets, **fields)


def refusal(admission: Admission, request: teacher_pb2.ScoreRequest) -> RequestRefused:
    with pytest.raises(RequestRefused) as caught:
        admission.admit(request)
    return caught.value


def outcome(
    admission: Admission, request: teacher_pb2.ScoreRequest
) -> list[SequenceJob] | RequestRefused:
    """What came of a request; anything but a refusal is a bug."""
    try:
        return admission.admit(request)
    except RequestRefused as error:
        return error


def wanted_rows(admitted: Sequence[SequenceJob]) -> list[list[int]]:
    return [item.request.rows.tolist() for item in admitted]


# What is admitted.


def test_a_plain_request_asks_for_every_row_of_every_sequence(admission: Admission) -> None:
    admitted = admission.admit(make_request(3, 2, 5))
    assert wanted_rows(admitted) == [[0, 1], [0], [0, 1, 2, 3]]
    assert [item.request.token_ids.tolist() for item in admitted] == [
        [0, 1, 2],
        [3, 4],
        [5, 6, 7, 8, 9],
    ]
    assert all(item.request.token_ids.dtype == torch.int64 for item in admitted)


def test_the_bytes_of_the_digest_are_the_sequences_own(admission: Admission) -> None:
    request = make_request(3, 2, 5)
    admitted = admission.admit(request)
    assert [len(item.ids_bytes) for item in admitted] == [12, 8, 20]
    assert b"".join(item.ids_bytes for item in admitted) == request.token_ids


def test_numbers_are_read_little_endian(admission: Admission) -> None:
    request = make_request(2)
    request.token_ids = bytes([1, 2, 0, 0, 3, 0, 0, 0])
    (item,) = admission.admit(request)
    assert item.request.token_ids.tolist() == [1 + 2 * 256, 3]


def test_a_temperature_of_zero_is_read_as_one(admission: Admission) -> None:
    assert admission.admit(make_request(2))[0].request.temperature == 1.0
    assert admission.admit(make_request(2, temperature=-0.0))[0].request.temperature == 1.0
    assert admission.admit(make_request(2, temperature=2.5))[0].request.temperature == 2.5


def test_targets_become_a_spec(admission: Admission) -> None:
    def spec_of(**fields: object) -> object:
        targets = teacher_pb2.TargetSpec(**fields)
        return admission.admit(make_request(2, targets=targets))[0].request.spec

    top_k = teacher_pb2.TopK(k=5, min_p=0.25, bits=16)
    assert spec_of(top_k=top_k) == TopKSpec(k=5, min_p=0.25, bits=16)
    assert spec_of(top_k=teacher_pb2.TopK(k=5, top_p=0.5, bits=7)) == TopKSpec(k=5, top_p=0.5)
    assert spec_of(dense=teacher_pb2.Dense(bits=16)) == DenseSpec(bits=16)
    assert spec_of(
        top_k=top_k, omit_realized_logprob=True, entropy=True, omit_log_z=True
    ) == TopKSpec(k=5, min_p=0.25, bits=16, realized=False, entropy=True, log_z=False)


def test_the_right_teacher_is_admitted(admission: Admission, model: TeacherModel) -> None:
    admission.admit(make_request(2, teacher_fingerprint=model.teacher_fingerprint))


def test_fields_that_do_not_concern_admission_are_let_through(admission: Admission) -> None:
    request = make_request(2, session_id=bytes(16), request_id=2**64 - 1, seed=1, epoch=2, level=3)
    assert wanted_rows(admission.admit(request)) == [[0]]


@pytest.mark.parametrize(
    ("targets", "temperature"),
    [(TOP_8, 1.0), (DENSE, 1.0), (teacher_pb2.TargetSpec(dense={"bits": 16}, entropy=True), 2.0)]
    + [
        (teacher_pb2.TargetSpec(top_k={"k": k, "bits": bits, "min_p": min_p}, entropy=True), 0.1)
        for k, bits, min_p in ((1, 16, 0.0), (64, 5, 0.0), (64, 8, 1e-4))
    ]
    + [
        (targets, 1.0)
        for targets in (
            GIVEN_IDS,
            teacher_pb2.TargetSpec(given_ids={"bits": 32, "ranks": True}, entropy=True),
            teacher_pb2.TargetSpec(realized={}, omit_log_z=True),
            teacher_pb2.TargetSpec(hidden={"bits": 8}),
            teacher_pb2.TargetSpec(hidden={"bits": 16}, omit_log_z=True),
            teacher_pb2.TargetSpec(features={"layers": [0, 1, 2]}, entropy=True),
        )
    ],
)
def test_the_estimate_of_an_answer_bounds_it_but_for_the_containers_fixed_parts(
    admission: Admission,
    model: TeacherModel,
    targets: teacher_pb2.TargetSpec,
    temperature: float,
) -> None:
    engine = Engine(model)
    for length in (2, 3, 20):
        request = make_request(length, targets=targets, temperature=temperature)
        if targets.HasField("given_ids"):
            request.given_ids = np.arange(64, dtype="<i4").tobytes() * (length - 1)
            request.given_counts.append(64)
        (item,) = admission.admit(request)
        (kept,) = engine.score([item.request])
        parts = list(encode_parts(kept, item.request.spec, max_nbytes=1 << 20))
        fixed = len(parts) * (OVERHEAD_NBYTES + 4 * 8)  # each plane ends in a whole word
        assert sum(len(payload) for _, _, payload in parts) <= item.reply_nbytes + fixed


# Rows.


def test_a_sequence_counts_its_own_tokens_and_one_without_rows_counts_none(
    admission: Admission,
) -> None:
    admitted = admission.admit(make_request(3, 3, 19, row_mask=bytes([0b00010001, 0, 0])))
    assert [(item.num_tokens, item.held) for item in admitted] == [(3, 3), (0, 0), (19, 19)]


def test_first_rows_go_to_the_last_row_of_their_sequence(admission: Admission) -> None:
    request = make_request(4, 2, 5, first_rows=[1, 0, 3])
    assert wanted_rows(admission.admit(request)) == [[1, 2], [0], [3]]


def test_a_row_mask_goes_over_the_rows_of_all_sequences(admission: Admission) -> None:
    # 3 + 1 + 6 rows; bit 9 is the lowest but one of the second byte.
    request = make_request(4, 2, 7, row_mask=bytes([0b10001010, 0b10]))
    admitted = admission.admit(request)
    assert wanted_rows(admitted) == [[1], [0], [3, 5]]


def test_a_sequence_of_which_no_row_is_wanted_keeps_its_place_and_costs_nothing(
    admission: Admission,
) -> None:
    admitted = admission.admit(make_request(3, 3, 3, row_mask=bytes([0b100001])))
    assert wanted_rows(admitted) == [[0], [], [1]]
    assert admitted[1].reply_nbytes == 0


@pytest.mark.parametrize("rows", [{"row_mask": bytes([0b100001])}, {"first_rows": [1, 1, 0]}])
def test_given_ids_belong_to_the_requested_rows_in_their_order(
    admission: Admission, rows: dict[str, object]
) -> None:
    request = make_request(3, 3, 3, **rows)
    num_rows = 2 if request.row_mask else 4
    ids = [[5, 7, 9], [3], [2, 4], [8]][:num_rows]
    give(request, [*itertools.chain(*ids)], [*map(len, ids)])
    admitted = admission.admit(request)
    given = [item.request.given_ids for item in admitted]
    if request.row_mask:  # none of the second sequence's rows is wanted
        assert given[1] is None
        assert admitted[1].reply_nbytes == 0
        assert [some.tolist() for some in (given[0], given[2])] == [[[5, 7, 9]], [[3]]]
        assert admitted[0].reply_nbytes > admitted[2].reply_nbytes
    else:
        assert [some.tolist() for some in given] == [[[5, 7, 9]], [[3]], [[2, 4], [8, 8]]]


@st.composite
def lengths_and_mask(draw: st.DrawFn) -> tuple[list[int], bytes]:
    lengths = draw(st.lists(st.integers(2, 9), min_size=1, max_size=5))
    count = sum(lengths) - len(lengths)
    bits = draw(st.integers(1, 2**count - 1))
    return lengths, bits.to_bytes((count + 7) // 8, "little")


@given(lengths_and_mask())
def test_row_masks_are_read_as_the_contract_says(
    admission: Admission, drawn: tuple[list[int], bytes]
) -> None:
    lengths, mask = drawn
    admitted = admission.admit(make_request(*lengths, row_mask=mask))
    bit = 0
    for length, item in zip(lengths, admitted, strict=True):
        expected = []
        for row in range(length - 1):
            if mask[bit // 8] >> (bit % 8) & 1:
                expected.append(row)
            bit += 1
        assert item.request.rows.tolist() == expected
        if expected:
            assert len(item.request.token_ids) == length


@given(st.data())
def test_first_rows_are_read_as_the_contract_says(
    admission: Admission, data: st.DataObject
) -> None:
    lengths = data.draw(st.lists(st.integers(2, 9), min_size=1, max_size=5))
    first_rows = [data.draw(st.integers(0, length - 2)) for length in lengths]
    admitted = admission.admit(make_request(*lengths, first_rows=first_rows))
    assert wanted_rows(admitted) == [
        list(range(first, length - 2 + 1))
        for first, length in zip(first_rows, lengths, strict=True)
    ]


# Limits: exactly at one is admitted, one beyond is refused.


def test_the_longest_sequence_is_admitted_and_one_token_more_is_not(admission: Admission) -> None:
    admission.admit(make_request(2, 20))
    error = refusal(admission, make_request(2, 21))
    assert (error.reason, error.field, error.sequence) == ("SEQUENCE_TOO_LONG", "lengths", 1)
    assert "21" in str(error)
    assert "20" in str(error)


def test_the_most_tokens_are_admitted_and_one_more_is_not(admission: Admission) -> None:
    admission.admit(make_request(20, 20, 10))
    error = refusal(admission, make_request(20, 20, 11))
    assert (error.reason, error.field) == ("TOO_MANY_TOKENS", "lengths")
    assert "51" in str(error)
    assert "50" in str(error)


def test_the_most_sequences_are_admitted_and_one_more_is_not(admission: Admission) -> None:
    admission.admit(make_request(*[2] * 6))
    error = refusal(admission, make_request(*[2] * 7))
    assert (error.reason, error.field) == ("TOO_MANY_SEQUENCES", "lengths")
    assert "7" in str(error)
    assert "6" in str(error)


def test_the_largest_request_is_admitted_and_one_byte_more_is_not(model: TeacherModel) -> None:
    request = make_request(5, 6)
    size = request.ByteSize()
    Admission(model, replace(LIMITS, max_request_nbytes=size)).admit(request)
    error = refusal(Admission(model, replace(LIMITS, max_request_nbytes=size - 1)), request)
    assert (error.reason, error.field) == ("REQUEST_TOO_LARGE", "token_ids")
    assert str(size) in str(error)
    assert str(size - 1) in str(error)


def top_k(k: int) -> teacher_pb2.ScoreRequest:
    return make_request(2, targets=teacher_pb2.TargetSpec(top_k={"k": k, "bits": 7}))


def test_the_largest_k_is_admitted_and_one_more_is_not(admission: Admission) -> None:
    admission.admit(top_k(64))
    error = refusal(admission, top_k(65))
    assert (error.reason, error.field) == ("TOP_K_OUT_OF_RANGE", "targets.top_k.k")
    assert "65" in str(error)
    assert "64" in str(error)


def test_k_cannot_be_larger_than_the_effective_vocabulary(model: TeacherModel) -> None:
    admission = Admission(model, replace(LIMITS, max_top_k=10**6))
    admission.admit(top_k(EFFECTIVE))
    error = refusal(admission, top_k(EFFECTIVE + 1))
    assert error.reason == "TOP_K_OUT_OF_RANGE"
    assert str(EFFECTIVE) in str(error)


@pytest.mark.parametrize("targets", [TOP_8, DENSE], ids=["top_k", "dense"])
def test_the_largest_answer_is_admitted_and_one_byte_more_is_not(
    model: TeacherModel, targets: teacher_pb2.TargetSpec
) -> None:
    request = make_request(5, 6, targets=targets)
    admitted = Admission(model, LIMITS).admit(request)
    size = sum(item.reply_nbytes for item in admitted)
    Admission(model, replace(LIMITS, max_reply_nbytes=size)).admit(request)
    error = refusal(Admission(model, replace(LIMITS, max_reply_nbytes=size - 1)), request)
    assert (error.reason, error.field) == ("REPLY_TOO_LARGE", "targets")
    assert str(size) in str(error)
    assert str(size - 1) in str(error)


def test_the_number_of_rows_that_a_refused_answer_names_is_admitted(model: TeacherModel) -> None:
    admission = Admission(model, replace(LIMITS, max_reply_nbytes=5 * 4 * VOCAB))
    error = refusal(admission, make_request(20, targets=DENSE))
    assert "at most 4 rows" in str(error)  # a row has a few bytes beside its 1,001 logprobs
    admission.admit(make_request(5, targets=DENSE))
    assert refusal(admission, make_request(6, targets=DENSE)).reason == "REPLY_TOO_LARGE"


def test_only_wanted_rows_count_for_the_answer(model: TeacherModel) -> None:
    admission = Admission(model, replace(LIMITS, max_reply_nbytes=5 * 4 * VOCAB))
    admission.admit(make_request(20, 20, targets=DENSE, first_rows=[17, 17]))


# Refusals.

REFUSALS: dict[str, tuple[Change, str, str, int | None, list[str]]] = {
    # what is wrong: (change of a good request, reason, field, sequence, said in the message)
    "no kind": (
        lambda r: r.ClearField("targets"),
        *("KIND_MISSING", "targets", None),
        ["no kind", "top_k", "dense"],
    ),
    "k of 0": (
        lambda r: r.targets.top_k.CopyFrom(teacher_pb2.TopK(bits=7)),
        *("TOP_K_OUT_OF_RANGE", "targets.top_k.k", None),
        ["1", "64", "got 0"],
    ),
    "bits of top_k": (
        lambda r: setattr(r.targets.top_k, "bits", 9),
        *("BAD_TARGETS", "targets.top_k", None),
        ["5, 6, 7, 8, 16", "got 9"],
    ),
    "bits of top_k left out": (
        lambda r: r.targets.top_k.ClearField("bits"),
        *("BAD_TARGETS", "targets.top_k", None),
        ["5, 6, 7, 8, 16", "got 0"],
    ),
    "bits of dense": (
        lambda r: r.targets.dense.CopyFrom(teacher_pb2.Dense(bits=8)),
        *("BAD_TARGETS", "targets.dense", None),
        ["32", "16", "got 8"],
    ),
    "min_p above 1": (
        lambda r: setattr(r.targets.top_k, "min_p", 1.5),
        *("BAD_TARGETS", "targets.top_k", None),
        ["between 0 and 1", "got 1.5"],
    ),
    "min_p below 0": (
        lambda r: setattr(r.targets.top_k, "min_p", -0.5),
        *("BAD_TARGETS", "targets.top_k", None),
        ["between 0 and 1", "got -0.5"],
    ),
    "min_p not a number": (
        lambda r: setattr(r.targets.top_k, "min_p", float("nan")),
        *("BAD_TARGETS", "targets.top_k", None),
        ["between 0 and 1", "got nan"],
    ),
    "top_p above 1": (
        lambda r: setattr(r.targets.top_k, "top_p", 95),
        *("BAD_TARGETS", "targets.top_k", None),
        ["top_p must be between 0 and 1", "got 95"],
    ),
    **{
        f"temperature {value}": (
            lambda r, value=value: setattr(r, "temperature", value),
            *("TEMPERATURE_OUT_OF_RANGE", "temperature", None),
            ["0.001", "1000", f"got {value}"],
        )
        for value in (-1.0, 0.0009, 1001.0, float("inf"), float("nan"))
    },
    "a session id of 15 bytes": (
        lambda r: setattr(r, "session_id", bytes(15)),
        *("BAD_SESSION_ID", "session_id", None),
        ["16", "got 15"],
    ),
    "given ids for another kind": (
        lambda r: setattr(r, "given_ids", bytes(4)),
        *("GIVEN_IDS_DO_NOT_FIT", "given_ids", None),
        ["of kind given_ids", "asks for top_k:8"],
    ),
    "given counts for another kind": (
        lambda r: r.given_counts.append(1),
        *("GIVEN_IDS_DO_NOT_FIT", "given_ids", None),
        ["of kind given_ids", "asks for top_k:8"],
    ),
    "no given ids": (
        lambda r: give(r, [], []),
        *("GIVEN_IDS_DO_NOT_FIT", "given_ids", None),
        ["there are 6 rows", "got 0 numbers"],
    ),
    "no given id for one row": (
        lambda r: give(r, [1, 2, 3, 4, 5], [1, 1, 1, 0, 1, 1]),
        *("GIVEN_IDS_DO_NOT_FIT", "given_ids", None),
        ["at least one", "0 in given_counts[3]"],
    ),
    "no given id for any row": (
        lambda r: give(r, [], [0]),
        *("GIVEN_IDS_DO_NOT_FIT", "given_ids", None),
        ["at least one", "0 in given_counts[0]"],
    ),
    "given counts that overflow": (
        lambda r: give(r, [1] * 6, [2**32 - 1] * 6),
        *("GIVEN_IDS_DO_NOT_FIT", "given_ids", None),
        [f"{6 * (2**32 - 1)} ids", "6 rows", "24 bytes"],
    ),
    "one given count that overflows": (
        lambda r: give(r, [1] * 6, [2**32 - 1]),
        *("GIVEN_IDS_DO_NOT_FIT", "given_ids", None),
        [f"{6 * (2**32 - 1)} ids", "6 rows", "24 bytes"],
    ),
    "given counts for too few rows": (
        lambda r: give(r, [1] * 5, [1] * 5),
        *("GIVEN_IDS_DO_NOT_FIT", "given_ids", None),
        ["there are 6 rows", "got 5 numbers"],
    ),
    "given counts for all rows of a mask": (
        lambda r: (setattr(r, "row_mask", b"\x05"), give(r, [1] * 6, [1] * 6)),
        *("GIVEN_IDS_DO_NOT_FIT", "given_ids", None),
        ["there are 2 rows", "got 6 numbers"],
    ),
    "given counts for rows before the first": (
        lambda r: (r.first_rows.extend([2, 0, 1]), give(r, [1] * 6, [1] * 6)),
        *("GIVEN_IDS_DO_NOT_FIT", "given_ids", None),
        ["there are 3 rows", "got 6 numbers"],
    ),
    "half a given id": (
        lambda r: (give(r, [1] * 6, [1]), setattr(r, "given_ids", bytes(26))),
        *("GIVEN_IDS_DO_NOT_FIT", "given_ids", None),
        ["6 ids of 4 bytes", "26 bytes"],
    ),
    "given ids that descend": (
        lambda r: give(r, [1, 2, 1, 2, 2, 1, 1, 2, 1, 2, 1, 2], [2]),
        *("GIVEN_IDS_DO_NOT_FIT", "given_ids", None),
        ["ascend", "row 2 "],
    ),
    "a given id twice": (
        lambda r: give(r, [9, 1, 2, 3, 3, 0, 0, 0], [1, 2, 2, 1, 1, 1]),
        *("GIVEN_IDS_DO_NOT_FIT", "given_ids", None),
        ["none twice", "row 2 "],
    ),
    "a negative given id": (
        lambda r: give(r, [9, 8, 7, 6, -1, 5], [1]),
        *("GIVEN_IDS_DO_NOT_FIT", "given_ids", None),
        ["none negative", "row 4 "],
    ),
    "a negative given id before ids that descend": (
        lambda r: give(r, [9, 9, -5, 1, 2, 1, 0, 1, 0, 1], [1, 1, 2, 2, 2, 2]),
        *("GIVEN_IDS_DO_NOT_FIT", "given_ids", None),
        ["row 2 "],
    ),
    "a given id beyond the effective vocabulary": (
        lambda r: give(r, [1, 2, EFFECTIVE, 3, 4, 5], [1]),
        *("TOKEN_ID_OUT_OF_RANGE", "given_ids", None),
        [f"the id {EFFECTIVE}", f"0 to {EFFECTIVE - 1}"],
    ),
    "too many given ids for one row": (
        lambda r: give(r, [*range(65), 1, 1, 1, 1, 1], [65, 1, 1, 1, 1, 1]),
        *("GIVEN_IDS_DO_NOT_FIT", "given_ids", None),
        ["at most 64", "got 65", "--targets.max-top-k"],
    ),
    "bits of given_ids": (
        lambda r: (give(r, [1] * 6, [1]), setattr(r.targets.given_ids, "bits", 8)),
        *("BAD_TARGETS", "targets.given_ids", None),
        ["16 or 32", "got 8"],
    ),
    "bits of hidden": (
        lambda r: setattr(r.targets.hidden, "bits", 4),
        *("BAD_TARGETS", "targets.hidden", None),
        ["8", "16", "got 4"],
    ),
    "no layer": (
        lambda r: r.targets.features.SetInParent(),
        *("BAD_TARGETS", "targets.features", None),
        ["layers"],
    ),
    "layers that descend": (
        lambda r: r.targets.features.layers.extend([1, 0]),
        *("BAD_TARGETS", "targets.features", None),
        ["layers", "1, 0"],
    ),
    "a layer that the teacher lacks": (
        lambda r: r.targets.features.layers.append(3),
        *("BAD_TARGETS", "targets.features", None),
        ["to 2", "got 3"],
    ),
    "an unknown level": (
        lambda r: setattr(r, "level", 7),
        *("BAD_LEVEL", "level", None),
        ["LEVEL_INTERACTIVE", "LEVEL_TRAINING", "LEVEL_BULK", "got 7"],
    ),
    "no sequence": (
        lambda r: (r.ClearField("lengths"), r.ClearField("token_ids")),
        *("EMPTY_REQUEST", "lengths", None),
        ["at least one", "got none"],
    ),
    "lengths for too many ids": (
        lambda r: r.lengths.append(2),
        *("LENGTHS_DO_NOT_FIT", "lengths", None),
        ["11 tokens", "36 bytes"],
    ),
    "half an id": (
        lambda r: setattr(r, "token_ids", r.token_ids + b"\0\0"),
        *("LENGTHS_DO_NOT_FIT", "lengths", None),
        ["9 tokens", "38 bytes"],
    ),
    "a sequence of one token": (
        lambda r: r.lengths.__setitem__(slice(None), [4, 1, 4]),
        *("SEQUENCE_TOO_SHORT", "lengths", 1),
        ["sequence 1", "1 tokens", "at least 2"],
    ),
    "a sequence of no token": (
        lambda r: r.lengths.append(0),
        *("SEQUENCE_TOO_SHORT", "lengths", 3),
        ["sequence 3", "0 tokens", "at least 2"],
    ),
    "an id beyond the effective vocabulary": (
        lambda r: set_id(r, 7, EFFECTIVE),
        *("TOKEN_ID_OUT_OF_RANGE", "token_ids", 2),
        ["token 1 of sequence 2", f"id {EFFECTIVE}", f"0 to {EFFECTIVE - 1}"],
    ),
    "a negative id": (
        lambda r: set_id(r, 3, -1),
        *("TOKEN_ID_OUT_OF_RANGE", "token_ids", 0),
        ["token 3 of sequence 0", "id -1", f"0 to {EFFECTIVE - 1}"],
    ),
    "the first of two wrong ids": (
        lambda r: (set_id(r, 8, -5), set_id(r, 4, 10**6)),
        *("TOKEN_ID_OUT_OF_RANGE", "token_ids", 1),
        ["token 0 of sequence 1", "id 1000000"],
    ),
    "both ways to choose rows": (
        lambda r: (r.first_rows.extend([0, 0, 0]), setattr(r, "row_mask", b"\x01")),
        *("ROWS_TWICE", "row_mask", None),
        ["first_rows", "row_mask"],
    ),
    "first rows of too few sequences": (
        lambda r: r.first_rows.extend([0, 0]),
        *("FIRST_ROWS_DO_NOT_FIT", "first_rows", None),
        ["(3)", "got 2"],
    ),
    "a first row after the last": (
        lambda r: r.first_rows.extend([2, 1, 2]),
        *("FIRST_ROW_OUT_OF_RANGE", "first_rows", 1),
        ["sequence 1", "0 to 0", "1"],
    ),
    "a mask that is too long": (
        lambda r: setattr(r, "row_mask", b"\x01\x00"),
        *("ROW_MASK_DOES_NOT_FIT", "row_mask", None),
        ["1 bytes", "6 rows", "got 2 bytes"],
    ),
    "a mask with a bit too many": (
        lambda r: setattr(r, "row_mask", b"\x41"),
        *("ROW_MASK_DOES_NOT_FIT", "row_mask", None),
        ["1 bytes", "6 rows", "unused"],
    ),
    "a mask of no row": (
        lambda r: setattr(r, "row_mask", b"\x00"),
        *("EMPTY_REQUEST", "row_mask", None),
        ["no row"],
    ),
}


def give(request: teacher_pb2.ScoreRequest, ids: list[int], counts: list[int]) -> None:
    """Asks for given ids, and names them."""
    request.targets.CopyFrom(GIVEN_IDS)
    request.given_ids = np.array(ids, dtype="<i4").tobytes()
    request.given_counts[:] = counts


def set_id(request: teacher_pb2.ScoreRequest, position: int, token_id: int) -> None:
    ids = np.frombuffer(request.token_ids, dtype="<i4").copy()
    ids[position] = token_id
    request.token_ids = ids.tobytes()


@pytest.mark.parametrize("what", REFUSALS)
def test_a_refusal_names_its_reason_its_field_and_what_is_allowed(
    admission: Admission, what: str
) -> None:
    change, reason, field, sequence, said = REFUSALS[what]
    request = make_request(4, 2, 3)
    admission.admit(request)
    change(request)
    error = refusal(admission, request)
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert (error.reason, error.field, error.sequence) == (reason, field, sequence)
    assert error.retry_after_ms == 0  # it would be refused again
    assert [part for part in said if part not in str(error)] == []


def test_a_request_for_another_teacher_fails_its_precondition(
    admission: Admission, model: TeacherModel
) -> None:
    error = refusal(admission, make_request(2, teacher_fingerprint="ab" * 32))
    assert error.code is grpc.StatusCode.FAILED_PRECONDITION
    assert (error.reason, error.field) == ("OTHER_TEACHER", "teacher_fingerprint")
    assert "ab" * 32 in str(error)
    assert model.teacher_fingerprint in str(error)


def test_a_mask_that_is_too_short_is_refused(admission: Admission) -> None:
    error = refusal(admission, make_request(10, row_mask=b"\x01"))
    assert error.reason == "ROW_MASK_DOES_NOT_FIT"
    assert "2 bytes" in str(error)
    assert "got 1 bytes" in str(error)


# Anything at all.

uint32 = st.integers(0, 2**32 - 1)
small = st.integers(0, 24)
top_ks = st.builds(
    teacher_pb2.TopK, k=small | uint32, min_p=st.floats(), bits=st.sampled_from([7, 16]) | uint32
)
given_kinds = st.builds(teacher_pb2.GivenIds, bits=st.sampled_from([16, 32]) | uint32)
layers = st.lists(st.integers(0, 3) | uint32, max_size=3)
denses = st.builds(teacher_pb2.Dense, bits=st.sampled_from([16, 32]) | uint32)
target_specs = (
    st.builds(teacher_pb2.TargetSpec, top_k=top_ks, entropy=st.booleans())
    | st.builds(teacher_pb2.TargetSpec, dense=denses, omit_log_z=st.booleans())
    | st.builds(teacher_pb2.TargetSpec, given_ids=given_kinds)
    | st.builds(teacher_pb2.TargetSpec, features=st.builds(teacher_pb2.Features, layers=layers))
    | st.just(teacher_pb2.TargetSpec(hidden={"bits": 8}))
    | st.just(teacher_pb2.TargetSpec(realized={}, omit_log_z=True))
    | st.just(teacher_pb2.TargetSpec())
    | st.just(TOP_8)
)
optional_rows = st.just([]) | st.lists(small | uint32, max_size=7)


@st.composite
def garbage(draw: st.DrawFn) -> teacher_pb2.ScoreRequest:
    """Random fields; half of the time the ids fit the lengths, so that later checks are met."""
    lengths = draw(st.lists(small, max_size=7) | st.lists(uint32, max_size=3))
    if sum(lengths) <= 60 and draw(st.booleans()):
        id_range = st.integers(-3, 1100) if draw(st.booleans()) else st.integers(0, EFFECTIVE - 1)
        ids = draw(st.lists(id_range, min_size=sum(lengths), max_size=sum(lengths)))
        token_ids = np.array(ids, dtype="<i4").tobytes()
    else:
        token_ids = draw(st.binary(max_size=64))
    return teacher_pb2.ScoreRequest(
        session_id=draw(st.just(b"") | st.binary(max_size=20)),
        request_id=draw(st.integers(0, 2**64 - 1)),
        token_ids=token_ids,
        lengths=lengths,
        first_rows=draw(optional_rows),
        row_mask=draw(st.just(b"") | st.binary(max_size=8)),
        targets=draw(target_specs),
        given_ids=draw(st.just(b"") | st.binary(max_size=40)),
        given_counts=draw(st.just([]) | st.lists(small | uint32, max_size=6)),
        temperature=draw(st.just(0.0) | st.floats()),
        level=draw(st.integers(0, 3) | st.integers(-(2**31), 2**31 - 1)),
        teacher_fingerprint=draw(st.just("") | st.text(max_size=70)),
    )


@settings(max_examples=400, deadline=None)
@given(garbage())
def test_garbage_is_refused_with_a_reason_or_admitted_with_rows_in_range(
    admission: Admission, request: teacher_pb2.ScoreRequest
) -> None:
    admitted = outcome(admission, request)
    if isinstance(admitted, RequestRefused):
        error = admitted
        assert error.reason
        assert error.field.split(".")[0] in teacher_pb2.ScoreRequest.DESCRIPTOR.fields_by_name
        assert str(error)
        assert error.sequence is None or error.sequence < len(request.lengths)
        return
    assert len(admitted) == len(request.lengths)
    assert any(len(item.request.rows) for item in admitted)
    for length, item in zip(request.lengths, admitted, strict=True):
        rows = item.request.rows.tolist()
        assert rows == sorted(set(rows))
        assert all(0 <= row < length - 1 for row in rows)
        if rows:
            assert len(item.request.token_ids) == length
            assert 0 <= item.request.token_ids.min() <= item.request.token_ids.max() < EFFECTIVE


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_bytes_that_happen_to_parse_are_refused_or_admitted(
    admission: Admission, data: bytes
) -> None:
    request = teacher_pb2.ScoreRequest(
        token_ids=np.arange(4, dtype="<i4").tobytes(), lengths=[4], targets=TOP_8
    )
    try:
        request.MergeFromString(data)
    except DecodeError:  # the transport's part: such bytes never become a request
        return
    outcome(admission, request)
