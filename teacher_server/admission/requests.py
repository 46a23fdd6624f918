"""What may enter: a ScoreRequest is checked here, once, and becomes the rows to score.

Every refusal says what was got, what is allowed and what to do.
"""

import math
from dataclasses import dataclass

import grpc
import numpy as np
import torch
import xxhash
from torch import Tensor

from logit_codec import IdTable, TargetSpec, uniforms
from logitstream.messages import read_targets
from protos import teacher_pb2
from teacher_server.admission.limits import Limits
from teacher_server.engine.batch import WantedRows
from teacher_server.engine.model import TeacherModel
from teacher_server.errors import RequestRefused, invalid, quoted

SESSION_ID_NBYTES = 16
ANSWER_NBYTES = 1024
"""Bytes of an answer that do not depend on its rows, at most."""


@dataclass(frozen=True, slots=True, eq=False)
class Admitted:
    """One sequence of an admitted request."""

    wanted: WantedRows
    ids_bytes: bytes
    """The sequence's own bytes of `token_ids`."""
    reply_nbytes: int
    """Upper bound of its answer."""
    id_table: IdTable | None = None
    """What its ids may be coded with."""


class Admission:
    """Checks requests against the teacher and the limits."""

    def __init__(self, model: TeacherModel, limits: Limits) -> None:
        self.limits = limits
        self._vocab_size = model.vocab_size
        self._effective = model.effective_vocab_size
        self._fingerprint = model.teacher_fingerprint
        self._id_table = model.id_table

    def admit(self, request: teacher_pb2.ScoreRequest) -> list[Admitted]:
        """The sequences to score, in order. Raises RequestRefused."""
        limits = self.limits
        if request.ByteSize() > limits.max_request_nbytes:
            raise invalid(
                "REQUEST_TOO_LARGE",
                f"a request may have {limits.max_request_nbytes} bytes, got {request.ByteSize()}. "
                "Send fewer sequences at once.",
                field="token_ids",
            )
        if request.teacher_fingerprint not in ("", self._fingerprint):
            raise RequestRefused(
                grpc.StatusCode.FAILED_PRECONDITION,
                "OTHER_TEACHER",
                f"the request is for teacher {quoted(request.teacher_fingerprint)}, this is "
                f"{self._fingerprint}: the service was changed. Connect again to use it.",
                field="teacher_fingerprint",
            )
        if len(request.session_id) not in (0, SESSION_ID_NBYTES):
            raise invalid(
                "BAD_SESSION_ID",
                f"session_id has {SESSION_ID_NBYTES} random bytes or none, got "
                f"{len(request.session_id)}.",
                field="session_id",
            )
        if request.level not in teacher_pb2.Level.values():
            raise invalid(
                "BAD_LEVEL",
                f"level must be one of {', '.join(teacher_pb2.Level.keys())}, got {request.level}.",
                field="level",
            )
        spec = self._spec(request)
        id_table = self._table(request.targets.id_table)
        temperature = request.temperature or 1.0
        if not (math.isfinite(temperature) and 1e-3 <= temperature <= 1e3):
            raise invalid(
                "TEMPERATURE_OUT_OF_RANGE",
                f"temperature must be between 0.001 and 1000, got {request.temperature}.",
                field="temperature",
            )
        ids, lengths = self._ids(request)
        rows = self._rows(request, lengths)

        row_nbytes = spec.max_row_nbytes(self._vocab_size)
        sizes = [
            math.ceil(len(wanted) * row_nbytes) + ANSWER_NBYTES if len(wanted) else 0
            for wanted in rows
        ]
        if sum(sizes) > limits.max_reply_nbytes:
            fitting = int(limits.max_reply_nbytes / row_nbytes)
            raise invalid(
                "REPLY_TOO_LARGE",
                f"the answer to one request may have {limits.max_reply_nbytes} bytes, this one "
                f"could have {sum(sizes)}. Ask for at most {fitting} rows of {spec} at once, or "
                "keep fewer entries per row. The operator sets the limit with "
                "--targets.max-reply-mib.",
                field="targets",
            )
        admitted = []
        first = 0
        for length, wanted, size in zip(lengths, rows, sizes, strict=True):
            part = ids[first : first + length]
            first += length
            if len(wanted):
                token_ids = torch.from_numpy(part.astype(np.int64))
                draws = None
                if spec.needs_uniforms:
                    digest = xxhash.xxh3_128_digest(part.tobytes())
                    draws = uniforms(request.seed, request.epoch, digest, wanted)
                item = WantedRows(token_ids, wanted, spec, temperature, draws)
                admitted.append(Admitted(item, part.tobytes(), size, id_table))
            else:  # its place keeps the numbers of the others right
                item = WantedRows(torch.empty(0, dtype=torch.int64), wanted, spec, temperature)
                admitted.append(Admitted(item, b"", 0))
        return admitted

    def _table(self, digest: bytes) -> IdTable | None:
        if not digest:
            return None
        if self._id_table is None or digest != self._id_table.digest:
            have = "none" if self._id_table is None else self._id_table.digest.hex()
            raise invalid(
                "UNKNOWN_ID_TABLE",
                f"this teacher has no id table {quoted(digest.hex())}; it has {have}. Leave the field "
                "empty for the built-in one.",
                field="targets.id_table",
            )
        return self._id_table

    def _spec(self, request: teacher_pb2.ScoreRequest) -> TargetSpec:
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
            return read_targets(message)
        except ValueError as error:
            if kind is None:
                raise invalid("KIND_MISSING", f"{error}.", field="targets") from None
            raise invalid("BAD_TARGETS", f"{error}.", field=f"targets.{kind}") from None

    def _ids(self, request: teacher_pb2.ScoreRequest) -> tuple[np.ndarray, list[int]]:
        """All ids as (tokens,) int32, and the length of each sequence."""
        limits = self.limits
        lengths = list(request.lengths)
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
        total = sum(lengths)
        if len(request.token_ids) != 4 * total:
            raise invalid(
                "LENGTHS_DO_NOT_FIT",
                f"lengths add up to {total} tokens of 4 bytes, token_ids has "
                f"{len(request.token_ids)} bytes.",
                field="lengths",
            )
        for index, length in enumerate(lengths):
            if length < 2:
                raise invalid(
                    "SEQUENCE_TOO_SHORT",
                    f"sequence {index} has {length} tokens; at least 2 are needed for one row.",
                    field="lengths",
                    sequence=index,
                )
            if length > limits.max_sequence_tokens:
                raise invalid(
                    "SEQUENCE_TOO_LONG",
                    f"sequence {index} has {length} tokens, this teacher reads at most "
                    f"{limits.max_sequence_tokens}. Cut it into shorter ones.",
                    field="lengths",
                    sequence=index,
                )
        if total > limits.max_request_tokens:
            raise invalid(
                "TOO_MANY_TOKENS",
                f"a request may have {limits.max_request_tokens} tokens, got {total}. Send "
                "several requests.",
                field="lengths",
            )
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
        return ids, lengths

    def _rows(self, request: teacher_pb2.ScoreRequest, lengths: list[int]) -> list[Tensor]:
        """The wanted rows of each sequence, ascending."""
        if request.first_rows and request.row_mask:
            raise invalid("ROWS_TWICE", "give first_rows or row_mask, not both.", field="row_mask")
        if request.first_rows:
            if len(request.first_rows) != len(lengths):
                raise invalid(
                    "FIRST_ROWS_DO_NOT_FIT",
                    f"first_rows needs one number per sequence ({len(lengths)}), got "
                    f"{len(request.first_rows)}.",
                    field="first_rows",
                )
            for index, (row, length) in enumerate(zip(request.first_rows, lengths, strict=True)):
                if row > length - 2:
                    raise invalid(
                        "FIRST_ROW_OUT_OF_RANGE",
                        f"sequence {index} has rows 0 to {length - 2}, got first row {row}.",
                        field="first_rows",
                        sequence=index,
                    )
            starts = request.first_rows
            return [torch.arange(s, n - 1) for s, n in zip(starts, lengths, strict=True)]
        if request.row_mask:
            counts = [length - 1 for length in lengths]
            total = sum(counts)
            packed = np.frombuffer(request.row_mask, dtype=np.uint8)
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
        return [torch.arange(length - 1) for length in lengths]
