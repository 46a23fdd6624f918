"""Defines what is asked of a teacher for each sequence, and what it answers."""

import math
from dataclasses import dataclass
from numbers import Integral

import numpy as np
from torch import Tensor

from logit_codec import Targets, TargetSpec, parse_targets
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
