"""Checks each ScoreRequest once, where it enters, and turns it into jobs.

Every refusal says what was sent, what is allowed and what to do.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Protocol

import grpc
import numpy as np
import torch
import xxhash
from torch import Tensor

from logit_codec import GivenIds, IdTable, TargetSpec, uniforms
from logitstream.messages import read_given_ids, read_targets, scope_of
from protos import teacher_pb2
from teacher_server.admission.access import scope_missing
from teacher_server.admission.limits import Limits
from teacher_server.engine.batch import RowRequest
from teacher_server.errors import RequestRefused, invalid, quoted
from teacher_server.scheduling.job import BULK, INTERACTIVE, TRAINING, SequenceJob
from teacher_server.teams.declaration import DEFAULT_TEAM, Team

SESSION_ID_NBYTES = 16
ANSWER_NBYTES = 1024
"""Upper bound of the bytes of an answer that do not depend on its rows."""
Request = teacher_pb2.ScoreRequest | teacher_pb2.GenerateRequest
LEVELS = {
    teacher_pb2.LEVEL_UNSPECIFIED: TRAINING,
    teacher_pb2.LEVEL_INTERACTIVE: INTERACTIVE,
    teacher_pb2.LEVEL_TRAINING: TRAINING,
    teacher_pb2.LEVEL_BULK: BULK,
}


class Teacher(Protocol):
    """Lists what admission has to know of a teacher."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def effective_vocab_size(self) -> int: ...
    @property
    def teacher_fingerprint(self) -> str: ...
    @property
    def id_table(self) -> IdTable | None: ...
    def complete(self, spec: TargetSpec) -> TargetSpec: ...


def check_request(team: Team, request: teacher_pb2.ScoreRequest) -> None:
    """Raises RequestRefused if the team may not ask for this; does not read the tokens."""
    scope = scope_of(request.targets)
    if scope != "score" and scope not in team.scopes:
        kind = request.targets.WhichOneof("kind")
        raise scope_missing(team, scope, f"targets of kind {kind}", field="targets")
    limit = team.limits.max_request_tokens
    num_tokens = len(request.token_ids) // 4
    if limit is not None and num_tokens > limit:
        raise invalid(
            "TOO_MANY_TOKENS",
            f"{num_tokens} tokens in one request; team {team.name} may send at most {limit}. Send "
            "fewer sequences per request.",
            field="lengths",
        )


