"""Defines a text that is being written: its tokens, how they are drawn, and where its keys are.

Letters: P tokens of the prompt, N tokens written after it.
"""

from dataclasses import dataclass, field

from torch import Tensor

from logit_codec import TargetSpec, ids_digest
from logit_codec.sampling import make_key


@dataclass(frozen=True, slots=True)
class DrawRule:
    """Says how the tokens of one text are drawn."""

    temperature: float = 1.0
    """0: the most likely id, of equally likely ones the lowest."""
    top_k: int = 0
    """0: off; else only so many likeliest ids are drawn from."""
    top_p: float = 1.0
    """1: off; else only the smallest set of likeliest ids with this mass is drawn from."""
    seed: int = 0
    epoch: int = 0
    sample: int = 0
    """Its number among the texts after one prompt."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class Continuation:
    """Follows one text: tokens are appended as they are drawn, pages as they are needed."""

    prompt_ids: Tensor
    """(P,) int64, P at least 1."""
    rule: DrawRule
    spec: TargetSpec | None = None
    """What is kept of the distribution of each new token; None: nothing."""
    target_temperature: float = 1.0
    new_ids: list[int] = field(default_factory=list)
    """Tokens after the prompt: drawn here, or received from another replica before."""
    pages: list[int] = field(default_factory=list)
    """Pages of the pool that hold its keys and values, in the order of its tokens."""
    num_cached: int = 0
    """Tokens from the start whose keys and values are in the pages."""
    prompt_digest: bytes = field(init=False)
    """As `ids_digest` makes it of the prompt."""
    draw_key: int = field(init=False)
    """Of the noise that its tokens are drawn with: of the prompt and the seeds, so of this text alone."""

    def __post_init__(self) -> None:
        self.prompt_digest = digest = ids_digest(self.prompt_ids)
        rule = self.rule
        halves = (int.from_bytes(half, "little") for half in (digest[:8], digest[8:]))
        self.draw_key = make_key(rule.seed, rule.epoch, *halves, rule.sample)

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and after it."""
        return len(self.prompt_ids) + len(self.new_ids)

    @property
    def is_ready(self) -> bool:
        """Whether the next step draws a token: only the last token's keys are missing."""
        return self.num_cached == self.num_tokens - 1
