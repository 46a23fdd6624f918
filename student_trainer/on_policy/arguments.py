"""Defines what a user may set about training on the student's own texts, and refuses what cannot work."""

from dataclasses import dataclass, field
from typing import Any

import xxhash

from logit_codec import FeaturesSpec
from student_trainer.losses.checks import check_divergence
from student_trainer.teachers.request import ScoreOptions

MOST_SUPPORT = 255
"""Ids that a student may name beside the written one: a teacher answers 256 unless it was told
otherwise."""


@dataclass(frozen=True)
class OnPolicyArguments:
    """How the student writes, and how it learns from what the teacher says about that."""

    fraction: float = field(
        default=1.0, metadata={"help": "Share of the batches that the student writes, 0 to 1."}
    )
    targets: str = field(
        default="given_ids",
        metadata={
            "help": "What to ask about the written tokens: given_ids (the student's likeliest ids and "
            "the one that it wrote), top_k:K, hidden:int8, ..."
        },
    )
    divergence: str = field(
        default="reverse_kl", metadata={"help": "Divergence from the teacher in these batches."}
    )
    beta: float | None = field(
        default=None, metadata={"help": "Parameter of the divergences that have one."}
    )
    support: int = field(
        default=16, metadata={"help": "With given_ids: likeliest ids that the student names."}
    )
    prompt_tokens: int = field(
        default=32,
        metadata={
            "help": "Tokens of a text that the student continues. Where only a part of a row is trained, "
            "such as an answer, the prompt is what comes before that."
        },
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Tokens that it writes at most."})
    sampling_temperature: float = field(
        default=1.0, metadata={"help": "Of the student's draws; 0 always takes the likeliest."}
    )
    sampling_top_k: int = field(
        default=0, metadata={"help": "Draw from so many of the likeliest tokens; 0: from all."}
    )
    sampling_top_p: float = field(
        default=1.0,
        metadata={"help": "Draw from the likeliest tokens that have this probability together."},
    )
    max_staleness: int = field(
        default=1,
        metadata={
            "help": "Optimizer steps between the weights that write a text and the step that trains on "
            "it, at most. 0 waits for the teacher in every step."
        },
    )
    train_special_tokens: bool = field(
        default=False,
        metadata={"help": "Also train the rows in which the student wrote a special token."},
    )

    def make_request(self, temperature: float, seed: int, epoch: int) -> ScoreOptions:
        """Returns what is asked for of each written text. Raises InvalidRequest."""
        return ScoreOptions.of(self.targets, temperature, seed, epoch)

    def describe(self) -> dict[str, Any]:
        """Returns the settings that decide the result, for a checkpoint."""
        return {f"on_policy_{name}": value for name, value in vars(self).items()}

    def check(self) -> None:
        """Raises ValueError for settings that make no text or no loss."""
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be above 0 and at most 1, got {self.fraction}")
        spec = self.make_request(1.0, 0, 0).spec
        if isinstance(spec, FeaturesSpec):
            raise ValueError(
                f"targets={self.targets!r} are states of layers, from which no divergence can be "
                "computed: ask for given_ids, top_k or hidden"
            )
        check_divergence(spec.kind, self.divergence, 0.5 if self.beta is None else self.beta)
        lowest = {"prompt_tokens": 1, "max_new_tokens": 1, "max_staleness": 0, "sampling_top_k": 0}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not 1 <= self.support <= MOST_SUPPORT:
            raise ValueError(f"support must be 1 to {MOST_SUPPORT}, got {self.support}")
        if self.sampling_temperature and not 1e-3 <= self.sampling_temperature <= 1e3:
            raise ValueError(
                "sampling_temperature must be 0 or 0.001 to 1000, got "
                f"{self.sampling_temperature:g}"
            )
        if not 0 < self.sampling_top_p <= 1:
            raise ValueError(
                f"sampling_top_p must be above 0 and at most 1, got {self.sampling_top_p}"
            )

    def chooses(self, seed: int, number: int) -> bool:
        """Whether the student writes the batch with this number, from 0, of a run with this seed.

        Of any n batches that follow one another it writes n * fraction, rounded up or down; the seed
        decides which.
        """
        offset = xxhash.xxh32_intdigest(f"on-policy {seed}".encode()) / 2**32
        return int((number + 1) * self.fraction + offset) > int(number * self.fraction + offset)
