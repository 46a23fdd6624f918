"""Defines what is asked of a teacher for each sequence, and what it answers."""

import math
from dataclasses import dataclass
from numbers import Integral

import numpy as np
from torch import Tensor

from logit_codec import GivenIds, Targets, TargetSpec, parse_targets
from student_trainer.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class ScoreOptions:
    """Says which targets each sequence of one stream should get."""

    spec: TargetSpec
    temperature: float
    seed: int
    epoch: int
    keep_payloads: bool = False
    """Whether answers should include the bytes that they were decoded from."""
    interactive: bool = False
    """Whether a person waits for the answers; see LEVEL_INTERACTIVE."""

    @classmethod
    def of(
        cls, targets: str | TargetSpec, temperature: float, seed: int, epoch: int
    ) -> "ScoreOptions":
        """Checks the arguments of `stream`. Raises InvalidRequest."""
        try:
            spec = parse_targets(targets)
        except ValueError as error:
            raise InvalidRequest(str(error)) from None
        if not (temperature > 0 and math.isfinite(temperature)):
            raise InvalidRequest(f"temperature must be positive and finite, got {temperature}")
        for name, value in (("seed", seed), ("epoch", epoch)):
            if not isinstance(value, Integral) or not 0 <= int(value) < 2**64:
                raise InvalidRequest(f"{name} must be a whole number, 0 to 2**64-1, got {value!r}")
        return cls(spec, float(temperature), int(seed), int(epoch))


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Names the rows of one sequence that targets are wanted of."""

    token_ids: Tensor
    """(L,) int64."""
    rows: Tensor | None = None
    """(N,) int64, ascending; None for all L - 1."""
    given_ids: GivenIds | None = None
    """N rows, for targets of kind `given_ids`."""
    batch_row: int = 0
    """Which row of its batch the sequence is in."""
    teacher: str = ""
    """Which of several teachers is asked, by its name."""

    @property
    def num_tokens(self) -> int:
        """L."""
        return len(self.token_ids)

    @property
    def num_rows(self) -> int:
        """N."""
        return self.num_tokens - 1 if self.rows is None else len(self.rows)

    def check(self, spec: TargetSpec) -> None:
        """Raises InvalidRequest unless ids are given for each row exactly if the spec needs them."""
        given = self.given_ids
        if not spec.needs_given_ids:
            if given is not None:
                raise InvalidRequest(
                    f"given_ids are for targets='given_ids', the targets are {spec}"
                )
        elif given is None:
            raise InvalidRequest(
                "targets='given_ids' needs given_ids=...: for stream, (L-1, m) ids for each sequence; "
                "for stream_batches, a function of the batch"
            )
        elif given.num_rows != self.num_rows:
            raise InvalidRequest(
                f"given_ids must name ids for each of the {self.num_rows} wanted rows, got "
                f"{given.num_rows} rows"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """Holds what a teacher answers for one sequence."""

    targets: Targets
    payloads: tuple[bytes, ...] = ()
    """The codec's containers that the targets were decoded from, in the order of the rows, if
    `keep_payloads` was set."""

    @property
    def nbytes(self) -> int:
        """The memory of both."""
        return self.targets.nbytes + sum(map(len, self.payloads))


def row_mask(rows: Tensor | None, num_rows: int) -> bytes | None:
    """Packs (N,) int64 wanted rows into bits, lowest first; None if all `num_rows` are wanted."""
    if rows is None or len(rows) == num_rows:
        return None
    mask = np.zeros(num_rows, dtype=np.uint8)
    mask[rows.numpy()] = 1
    return np.packbits(mask, bitorder="little").tobytes()
