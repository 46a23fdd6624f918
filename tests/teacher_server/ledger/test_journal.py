import errno
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import xxhash

from teacher_server.ledger import journal
from teacher_server.ledger.directory import Directory
from teacher_server.ledger.journal import Journal, Kind, Record, from_bytes, orphans, to_bytes
from teacher_server.rpc.messages import usage_row
from tests.conftest import FORKSERVER

RECORDS = [
    Record(Kind.DISPATCHED, "search", 20_000, 3, 96),
    Record(Kind.DELIVERED, "suche-ä", 20_001, 31, 1 << 40, b"k" * 16),
    Record(Kind.REJECTED, "default", 20_002, 1),
]


def all_records(journal: Journal) -> list[Record]:
    """Takes everything out of a journal, as the directory would."""
    journal.seal()
    found = []
    while (segment := journal.oldest()) is not None:
        found += from_bytes(segment[1])
        journal.drop(segment[0])
    return found


@pytest.mark.parametrize("in_memory", [True, False])
def test_records_come_back_once_and_in_order(tmp_path: Path, monkeypatch, in_memory: bool):
    monkeypatch.setattr(journal, "SEGMENT_NBYTES", 300)
    mine = Journal(None if in_memory else tmp_path)
    for record in RECORDS * 10:
        mine.append(to_bytes(record))
    assert mine.num_sealed > 3
    assert all_records(mine) == RECORDS * 10
    assert all_records(mine) == []
    mine.close()
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_record_ends_a_segment_and_is_logged(caplog):
    whole = b"".join(map(to_bytes, RECORDS))
    assert list(from_bytes(whole)) == RECORDS
    assert not caplog.records
    assert list(from_bytes(whole[:-1])) == RECORDS[:2]
    flipped = bytearray(whole)
    flipped[len(to_bytes(RECORDS[0])) + 20] ^= 1
    assert list(from_bytes(bytes(flipped))) == RECORDS[:1]
    assert list(from_bytes(whole + bytes(100))) == RECORDS
    assert len(caplog.records) == 3


def _write_until_killed(folder: str, end: Connection) -> None:
    mine = Journal(Path(folder))
    for number in range(1 << 40):
        mine.append(to_bytes(Record(Kind.DISPATCHED, "search", 1, 1, number)))
        if number % 100 == 0:
            end.send(number)


def test_what_a_killed_process_had_written_is_found_and_a_live_ones_is_left_alone(tmp_path: Path):
    mine, theirs = FORKSERVER.Pipe(duplex=False)
    process = FORKSERVER.Process(target=_write_until_killed, args=(str(tmp_path), theirs))
    process.start()
    theirs.close()
    written = [mine.recv() for _ in range(30)][-1]
    with orphans(tmp_path) as found:
        assert found == []
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    alive = Journal(tmp_path)
    alive.append(to_bytes(RECORDS[0]))
    with orphans(tmp_path) as found:
        ((name, files),) = found
        assert name != alive.name
        records = [record for _, path in files for record in from_bytes(path.read_bytes())]
        assert [record.amount for record in records] == list(range(len(records)))
        assert len(records) > written
        with orphans(tmp_path) as again:
            assert again == []  # somebody has it already
        for _, path in files:
            path.unlink()
    with orphans(tmp_path) as found:
        assert found == []
    assert all_records(alive) == RECORDS[:1]
    alive.close()
    assert list(tmp_path.iterdir()) == []


def left_behind(folder: Path, *records: Record) -> str:
    """A journal whose process has ended; returns its name."""
    gone = Journal(folder)
    gone.append(b"".join(map(to_bytes, records)))
    gone.close()
    return gone.name


def link(path: Path) -> None:
    path.symlink_to("/dev/zero")


STRAYS: dict[str, Callable[[Path], object]] = {
    "NAME.bak": Path.touch,
    "NAME.000001~": Path.touch,
    "NAME.1": Path.touch,
    "NAME.0000001": Path.touch,
    "NAME." + "9" * 200: Path.touch,
    "NAME.\u0663\u0663\u0663\u0663\u0663\u0663": Path.touch,
    "NAME.000002": Path.mkdir,
    "NAME.000003": link,
    "NAME.000004": os.mkfifo,
    "NAME.lock~": Path.touch,
    "NAME.lock.bak": Path.touch,
    ".nfs000000000001": Path.touch,
    ".nfs000.lock": Path.touch,
    "backup.lock": Path.touch,
    "00000000deadbeef.lock": Path.mkdir,
    "00000001deadbeef.lock": link,
    "00000002deadbeef.lock": os.mkfifo,
}


