"""Decides what one team may use at this replica: its turns, its rate and its daily quota.

A request meets the limits of its team in this order; all are in tokens:

    max_tokens_in_flight   Turns   waits until earlier requests of its team have ended
    max_tokens_per_second  Rate    waits up to WAIT_S; beyond that it is refused with a hint
    max_tokens_per_day     Quota   takes from the tokens that the directory has leased to this replica

The first two are divided evenly among the replicas that work for the team now; the third is divided by
the directory (directory.py).
"""

import asyncio
import contextlib
import random
import time
from collections import deque
from dataclasses import dataclass, field

import grpc

from teacher_server.errors import RequestRefused
from teacher_server.ledger.lease import Lease, LeaseRequest
from teacher_server.teams.declaration import Team

BURST_S = 1.0
"""Seconds' worth of a team's rate that may be used at once after a pause."""
WAIT_S = 1.0
"""The longest that a request waits for its team's rate before it is refused with a hint."""
FORESIGHT_S = 3.0
"""Seconds of expected use that one lease covers."""
OVERDRAFT_TOKENS = 1 << 16
"""Tokens beyond its lease that a team may use here while the directory is away."""
ACTIVE_S = 1.0
"""How long after its last request a team counts as active here."""
FORGET_S = 600.0
"""An idle team's lease is no longer renewed after this."""
HINT_S = 60.0
"""The longest hint: by then the operator may have raised a quota."""
DAY_S = 86400


