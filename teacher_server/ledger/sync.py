"""Exchanges usage and leases with the directory, and adopts the journals of replicas that died."""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from pathlib import Path

from teacher_server.ledger.book import Book
from teacher_server.ledger.journal import complain_once, orphans
from teacher_server.ledger.lease import DirectoryAway, DirectoryLink

logger = logging.getLogger(__name__)

SYNC_S = 1.0
"""Seconds between two rounds, unless one is asked for."""
ANSWER_S = 5.0
"""How long the directory may take to answer."""
ADOPT_S = 15.0
"""How often a replica looks for journals that others left."""


class DirectorySync:
    """Reports to the directory in rounds. Everything is called by the event loop.

    A round sends the oldest closed segment of the journal, with lease requests for the teams. The
    segment is dropped only when the directory has confirmed it; until then it is sent again, and the
    directory applies it once however often it comes.
    """

    def __init__(self, directory: DirectoryLink, book: Book, folder: Path | None) -> None:
        self.is_away = False
        """Whether the last round got no answer."""
        self._directory = directory
        self._book = book
        self._adoption = None if folder is None else Adoption(directory, folder)
        self._began_s = time.monotonic()
        """When the last round began."""
        self._complete_s = self._began_s
        """When the directory last knew everything."""
        self._due = asyncio.Event()
        self._next: asyncio.Future[None] | None = None
        """Ends with the next round, for those who wait for it."""

    @property
    def age_s(self) -> float:
        """Seconds since the directory knew everything that this replica has used."""
        return time.monotonic() - self._complete_s

    async def round(self) -> None:
        """Returns when a round that begins from now on has ended, answered or not."""
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
        self._due.set()
        # Shielded: others wait for the same round, and one of them may be cancelled.
        await asyncio.shield(self._next)

    async def run(self) -> None:
        """Keeps the directory informed until it is cancelled."""
        adopted_s = -ADOPT_S
        while True:
            # Taken before the round begins: a caller from here on waits for the round after it,
            # because this one may already have read the accounts.
            waiting, self._next = self._next, None
            self._due.clear()
            try:
                await self._exchange()
                if time.monotonic() - adopted_s > ADOPT_S and not self.is_away:
                    adopted_s = time.monotonic()
                    if self._adoption is not None:
                        await self._adoption.look()
            except Exception:
                # Requests wait for rounds: this loop must outlive any fault of its own.
                logger.exception("the exchange with the directory failed and is tried again")
                self.is_away = True
            finally:
                if waiting is not None:
                    waiting.set_result(None)
            if self._book.journal.num_sealed and not self.is_away:
                continue  # catching up after a time without a directory
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SYNC_S):
                    await self._due.wait()
            if self.is_away:
                # Requests set `_due` all the time; a directory that restarts is not to be flooded.
                await asyncio.sleep(SYNC_S / 5)

    async def close(self) -> None:
        """Reports the rest and returns all leases; called when nothing is charged any more."""
        self._book.close()
        journal = self._book.journal
        while journal.num_sealed:
            await self._exchange(ended=True)
            if self.is_away:
                break  # the journal stays, and another replica of this host adopts it
        else:
            await self._exchange(ended=True)
        journal.close()
        with contextlib.suppress(DirectoryAway):
            await self._directory.close()

    async def _exchange(self, *, ended: bool = False) -> None:
        now = time.monotonic()
        elapsed_s, self._began_s = max(1e-3, now - self._began_s), now
        requests = self._book.report(now, elapsed_s)
        journal = self._book.journal
        try:
            segment = journal.oldest()
            if segment is None and not requests and not ended:
                self._complete_s = now
                return
            async with asyncio.timeout(ANSWER_S):
                leases = await self._directory.sync(journal.name, segment, requests, ended=ended)
        except (DirectoryAway, TimeoutError, OSError) as error:
            if not self.is_away:
                why = str(error) or "no answer"
                logger.warning("the directory is away, serving continues: %s", why)
            # The segment stays closed and is sent again as it is: it may have arrived.
            self.is_away = True
            return
        if self.is_away:
            logger.info("the directory is back")
        self.is_away = False
        if segment is not None:
            journal.drop(segment[0])
        if not journal.num_sealed:
            self._complete_s = now
        self._book.add_leases(leases, requests)


class Adoption:
    """Reports the journals that replicas of this host left when they died, and removes them.

    A journal belongs to its process for as long as that holds the file lock; the kernel releases it
    with the process, however it dies. `orphans` takes the free locks, so that of several replicas one
    adopts a journal. The segments go to the directory under the name of the dead replica: one that it
    had sent itself before it died is not counted again, and its leases end.
    """

    def __init__(self, directory: DirectoryLink, folder: Path) -> None:
        self._directory = directory
        self._folder = folder
        self._logged: set[Path] = set()
        """Files with a fault that was logged."""
        self._attempts: Counter[str] = Counter()
        """Failed attempts by journal."""

    async def look(self) -> None:
        """Adopts every journal whose replica has died. What fails is tried again the next time."""
        try:
            with orphans(self._folder, self._logged) as found:
                # Failed ones last: one that fails each time must not keep the others from their turn.
                for name, files in sorted(found, key=lambda journal: self._attempts[journal[0]]):
                    self._attempts[name] += 1
                    if await self._adopt(name, files):
                        del self._attempts[name]
        except (DirectoryAway, TimeoutError):
            return
        except OSError as error:
            complain_once(self._logged, self._folder, f"cannot be used: {error.strerror}")
        except Exception:
            # A fault in what others left must not count as one of this replica's own exchange.
            logger.exception("adopting journals failed and is tried again")

    async def _adopt(self, name: str, files: list[tuple[int, Path]]) -> bool:
        """Reports the segments of one journal; returns whether all were taken and removed."""
        for number, path in files:
            try:
                segment = number, path.read_bytes()
                async with asyncio.timeout(ANSWER_S):
                    await self._directory.sync(name, segment, {}, ended=True)
                # Only after the directory has it: a crash in between sends it twice, never not at all.
                path.unlink()
            except (DirectoryAway, TimeoutError) as error:
                why = str(error) or "no answer from the directory"
                complain_once(self._logged, path, f"is not adopted yet: {why}")
                raise
            except OSError as error:
                # Later segments wait: the directory skips a number below the last that it applied.
                complain_once(self._logged, path, f"cannot be adopted: {error.strerror}")
                return False
        logger.info("adopted what a replica had not reported before it died journal=%s", name)
        return True