class Admission:
    """Checks requests against the teacher and the limits."""

    def __init__(self, teacher: Teacher, limits: Limits) -> None:
        self.limits = limits
        self.fingerprint = teacher.teacher_fingerprint
        self.id_table = teacher.id_table
        self._complete = teacher.complete
        self._vocab_size = teacher.vocab_size
        self._effective = teacher.effective_vocab_size

    def admit(
        self, request: teacher_pb2.ScoreRequest, team: Team = DEFAULT_TEAM
    ) -> list[SequenceJob]:
        """Returns one job per sequence, in order; some may have no rows to score.

        Raises RequestRefused.
        """
        self.check_envelope(request)
        spec = self.read_spec(request)
        id_table = self.find_table(request.targets.id_table)
        temperature = _read_temperature(request)
        lengths = self._read_lengths(request)
        ids = self._read_ids(request, lengths)
        rows = _read_rows(request, lengths)
        given = self._read_given_ids(request, spec, [len(wanted) for wanted in rows])
        specs = [spec if some is None else spec.for_rows(some.most) for some in given]
        sizes = self._bound_replies(specs, rows)
        jobs = []
        first = 0
        for index, (length, wanted) in enumerate(zip(lengths, rows, strict=True)):
            # A sequence without rows keeps its place, so that the others keep their numbers.
            part = ids[first : first + length] if len(wanted) else ids[:0]
            first += length
            ids_bytes = part.tobytes()
            draws = None
            if spec.needs_uniforms and len(wanted):
                digest = xxhash.xxh3_128_digest(ids_bytes)
                draws = uniforms(request.seed, request.epoch, digest, wanted)
            token_ids = torch.from_numpy(part.astype(np.int64))
            some = given[index]
            padded = None if some is None else some.padded()
            jobs.append(
                SequenceJob(
                    RowRequest(token_ids, wanted, specs[index], temperature, draws, padded),
                    len(part),
                    sizes[index],
                    level=LEVELS[request.level],
                    team=team,
                    held=len(part),
                    index=index,
                    ids_bytes=ids_bytes,
                    id_table=id_table,
                )
            )
        return jobs

    def check_envelope(self, request: Request) -> None:
        """Checks everything but the targets and the sequences."""
        nbytes, limit = request.ByteSize(), self.limits.max_request_nbytes
        if nbytes > limit:
            raise invalid(
                "REQUEST_TOO_LARGE",
                f"a request may have {limit} bytes, got {nbytes}. Send fewer sequences at once.",
                field="token_ids",
            )
        if request.teacher_fingerprint not in ("", self.fingerprint):
            raise RequestRefused(
                grpc.StatusCode.FAILED_PRECONDITION,
                "OTHER_TEACHER",
                f"the request is for teacher {quoted(request.teacher_fingerprint)}, this is "
                f"{self.fingerprint}: the service was changed. Connect again to use it.",
                field="teacher_fingerprint",
            )
        if len(request.session_id) not in (0, SESSION_ID_NBYTES):
            raise invalid(
                "BAD_SESSION_ID",
                f"session_id must be {SESSION_ID_NBYTES} random bytes or empty, got "
                f"{len(request.session_id)} bytes.",
                field="session_id",
            )
        if request.level not in LEVELS:
            raise invalid(
                "BAD_LEVEL",
                f"level must be one of {', '.join(teacher_pb2.Level.keys())}, got {request.level}.",
                field="level",
            )

    def find_table(self, digest: bytes) -> IdTable | None:
        """Finds the id table that the request names; None is the built-in one."""
        if not digest:
            return None
        if self.id_table is None or digest != self.id_table.digest:
            have = "none" if self.id_table is None else self.id_table.digest.hex()
            raise invalid(
                "UNKNOWN_ID_TABLE",
                f"this teacher has no id table {quoted(digest.hex())}; it has {have}. Leave the "
                "field empty for the built-in one.",
                field="targets.id_table",
            )
        return self.id_table

    def read_spec(self, request: Request) -> TargetSpec:
        """Reads what is asked for, completed by what the teacher has. Raises RequestRefused."""
        message = request.targets
        kind = message.WhichOneof("kind")
        largest = min(self.limits.max_top_k, self._effective)
        if kind == "top_k" and not 1 <= message.top_k.k <= largest:
            raise invalid(
                "TOP_K_OUT_OF_RANGE",
                f"top_k must be between 1 and {largest} for this teacher, got "
                f"{message.top_k.k}. The operator sets the limit with --targets.max-top-k.",
                field="targets.top_k.k",
            )
        try:
            return self._complete(read_targets(message))
        except ValueError as error:
            if kind is None:
                raise invalid("KIND_MISSING", f"{error}.", field="targets") from None
            raise invalid("BAD_TARGETS", f"{error}.", field=f"targets.{kind}") from None

    def _read_lengths(self, request: teacher_pb2.ScoreRequest) -> list[int]:
        """Reads and checks the length of each sequence."""
        limits = self.limits
        lengths = list(request.lengths)
        total = sum(lengths)
        if not lengths:
            raise invalid(
                "EMPTY_REQUEST",
                "a request needs at least one sequence, got none. Fill token_ids and lengths.",
                field="lengths",
            )
        if len(lengths) > limits.max_request_sequences:
            raise invalid(
                "TOO_MANY_SEQUENCES",
                f"a request may have {limits.max_request_sequences} sequences, got "
                f"{len(lengths)}. Send several requests.",
                field="lengths",
            )
        if len(request.token_ids) != 4 * total:
            raise invalid(
                "LENGTHS_DO_NOT_FIT",
                f"lengths add up to {total} tokens of 4 bytes, token_ids has "
                f"{len(request.token_ids)} bytes.",
                field="lengths",
            )
        for index, length in enumerate(lengths):
            self._check_length(index, length)
        if total > limits.max_request_tokens:
            raise invalid(
                "TOO_MANY_TOKENS",
                f"a request may have {limits.max_request_tokens} tokens, got {total}. Send "
                "several requests.",
                field="lengths",
            )
        return lengths

    def _check_length(self, index: int, length: int) -> None:
        """Checks that a sequence has a row and fits into the teacher's context."""
        if length < 2:
            raise invalid(
                "SEQUENCE_TOO_SHORT",
                f"sequence {index} has {length} tokens; at least 2 are needed for one row.",
                field="lengths",
                sequence=index,
            )
        if length > self.limits.max_sequence_tokens:
            raise invalid(
                "SEQUENCE_TOO_LONG",
                f"sequence {index} has {length} tokens, this teacher reads at most "
                f"{self.limits.max_sequence_tokens}. Cut it into shorter ones.",
                field="lengths",
                sequence=index,
            )

    def _read_ids(self, request: teacher_pb2.ScoreRequest, lengths: list[int]) -> np.ndarray:
        """Reads the ids of all sequences as (tokens,) int32 and checks their range."""
        ids = np.frombuffer(request.token_ids, dtype="<i4")
        wrong = (ids < 0) | (ids >= self._effective)
        if wrong.any():
            position = int(wrong.argmax())
            ends = np.cumsum(lengths)
            sequence = int(np.searchsorted(ends, position, side="right"))
            place = position - int(ends[sequence]) + lengths[sequence]
            raise invalid(
                "TOKEN_ID_OUT_OF_RANGE",
                f"token {place} of sequence {sequence} has id {int(ids[position])}; this "
                f"teacher's ids are 0 to {self._effective - 1}. Use the teacher's tokenizer.",
                field="token_ids",
                sequence=sequence,
            )
        return ids

    def _read_given_ids(
        self, request: teacher_pb2.ScoreRequest, spec: TargetSpec, num_rows: list[int]
    ) -> list[GivenIds | None]:
        """Reads the ids that are given for the requested rows of each sequence, and checks them."""
        if not spec.needs_given_ids:
            if request.given_ids or request.given_counts:
                raise invalid(
                    "GIVEN_IDS_DO_NOT_FIT",
                    f"given_ids are for targets of kind given_ids, the request asks for {spec}.",
                    field="given_ids",
                )
            return [None] * len(num_rows)
        try:
            given = read_given_ids(request, sum(num_rows))
        except ValueError as error:
            raise invalid("GIVEN_IDS_DO_NOT_FIT", f"{error}.", field="given_ids") from None
        largest = min(self.limits.max_top_k, self._effective)
        if given.most > largest:
            raise invalid(
                "GIVEN_IDS_DO_NOT_FIT",
                f"at most {largest} ids can be given for a row, got {given.most}. The operator sets "
                "the limit with --targets.max-top-k.",
                field="given_ids",
            )
        if int(given.token_ids.max()) >= self._effective:
            raise invalid(
                "TOKEN_ID_OUT_OF_RANGE",
                f"given_ids has the id {int(given.token_ids.max())}; this teacher's ids are 0 to "
                f"{self._effective - 1}. Use the teacher's tokenizer.",
                field="given_ids",
            )
        ends = itertools.accumulate(num_rows)
        return [
            given[end - count : end] if count else None
            for count, end in zip(num_rows, ends, strict=True)
        ]

    def _bound_replies(self, specs: list[TargetSpec], rows: list[Tensor]) -> list[int]:
        """Returns an upper bound of the bytes of each sequence's answer and checks their sum."""
        limit = self.limits.max_reply_nbytes
        row_nbytes = [spec.max_row_nbytes(self._vocab_size) for spec in specs]
        sizes = [
            math.ceil(len(wanted) * nbytes) + ANSWER_NBYTES if len(wanted) else 0
            for wanted, nbytes in zip(rows, row_nbytes, strict=True)
        ]
        if sum(sizes) > limit:
            raise invalid(
                "REPLY_TOO_LARGE",
                f"the answer to one request may have {limit} bytes, this one could have "
                f"{sum(sizes)}. Ask for at most {int(limit / max(row_nbytes))} rows of {specs[0]} at once, "
                "or keep fewer entries per row. The operator sets the limit with "
                "--targets.max-reply-mib.",
                field="targets",
            )
        return sizes


