"""Keeps the accounts of all teams and the journal in agreement, under one lock."""

import threading
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from teacher_server.ledger.journal import Journal, Kind, Record, to_bytes
from teacher_server.ledger.lease import Lease, LeaseRequest
from teacher_server.ledger.quota import DAY_S, TeamAccount
from teacher_server.teams.declaration import Team


class Reservation(Protocol):
    """What the ledger reads and changes of one sequence that waits for the model."""

    team: Team

    @property
    def num_tokens(self) -> int:
        """What is charged for it."""
        ...

    held: int
    """Its tokens that are still reserved: all, then none."""


class Holder(Protocol):
    """What the ledger reads and changes of one text, of which it charges a piece at a time."""

    team: Team
    held: int
    """Its tokens that are still reserved."""


class Book:
    """Holds the accounts of one replica's teams, the journal, and the lock that both share.

    Two threads change the token counts: the scheduler's charges, the event loop reserves, gives back
    and reports. A lease request says what is held, the journal segment that travels with it says what
    was charged; together they must account for every leased token, or the directory would lease one
    twice. So a charge changes its account and enters the journal in one hold of the lock, and a
    report closes the segment and reads the accounts in one. Only this class takes the lock, never
    across an await. What is not a token count (turns, rates, times) belongs to the event loop alone.
    """

    def __init__(self, journal: Journal, clock: Callable[[], float]) -> None:
        self.journal = journal
        self._clock = clock
        self._lock = threading.Lock()
        self._accounts: dict[str, TeamAccount] = {}

    @property
    def accounts(self) -> list[TeamAccount]:
        """The accounts at this moment; any thread may read them."""
        return list(self._accounts.values())

    @property
    def today(self) -> int:
        """Days since 1970-01-01, UTC."""
        return int(self._clock() // DAY_S)

    @property
    def day_left_s(self) -> float:
        """Seconds until midnight, UTC."""
        return DAY_S - self._clock() % DAY_S

    def account(self, team: Team) -> TeamAccount:
        """Returns a team's account with its current declaration, and opens one if there is none."""
        account = self._accounts.get(team.name)
        if account is None:
            account = self._accounts[team.name] = TeamAccount(team)
        account.update(team)
        return account

    def take(self, account: TeamAccount, team: Team, tokens: int) -> bool:
        """Reserves tokens; returns whether the team's lease held enough. Without a quota: always."""
        with self._lock:
            return account.quota.take(tokens, self.today, limited=_has_quota(team))

    def overdraw(self, account: TeamAccount, tokens: int) -> bool:
        """Reserves tokens beyond the lease; returns whether the overdraft allows it."""
        with self._lock:
            return account.quota.overdraw(tokens)

    def charge(self, sequences: Iterable[Reservation]) -> None:
        """Charges sequences that the model gets now, and writes them to the journal."""
        self.charge_parts((sequence, sequence.num_tokens, True) for sequence in sequences)

    def charge_parts(self, parts: Iterable[tuple[Holder, int, bool]]) -> None:
        """Charges so many tokens of each sequence, and leaves the rest of what it holds reserved.

        The last value of a part: whether the sequence is counted now, as it is once.
        """
        today = self.today
        totals: dict[str, tuple[int, int]] = {}
        with self._lock:
            for sequence, tokens, is_counted in parts:
                team = sequence.team
                count, total = totals.get(team.name, (0, 0))
                totals[team.name] = count + is_counted, total + tokens
                account = self._accounts.get(team.name)
                if account is not None:
                    held = min(tokens, sequence.held)
                    # So that `give_back`, which may wait for the lock, does not free it too.
                    sequence.held -= held
                    if held:
                        account.quota.charge(held, held, limited=_has_quota(team))
                    if tokens > held:
                        account.quota.charge(tokens - held, 0, limited=_has_quota(team))
            self.journal.append(
                b"".join(
                    to_bytes(Record(Kind.DISPATCHED, name, today, *counts))
                    for name, counts in totals.items()
                )
            )

    def give_back(self, sequence: Reservation) -> None:
        """Ends a sequence: its turn is over, and what is still reserved for it is free again."""
        account = self._accounts.get(sequence.team.name)
        if account is None:
            return  # the book is closed
        with self._lock:
            account.quota.give_back(sequence.held, limited=_has_quota(sequence.team))
            sequence.held = 0  # a charge after this takes from the balance instead
        account.used_s = time.monotonic()
        account.turns.leave(sequence.num_tokens)

    def report(self, now: float, elapsed_s: float) -> dict[str, LeaseRequest]:
        """Closes the journal's segment; returns the lease requests that belong to it, by team."""
        self._record_rejections()
        with self._lock:
            self.journal.seal()
            return {
                name: account.request_lease(now, self.today, elapsed_s)
                for name, account in self._accounts.items()
                if account.is_limited and not account.is_idle(now)
            }

    def add_leases(self, leases: dict[str, Lease], requests: dict[str, LeaseRequest]) -> None:
        """Books the directory's answer to the requests of a report."""
        for name, lease in leases.items():
            account = self._accounts.get(name)
            if account is None:
                continue
            with self._lock:
                account.quota.add(lease, requests[name].day)
            account.update()  # the share changes when a replica begins or ends to work for the team

    def close(self) -> None:
        """Closes all accounts; what they were charged is in the journal."""
        self._record_rejections()
        self._accounts.clear()
        self.journal.seal()

    def _record_rejections(self) -> None:
        for name, account in self._accounts.items():
            if account.rejected:
                record = Record(Kind.REJECTED, name, self.today, account.rejected)
                self.journal.append(to_bytes(record))
                account.rejected = 0


def _has_quota(team: Team) -> bool:
    return team.limits.max_tokens_per_day is not None
