"""Describes what a record was made of: its teacher, the kind of targets, the temperature."""

import json
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Self

import xxhash
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError

from logit_codec import parse_targets
from protos import teacher_pb2
from student_trainer.errors import IncompatibleTeacher, InvalidRequest
from student_trainer.teachers.request import ScoreOptions

logger = logging.getLogger(__name__)

MAX_TEMPERATURE = 1e9
"""Far above any temperature that makes sense."""
NO_TARGETS = "none"
"""Stands for the targets of texts that were written without any."""
NOT_THE_TEACHERS = ("service_id", "replicas", "replica_id", "team", "limits", "server_version")
"""Fields of TeacherInfo that describe the service, not the teacher."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """Holds what all rows of a record have in common."""

    teacher: dict[str, Any]
    """Fields of TeacherInfo, as JSON has them."""
    spec: str
    """The kind of targets, as `parse_targets` reads it, or NO_TARGETS."""
    temperature: float
    id_tables: tuple[str, ...] = ()
    """Digests, in hex, of the tables that the targets may be coded with."""

    @classmethod
    def of(
        cls, info: teacher_pb2.TeacherInfo, spec: str, temperature: float, tables: Iterable[bytes]
    ) -> Self:
        """Describes the targets of a live teacher. tables: the digests of its id tables."""
        teacher = teacher_pb2.TeacherInfo()
        teacher.CopyFrom(info)
        for name in NOT_THE_TEACHERS:
            teacher.ClearField(name)
        fields = MessageToDict(teacher, preserving_proto_field_name=True)
        return cls(fields, spec, temperature, tuple(table.hex() for table in tables))

    @property
    def fingerprint(self) -> str:
        """The teacher's fingerprint, which covers everything that decides the bytes."""
        return self.teacher.get("teacher_fingerprint", "")

    @property
    def origin(self) -> tuple[str, ...]:
        """What must be equal for rows to belong to one record."""
        return origin_of(self.info())

    def info(self) -> teacher_pb2.TeacherInfo:
        """Returns the teacher's description, without fields that this version does not know."""
        return ParseDict(self.teacher, teacher_pb2.TeacherInfo(), ignore_unknown_fields=True)

    def to_json(self) -> dict[str, Any]:
        """Returns what `json.dumps` takes."""
        return {
            "teacher": self.teacher,
            "spec": self.spec,
            "temperature": self.temperature,
            "id_tables": list(self.id_tables),
        }

    def signed(self) -> str:
        """Returns JSON that contains its own digest, for the metadata of a shard."""
        content = self.to_json()
        return json.dumps({**content, "digest": _digest_of(content)})

    @classmethod
    def from_signed(cls, text: bytes) -> Self:
        """Reads what `signed` made. Raises ValueError for anything else."""
        try:
            content = json.loads(text)
            if content.pop("digest") != _digest_of(content):
                raise ValueError("the provenance of a shard was changed")
            json.dumps(content, ensure_ascii=False).encode()  # half a surrogate pair is no text
            if not isinstance(content["teacher"], dict):
                raise ValueError("the teacher is not described")
            tables = [bytes.fromhex(table).hex() for table in as_list(content["id_tables"])]
            provenance = cls(
                content["teacher"], content["spec"], content["temperature"], tuple(tables)
            )
            provenance.info()
            if provenance.spec != NO_TARGETS:
                parse_targets(provenance.spec)
            temperature = provenance.temperature
            if isinstance(temperature, bool) or not 0 < temperature < MAX_TEMPERATURE:
                raise ValueError("the temperature is not a number above 0")
        except RecursionError:
            raise ValueError("the provenance of a shard is nested too deep") from None
        except (KeyError, TypeError, AttributeError, ParseError) as error:
            raise ValueError(
                f"the provenance of a shard cannot be understood ({error!r})"
            ) from None
        return provenance

    def check_options(self, root: str, options: ScoreOptions) -> None:
        """Raises InvalidRequest for other targets than the record at `root` holds."""
        self.check_targets(root, str(options.spec), options.temperature)

    def check_targets(self, root: str, spec: str, temperature: float) -> None:
        """The same of a spec, which may be NO_TARGETS."""
        if (spec, temperature) != (self.spec, self.temperature):
            raise InvalidRequest(
                f"{root} holds {self.spec} at temperature {self.temperature}, asked for "
                f"{spec} at temperature {temperature}. Ask for what it holds, or record the other "
                "targets to another folder."
            )

    def check_same_teacher(self, root: str, info: teacher_pb2.TeacherInfo) -> None:
        """Raises IncompatibleTeacher unless a live teacher has the recorded weights and tokenizer.

        Versions of torch and transformers, dtype and device decide the last bits, so they are part
        of the fingerprint too; but a record stays valuable when they change. `check_compatible`
        compares the codec.
        """
        if self.fingerprint == info.teacher_fingerprint:
            return
        recorded = self.info()
        if self.origin == origin_of(info):
            logger.info(
                "%s was recorded from the same weights of %s under another fingerprint (%s, now "
                "%s): versions, dtype or device differ, so new targets may differ by rounding",
                root,
                info.model,
                recorded.teacher_fingerprint,
                info.teacher_fingerprint,
            )
            return
        differences = []
        if recorded.weights_fingerprint != info.weights_fingerprint:
            differences.append("set of weights")
        if recorded.tokenizer_fingerprint != info.tokenizer_fingerprint:
            differences.append("tokenizer")
        raise IncompatibleTeacher(
            f"{root} was recorded from teacher {recorded.model} {recorded.teacher_fingerprint}, "
            f"the live one is {info.model} {info.teacher_fingerprint}, with another "
            f"{' and another '.join(differences) or 'fingerprint'}. Record it to another folder."
        )


