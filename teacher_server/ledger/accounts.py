"""Reserves, charges and counts what teams use of one replica.

A request's tokens are reserved before any of it is queued, so that a quota is never overspent. They
are charged when the scheduler gives a sequence to the model, whatever becomes of it then. Charges and
deliveries enter the journal at once (journal.py) and reach the directory within SYNC_S (sync.py), which
leases quotas in return (directory.py).

While the directory is away, serving continues from what is known: requests use up the lease, and
OVERDRAFT_TOKENS once beyond it, before they are refused (quota.py).
"""

import asyncio
import contextlib
import hashlib
import sqlite3
import struct
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from teacher_server.errors import ServeError
from teacher_server.ledger.book import Book, Holder, Reservation
from teacher_server.ledger.directory import Directory, LocalDirectory
from teacher_server.ledger.journal import Journal, Kind, Record, to_bytes
from teacher_server.ledger.lease import DirectoryLink, UsageRow
from teacher_server.ledger.quota import FORGET_S, TeamAccount
from teacher_server.ledger.sync import DirectorySync
from teacher_server.teams.declaration import Team

ORIGIN = struct.Struct("<16sQ")
ITEM = struct.Struct("<24sI16s")
JOURNALS = "journals"
"""Subfolder of the ledger's folder: one journal per replica."""


class Accounts:
    """Keeps one replica's accounts; `run` reports them to the directory.

    `charge` may be called by any thread, everything else by the event loop. folder: where the journal
    is kept; None: in memory. Raises OSError if it cannot be used.
    """

    def __init__(
        self,
        directory: DirectoryLink,
        folder: Path | None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._directory = directory
        self._book = Book(Journal(folder), clock)
        self._sync = DirectorySync(directory, self._book, folder)

    async def reserve(self, team: Team, tokens: int) -> None:
        """Waits until the team may use these tokens; `settle` ends each sequence that holds some.

        Raises RequestRefused (RESOURCE_EXHAUSTED, with a hint).
        """
        account = self._book.account(team)
        account.used_s = time.monotonic()
        await account.turns.take(tokens)
        try:
            await account.rate.wait(team, tokens, account.share)
            await self._take_quota(account, team, tokens)
        except BaseException:  # a cancelled client too: the turn goes to the next request
            account.turns.leave(tokens)
            raise

    async def _take_quota(self, account: TeamAccount, team: Team, tokens: int) -> None:
        """Takes tokens from the lease, after a round with the directory if it holds too few."""
        quota = account.quota
        for _ in range(2):  # other requests may take what the first round brought
            if self._book.take(account, team, tokens):
                return
            if self._sync.is_away:
                break  # a round would only add the wait for its timeout
            quota.need += tokens
            try:
                await self._sync.round()
            finally:
                quota.need -= tokens
        if self._book.take(account, team, tokens):
            return
        is_away = self._sync.is_away
        if is_away and self._book.overdraw(account, tokens):
            return
        raise quota.refusal(team, tokens, is_away=is_away, day_left_s=self._book.day_left_s)

    def charge(self, sequences: Iterable[Reservation]) -> None:
        """Charges sequences that the scheduler gives to the model now. Any thread may call it."""
        self._book.charge(sequences)

    def charge_parts(self, parts: Iterable[tuple[Holder, int, bool]]) -> None:
        """Charges so many tokens of each sequence that the model gets now; the last value of a part:
        whether the sequence itself is counted. Any thread may call it."""
        self._book.charge_parts(parts)

    def settle(self, sequence: Reservation) -> None:
        """Ends a reserved sequence, answered or not; called exactly once for each."""
        self._book.give_back(sequence)

    def record_delivery(
        self, team: Team, origin: bytes, sequence: int, digest: bytes, rows: int, nbytes: int
    ) -> None:
        """Counts a sequence whose last part goes to the transport next.

        origin: of the request, from `origin`; digest: of the sequence's ids. The key made of both
        lets the directory count work once that was sent again to another replica.
        """
        item = ITEM.pack(origin, sequence, digest) + team.name.encode()
        key = hashlib.blake2b(item, digest_size=16).digest()
        record = Record(Kind.DELIVERED, team.name, self._book.today, rows, nbytes, key)
        self._book.journal.append(to_bytes(record))

    def record_rejection(self, team: Team) -> None:
        """Counts a request of this team that was refused."""
        self._book.account(team).rejected += 1

    @property
    def is_directory_away(self) -> bool:
        """Whether the directory did not answer the last time."""
        return self._sync.is_away

    @property
    def sync_age_s(self) -> float:
        """Seconds since the directory knew everything that was used here."""
        return self._sync.age_s

    @property
    def num_segments(self) -> int:
        """Segments of the journal that wait for the directory."""
        return self._book.journal.num_sealed

    def teams(self) -> dict[str, Team]:
        """Returns the teams that have asked for anything here, as each was declared then."""
        return {account.team.name: account.team for account in self._book.accounts}

    def known_left_today(self) -> dict[str, int]:
        """Returns what was left of the quotas at the last round, by team. Any thread may call it."""
        left = {}
        for account in self._book.accounts:
            lease, limits = account.quota.lease, account.team.limits
            if limits.max_tokens_per_day is None or lease is None or lease.left_today is None:
                continue
            if not account.is_idle(time.monotonic()):
                left[account.team.name] = lease.left_today
        return left

    async def left_today(self, team: Team, wait_s: float = 0.5) -> int | None:
        """Returns what is left of a team's quota as far as is known; None without a quota."""
        if team.limits.max_tokens_per_day is None:
            return None
        account = self._book.account(team)
        before_s = max(account.used_s, account.asked_s)
        account.asked_s = time.monotonic()
        stale = account.asked_s - before_s > FORGET_S  # no round has asked for it meanwhile
        lease = account.quota.lease
        if stale or lease is None or lease.left_today is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._sync.round()
        lease = account.quota.lease
        return None if lease is None else lease.left_today

    async def usage(self, team: str | None, since: int) -> list[UsageRow]:
        """Reads the ledger, with what was used here until now. Raises DirectoryAway."""
        await self._sync.round()
        return await self._directory.usage(team, since)

    async def sync(self) -> None:
        """Returns when a round with the directory that begins from now on has ended."""
        await self._sync.round()

    async def run(self) -> None:
        """Reports to the directory until it is cancelled."""
        await self._sync.run()

    async def close(self) -> None:
        """Reports the rest, once nothing is charged any more."""
        await self._sync.close()


def origin(session: bytes, item: int) -> bytes:
    """Names a piece of a client's work in 24 bytes, the same at every attempt and replica."""
    return ORIGIN.pack(session, item)


def open_accounts(folder: Path | None, directory: DirectoryLink | None = None) -> Accounts:
    """Opens one replica's accounts, in `folder` or in memory; by default with its own directory.

    Raises ServeError if the folder cannot be used.
    """
    try:
        directory = directory or LocalDirectory(Directory(folder))
        return Accounts(directory, None if folder is None else folder / JOURNALS)
    except (OSError, sqlite3.Error) as error:
        raise ServeError(
            f"cannot keep a ledger in {folder}: {error}. Give --ledger a folder on a local disk "
            "that this user can write to."
        ) from error
