"""Defines the unit of scheduling: one sequence, from its admission until its answer is encoded."""

from dataclasses import dataclass, field

from logit_codec import IdTable, TargetSpec
from teacher_server.engine.batch import PackTimes, RowRequest
from teacher_server.teams.declaration import DEFAULT_TEAM, Team

NUM_LEVELS = 3
INTERACTIVE, TRAINING, BULK = range(NUM_LEVELS)
"""A lower level goes first among the jobs of its team; fairness.py says what else it decides."""


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """Records the forward pass that scored some jobs, which share this record."""

    started_s: float
    """time.monotonic() when its batch was taken."""
    times: PackTimes
    num_sequences: int
    num_tokens: int


@dataclass(slots=True, eq=False)
class SequenceJob:
    """Follows one sequence of a request on its way through the server.

    Admission makes it, the scheduler orders it, the engine scores it, the encoder and the stream
    answer it.
    """

    request: RowRequest
    num_tokens: int
    """Length of the sequence; 0 if it has no rows to score."""
    reply_nbytes: int
    """Upper bound of its answer."""
    level: int = TRAINING
    team: Team = DEFAULT_TEAM
    held: int = 0
    """Tokens of its team's quota that are reserved for it and not charged yet."""
    index: int = 0
    """Its place in the request."""
    ids_bytes: bytes = b""
    """Its part of the request's `token_ids`; the answer carries their digest."""
    id_table: IdTable | None = None
    """What the ids of its answer may be coded with."""

    cost: float = field(default=0.0, init=False)
    """What its team is charged, set when it is queued; see `cost.CostModel`."""
    waiting: bool = field(default=False, init=False)
    """Whether it is queued, so that it counts towards the queue's tokens."""
    submitted_s: float = field(default=0.0, init=False)
    """time.monotonic() when it was queued."""

    forward_pass: ForwardPass | None = field(default=None, init=False)
    """The pass that scored it."""

    @property
    def spec(self) -> TargetSpec:
        """What is kept of each of its rows."""
        return self.request.spec

    @property
    def num_projected(self) -> int:
        """Rows that go through the vocabulary head."""
        return len(self.request.rows) if self.request.spec.reads_logits else 0

    @property
    def waited_s(self) -> float:
        """Seconds from queueing until its batch was taken; known once it is scored."""
        assert self.forward_pass is not None
        return max(0.0, self.forward_pass.started_s - self.submitted_s)
