"""Defines a text that is being written for a client, from its admission until its last token."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from logit_codec import IdTable
from teacher_server.engine.continuation import Continuation
from teacher_server.engine.stops import StopRule
from teacher_server.scheduling.job import TRAINING
from teacher_server.teams.declaration import DEFAULT_TEAM, Team

Finish = Literal["", "stop", "length"]


class Pool(Protocol):
    """Says what the scheduler needs of the pool of keys (engine/key_pool.py)."""

    @property
    def num_free(self) -> int: ...

    num_pages: int

    def take(self, count: int) -> list[int] | None: ...
    def share(self, pages: Sequence[int]) -> None: ...
    def give_back(self, pages: Sequence[int]) -> None: ...


class TextModel(Protocol):
    """Says what the scheduler needs of what writes texts (engine/generate.py)."""

    decode_rows: int
    """Rows of one launch that draws tokens; fewer texts take as long as this many."""

    @property
    def pool(self) -> Pool: ...
    def next_chunk(self, text: Continuation, /) -> int: ...


@dataclass(slots=True, eq=False)
class SampleGroup:
    """Joins the texts after one prompt, which compute the prompt once and share its pages."""

    running: "list[GenerationJob]" = field(default_factory=list)
    """Those that have pages. Changed by the scheduler alone."""


@dataclass(slots=True, eq=False)
class GenerationJob:
    """Follows one text on its way through the server.

    Admission makes it; the scheduler decides when its prompt is computed and its tokens are drawn. The
    ledger takes it for a reservation of `num_tokens` tokens, of which it charges those that were computed.
    """

    text: Continuation
    stop_rule: StopRule
    max_new_tokens: int
    """Those that it has received elsewhere count."""
    row_nbytes: int = 0
    """Upper bound of the answer of one token."""
    level: int = TRAINING
    team: Team = DEFAULT_TEAM
    held: int = 0
    """Tokens of its team's quota that are reserved for it and not charged yet."""
    group: SampleGroup = field(default_factory=SampleGroup)
    """Texts after one prompt have the same."""
    id_table: IdTable | None = None
    """What the ids of its targets may be coded with."""

    num_charged: int = field(default=0, init=False)
    """Tokens from the start that were charged, or were computed for another sample."""
    order: int = field(default=0, init=False)
    """Its place among all texts that were ever queued: a higher one is younger."""
    submitted_s: float = field(default=0.0, init=False)
    """time.monotonic() when it was queued."""
    first_token_s: float = field(default=math.nan, init=False)
    """time.monotonic() when its first token here was drawn."""
    is_begun: bool = field(default=False, init=False)
    """Whether any of its tokens was given to the model."""
    entered_with: int = field(default=0, init=False)
    """New tokens that it had when it got its slot."""
    unread: int = field(default=0, init=False)
    """Flushes that its reader has not taken; with MAX_UNREAD of them it pauses."""
    state: "State" = field(default="new", init=False)
    last_turn: int = field(default=0, init=False)
    """Number of the last turn that it took part in; the others of its team go first."""

    @property
    def num_tokens(self) -> int:
        """Tokens that it may have in the end, its prompt included: what is reserved for it."""
        return len(self.text.prompt_ids) + self.max_new_tokens

    @property
    def has_drawn(self) -> bool:
        """Whether a token was drawn here."""
        return not math.isnan(self.first_token_s)


State = Literal["new", "waiting", "running", "parked", "ended"]
"""Whether a text was not queued yet, waits for a slot, has one, waits for its reader without one, or is
over."""
MAX_UNREAD = 2
