"""What teams have used is for the user alone who runs the service."""

import errno
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from teacher_server.ledger.directory import FILE_NAME, Directory
from teacher_server.ledger.journal import Journal, Kind, Record, to_bytes

CHARGE = to_bytes(Record(Kind.DISPATCHED, "search", 20_000, 1, 32))
SIDES = ("", "-wal", "-shm")


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes(folder: Path) -> dict[str, str]:
    """Of everything in a folder and below, by the path within it."""
    return {
        str(path.relative_to(folder)): f"{stat.S_IMODE(path.stat().st_mode):o}"
        for path in [folder, *folder.rglob("*")]
    }


@pytest.mark.parametrize("mask", [0o022, 0o000, 0o077])
def test_others_cannot_read_a_new_ledger(tmp_path: Path, mask: int):
    folder = tmp_path / "lib" / "ledger"
    with umask(mask):
        mine = Journal(folder / "journals")
        mine.append(CHARGE)
        directory = Directory(folder)
        found = modes(tmp_path / "lib")
        directory.close()
        mine.close()
    journals = "ledger/journals"
    assert {found.pop(path) for path in (".", "ledger", journals)} == {"700"}
    assert {f"ledger/{FILE_NAME}{side}" for side in SIDES} < found.keys()
    assert any(path.endswith(".lock") for path in found)
    assert any(path.endswith(".000001") for path in found)
    assert set(found.values()) == {"600"}, found


@pytest.mark.parametrize("mask", [0o022, 0o000])
@pytest.mark.parametrize("linked", [False, True])
def test_a_ledger_that_others_could_read_is_tightened_and_its_folder_left_alone(
    tmp_path: Path, mask: int, linked: bool
):
    folder = tmp_path / "ledger"
    with umask(mask):
        folder.mkdir(mode=0o755)
        home = tmp_path / "elsewhere" if linked else folder
        home.mkdir(mode=0o755, exist_ok=True)
        if linked:
            (folder / FILE_NAME).symlink_to(home / FILE_NAME)
        killed = Directory(folder)  # never closed: its -wal and -shm stay
        killed.sync("a", (1, CHARGE), {})
        for side in SIDES:
            (home / f"{FILE_NAME}{side}").chmod(0o644)
        mine = Directory(folder)
        found = modes(home)
        assert found.pop(".") == "755"
        assert modes(folder)["."] == "755"
        assert set(found.values()) == {"600"}, found
        (row,) = mine.usage(None, 0)
        assert row.tokens == 32
        mine.close()
        killed.close()


def test_a_ledger_of_somebody_else_is_used_and_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    Directory(tmp_path).close()
    (tmp_path / FILE_NAME).chmod(0o664)

    def refuse(path: Path, mode: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))

    monkeypatch.setattr(Path, "chmod", refuse)
    mine = Directory(tmp_path)
    mine.sync("a", (1, CHARGE), {})
    mine.close()
    (record,) = [one for one in caplog.records if one.levelno == logging.WARNING]
    assert str(tmp_path / FILE_NAME) in record.getMessage()
    assert "chmod 600" in record.getMessage()