class Turns:
    """Admits one team's requests in order, while its tokens in flight stay within a limit.

    Used by the event loop only.
    """

    def __init__(self) -> None:
        self.in_flight = 0
        self._limit: float | None = None
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        """Requests that wait for earlier ones, in order: their tokens, and what wakes each."""

    def set_limit(self, limit: float | None) -> None:
        """Changes the limit, and admits what fits now."""
        self._limit = limit
        self._admit()

    async def take(self, tokens: int) -> None:
        """Waits for a turn; `leave` ends it. A request beyond the limit gets its turn alone."""
        if not self._waiting and self._fits(tokens):
            self.in_flight += tokens
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((tokens, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                # Admitted and cancelled in one pass of the loop: the tokens are counted already.
                self.leave(tokens)
            else:
                with contextlib.suppress(ValueError):  # `_admit` may have dropped it already
                    self._waiting.remove((tokens, turn))
                # It may have been the large one at the head that kept smaller ones waiting.
                self._admit()
            raise

    def leave(self, tokens: int) -> None:
        """Ends a turn, or the part of it that one sequence of the request had."""
        self.in_flight -= tokens
        self._admit()

    def _fits(self, tokens: int) -> bool:
        if self._limit is None or not self.in_flight:
            return True
        return self.in_flight + tokens <= self._limit

    def _admit(self) -> None:
        while self._waiting and self._fits(self._waiting[0][0]):
            tokens, turn = self._waiting.popleft()
            if not turn.done():
                # Counted here and not by the request when it wakes: others may ask in between.
                self.in_flight += tokens
                turn.set_result(None)


class Rate:
    """Spreads one team's requests over time. Used by the event loop only."""

    def __init__(self) -> None:
        self._free_s = 0.0
        """time.monotonic() from which the rate allows the next request."""

    async def wait(self, team: Team, tokens: int, share: float) -> None:
        """Waits until the team's rate, of which this replica has a share, allows the tokens.

        Raises RequestRefused if that would take longer than WAIT_S.
        """
        limit = team.limits.max_tokens_per_second
        if limit is None:
            return
        now = time.monotonic()
        starts = max(self._free_s, now - BURST_S)
        if starts - now > WAIT_S:
            raise RequestRefused(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "RATE_LIMIT",
                f'team "{team.name}" may use {limit} tokens per second and has asked for more; send '
                "the same request again after the hint. The operator sets the limit with "
                "max_tokens_per_second in the teams file.",
                # Spread: requests that get one and the same hint would all come back together.
                retry_after_ms=_hint_ms((starts - now) * random.uniform(1.0, 1.5)),
            )
        # Booked before the wait, so that the next request comes after this one.
        self._free_s = starts + tokens / (limit * share)
        if starts > now:
            await asyncio.sleep(starts - now)


@dataclass(slots=True)
class Quota:
    """Counts what this replica may still use of one team's daily quota, and what it has reserved.

    Every method that changes a count is called under the lock of the book (book.py): the scheduler's
    thread charges while the event loop reserves, and both counts go to the directory together.
    """

    day: int = 0
    """The day that `balance` and `overdrawn` are for, since 1970-01-01, UTC."""
    balance: int = 0
    """Leased and not reserved; below 0 by what was overdrawn."""
    reserved: int = 0
    """Held by sequences that were admitted and have not been given to the model."""
    overdrawn: int = 0
    """Used beyond the lease since the directory answered last."""
    need: int = 0
    """What requests are waiting for; only the event loop changes it."""
    spent: int = 0
    """Charged since the last lease request."""
    pace: float = 0.0
    """Charged per second, smoothed."""
    lease: Lease | None = None
    """The last one."""

    def take(self, tokens: int, today: int, *, limited: bool) -> bool:
        """Reserves tokens; returns whether the lease, if the team needs one, held enough."""
        if limited:
            self._begin(today)
            if self.balance < tokens:
                return False
            self.balance -= tokens
        self.reserved += tokens
        return True

    def overdraw(self, tokens: int) -> bool:
        """Reserves tokens beyond the lease, for a time when the directory is away.

        Returns whether the last known rest of the quota and OVERDRAFT_TOKENS allow it.
        """
        left = None if self.lease is None else self.lease.left_today
        if left is not None and left < tokens:
            return False
        if self.overdrawn + tokens > OVERDRAFT_TOKENS:
            return False
        self.overdrawn += tokens
        self.balance -= tokens
        self.reserved += tokens
        return True

    def charge(self, tokens: int, held: int, *, limited: bool) -> None:
        """Charges a sequence that the model gets now; held: what is still reserved for it."""
        self.spent += tokens
        if held:
            self.reserved -= held
        elif limited:
            # It was cancelled after the scheduler chose it, and has given its tokens back.
            self.balance -= tokens

    def give_back(self, held: int, *, limited: bool) -> None:
        """Frees what was reserved for a sequence that the model will never get."""
        self.reserved -= held
        if limited:
            self.balance += held

    def request(
        self, limit: int | None, today: int, elapsed_s: float, *, active: bool
    ) -> LeaseRequest:
        """Builds the lease request of this round, and returns leased tokens that are not needed."""
        self._begin(today)
        weight = min(1.0, elapsed_s / FORESIGHT_S)
        self.pace += weight * (self.spent / elapsed_s - self.pace)
        self.spent = 0
        soon = int(self.pace * FORESIGHT_S)
        # What is not reported as held is free for other replicas from this round on.
        self.balance = min(self.balance, self.need + soon)
        return LeaseRequest(
            quota=limit,
            day=self.day,
            held=self.balance + self.reserved,
            need=max(0, self.need - self.balance),
            more=max(0, soon - max(0, self.balance - self.need)),
            active=active or bool(self.need),
        )

    def add(self, lease: Lease, day: int) -> None:
        """Adds what the directory has leased for a day."""
        self.lease = lease
        if self.day == day:  # else midnight has passed since it was requested
            self.balance += lease.tokens
        self.overdrawn = 0

    def refusal(
        self, team: Team, tokens: int, *, is_away: bool, day_left_s: float
    ) -> RequestRefused:
        """Explains to a client why its team gets no tokens now, and when to ask again."""
        if is_away or self.lease is None:
            return RequestRefused(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "RATE_LIMIT",
                f'team "{team.name}" has a quota, and how much of it is left is not known at the '
                "moment; send the same request again after the hint.",
                retry_after_ms=_hint_ms(random.uniform(1.0, 2.0)),
            )
        # Tokens leased elsewhere, or reserved here and cancelled, may come back within seconds.
        returns = self.lease.elsewhere + self.reserved > 0
        return RequestRefused(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "QUOTA_USED_UP",
            f'team "{team.name}" may use {team.limits.max_tokens_per_day} tokens a day (UTC); '
            f"{self.lease.left_today} are left and {tokens} were asked for. Send the same request "
            "again after the hint. The operator sets the quota with max_tokens_per_day in the teams "
            "file.",
            retry_after_ms=_hint_ms(random.uniform(1.0, 2.0) if returns else day_left_s),
        )

    def _begin(self, today: int) -> None:
        """Drops yesterday's lease after midnight: the directory counts each day by itself."""
        if self.day != today:
            self.day = today
            self.balance = self.overdrawn = 0


@dataclass(slots=True, eq=False)
class TeamAccount:
    """Holds everything that this replica knows of one team's use."""

    team: Team
    """As it was declared when it last asked for anything."""
    turns: Turns = field(default_factory=Turns)
    rate: Rate = field(default_factory=Rate)
    quota: Quota = field(default_factory=Quota)
    rejected: int = 0
    """Refused requests that are not in the journal yet."""
    used_s: float = -FORGET_S
    """When it last had work; time.monotonic()."""
    asked_s: float = -FORGET_S
    """When a client last asked what is left of its quota; time.monotonic()."""

    @property
    def share(self) -> float:
        """This replica's share of the team's limits."""
        lease = self.quota.lease
        return 1.0 if lease is None else 1.0 / lease.replicas

    @property
    def is_limited(self) -> bool:
        """Whether any limit needs the directory."""
        limits = self.team.limits
        each = limits.max_tokens_in_flight, limits.max_tokens_per_second, limits.max_tokens_per_day
        return any(limit is not None for limit in each)

    def is_idle(self, now: float) -> bool:
        """Whether the team has asked for nothing here for FORGET_S."""
        return now - max(self.used_s, self.asked_s) >= FORGET_S

    def update(self, team: Team | None = None) -> None:
        """Applies the current declaration and share, after either has changed."""
        self.team = team or self.team
        limit = self.team.limits.max_tokens_in_flight
        self.turns.set_limit(None if limit is None else limit * self.share)

    def request_lease(self, now: float, today: int, elapsed_s: float) -> LeaseRequest:
        """Builds this round's lease request. Called under the lock of the book."""
        active = bool(self.turns.in_flight) or now - self.used_s < ACTIVE_S
        limit = self.team.limits.max_tokens_per_day
        return self.quota.request(limit, today, elapsed_s, active=active)


def _hint_ms(seconds: float) -> int:
    return int(1000 * min(HINT_S, max(0.05, seconds)))
