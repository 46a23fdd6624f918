"""Asks several teachers: each row of a batch says which of them, or how they are mixed.

Letters: B rows of a batch, J teachers.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from logit_codec import HiddenTargets, Targets, TargetSpec, TeacherHead
from protos import teacher_pb2
from student_trainer.errors import IncompatibleTeacher, InvalidRequest, TeacherError
from student_trainer.teachers.mixture import Said, check_mixable, join, narrow
from student_trainer.teachers.request import Answer, Piece, ScoreOptions
from student_trainer.teachers.stream import Assign, Join
from student_trainer.teachers.teacher import Teacher

logger = logging.getLogger(__name__)

Weights = Mapping[str, float]
"""How much each teacher counts, by its name."""
TOLERANCE = 1e-6
"""By how much weights may miss 1."""


@dataclass(frozen=True, slots=True)
class TotalCounters:
    """Adds up what all teachers have handed out."""

    rows: int
    payload_nbytes: int


class Teachers(Teacher):
    """Serves as one teacher with several, by name, that share a tokenizer and a vocabulary.

    column: the column of a batch that names the teacher of each of its rows: B names, or mappings from
    names to weights that add up to 1 for a mixture, or both; `weigh` turns them into a tensor for
    loaders that keep tensors only. weights: one mixture for all rows instead. Only teachers that a
    batch names are asked.

    Targets come back in the order of the batch. A row of one teacher has what this teacher says, to the
    bit; `mixture.py` says which kinds of target can be mixed, and how exactly. Closes no teacher but by
    `close`. Raises ValueError for arguments that make no sense, and IncompatibleTeacher for teachers
    with different tokenizers or vocabularies.
    """

    who_writes = "one of them: teachers[name].generate(...)"

    def __init__(
        self,
        teachers: Mapping[str, Teacher],
        *,
        column: str | None = None,
        weights: Weights | None = None,
    ) -> None:
        if not teachers:
            raise ValueError("several teachers need at least one, got an empty mapping")
        for name, one in teachers.items():
            if not isinstance(one, Teacher):
                raise ValueError(
                    f"the teacher {name!r} must be a Teacher, such as connect(address) returns, got "
                    f"{type(one).__name__}"
                )
        if (column is None) == (weights is None):
            given = "neither" if column is None else "both"
            raise ValueError(
                f"the teachers {', '.join(teachers)} need either column=..., the column of a batch that "
                "names the teacher of each row, or weights=..., how much each counts for all rows; got "
                f"{given}"
            )
        self._teachers = dict(teachers)
        self.column = column
        """The column of a batch that names the teacher of each row."""
        self._allowed = ", ".join(map(repr, teachers))
        self._weights_J = None if weights is None else self._weigh_one(weights, "weights")
        self._width = _check_alike(self._teachers)
        self._info = _describe(self._teachers, self._width)
        self._rows = dict.fromkeys(self._teachers, 0.0)
        every = self._teachers.values()
        self.default_ahead = min(one.default_ahead for one in every)
        alike = {one.default_look_ahead for one in every}
        self.default_look_ahead = min(alike, key=lambda ahead: isinstance(ahead, str))
        targets = {str(one.default_targets) for one in every}
        self.default_targets = targets.pop() if len(targets) == 1 else Teacher.default_targets
        self.tokenizer = next((one.tokenizer for one in every if one.tokenizer is not None), None)

    def __getitem__(self, name: str) -> Teacher:
        """Returns one of the teachers. Raises KeyError."""
        return self._teachers[name]

    def replace(self, change: Callable[[Teacher], Teacher | None]) -> "Teachers | None":
        """Returns the same choice among other teachers; self if none changes, None if one has none."""
        changed = {name: change(one) for name, one in self._teachers.items()}
        if all(changed[name] is one for name, one in self._teachers.items()):
            return self
        found = {name: one for name, one in changed.items() if one is not None}
        if len(found) < len(changed):
            return None
        weights = self.choice.get("teacher_weights")
        return Teachers(found, column=self.column, weights=weights)

    @property
    def info(self) -> teacher_pb2.TeacherInfo:
        """Describes all teachers at once: fingerprints as "name=..." of each, and the least of limits."""
        return self._info

    @property
    def choice(self) -> dict[str, Any]:
        """What says which teacher is asked for a row, as JSON has it."""
        if self._weights_J is None:
            return {"teacher_column": self.column}
        return {"teacher_weights": dict(zip(self._teachers, self._weights_J.tolist(), strict=True))}

    @property
    def teachers(self) -> dict[str, Teacher]:
        """The teachers by name."""
        return dict(self._teachers)

    @property
    def counters(self) -> TotalCounters | None:
        """Rows and bytes that came from all teachers; None unless all of them count."""
        found = [getattr(one, "counters", None) for one in self._teachers.values()]
        if None in found:
            return None
        rows, nbytes = (
            sum(getattr(one, name) for one in found) for name in ("rows", "payload_nbytes")
        )
        return TotalCounters(rows, nbytes)

    @property
    def rows_by_teacher(self) -> dict[str, float]:
        """How many rows each teacher has decided so far; of a mixture, its share of each row."""
        return dict(self._rows)

    def weigh(self, values: Sequence[str | Weights]) -> Tensor:
        """Returns (B, J) float64 weights for B values of the column. Raises InvalidRequest."""
        found = [self._weigh_one(value, f"value {row}") for row, value in enumerate(values)]
        return torch.stack(found)

    def submit(self, piece: Piece, options: ScoreOptions) -> "Future[Answer]":
        """Asks the teacher that the piece names."""
        return self._teachers[piece.teacher].submit(piece, options)

    def head(self) -> TeacherHead:
        """Raises TeacherError: each teacher has its own."""
        name = next(iter(self._teachers))
        raise TeacherError(f"several teachers have a head each: teachers[{name!r}].head()")

    def make_options(
        self, targets: str | TargetSpec | None, temperature: float, seed: int, epoch: int
    ) -> ScoreOptions:
        options = super().make_options(targets, temperature, seed, epoch)
        for one in self._teachers.values():  # a record refuses what it does not hold
            one.make_options(options.spec, temperature, seed, epoch)
        if self._weights_J is not None and int((self._weights_J > 0).sum()) > 1:
            check_mixable(options.spec)
        return options

    def check_usable(self) -> None:
        for one in self._teachers.values():
            one.check_usable()

    def close(self) -> None:
        """Closes all teachers."""
        for one in self._teachers.values():
            one.close()

    def _assigner(self, options: ScoreOptions) -> Assign:
        heads: dict[str, TeacherHead] = {}
        if options.spec.needs_hidden:
            heads = {name: one.head() for name, one in self._teachers.items()}

        def assign(
            batch: Mapping[str, Any] | None, pieces: Mapping[str, Piece]
        ) -> tuple[dict[str, Piece], Join]:
            asked: dict[str, Piece] = {}
            weights: list[dict[str, float]] = []
            for where, piece in pieces.items():
                weights_J = self._weights_of(batch, piece, where)
                chosen = {
                    name: weight
                    for name, weight in zip(self._teachers, weights_J.tolist(), strict=True)
                    if weight > 0
                }
                if len(chosen) > 1:
                    check_mixable(options.spec)
                weights.append(chosen)
                asked |= {
                    f"{where}, teacher {name}": replace(piece, teacher=name) for name in chosen
                }

            def join_all(parts: list[Targets]) -> Targets:
                return self._join(parts, weights, heads)

            return asked, join_all

        return assign

    def _weights_of(self, batch: Mapping[str, Any] | None, piece: Piece, where: str) -> Tensor:
        """Returns (J,) weights of the teachers of a sequence. Raises InvalidRequest."""
        if self._weights_J is not None:
            return self._weights_J
        assert self.column is not None
        if batch is None:
            raise InvalidRequest(
                f"{where}: sequences have no column {self.column!r} that names their teacher. Use "
                f"stream_batches, or one teacher: teachers[{next(iter(self._teachers))!r}].stream(...)"
            )
        if batch.get(self.column) is None:
            raise InvalidRequest(
                f"{where}: the batch has no column {self.column!r}, which names the teacher of each "
                f"row ({self._allowed}); it has {', '.join(batch)}"
            )
        values, num_rows = batch[self.column], _count_rows(batch)
        if isinstance(values, str | Mapping):
            values = [values]
        if len(values) != num_rows:
            raise InvalidRequest(
                f"{where}: the column {self.column!r} must name a teacher for each of the "
                f"{num_rows} rows of the batch, got {len(values)} values"
            )
        value = values[piece.batch_row]
        return self._weigh_one(value, f"{where}: {self.column!r}")

    def _weigh_one(self, value: Any, where: str) -> Tensor:
        """Returns (J,) float64 weights. Raises InvalidRequest."""
        if isinstance(value, Tensor) and value.is_floating_point():  # what `weigh` made
            value = dict(zip(self._teachers, value.tolist(), strict=True))
        given = {str(value): 1.0} if isinstance(value, str) else value
        if not isinstance(given, Mapping):
            raise InvalidRequest(
                f"{where} must be the name of a teacher ({self._allowed}) or weights by name, got "
                f"{value!r}"
            )
        unknown = [name for name in given if name not in self._teachers]
        if unknown:
            raise InvalidRequest(
                f"{where} names the teacher {unknown[0]!r}; the teachers are {self._allowed}"
            )
        try:
            numbers = [float(given.get(name, 0.0)) for name in self._teachers]
        except (TypeError, ValueError):
            numbers = [math.nan]
        if min(numbers) < 0 or not abs(math.fsum(numbers) - 1) <= TOLERANCE:
            raise InvalidRequest(
                f"{where}: weights must be at least 0 and add up to 1, got {dict(given)}"
            )
        return torch.tensor(numbers, dtype=torch.float64)

    def _join(
        self,
        parts: Sequence[Targets],
        weights: Sequence[Weights],
        heads: Mapping[str, TeacherHead],
    ) -> Targets:
        """Joins the answers to one batch, in the order in which they were asked for."""
        rest, said = iter(parts), []
        for chosen in weights:
            targets = {name: _complete(next(rest), heads.get(name), self._width) for name in chosen}
            said.append(Said(targets, chosen))
            for name, weight in chosen.items():
                self._rows[name] += weight * targets[name].num_rows
        return join(said)


def split_teachers(teacher: Teacher) -> dict[str, Teacher]:
    """Returns several teachers by name, and a single one under the name ""."""
    return teacher.teachers if isinstance(teacher, Teachers) else {"": teacher}


def _complete(targets: Targets, head: TeacherHead | None, width: int) -> Targets:
    if isinstance(targets, HiddenTargets) and head is not None:
        targets = targets.with_head(head)
    return narrow(targets, width)


def _count_rows(batch: Mapping[str, Any]) -> int:
    """Returns B."""
    ids = batch["input_ids"]
    return 1 if torch.as_tensor(ids[0]).dim() == 0 else len(ids)


def _check_alike(teachers: Mapping[str, Teacher]) -> int:
    """Returns V, the ids that targets of all teachers are over. Raises IncompatibleTeacher."""
    first, *others = teachers.items()
    for name, other in others:
        mine, theirs = first[1].info, other.info
        tokenizers = mine.tokenizer_fingerprint, theirs.tokenizer_fingerprint
        if not all(tokenizers):
            if any(tokenizers):
                logger.warning(
                    "of the teachers %s and %s one has no tokenizer to compare", first[0], name
                )
        elif tokenizers[0] != tokenizers[1]:
            raise IncompatibleTeacher(
                f"the teachers {first[0]!r} ({mine.model}) and {name!r} ({theirs.model}) have different "
                f"tokenizers: fingerprints {tokenizers[0]} and {tokenizers[1]}. One student needs "
                "teachers of one vocabulary."
            )
        if _used_ids(mine) != _used_ids(theirs):
            raise IncompatibleTeacher(
                f"the teachers {first[0]!r} ({mine.model}) and {name!r} ({theirs.model}) have "
                f"different vocabularies: {_used_ids(mine)} and {_used_ids(theirs)} ids. One student "
                "needs teachers of one vocabulary."
            )
    sizes = {one.info.vocab_size for one in teachers.values()}
    return sizes.pop() if len(sizes) == 1 else _used_ids(first[1].info)


def _used_ids(info: teacher_pb2.TeacherInfo) -> int:
    return info.effective_vocab_size or info.vocab_size


def _describe(teachers: Mapping[str, Teacher], width: int) -> teacher_pb2.TeacherInfo:
    """Describes all teachers in one message, for what asks a teacher who it is and what it allows."""
    infos = {name: one.info for name, one in teachers.items()}
    described = teacher_pb2.TeacherInfo()
    described.CopyFrom(next(iter(infos.values())))
    # By name, since names decide who is asked; in one order, since that of the mapping decides nothing.
    for field in ("model", "revision", "weights_fingerprint", "teacher_fingerprint"):
        known = {name: getattr(infos[name], field) for name in sorted(infos)}
        text = ",".join(f"{name}={value}" for name, value in known.items())
        setattr(described, field, text if any(known.values()) else "")
    for field in ("replicas", "id_tables", "replica_id", "head_fingerprint"):
        described.ClearField(field)  # type: ignore[arg-type]
    described.vocab_size = width
    described.effective_vocab_size = _used_ids(described)
    longest = [info.max_sequence_tokens for info in infos.values() if info.max_sequence_tokens]
    described.max_sequence_tokens = min(longest, default=0)
    # A batch may be for one of them alone.
    queues = [info.limits.max_queued_tokens * max(1, len(info.replicas)) for info in infos.values()]
    described.limits.max_queued_tokens = min((one for one in queues if one), default=0)
    return described
