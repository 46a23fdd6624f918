"""A replica's books: what teams may still use here, and what they used, on its way to the directory.

A request's tokens are reserved before any of it is queued, so that a quota is never overspent, and are
charged when the scheduler gives its sequences out. Charges and deliveries are written to the journal
at once (journal.py) and go to the directory every SYNC_S, where quotas are leased in return
(directory.py).

While the directory is away everything goes on from what is known: requests use up the lease, and
OVERDRAFT_TOKENS once beyond it, before they are told to come back.
"""

import asyncio
import contextlib
import hashlib
import logging
import random
import sqlite3
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from teacher_server.errors import RequestRefused, ServeError
from teacher_server.ledger.directory import Directory, LocalDirectory
from teacher_server.ledger.journal import Journal, Kind, Record, complain_once, orphans, to_bytes
from teacher_server.ledger.lease import DirectoryAway, DirectoryLink, Grant, UsageRow, Wish
from teacher_server.scheduling.job import SequenceJob
from teacher_server.teams.declaration import Team

logger = logging.getLogger(__name__)

SYNC_S = 1.0
ANSWER_S = 5.0
"""How long the directory may take to answer."""
ADOPT_S = 15.0
"""How often a replica looks for journals that others left behind."""
FORESIGHT_S = 3.0
"""A lease covers the use of so long."""
FORGET_S = 600.0
"""An idle team is not asked for any more after this."""
OVERDRAFT_TOKENS = 1 << 16
BURST_S = 1.0
"""A team's rate may be used up in advance by so much."""
WAIT_S = 1.0
"""A stream waits for so long for its team's rate; beyond that its request is told to come back."""
HINT_S = 60.0
"""The longest hint: by then a quota may have been raised."""
DAY_S = 86400
ORIGIN = struct.Struct("<16sQ")
ITEM = struct.Struct("<24sI16s")


@dataclass(slots=True, eq=False)
class _Account:
    """One team at this replica, in padded tokens."""

    team: Team
    day: int = 0
    balance: int = 0
    """Leased and not reserved; below 0 by what was overdrawn."""
    reserved: int = 0
    """Of jobs that were admitted and not given out."""
    need: int = 0
    """That requests wait for."""
    overdrawn: int = 0
    """Since the directory answered last."""
    spent: int = 0
    """Charged since the last sync."""
    pace: float = 0.0
    """Charged per second, smoothed."""
    grant: Grant | None = None
    in_flight: int = 0
    turns: "deque[tuple[int, asyncio.Future[None]]]" = field(default_factory=deque)
    """Requests that wait for others to be answered, and their tokens."""
    free_s: float = 0.0
    """From when on the rate allows the next request; time.monotonic()."""
    rejected: int = 0
    used_s: float = -FORGET_S
    """When it last had work; time.monotonic()."""
    asked_s: float = -FORGET_S
    """When somebody wanted to know what is left of its quota."""

    @property
    def share(self) -> float:
        """Of the limits of its team."""
        return 1.0 if self.grant is None else 1.0 / self.grant.replicas


