"""Reads settings of a training that may change over its steps, such as 0.5->0.1."""

import math
from dataclasses import dataclass

ARROW = "->"


@dataclass(frozen=True, slots=True)
class LinearSchedule:
    """Goes from one number in the first step to another in the last one, in a straight line."""

    first: float
    last: float

    @classmethod
    def parse(cls, value: "float | str") -> "LinearSchedule":
        """Reads a number, or two of them such as "0.5->0.1". Raises ValueError."""
        parts = value.split(ARROW) if isinstance(value, str) else [value]
        try:
            numbers = [float(part) for part in parts]
        except ValueError:
            numbers = []
        if not 1 <= len(numbers) <= 2 or not all(math.isfinite(number) for number in numbers):
            raise ValueError(f"must be a number, or two such as 0.5{ARROW}0.1; got {value!r}")
        return cls(numbers[0], numbers[-1])

    @property
    def ends(self) -> tuple[float, float]:
        """The numbers of the first and of the last step."""
        return self.first, self.last

    @property
    def setting(self) -> "float | str":
        """The number, if it is one, or the two as text: what `parse` reads."""
        return self.first if self.first == self.last else f"{self.first:g}{ARROW}{self.last:g}"

    def at(self, progress: float) -> float:
        """Returns the number after a share of the steps: 0 in the first one, 1 in the last."""
        return self.first + (self.last - self.first) * progress


TRUNCATED = ("top_k",)
"""Kinds that a training asks for and that do not say how their tail is spread."""
MIXED = (0.7, 0.3)
"""The default weights of divergence and labels for these."""


def default_weights(
    kind: str, kd_weight: "float | str | None", ce_weight: "float | str | None"
) -> tuple["float | str", "float | str"]:
    """Returns the weights of the divergence and of the labels, by default if neither is given.

    top_k: 0.7 and 0.3, since it does not teach how the teacher spreads the tail: in Busbridge et al.
    2025 (arXiv:2502.08606, appendix G) 128 kept ids lose 0.11 nats, and less than 0.01 mixed with
    labels. All others: 1 and 0.
    """
    if kd_weight is None and ce_weight is None and kind in TRUNCATED:
        return MIXED
    return (1.0 if kd_weight is None else kd_weight), (0.0 if ce_weight is None else ce_weight)
