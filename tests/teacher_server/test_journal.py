import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from teacher_server import journal
from teacher_server.journal import Journal, Kind, Record, from_bytes, orphans, to_bytes
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