class Accounts:
    """Reserves, charges and counts, for one replica; `run` keeps the directory informed.

    `dispatched` may be called by any thread, everything else by the event loop. folder: where the
    journal is kept; None: in memory. Raises OSError if it cannot be used.
    """

    def __init__(
        self,
        directory: DirectoryLink,
        folder: Path | None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._directory = directory
        self._folder = folder
        self._clock = clock
        self._journal = Journal(folder)
        self._accounts: dict[str, _Account] = {}
        self._lock = threading.Lock()
        self._synced_s = time.monotonic()
        self._level_s = self._synced_s
        """When the directory last knew everything."""
        self._away = False
        self._told: set[Path] = set()
        """What is wrong in the folder, and was said."""
        self._attempts: Counter[str] = Counter()
        """To take over journals that are still there."""
        self._due = asyncio.Event()
        self._round: asyncio.Future[None] | None = None
        """Of the next sync, if somebody waits for it."""

    # Before work: may this team have more?

    async def reserve(self, team: Team, tokens: int) -> None:
        """Waits until the team may have so many tokens more; `settle` gives each job's back.

        Raises RequestRefused (RESOURCE_EXHAUSTED, with a hint).
        """
        account = self._account(team)
        account.used_s = time.monotonic()
        limits = team.limits
        await self._take_turn(account, tokens)
        try:
            if limits.max_tokens_per_second is not None:
                await self._keep_rate(account, tokens, limits.max_tokens_per_second)
            if limits.max_tokens_per_day is not None:
                await self._take_quota(account, tokens, limits.max_tokens_per_day)
            else:
                with self._lock:
                    account.reserved += tokens
        except BaseException:
            self._leave(account, tokens)
            raise

    async def _take_turn(self, account: _Account, tokens: int) -> None:
        """Waits while too much of the team is in flight; one request may always be."""
        if account.turns or not _fits(account, tokens):
            turn = asyncio.get_running_loop().create_future()
            account.turns.append((tokens, turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._leave(account, tokens)
                else:
                    with contextlib.suppress(ValueError):  # passed over already
                        account.turns.remove((tokens, turn))
                    self._give_turns(account)
                raise
        else:
            account.in_flight += tokens

    def _leave(self, account: _Account, tokens: int) -> None:
        account.in_flight -= tokens
        self._give_turns(account)

    def _give_turns(self, account: _Account) -> None:
        while account.turns and _fits(account, account.turns[0][0]):
            tokens, turn = account.turns.popleft()
            if not turn.done():
                account.in_flight += tokens
                turn.set_result(None)

    async def _keep_rate(self, account: _Account, tokens: int, limit: int) -> None:
        now = time.monotonic()
        rate = limit * account.share
        starts = max(account.free_s, now - BURST_S)
        if starts - now > WAIT_S:
            # Those who are told the same time would come back together.
            seconds = (starts - now) * random.uniform(1.0, 1.5)
            raise RequestRefused(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "RATE_LIMIT",
                f'team "{account.team.name}" may use {limit} tokens per second, and more than that '
                "has been asked for; send the same request again after the hint. The operator "
                "sets the limit with max_tokens_per_second in the teams file.",
                retry_after_ms=_hint_ms(seconds),
            )
        account.free_s = starts + tokens / rate
        if starts > now:
            await asyncio.sleep(starts - now)

    async def _take_quota(self, account: _Account, tokens: int, quota: int) -> None:
        for _ in range(2):
            if self._take_from_lease(account, tokens):
                return
            if self._away:
                break
            account.need += tokens
            try:
                await self.sync()
            finally:
                account.need -= tokens
        if self._take_from_lease(account, tokens):
            return
        if self._away and self._overdraw(account, tokens):
            return
        name, grant = account.team.name, account.grant
        if self._away or grant is None:
            raise RequestRefused(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "RATE_LIMIT",
                f'team "{name}" has a quota, and how much of it is left cannot be found out now; '
                "send the same request again after the hint.",
                retry_after_ms=_hint_ms(random.uniform(1.0, 2.0)),
            )
        # What others hold, or was admitted here and may yet be cancelled, can come back.
        returns = grant.elsewhere + account.reserved > 0
        seconds = random.uniform(1.0, 2.0) if returns else DAY_S - self._clock() % DAY_S
        raise RequestRefused(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "QUOTA_USED_UP",
            f'team "{name}" may use {quota} tokens a day (UTC), {grant.left_today} are left and '
            f"{tokens} were asked for; send the same request again after the hint. The operator "
            "sets the quota with max_tokens_per_day in the teams file.",
            retry_after_ms=_hint_ms(seconds),
        )

    def _take_from_lease(self, account: _Account, tokens: int) -> bool:
        with self._lock:
            self._turn_page(account)
            if account.balance < tokens:
                return False
            account.balance -= tokens
            account.reserved += tokens
            return True

    def _overdraw(self, account: _Account, tokens: int) -> bool:
        """Whether last known numbers, and the overdraft, allow it while the directory is away."""
        last = account.grant
        if last is not None and last.left_today is not None and last.left_today < tokens:
            return False
        with self._lock:
            if account.overdrawn + tokens > OVERDRAFT_TOKENS:
                return False
            account.overdrawn += tokens
            account.balance -= tokens
            account.reserved += tokens
            return True

    def _turn_page(self, account: _Account) -> None:
        """At midnight what was leased is void. Called under the lock."""
        today = self._today()
        if account.day != today:
            account.day = today
            account.balance = account.overdrawn = 0

    # During and after work.

    def dispatched(self, jobs: Iterable[SequenceJob]) -> None:
        """The scheduler has given these out: they are charged, whatever becomes of them."""
        today = self._today()
        sums: dict[str, tuple[int, int]] = {}
        with self._lock:
            for job in jobs:
                name = job.team.name
                sequences, tokens = sums.get(name, (0, 0))
                sums[name] = sequences + 1, tokens + job.bucket
                account = self._accounts.get(name)
                if account is None:
                    continue
                account.spent += job.bucket
                if job.held:
                    account.reserved -= job.held
                    job.held = 0
                elif job.team.limits.max_tokens_per_day is not None:
                    account.balance -= job.bucket  # settled a moment ago: it was being cancelled
            self._journal.append(
                b"".join(
                    to_bytes(Record(Kind.DISPATCHED, name, today, *counts))
                    for name, counts in sums.items()
                )
            )

    def settle(self, job: SequenceJob) -> None:
        """This job is over: answered, refused or departed. Exactly once for each reserved job."""
        account = self._accounts.get(job.team.name)
        if account is None:
            return  # the books are closed
        with self._lock:
            if job.held:
                account.reserved -= job.held
                if job.team.limits.max_tokens_per_day is not None:
                    account.balance += job.held
                job.held = 0
        account.used_s = time.monotonic()
        self._leave(account, job.bucket)

    def delivered(
        self, team: Team, origin: bytes, sequence: int, digest: bytes, rows: int, nbytes: int
    ) -> None:
        """The last part of a sequence is about to be handed to the transport.

        origin: of the request, from `origin`; digest: of the sequence's ids.
        """
        key = hashlib.blake2b(
            ITEM.pack(origin, sequence, digest) + team.name.encode(), digest_size=16
        ).digest()
        record = Record(Kind.DELIVERED, team.name, self._today(), rows, nbytes, key)
        self._journal.append(to_bytes(record))

    def rejected(self, team: Team) -> None:
        """A request of this team was refused."""
        self._account(team).rejected += 1

    def _account(self, team: Team) -> _Account:
        account = self._accounts.get(team.name)
        if account is None:
            account = self._accounts[team.name] = _Account(team)
        account.team = team
        return account

    def _today(self) -> int:
        return int(self._clock() // DAY_S)

    # What is known.

    @property
    def is_alone(self) -> bool:
        """Whether the directory is away, as far as is known."""
        return self._away

    def teams(self) -> dict[str, Team]:
        """The teams that have asked for anything here, by name, as each was declared then."""
        return {account.team.name: account.team for account in list(self._accounts.values())}

    @property
    def sync_age_s(self) -> float:
        """How long ago the directory knew all that is to be known."""
        return time.monotonic() - self._level_s

    @property
    def num_segments(self) -> int:
        """Pieces of the journal that wait for the directory."""
        return self._journal.num_sealed

    def known_left_today(self) -> dict[str, int]:
        """What was left of the quotas at the last sync, by team; any thread may ask."""
        left = {}
        for account in list(self._accounts.values()):
            grant, limits = account.grant, account.team.limits
            if limits.max_tokens_per_day is None or grant is None or grant.left_today is None:
                continue
            if time.monotonic() - max(account.used_s, account.asked_s) < FORGET_S:
                left[account.team.name] = grant.left_today
        return left

    async def usage(self, team: str | None, since: int) -> list[UsageRow]:
        """From the directory, with what this replica has not told it yet. Raises DirectoryAway."""
        await self.sync()
        return await self._directory.usage(team, since)

    async def left_today(self, team: Team, wait_s: float = 0.5) -> int | None:
        """What is left of a team's quota as far as is known; None without a quota."""
        if team.limits.max_tokens_per_day is None:
            return None
        account = self._account(team)
        before_s = max(account.used_s, account.asked_s)
        account.asked_s = time.monotonic()
        stale = account.asked_s - before_s > FORGET_S
        if stale or account.grant is None or account.grant.left_today is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self.sync()
        return None if account.grant is None else account.grant.left_today

    # The directory.

    async def sync(self) -> None:
        """Returns when a sync that begins from now on has ended, well or not."""
        if self._round is None:
            self._round = asyncio.get_running_loop().create_future()
        self._due.set()
        await asyncio.shield(self._round)

    async def run(self) -> None:
        """Keeps the directory informed for ever."""
        adopted_s = -ADOPT_S
        while True:
            waiting, self._round = self._round, None
            self._due.clear()
            try:
                await self._sync()
                if time.monotonic() - adopted_s > ADOPT_S and not self._away:
                    adopted_s = time.monotonic()
                    await self._adopt()
            except Exception:
                # Nobody may wait for ever for books that nobody keeps.
                logger.exception("keeping the books failed, it is tried again")
                self._away = True
            finally:
                if waiting is not None:
                    waiting.set_result(None)
            if self._journal.num_sealed and not self._away:
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SYNC_S):
                    await self._due.wait()
            if self._away:
                await asyncio.sleep(SYNC_S / 5)

    async def close(self) -> None:
        """Tells the directory the rest, once nothing is dispatched any more."""
        self._note_rejected()
        self._accounts.clear()
        self._journal.seal()
        while self._journal.num_sealed:
            await self._sync(ended=True)
            if self._away:
                break
        else:
            await self._sync(ended=True)
        self._journal.close()
        with contextlib.suppress(DirectoryAway):
            await self._directory.close()

    async def _sync(self, *, ended: bool = False) -> None:
        now = time.monotonic()
        elapsed_s, self._synced_s = max(1e-3, now - self._synced_s), now
        self._note_rejected()
        with self._lock:  # what is held and what is reported belong together
            self._journal.seal()
            wishes = {
                name: self._wish(account, now, elapsed_s)
                for name, account in self._accounts.items()
                if now - max(account.used_s, account.asked_s) < FORGET_S
                and _is_limited(account.team)
            }
        try:
            segment = self._journal.oldest()
            if segment is None and not wishes and not ended:
                self._level_s = now
                return
            async with asyncio.timeout(ANSWER_S):
                grants = await self._directory.sync(
                    self._journal.name, segment, wishes, ended=ended
                )
        except (DirectoryAway, TimeoutError, OSError) as error:
            if not self._away:
                logger.warning(
                    "the directory is away, serving goes on: %s", str(error) or "no answer"
                )
            self._away = True
            return
        if self._away:
            logger.info("the directory is back")
        self._away = False
        if segment is not None:
            self._journal.drop(segment[0])
        if not self._journal.num_sealed:
            self._level_s = now
        for name, grant in grants.items():
            account = self._accounts.get(name)
            if account is None:
                continue
            with self._lock:
                account.grant = grant
                if account.day == wishes[name].day:
                    account.balance += grant.tokens
                account.overdrawn = 0
            self._give_turns(account)

    def _note_rejected(self) -> None:
        for name, account in self._accounts.items():
            if account.rejected:
                record = Record(Kind.REJECTED, name, self._today(), account.rejected)
                self._journal.append(to_bytes(record))
                account.rejected = 0

    def _wish(self, account: _Account, now: float, elapsed_s: float) -> Wish:
        """Called under the lock; what is held for no use goes back with it."""
        self._turn_page(account)
        weight = min(1.0, elapsed_s / FORESIGHT_S)
        account.pace += weight * (account.spent / elapsed_s - account.pace)
        account.spent = 0
        soon = int(account.pace * FORESIGHT_S)
        account.balance = min(account.balance, account.need + soon)
        return Wish(
            quota=account.team.limits.max_tokens_per_day,
            day=account.day,
            held=account.balance + account.reserved,
            need=max(0, account.need - account.balance),
            more=max(0, soon - max(0, account.balance - account.need)),
            active=bool(account.need or account.in_flight or now - account.used_s < SYNC_S),
        )

    async def _adopt(self) -> None:
        """Tells the directory what replicas of this host have left in their journals."""
        if self._folder is None:
            return
        try:
            with orphans(self._folder, self._told) as found:
                # What failed before comes last: one that always fails must not keep the others.
                for name, files in sorted(found, key=lambda one: self._attempts[one[0]]):
                    self._attempts[name] += 1
                    if await self._take_over(name, files):
                        del self._attempts[name]
        except (DirectoryAway, TimeoutError):
            return  # the next time
        except OSError as error:
            complain_once(self._told, self._folder, f"cannot be used: {error.strerror}")
        except Exception:
            # The books of this replica are none the worse for it.
            logger.exception("taking over journals failed, it is tried again")

    async def _take_over(self, name: str, files: list[tuple[int, Path]]) -> bool:
        """Whether all of a journal was told, and removed."""
        for number, path in files:
            try:
                segment = number, path.read_bytes()
                async with asyncio.timeout(ANSWER_S):
                    await self._directory.sync(name, segment, {}, ended=True)
                path.unlink()
            except (DirectoryAway, TimeoutError) as error:
                why = str(error) or "no answer from the directory"
                complain_once(self._told, path, f"is not taken over yet: {why}")
                raise
            except OSError as error:
                # Those behind it wait: the directory takes them in the order of their numbers.
                complain_once(self._told, path, f"cannot be taken over: {error.strerror}")
                return False
        logger.info("took over what another replica had not reported journal=%s", name)
        return True


def origin(session: bytes, item: int) -> bytes:
    """Names a piece of a client's work, whichever attempt and replica: 24 bytes."""
    return ORIGIN.pack(session, item)


def _fits(account: _Account, tokens: int) -> bool:
    limit = account.team.limits.max_tokens_in_flight
    if limit is None or not account.in_flight:
        return True
    return account.in_flight + tokens <= limit * account.share


def _is_limited(team: Team) -> bool:
    limits = team.limits
    return any(
        limit is not None
        for limit in (
            limits.max_tokens_in_flight,
            limits.max_tokens_per_second,
            limits.max_tokens_per_day,
        )
    )


def _hint_ms(seconds: float) -> int:
    return int(1000 * min(HINT_S, max(0.05, seconds)))


JOURNALS = "journals"
"""In the folder of the ledger: one journal per replica."""


def open_accounts(folder: Path | None, directory: DirectoryLink | None = None) -> Accounts:
    """The books of one replica, in `folder` or in memory; by default with a directory of its own.

    Raises ServeError if the folder cannot be used.
    """
    try:
        directory = directory or LocalDirectory(Directory(folder))
        return Accounts(directory, None if folder is None else folder / JOURNALS)
    except (OSError, sqlite3.Error) as error:
        raise ServeError(
            f"cannot keep a ledger in {folder}: {error}. Give --ledger a folder on a local disk "
            "that this user may write to."
        ) from error
