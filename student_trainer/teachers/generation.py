"""Defines what a teacher is asked to write, and what it wrote."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

from torch import Tensor

from logit_codec import HiddenTargets, Targets, TargetSpec, TeacherHead
from student_trainer.errors import InvalidRequest

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """Holds one text that a teacher wrote, with the targets of its tokens."""

    prompt_ids: Tensor
    """(P,) int64."""
    token_ids: Tensor
    """(N,) int64: what was written after the prompt, with the token that ended it."""
    targets: Targets | None
    """N rows: row i is the distribution that token i was drawn from, before any cut; None if no
    targets were asked for."""
    finish: Finish
    """How it ended: "stop" at a stop id or stop string, "length" at `max_new_tokens`."""
    index: int
    """Which of the prompts it continues."""
    sample: int = 0
    """Which of the `num_samples` texts of that prompt it is."""
    payloads: tuple[bytes, ...] = ()
    """The codec's containers that the targets were decoded from, in the order of the rows, so that
    they can be stored exactly; none where the teacher does not say."""


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """Says how every prompt of a call is continued."""

    spec: TargetSpec | None
    """None: no targets."""
    max_new_tokens: int
    temperature: float = 1.0
    """Of the draws; 0: the most likely id."""
    top_k: int = 0
    top_p: float = 1.0
    target_temperature: float = 0.0
    """Of the targets; 0: that of the draws, or 1 where that is 0."""
    seed: int = 0
    epoch: int = 0
    stop_ids: Sequence[int] = ()
    stop_strings: Sequence[str] = ()
    ignore_teacher_stop_ids: bool = False
    num_samples: int = 1

    def __post_init__(self) -> None:
        for name, least, most in (
            *(("max_new_tokens", 1, 2**31 - 1), ("num_samples", 1, 2**31 - 1)),
            *(("top_k", 0, 2**31 - 1), ("seed", 0, 2**64 - 1), ("epoch", 0, 2**64 - 1)),
        ):
            value = getattr(self, name)
            if not isinstance(value, Integral) or not least <= int(value) <= most:
                raise InvalidRequest(
                    f"{name} must be a whole number, at least {least}, got {value!r}"
                )
        for name in ("temperature", "target_temperature"):
            value = getattr(self, name)
            if value != 0 and not 1e-3 <= value <= 1e3:
                raise InvalidRequest(f"{name} must be 0 or 0.001 to 1000, got {value}")
        if not 0 < self.top_p <= 1:
            raise InvalidRequest(f"top_p must be above 0 and at most 1, got {self.top_p}")
        for one in self.stop_ids:
            if not isinstance(one, Integral) or one < 0:
                raise InvalidRequest(f"stop_ids must be token ids, got {one!r}")
        for text in self.stop_strings:
            if not isinstance(text, str) or not text:
                raise InvalidRequest(
                    f"stop_strings must be strings of at least one character, got {text!r}"
                )

    @property
    def spec_temperature(self) -> float:
        """The temperature of the targets."""
        return self.target_temperature or self.temperature or 1.0


def join_targets(parts: Sequence[Targets], head: TeacherHead | None) -> Targets:
    """Joins the targets of a text, and gives hidden states the head that they need."""
    targets = Targets.cat(parts)
    if isinstance(targets, HiddenTargets):
        assert head is not None
        targets = targets.with_head(head)
    return targets