def origin_of(info: teacher_pb2.TeacherInfo) -> tuple[str, ...]:
    """Returns the fingerprints of weights and tokenizer, or of the teacher if it has only that."""
    if not info.weights_fingerprint:
        return (info.teacher_fingerprint,)
    return info.weights_fingerprint, info.tokenizer_fingerprint


def merge(root: str, shards: Iterable[tuple[str, Provenance, int]]) -> Provenance | None:
    """Returns one provenance for all shards: the one that most rows have; None without shards.

    shards: name, provenance and number of rows of each. Raises IncompatibleTeacher if they belong
    to two records.
    """
    first: tuple[str, Provenance, object] | None = None
    num_rows: Counter[str] = Counter()
    by_fingerprint: dict[str, Provenance] = {}
    tables: dict[str, None] = {}
    for name, provenance, count in shards:
        content = provenance.origin, provenance.spec, provenance.temperature
        first = first or (name, provenance, content)
        if content != first[2]:
            raise IncompatibleTeacher(
                f"{root} holds two records: {first[0]} has {_describe(first[1])}, {name} has "
                f"{_describe(provenance)}. Put them into folders of their own."
            )
        num_rows[provenance.fingerprint] += count
        by_fingerprint[provenance.fingerprint] = provenance
        tables.update(dict.fromkeys(provenance.id_tables))
    if not by_fingerprint:
        return None
    if len(by_fingerprint) > 1:
        logger.info(
            "%s was recorded under %d fingerprints of one teacher's weights: versions, dtype or "
            "device differed, so values may differ by rounding",
            root,
            len(by_fingerprint),
        )
    most = max(by_fingerprint, key=lambda fingerprint: (num_rows[fingerprint], fingerprint))
    return replace(by_fingerprint[most], id_tables=tuple(tables))


def as_list(value: Any) -> list[Any]:
    """Returns a list from a JSON file unchanged. Raises TypeError for anything else."""
    if not isinstance(value, list):
        raise TypeError(f"a list was expected, got {type(value).__name__}")
    return value


def _describe(provenance: Provenance) -> str:
    return (
        f"{provenance.spec} at temperature {provenance.temperature} of teacher "
        f"{provenance.fingerprint}"
    )


def _digest_of(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
