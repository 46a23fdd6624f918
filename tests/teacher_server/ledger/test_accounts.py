import asyncio
import contextlib
import errno
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc
import pytest
import torch

from logit_codec import TopKSpec
from teacher_server.engine.batch import RowRequest
from teacher_server.errors import RequestRefused, ServeError
from teacher_server.ledger import quota, sync
from teacher_server.ledger.accounts import Accounts, open_accounts, origin
from teacher_server.ledger.directory import Directory, LocalDirectory
from teacher_server.ledger.lease import DirectoryAway, Lease, LeaseRequest, UsageRow
from teacher_server.scheduling.job import SequenceJob
from teacher_server.teams.declaration import Team, TeamLimits

NOTHING = torch.empty(0, dtype=torch.int64)
FREE = Team("free")


def team(**limits: int) -> Team:
    return Team("search", limits=TeamLimits(**limits))


def make_job(team: Team, tokens: int = 32) -> SequenceJob:
    return SequenceJob(RowRequest(NOTHING, NOTHING, TopKSpec(k=1)), tokens, 0, 1, team, held=tokens)


class Link(LocalDirectory):
    """A directory that can go away: it refuses, or never answers."""

    refuses = False
    hangs = False

    async def sync(
        self,
        holder: str,
        segment: tuple[int, bytes] | None,
        requests: dict[str, LeaseRequest],
        *,
        ended: bool = False,
    ) -> dict[str, Lease]:
        if self.refuses:
            raise DirectoryAway("it was killed")
        leases = await super().sync(holder, segment, requests, ended=ended)
        if self.hangs:
            await asyncio.Event().wait()  # the answer is lost, what it did is done
        return leases

    async def close(self) -> None:
        self.refuses = False  # the directory belongs to the test

    async def rows(self) -> list[UsageRow]:
        return await self.usage(None, 0)


@contextlib.asynccontextmanager
async def books(link: Link, folder: Path | None = None, **options) -> AsyncIterator[Accounts]:
    mine = Accounts(link, folder, **options)
    running = asyncio.create_task(mine.run())
    await mine.sync()
    yield mine
    running.cancel()
    await mine.close()


def with_link(test: Callable[[Link], Awaitable[None]], **options) -> None:
    """Runs a test's coroutine with a directory in memory."""
    directory = Directory(None, **options)
    link = Link(directory)

    async def run() -> None:
        async with asyncio.timeout(20):
            await test(link)
        link.refuses = link.hangs = False
        await LocalDirectory.close(link)

    asyncio.run(run())


async def use(mine: Accounts, team: Team, tokens: int = 32) -> None:
    """One request of one sequence, from admission to its end."""
    await mine.reserve(team, tokens)
    job = make_job(team, tokens)
    mine.charge([job])
    mine.settle(job)


async def refused(work: Awaitable[None]) -> RequestRefused:
    with pytest.raises(RequestRefused) as caught:
        await work
    assert caught.value.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.retry_after_ms > 0
    return caught.value


def test_every_dispatch_is_charged_and_every_delivery_counted_once():
    async def test(link: Link) -> None:
        first, second = origin(b"1" * 16, 1), origin(b"2" * 16, 1)
        async with books(link) as mine, books(link) as other:
            for _ in range(3):  # one request id, three times
                await use(mine, FREE)
                mine.record_delivery(FREE, first, 0, b"d" * 16, 31, 500)
            await use(other, FREE)  # the same work, sent again to another replica
            other.record_delivery(FREE, first, 0, b"d" * 16, 31, 500)
            await use(other, FREE)  # another client, whose ids begin at the same number
            other.record_delivery(FREE, second, 0, b"d" * 16, 31, 500)
            other.record_delivery(FREE, second, 1, b"d" * 16, 31, 500)
            mine.record_rejection(FREE)
        (row,) = await link.rows()
        assert (row.sequences, row.tokens, row.rejected) == (5, 160, 1)
        assert (row.delivered_rows, row.delivered_bytes) == (93, 1500)

    with_link(test)


def test_a_quota_is_used_to_the_last_token_and_never_beyond():
    limited = team(max_tokens_per_day=1000)

    async def test(link: Link) -> None:
        async with books(link) as mine, books(link) as other:
            outcomes = await asyncio.gather(
                *(use(books, limited) for books in (mine, other) * 20), return_exceptions=True
            )
            served = outcomes.count(None)
            while served < 1000 // 32:  # what the other replica had leased comes back
                await asyncio.sleep(0.1)
                with contextlib.suppress(RequestRefused):
                    await use(mine, limited)
                    served += 1
            error = await refused(use(other, limited))
            assert error.reason == "QUOTA_USED_UP"
            assert "search" in str(error)
            assert "8 are left" in str(error)
            await mine.sync()
            assert await mine.left_today(limited) == 8
        (row,) = await link.rows()
        assert row.tokens == 992

    with_link(test)