def _read_temperature(request: teacher_pb2.ScoreRequest) -> float:
    temperature = request.temperature or 1.0
    if not (math.isfinite(temperature) and 1e-3 <= temperature <= 1e3):
        raise invalid(
            "TEMPERATURE_OUT_OF_RANGE",
            f"temperature must be between 0.001 and 1000, got {request.temperature}.",
            field="temperature",
        )
    return temperature


def _read_rows(request: teacher_pb2.ScoreRequest, lengths: list[int]) -> list[Tensor]:
    """Returns the requested rows of each sequence, ascending."""
    if request.first_rows and request.row_mask:
        raise invalid("ROWS_TWICE", "give first_rows or row_mask, not both.", field="row_mask")
    if request.first_rows:
        return _read_first_rows(request.first_rows, lengths)
    if request.row_mask:
        return _read_row_mask(request.row_mask, lengths)
    return [torch.arange(length - 1) for length in lengths]


def _read_first_rows(first_rows: Sequence[int], lengths: list[int]) -> list[Tensor]:
    """Returns the rows of each sequence from its first one on."""
    if len(first_rows) != len(lengths):
        raise invalid(
            "FIRST_ROWS_DO_NOT_FIT",
            f"first_rows needs one number per sequence ({len(lengths)}), got {len(first_rows)}.",
            field="first_rows",
        )
    for index, (row, length) in enumerate(zip(first_rows, lengths, strict=True)):
        if row > length - 2:
            raise invalid(
                "FIRST_ROW_OUT_OF_RANGE",
                f"sequence {index} has rows 0 to {length - 2}, got first row {row}.",
                field="first_rows",
                sequence=index,
            )
    return [torch.arange(row, n - 1) for row, n in zip(first_rows, lengths, strict=True)]


def _read_row_mask(row_mask: bytes, lengths: list[int]) -> list[Tensor]:
    """Returns the rows whose bits are set; the bits of all sequences follow each other."""
    counts = [length - 1 for length in lengths]
    total = sum(counts)
    packed = np.frombuffer(row_mask, dtype=np.uint8)
    bits = np.unpackbits(packed, bitorder="little")
    if len(packed) != (total + 7) // 8 or bits[total:].any():
        raise invalid(
            "ROW_MASK_DOES_NOT_FIT",
            f"row_mask needs {(total + 7) // 8} bytes for {total} rows, with the unused "
            f"bits 0; got {len(packed)} bytes with "
            f"{int(bits[total:].sum())} bits set after the last row.",
            field="row_mask",
        )
    if not bits.any():
        raise invalid("EMPTY_REQUEST", "row_mask asks for no row at all.", field="row_mask")
    parts = torch.from_numpy(bits[:total]).split(counts)
    return [part.nonzero()[:, 0] for part in parts]
