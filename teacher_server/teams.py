"""Teams: who shares a teacher, with which weight, for what, and up to which limits."""

from dataclasses import dataclass

SCOPES = ("score", "generate", "hidden", "dense", "admin")


@dataclass(frozen=True, slots=True)
class TeamLimits:
    """What one team may use of the whole service; None is no limit."""

    max_tokens_in_flight: int | None = None
    """Padded tokens that are admitted and not answered."""
    max_tokens_per_second: int | None = None
    """Padded tokens dispatched."""
    max_tokens_per_day: int | None = None
    """Padded tokens dispatched from midnight to midnight, UTC."""
    max_request_tokens: int | None = None
    """Tokens of one request."""


@dataclass(frozen=True, slots=True)
class Team:
    """One team as it is declared now."""

    name: str
    weight: float = 1.0
    scopes: frozenset[str] = frozenset({"score"})
    limits: TeamLimits = TeamLimits()


DEFAULT_TEAM = Team("default", scopes=frozenset(SCOPES))
"""Everybody, where no teams are declared."""
