"""Defines what replicas and the directory exchange: lease requests, leases and usage."""

from dataclasses import dataclass
from typing import Protocol


class DirectoryAway(Exception):
    """The directory does not answer now; everything is asked again later."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a replica holds and wants for one team."""

    quota: int | None
    """Tokens per day, as the replica knows it."""
    day: int
    held: int
    """Tokens of its lease that it has not reported as dispatched."""
    need: int
    """Tokens beyond `held` that requests wait for."""
    more: int
    """Tokens beyond `need` that it would use soon."""
    active: bool
    """Whether the team had work here a moment ago."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What the directory answers to a wish."""

    tokens: int
    """Added to the lease."""
    left_today: int | None
    """Of the quota, not charged yet; None without a quota."""
    elsewhere: int
    """Tokens that are leased to other replicas."""
    replicas: int
    """Replicas that work for this team now, this one too: they share its limits."""


@dataclass(frozen=True, slots=True)
class UsageRow:
    """What one team used on one day."""

    day: int
    """Since 1970-01-01, UTC."""
    team: str
    sequences: int
    tokens: int
    delivered_rows: int
    delivered_bytes: int
    rejected: int


class DirectoryLink(Protocol):
    """A way to the directory; everything raises DirectoryAway."""

    async def sync(
        self,
        holder: str,
        segment: tuple[int, bytes] | None,
        wishes: dict[str, Wish],
        *,
        ended: bool = False,
    ) -> dict[str, Grant]: ...

    async def usage(self, team: str | None, since: int) -> list[UsageRow]: ...

    async def close(self) -> None: ...
