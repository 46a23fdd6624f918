"""Defines what replicas and the directory exchange: lease requests, leases and usage."""

from dataclasses import dataclass
from typing import Protocol


class DirectoryAway(Exception):
    """The directory does not answer now; everything is sent again later."""


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """Reports what a replica holds for one team, and asks for more."""

    quota: int | None
    """Tokens per day, as the replica's teams file has it."""
    day: int
    """Since 1970-01-01, UTC, by the replica's clock."""
    held: int
    """Tokens of its lease that it has not reported as charged."""
    need: int
    """Tokens beyond `held` that requests are waiting for."""
    more: int
    """Tokens beyond `need` that it expects to use soon."""
    active: bool
    """Whether the team has work here, or had a moment ago."""


@dataclass(frozen=True, slots=True)
class Lease:
    """Answers a lease request."""

    tokens: int
    """Added to what the replica holds."""
    left_today: int | None
    """Tokens of the quota that are not charged yet; None without a quota."""
    elsewhere: int
    """Tokens that are leased to other replicas."""
    replicas: int
    """Replicas that work for this team now, this one included: they share its other limits."""


@dataclass(frozen=True, slots=True)
class UsageRow:
    """Sums up what one team used on one day."""

    day: int
    """Since 1970-01-01, UTC."""
    team: str
    sequences: int
    tokens: int
    delivered_rows: int
    delivered_bytes: int
    rejected: int


class DirectoryLink(Protocol):
    """Reaches the directory; every method raises DirectoryAway."""

    async def sync(
        self,
        holder: str,
        segment: tuple[int, bytes] | None,
        requests: dict[str, LeaseRequest],
        *,
        ended: bool = False,
    ) -> dict[str, Lease]: ...

    async def usage(self, team: str | None, since: int) -> list[UsageRow]: ...

    async def close(self) -> None: ...
