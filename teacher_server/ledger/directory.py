"""Keeps what every team has used, and leases the rest of each quota to the replicas.

The directory is one SQLite file, written by one transaction at a time. On Ray it is an actor
(cluster/ray_directory.py), in standalone mode it runs in the replica's process; several replicas of a
host may also run one each over the same file.

Replicas send segments of their journals and lease requests. A segment is applied once, however often it
is sent: its journal and number are stored in the same transaction. A lease is what a replica may still
charge beyond what it has reported, so that

    charged today + leases <= quota

holds for as long as replicas report. A replica that is silent for LEASE_S loses its lease to the others;
if it did charge meanwhile, the quota is exceeded by at most that lease.
"""

import asyncio
import contextlib
import logging
import os
import sqlite3
import stat
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from logitstream.files import locked, make_private
from teacher_server.ledger.journal import Kind, Record, from_bytes
from teacher_server.ledger.lease import DirectoryAway, Lease, LeaseRequest, UsageRow

T = TypeVar("T")

logger = logging.getLogger(__name__)

FILE_NAME = "ledger.sqlite"
BESIDE = ("-wal", "-shm")
"""Suffixes of SQLite's own files beside the ledger."""
LEASE_S = 30.0
"""Seconds of silence after which a lease ends."""
ACTIVE_S = 3.0
"""Replicas that worked for a team in the last ACTIVE_S seconds share its limits."""
BUSY_MS = 4000
"""How long SQLite waits for another process that writes."""
JOURNALS_DAYS = 400
"""Days that the number of a journal's last segment is remembered."""
DROP_AT_ONCE = 10_000
"""Old keys are removed in small steps, so that no round waits for it."""
SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE usage (
    day INTEGER NOT NULL, team TEXT NOT NULL,
    sequences INTEGER NOT NULL DEFAULT 0, tokens INTEGER NOT NULL DEFAULT 0,
    delivered_rows INTEGER NOT NULL DEFAULT 0, delivered_bytes INTEGER NOT NULL DEFAULT 0,
    rejected INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (day, team)
) STRICT, WITHOUT ROWID;
CREATE TABLE delivered (
    day INTEGER NOT NULL, key BLOB NOT NULL,
    PRIMARY KEY (day, key)
) STRICT, WITHOUT ROWID;
CREATE TABLE journals (
    journal TEXT PRIMARY KEY, segment INTEGER NOT NULL, heard_day INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE leases (
    holder TEXT NOT NULL, team TEXT NOT NULL, day INTEGER NOT NULL, tokens INTEGER NOT NULL,
    heard_s REAL NOT NULL, active_s REAL NOT NULL,
    PRIMARY KEY (team, holder)
) STRICT, WITHOUT ROWID;
"""
COLUMNS = {
    Kind.DISPATCHED: ("sequences", "tokens"),
    Kind.DELIVERED: ("delivered_rows", "delivered_bytes"),
    Kind.REJECTED: ("rejected",),
}
"""The columns that the two counts of a record are added to."""


class Directory:
    """Stores the ledger and the leases in `folder`, or in memory without one.

    Not thread-safe. Every method may raise sqlite3.Error, and has changed nothing then.
    """

    def __init__(self, folder: Path | None, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        if folder is None:
            self._base = self._open(":memory:")
            return
        make_private(folder)
        # The first process to open a new file turns it into WAL mode; a second one at that moment gets
        # "database is locked" at once, whatever its busy_timeout is.
        with locked(folder):
            _keep_private(folder / FILE_NAME)
            self._base = self._open(str(folder / FILE_NAME))

    def _open(self, name: str) -> sqlite3.Connection:
        """Opens the ledger in this file, and makes its tables if it has none."""
        base = sqlite3.connect(name, isolation_level=None, check_same_thread=False)
        base.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
        base.execute("PRAGMA journal_mode = WAL")
        # Journals are removed once the directory confirms: what it confirmed must survive a power cut.
        base.execute("PRAGMA synchronous = FULL")
        # Read first: a write waits for other writers, maybe for longer than BUSY_MS.
        if not _read_version(base, name):
            with _Transaction(base):
                if not _read_version(base, name):
                    for statement in SCHEMA.split(";\n"):
                        base.execute(statement)
                    base.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        return base

    def sync(
        self,
        holder: str,
        segment: tuple[int, bytes] | None,
        requests: dict[str, LeaseRequest],
        *,
        ended: bool = False,
    ) -> dict[str, Lease]:
        """Applies a segment unless it was applied before, then leases. ended: nothing is held."""
        now = self._clock()
        today = int(now // 86400)
        with _Transaction(self._base):
            if segment is not None:
                self._apply(holder, *segment, today)
            if ended:
                self._base.execute("DELETE FROM leases WHERE holder = ?", (holder,))
            # Once, and not for each team: it reads the leases of all of them.
            self._base.execute("DELETE FROM leases WHERE heard_s < ?", (now - 2 * LEASE_S,))
            return {
                team: self._lease(holder, team, request, now, today)
                for team, request in requests.items()
            }

    def usage(self, team: str | None, since: int) -> list[UsageRow]:
        """Returns usage by day and team from the day `since` on; team: this one only."""
        return _usage(self._base, team, since)

    def close(self) -> None:
        self._base.close()

    def _apply(self, journal: str, number: int, data: bytes, today: int) -> None:
        row = self._base.execute(
            "SELECT segment FROM journals WHERE journal = ?", (journal,)
        ).fetchone()
        if row and number <= row[0]:
            return  # sent again: its answer was lost, or its replica died before the answer
        totals: dict[tuple[int, str], dict[str, int]] = {}
        for record in from_bytes(data):
            if record.kind is Kind.DELIVERED and not self._is_first(record, today):
                continue
            sums = totals.setdefault((record.day, record.team), {})
            numbers = record.number, record.amount
            for name, value in zip(COLUMNS[record.kind], numbers, strict=False):
                sums[name] = sums.get(name, 0) + value
        for (day, team), sums in totals.items():
            self._base.execute("INSERT OR IGNORE INTO usage (day, team) VALUES (?, ?)", (day, team))
            columns = ", ".join(f"{name} = {name} + ?" for name in sums)
            self._base.execute(
                f"UPDATE usage SET {columns} WHERE day = ? AND team = ?",
                (*sums.values(), day, team),
            )
        self._base.execute(
            "INSERT OR REPLACE INTO journals VALUES (?, ?, ?)", (journal, number, today)
        )
        self._base.execute(
            "DELETE FROM delivered WHERE (day, key) IN"
            " (SELECT day, key FROM delivered WHERE day < ? LIMIT ?)",
            (today - 1, DROP_AT_ONCE),  # no client retries work that is two days old
        )
        self._base.execute("DELETE FROM journals WHERE heard_day < ?", (today - JOURNALS_DAYS,))

    def _is_first(self, record: Record, today: int) -> bool:
        """Remembers a key; returns whether it came neither today nor yesterday."""
        yesterday = self._base.execute(
            "SELECT 1 FROM delivered WHERE day = ? AND key = ?", (today - 1, record.key)
        )
        if yesterday.fetchone():
            return False
        added = self._base.execute(
            "INSERT OR IGNORE INTO delivered VALUES (?, ?)", (today, record.key)
        )
        return added.rowcount == 1

    def _lease(
        self, holder: str, team: str, request: LeaseRequest, now: float, today: int
    ) -> Lease:
        held = request.held if request.day == today else 0  # yesterday's lease is void
        active_s = now if request.active else now - 2 * ACTIVE_S
        elsewhere, replicas = self._base.execute(
            "SELECT coalesce(sum(tokens) FILTER (WHERE day = ? AND heard_s > ?), 0),"
            " count(*) FILTER (WHERE active_s > ?)"
            " FROM leases WHERE team = ? AND holder <> ?",
            (today, now - LEASE_S, now - ACTIVE_S, team, holder),
        ).fetchone()
        replicas += 1
        tokens, left = 0, None
        if request.quota is not None:
            row = self._base.execute(
                "SELECT tokens FROM usage WHERE day = ? AND team = ?", (today, team)
            ).fetchone()
            left = max(0, request.quota - (row[0] if row else 0))
            free = left - elsewhere - held
            if request.day == today:
                # No replica gets for later what others need now.
                soon = min(request.more, max(0, free - request.need) // (2 * replicas))
                tokens = max(0, min(request.need + soon, free))
        self._base.execute(
            "INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?, ?, ?)",
            (holder, team, today, held + tokens, now, active_s),
        )
        return Lease(tokens, left, elsewhere, replicas)


def _keep_private(path: Path) -> None:
    """Makes the ledger if it is missing, and readable by its owner only. Raises OSError.

    SQLite would make it readable by everyone, and gives its own files beside it the mode of this one.
    A file that SQLite has open must never be opened and closed here: closing it drops every lock that
    this process has on it (fcntl).
    """
    path = Path(os.path.realpath(path))
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    for file in (path, *(path.with_name(path.name + side) for side in BESIDE)):
        try:
            mode = stat.S_IMODE(file.stat().st_mode)
            if mode & 0o077:
                file.chmod(mode & 0o700)
        except FileNotFoundError:
            continue
        except PermissionError:
            logger.warning("%s can be read by others and is not this user's: chmod 600 it", file)


def _read_version(base: sqlite3.Connection, name: str) -> int:
    """Returns the version of the tables; 0: there are none. Raises sqlite3.DatabaseError for others."""
    (version,) = base.execute("PRAGMA user_version").fetchone()
    if version not in (0, SCHEMA_VERSION):
        raise sqlite3.DatabaseError(
            f"{name} is a ledger of version {version}, this server reads version {SCHEMA_VERSION}. Use "
            "the server that wrote it, or another folder."
        )
    return version


def read_usage(path: Path, team: str | None, since: int) -> list[UsageRow]:
    """Reads usage from a ledger's file, which a service may be writing. Raises sqlite3.Error."""
    with contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as base:
        base.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
        return _usage(base, team, since)


def _usage(base: sqlite3.Connection, team: str | None, since: int) -> list[UsageRow]:
    rows = base.execute(
        "SELECT day, team, sequences, tokens, delivered_rows, delivered_bytes, rejected"
        " FROM usage WHERE day >= ? AND (? IS NULL OR team = ?) ORDER BY day, team",
        (since, team, team),
    )
    return [UsageRow(*row) for row in rows]


class _Transaction:
    """Commits the block as a whole, or nothing of it."""

    def __init__(self, base: sqlite3.Connection) -> None:
        self._base = base

    def __enter__(self) -> None:
        self._base.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._base.execute("COMMIT")
        elif self._base.in_transaction:
            self._base.execute("ROLLBACK")


class LocalDirectory:
    """Runs the directory in this process, in its own thread: the event loop never waits for the disk."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="directory")

    async def sync(
        self,
        holder: str,
        segment: tuple[int, bytes] | None,
        requests: dict[str, LeaseRequest],
        *,
        ended: bool = False,
    ) -> dict[str, Lease]:
        return await self._do(lambda: self._directory.sync(holder, segment, requests, ended=ended))

    async def usage(self, team: str | None, since: int) -> list[UsageRow]:
        return await self._do(lambda: self._directory.usage(team, since))

    async def close(self) -> None:
        await self._do(self._directory.close)
        self._thread.shutdown(wait=False)

    async def _do(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except sqlite3.Error as error:
            raise DirectoryAway(f"the ledger: {error}") from error
