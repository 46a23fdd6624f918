"""Files and folders appear whole or not at all, with the permissions asked for."""

import os
import stat
import threading
import time
from pathlib import Path

import pytest

from logitstream.files import (
    cache_folder,
    make_private,
    remove_partial_files,
    whole_folder,
    write_atomically,
)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(("mode", "expected"), [(None, 0o640), (0o600, 0o600), (0o666, 0o666)])
def test_a_file_is_replaced_with_the_mode_asked_for_or_the_umasks(
    tmp_path: Path, mode: int | None, expected: int
):
    path = tmp_path / "file"
    before = os.umask(0o027)
    try:
        for content in ("old", b"new", memoryview(b"newest")):
            write_atomically(path, content, mode)
            assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
            assert mode_of(path) == expected
    finally:
        os.umask(before)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_file_and_its_folder_are_forced_to_the_disk(tmp_path: Path, monkeypatch):
    forced = []

    def note(handle: int) -> None:
        forced.append(Path(os.readlink(f"/proc/self/fd/{handle}")))

    monkeypatch.setattr(os, "fsync", note)
    write_atomically(tmp_path / "file", b"content")
    assert forced[0].name.startswith(".file.")
    assert forced[1:] == [tmp_path]
    forced.clear()
    with whole_folder(tmp_path / "folder") as partial:
        (partial / "inside").mkdir()
        (partial / "inside" / "file").write_text("content")
    assert {*forced} == {partial, partial / "inside", partial / "inside" / "file", tmp_path}
    assert forced[-1] == tmp_path


def test_what_cannot_be_written_changes_nothing(tmp_path: Path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(handle: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    with (
        pytest.raises(OSError, match="No space left"),
        whole_folder(tmp_path / "folder") as partial,
    ):
        (partial / "file").write_text("content")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_threads_that_write_one_file_do_not_disturb_each_other(tmp_path: Path):
    path = tmp_path / "file"
    contents = [bytes([number]) * 100_000 for number in range(4)]

    def write(content: bytes) -> None:
        for _ in range(20):
            write_atomically(path, content)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            assert path.read_bytes() in contents
    assert path.read_bytes() in contents
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_folder_replaces_the_one_before_and_an_error_leaves_that(tmp_path: Path):
    path = tmp_path / "above" / "folder"
    (tmp_path / "above" / ".folder.partial").mkdir(parents=True)
    (tmp_path / "above" / ".folder.partial" / "left").touch()
    for name in ("first", "second"):
        with whole_folder(path) as partial:
            (partial / name).touch()
        assert [entry.name for entry in path.iterdir()] == [name]
    with pytest.raises(FileExistsError), whole_folder(path) as partial:
        partial.mkdir()
    assert [entry.name for entry in path.iterdir()] == ["second"]
    assert [entry.name for entry in path.parent.iterdir()] == ["folder"]


def test_only_what_writers_have_abandoned_is_removed(tmp_path: Path, monkeypatch):
    def keep(self: Path) -> None:
        raise OSError(5, os.strerror(5))

    # As a kill does: the partial file stays.
    with monkeypatch.context() as killed:
        killed.setattr(os, "fsync", keep)
        killed.setattr(Path, "unlink", keep)
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output"):
                write_atomically(tmp_path / "shard", b"content")
    mine, old = sorted(tmp_path.iterdir())
    os.utime(old, (time.time() - 700, time.time() - 700))
    exited = mine.with_name(mine.name.replace(f".{os.getpid()}.", f".{2**22 + 1}."))
    elsewhere = tmp_path / f".shard.another.{2**22 + 1}.0a0a0a0a.partial"
    exited.touch()
    elsewhere.touch()
    remove_partial_files(tmp_path)
    assert {*tmp_path.iterdir()} == {mine, elsewhere}


def test_private_folders_are_for_their_owner_and_others_stay_as_they_are(tmp_path: Path):
    (tmp_path / "open").mkdir(mode=0o755)
    make_private(tmp_path / "open" / "one" / "two")
    assert mode_of(tmp_path / "open") == 0o755
    assert mode_of(tmp_path / "open" / "one") == mode_of(tmp_path / "open" / "one" / "two") == 0o700
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        make_private(tmp_path / "file")


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("LOGITSTREAM_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("LOGITSTREAM_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "logitstream"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "logitstream"