@pytest.mark.parametrize("stray", STRAYS)
def test_what_is_no_journal_is_told_of_once_and_stops_no_take_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, stray: str
):
    names = sorted(left_behind(tmp_path, record) for record in RECORDS)
    odd = tmp_path / stray.replace("NAME", names[1])
    STRAYS[stray](odd)
    logged: set[Path] = set()
    for _ in range(2):
        with orphans(tmp_path, logged) as found:
            assert [name for name, _ in found] == names
            assert [[number for number, _ in files] for _, files in found] == [[1]] * 3
            ours = [path for _, files in found for _, path in files]
            assert sum(len(list(from_bytes(path.read_bytes()))) for path in ours) == 3
    (message,) = caplog.messages
    assert str(odd) in message
    for path in ours:
        path.unlink()
    with orphans(tmp_path, logged):
        pass
    with orphans(tmp_path, logged) as found:
        assert found == []
    assert list(tmp_path.iterdir()) == [odd], "it is left alone"


def test_a_lock_that_cannot_be_opened_stops_no_take_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    first, second = sorted(left_behind(tmp_path, record) for record in RECORDS[:2])
    open_file = os.open

    def refuse(path: Path, *arguments: int) -> int:
        if Path(path).name == f"{first}.lock":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return open_file(path, *arguments)

    monkeypatch.setattr(os, "open", refuse)
    with orphans(tmp_path, set()) as found:
        assert [name for name, _ in found] == [second]
    (message,) = caplog.messages
    assert f"{first}.lock" in message
    assert "Permission denied" in message


def test_segments_are_taken_over_in_the_order_of_their_numbers(tmp_path: Path):
    name = left_behind(tmp_path, RECORDS[0])
    for number in (999_999, 1_000_000):
        (tmp_path / f"{name}.{number:06}").touch()
    with orphans(tmp_path) as found:
        ((_, files),) = found
        assert [number for number, _ in files] == [1, 999_999, 1_000_000]


def signed(body: bytes) -> bytes:
    """Something that has the digest of a record."""
    return journal._PREFIX.pack(xxhash.xxh3_64_intdigest(body), len(body)) + body


@pytest.mark.parametrize(
    "odd",
    [
        to_bytes(RECORDS[0]).replace(b"search", b"s\xffarch"),
        to_bytes(RECORDS[0]).replace(b"search", b"s\xed\xa0\x80ch"),  # half a surrogate pair
        to_bytes(RECORDS[0]._replace(day=(1 << 32) - 1)),
        to_bytes(RECORDS[0]._replace(number=(1 << 64) - 1)),
        to_bytes(RECORDS[1]._replace(amount=1 << 63)),
        to_bytes(RECORDS[0])[:10] + b"\x63" + to_bytes(RECORDS[0])[11:],
    ],
    ids=["bytes", "surrogate", "day", "number", "amount", "kind"],
)
def test_a_record_that_nobody_can_count_does_not_hide_those_behind_it(
    caplog: pytest.LogCaptureFixture, odd: bytes
):
    data = to_bytes(RECORDS[1]) + signed(odd[journal._PREFIX.size :]) + to_bytes(RECORDS[2])
    directory = Directory(None)
    directory.sync("left", (1, data), {})
    assert list(from_bytes(data)) == [RECORDS[1], RECORDS[2]]
    assert len(caplog.messages) == 2
    for row in directory.usage(None, 0):
        usage_row(row)
    directory.close()


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch, caplog):
    mine = Journal(tmp_path)
    mine.append(to_bytes(RECORDS[0]))
    write = os.write

    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:10]))  # what fits
    mine.append(to_bytes(RECORDS[1]))
    monkeypatch.undo()
    mine.append(to_bytes(RECORDS[2]))
    assert all_records(mine) == RECORDS
    assert "No space left" in caplog.text
    mine.append(to_bytes(RECORDS[0]))
    (path,) = (one for one in tmp_path.iterdir() if one.suffix != ".lock")
    assert path.stat().st_size == len(to_bytes(RECORDS[0]))  # the next segment is a file again
    mine.close()
