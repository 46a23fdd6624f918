"""Defines the unit of scheduling: one sequence that waits to be scored."""

from dataclasses import dataclass, field

from teacher_server.engine.batch import WantedRows
from teacher_server.teams.declaration import DEFAULT_TEAM, Team

NUM_LEVELS = 3
INTERACTIVE, TRAINING, BULK = range(NUM_LEVELS)
"""A lower level goes first among the jobs of its team; scheduler.py says what it does beyond."""


@dataclass(slots=True, eq=False)
class Job:
    """One sequence waiting to be scored."""

    wanted: WantedRows
    bucket: int
    """Its canonical padded length, in tokens."""
    reply_nbytes: int
    """Upper bound of its answer."""
    level: int = TRAINING
    team: Team = DEFAULT_TEAM
    held: int = 0
    """Tokens that the ledger has reserved for it."""
    cost: float = field(default=0.0, init=False)
    """What its team is charged, known when it is submitted; see `cost.CostModel`."""
    waiting: bool = field(default=False, init=False)
    """Queued and not departed: it counts towards the queue's tokens."""
    order: int = field(default=0, init=False)
    submitted_s: float = field(default=0.0, init=False)