def test_what_departs_before_it_is_dispatched_costs_nothing():
    limited = team(max_tokens_per_day=64)

    async def test(link: Link) -> None:
        async with books(link) as mine:
            for _ in range(5):
                await mine.reserve(limited, 64)
                mine.settle(make_job(limited, 64))
            await mine.reserve(limited, 64)
            job = make_job(limited, 64)
            mine.settle(job)  # it was cancelled when the scheduler had just given it out
            mine.charge([job])
            assert (await refused(use(mine, limited))).reason == "QUOTA_USED_UP"
        (row,) = await link.rows()
        assert row.tokens == 64

    with_link(test)


def test_a_new_day_brings_a_new_quota():
    limited = team(max_tokens_per_day=64)
    now = 20_000 * 86400.0 + 86399

    async def test(link: Link) -> None:
        nonlocal now
        async with books(link, clock=lambda: now) as mine:
            await use(mine, limited, 64)
            error = await refused(use(mine, limited, 64))
            assert error.reason == "QUOTA_USED_UP"
            assert error.retry_after_ms == 1000
            now += 1
            await use(mine, limited, 64)
            assert (await refused(use(mine, limited, 64))).reason == "QUOTA_USED_UP"
        assert [(row.day, row.tokens) for row in await link.rows()] == [(20_000, 64), (20_001, 64)]

    with_link(test, clock=lambda: now)


def test_a_rate_is_waited_for_and_beyond_that_refused():
    limited = team(max_tokens_per_second=1000)

    async def test(link: Link) -> None:
        async with books(link) as mine:
            began = time.monotonic()
            ended: list[float] = []

            async def one() -> None:
                await use(mine, limited, 100)
                ended.append(time.monotonic() - began)

            outcomes = await asyncio.gather(*(one() for _ in range(400)), return_exceptions=True)
            # A second's worth at once and then ten each second, however slow the machine is ...
            assert all(place <= 11 + 10 * at for place, at in enumerate(ended, 1))
            # ... another second's worth may wait, and who would wait for longer is refused.
            errors = [error for error in outcomes if error is not None]
            assert 20 <= len(ended) <= 21 + 10 * (time.monotonic() - began)
            assert errors
            for error in errors:
                assert isinstance(error, RequestRefused)
                assert error.reason == "RATE_LIMIT"
                assert 1000 <= error.retry_after_ms < 2000

    with_link(test)


def test_requests_wait_while_too_much_is_in_flight_and_go_on_in_order():
    limited = team(max_tokens_in_flight=100)

    async def test(link: Link) -> None:
        async with books(link) as mine:
            order: list[int] = []

            async def one(number: int, tokens: int) -> None:
                await mine.reserve(limited, tokens)
                order.append(number)

            sizes = [60, 40, 10, 500, 60, 30]
            tasks = [asyncio.create_task(one(*pair)) for pair in enumerate(sizes)]
            await asyncio.sleep(0.01)
            assert order == [0, 1]
            tasks[2].cancel()  # its client has gone
            mine.settle(make_job(limited, 60))
            await asyncio.sleep(0.01)
            assert order == [0, 1]
            mine.settle(make_job(limited, 40))
            await asyncio.sleep(0.01)
            assert order == [0, 1, 3]  # larger than the limit: alone
            mine.settle(make_job(limited, 500))
            await asyncio.gather(*tasks, return_exceptions=True)
            assert order == [0, 1, 3, 4, 5]
            await mine.reserve(FREE, 1 << 30)  # nobody else waits

    with_link(test)


def test_replicas_that_work_for_a_team_share_its_limits():
    limited = team(max_tokens_in_flight=100)

    async def test(link: Link) -> None:
        async with books(link) as mine, books(link) as other:
            await mine.reserve(limited, 10)
            await other.reserve(limited, 10)
            await mine.sync()
            await other.sync()
            await mine.sync()
            await mine.reserve(limited, 40)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(mine.reserve(limited, 10), 0.05)

    with_link(test)


