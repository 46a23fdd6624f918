"""Defines the columns and the metadata of a shard."""

import json
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
import xxhash
from google.protobuf.json_format import ParseDict, ParseError

from logit_codec import parse_targets
from protos import teacher_pb2
from student_trainer.record.folder import _listed

SCHEMA = pa.schema(
    [
        ("key", pa.binary(16)),
        ("seed", pa.uint64()),
        ("epoch", pa.uint64()),
        ("row_mask", pa.binary()),
        ("input_ids", pa.list_(pa.field("element", pa.int32(), nullable=False))),
        ("targets", pa.list_(pa.field("element", pa.binary(), nullable=False))),
        ("teacher", pa.string()),
        ("spec", pa.string()),
        ("temperature", pa.float64()),
    ]
)
"""One row per sequence and draw; docs/recording.md says what each column holds."""


IDENTITY = ("key", "seed", "epoch", "row_mask")
"""The columns that say what a row is, without its content."""


METADATA = "logitstream"
"""Key of a shard's metadata under which its provenance is."""


MAX_TEMPERATURE = 1e9
"""Far above any that means something."""


DAMAGE = (pa.ArrowException, OSError, KeyError, ValueError, IndexError)
"""What reading a damaged file can raise; other things too, so `is_whole` has the last word."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """What is the same for every row of a record."""

    teacher: dict[str, Any]
    """Fields of TeacherInfo, as JSON has them."""
    spec: str
    """What was asked for, as `parse_targets` reads it."""
    temperature: float
    id_tables: tuple[str, ...] = ()
    """Digests, hex, of what the targets may be coded with."""

    @property
    def fingerprint(self) -> str:
        """Of the teacher: of everything that decides the bytes."""
        return self.teacher.get("teacher_fingerprint", "")

    @property
    def origin(self) -> tuple[str, ...]:
        """What has to be the same for rows to be of one record."""
        return origin_of(self.info())

    def to_json(self) -> dict[str, Any]:
        return {
            "teacher": self.teacher,
            "spec": self.spec,
            "temperature": self.temperature,
            "id_tables": list(self.id_tables),
        }

    def signed(self) -> str:
        """As JSON that says what its own digest is, for the metadata of a shard."""
        content = self.to_json()
        return json.dumps({**content, "digest": _digest_of(content)})

    @classmethod
    def from_signed(cls, text: bytes) -> Self:
        """Raises ValueError if it is not what `signed` made."""
        try:
            found = json.loads(text)
            if found.pop("digest") != _digest_of(found):
                raise ValueError("the provenance of a shard was changed")
            json.dumps(found, ensure_ascii=False).encode()  # half surrogate pairs are no text
            if not isinstance(found["teacher"], dict):
                raise ValueError("the teacher is not described")
            tables = [bytes.fromhex(table).hex() for table in _listed(found["id_tables"])]
            made = cls(found["teacher"], found["spec"], found["temperature"], tuple(tables))
            made.info()
            parse_targets(made.spec)
            if isinstance(made.temperature, bool) or not 0 < made.temperature < MAX_TEMPERATURE:
                raise ValueError("the temperature is not a number above 0")
        except RecursionError:
            raise ValueError("the provenance of a shard is nested too deep") from None
        except (KeyError, TypeError, AttributeError, ParseError) as error:
            raise ValueError(f"the provenance of a shard is not one ({error!r})") from None
        return made

    def info(self) -> teacher_pb2.TeacherInfo:
        """Who the teacher is; fields that this version does not know are left out."""
        return ParseDict(self.teacher, teacher_pb2.TeacherInfo(), ignore_unknown_fields=True)


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence with its targets."""

    key: bytes
    """`ids_digest` of the ids."""
    seed: int
    epoch: int
    row_mask: bytes | None
    """Bit i, the lowest first, says whether row i has targets; None: all have."""
    token_ids: np.ndarray
    """(L,) int32."""
    payloads: tuple[bytes, ...]
    """Containers of the codec, in the order of the rows."""

    @property
    def nbytes(self) -> int:
        return self.token_ids.nbytes + sum(map(len, self.payloads))


def origin_of(info: teacher_pb2.TeacherInfo) -> tuple[str, ...]:
    """Weights and tokenizer of a teacher, or all of its fingerprint if it does not say which."""
    if not info.weights_fingerprint:
        return (info.teacher_fingerprint,)
    return info.weights_fingerprint, info.tokenizer_fingerprint


def _digest_of(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