@pytest.mark.parametrize("how", ["refuses", "hangs"])
def test_serving_goes_on_while_the_directory_is_away(monkeypatch, tmp_path: Path, how: str):
    monkeypatch.setattr(sync, "SYNC_S", 0.05)
    monkeypatch.setattr(sync, "ANSWER_S", 0.2)
    monkeypatch.setattr(quota, "OVERDRAFT_TOKENS", 320)
    limited = team(max_tokens_per_day=100_000)

    async def test(link: Link) -> None:
        async with books(link, tmp_path / "journals") as mine:
            await use(mine, limited)
            setattr(link, how, True)
            await mine.sync()
            served, error = 1, None
            while error is None:
                began = time.monotonic()
                try:
                    await use(mine, limited)
                    served += 1
                except RequestRefused as refused:
                    error = refused
                await use(mine, FREE)
                assert time.monotonic() - began < 0.2
            assert served > 10
            assert error.reason == "RATE_LIMIT"
            await use(mine, FREE, 1 << 20)
            setattr(link, how, False)
            while mine.is_directory_away:
                await mine.sync()
            await use(mine, limited)
        tokens = {row.team: row.tokens for row in await link.rows()}
        assert tokens == {
            "search": 32 * (served + 1),
            "free": 32 * served + (1 << 20),
        }

    with_link(test)
    assert list((tmp_path / "journals").iterdir()) == []


def test_what_another_replica_left_is_told_to_the_directory(tmp_path: Path):
    async def test(link: Link) -> None:
        link.refuses = True
        left = Accounts(link, tmp_path)
        await use(left, FREE)
        link.refuses = False
        left._book.journal.close()  # it ends without a word
        async with books(link, tmp_path):
            pass
        (row,) = await link.rows()
        assert row.tokens == 32

    with_link(test)
    assert list(tmp_path.iterdir()) == []


def leave_behind(link: Link, folder: Path, tokens: int) -> str:
    """What a killed replica leaves; returns the name of its journal."""
    left = Accounts(link, folder)
    left.charge([make_job(FREE, tokens)])
    left._book.journal.close()
    return left._book.journal.name


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def rounds(monkeypatch: pytest.MonkeyPatch, link: Link, folder: Path, tokens: int) -> None:
    """A replica that looks for orphans all the time, until so much is in the ledger."""
    monkeypatch.setattr(sync, "ADOPT_S", 0.0)
    monkeypatch.setattr(sync, "SYNC_S", 0.02)
    async with books(link, folder) as mine:
        while sum(row.tokens for row in await link.rows()) < tokens:
            await mine.sync()
        for _ in range(5):
            await mine.sync()


def test_a_journal_that_cannot_be_read_stops_no_take_over_of_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    async def test(link: Link) -> None:
        names = sorted(leave_behind(link, tmp_path, 32) for _ in range(3))
        kept = tmp_path / f"{names[0]}.000001"
        behind = tmp_path / f"{names[0]}.000002"
        behind.write_bytes(kept.read_bytes())
        read = Path.read_bytes

        def refuse(path: Path) -> bytes:
            if path == kept:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return read(path)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", refuse)
            await rounds(monkeypatch, link, tmp_path, 64)
        assert names_in(tmp_path) == [
            f"{names[0]}.000001",
            f"{names[0]}.000002",
            f"{names[0]}.lock",
        ]
        (message,) = [one for one in caplog.messages if "Permission denied" in one]
        assert str(kept) in message
        await rounds(monkeypatch, link, tmp_path, 128)
        assert names_in(tmp_path) == []

    with_link(test)


@pytest.mark.parametrize("error", [DirectoryAway("not this one"), OverflowError("nor this")])
def test_a_journal_that_the_directory_does_not_take_stops_no_take_over_of_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
):
    class Choosy(Link):
        refused = ""

        async def sync(self, holder: str, *arguments, **options) -> dict[str, Lease]:
            if holder == self.refused:
                raise error
            return await super().sync(holder, *arguments, **options)

    async def test(plain: Link) -> None:
        link = Choosy(plain._directory)
        names = sorted(leave_behind(link, tmp_path, 32) for _ in range(3))
        link.refused = names[0]
        await rounds(monkeypatch, link, tmp_path, 64)
        assert names_in(tmp_path) == [f"{names[0]}.000001", f"{names[0]}.lock"]
        await LocalDirectory.close(link)

    with_link(test)


def test_a_folder_that_cannot_be_used_is_refused():
    with pytest.raises(ServeError, match=r"cannot keep a ledger in /dev/null/x: .* --ledger"):
        open_accounts(Path("/dev/null/x"))
