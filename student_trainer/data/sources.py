"""Finds what the names of data stand for: files, folders, URLs, and data sets with splits.

A source is a list of shards, each of which is read from its beginning to its end, by one process.
"""

import glob
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from student_trainer.data.text import find_files, read_json_lines, read_text

Rows = Iterator[tuple[str, dict[str, Any]]]
"""Each row of a data set with the place where it stands, for messages."""
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")
BESIDE, OF_RECORDS = "__record__", {"key", "row_mask", "targets"}
"""Folder in a record for what is no data, and columns that show a record, of no use here."""
SUFFIXES = (".txt", ".jsonl", ".parquet")


class Shard(Protocol):
    """A part of the data that can be read alone."""

    @property
    def group(self) -> str:
        """Shards of one group have the same columns."""
        ...

    @property
    def name(self) -> str:
        """What to call it in messages."""
        ...

    @property
    def stamp(self) -> tuple[Any, ...]:
        """Where it is and what shows that it changed: what is in a cache belongs to this."""
        ...

    @property
    def identity(self) -> tuple[Any, ...]:
        """What is known of its content without reading it; the same when it is moved."""
        ...

    def rows(self) -> Rows:
        """Reads it. Raises ValueError, naming the place, and OSError."""
        ...


@dataclass(frozen=True, slots=True)
class FileShard:
    """A file, or a URL that fsspec can open."""

    path: Path | str
    nbytes: int
    changed: Any
    """When it was written, or what the file system tells of it."""

    @property
    def stamp(self) -> tuple[Any, ...]:
        path = self.path.resolve() if isinstance(self.path, Path) else self.path
        return str(path), self.nbytes, self.changed

    @property
    def identity(self) -> tuple[Any, ...]:
        return Path(self.path).name, self.nbytes

    @property
    def group(self) -> str:
        suffix = Path(self.path).suffix
        return suffix if suffix in (".jsonl", ".parquet") else ".txt"

    @property
    def name(self) -> str:
        return str(self.path)

    def rows(self) -> Rows:
        if self.group == ".jsonl":
            yield from read_json_lines(self.path)
        elif self.group == ".parquet":
            import datasets

            options: Any = {"data_files": str(self.path), "split": "train", "streaming": True}
            found: Any = datasets.load_dataset("parquet", **options)
            names = set(found.column_names or ())
            if names >= OF_RECORDS:  # of a record: what is large in it is not read
                read = sorted(names - OF_RECORDS)
                found = datasets.load_dataset("parquet", columns=read, **options)
            yield from _number_rows(found, str(self.path))
        else:
            yield str(self.path), {"text": read_text(self.path)}


@dataclass(frozen=True, slots=True)
class SplitShard:
    """A part of a split of a data set: of the hub, or a folder that is laid out like one."""

    data_set: str
    """Its name or folder, with its configuration behind a colon if that is given."""
    split: str
    streaming: bool
    version: str
    number: int = 0
    count: int = 1
    """How many such parts there are."""

    @property
    def stamp(self) -> tuple[Any, ...]:
        return (self.data_set, *self.identity)

    @property
    def identity(self) -> tuple[Any, ...]:
        return self.split, self.version, self.number

    @property
    def group(self) -> str:
        return self.data_set

    @property
    def name(self) -> str:
        return f"{self.data_set} ({self.split})"

    def rows(self) -> Rows:
        found = _load(self.data_set, self.split, self.streaming)
        if self.count > 1:
            found = found.shard(self.count, self.number)
        yield from _number_rows(found, self.name)


def find_shards(names: Sequence[str], *, split: str, streaming: bool) -> list[Shard]:
    """Finds what names stand for: local files first, sorted, each once; then the rest as named.

    A name is a file, folder or glob pattern, here or at a URL, or a data set of the hub with or
    without a configuration (NAME, ORG/NAME, ORG/NAME:CONFIG), of which `split` is read; a folder with
    Parquet files is read as such a data set, and a record as its shards. Raises FileNotFoundError, ValueError.
    """
    patterns: list[str] = []
    others: list[Shard] = []
    for name in names:
        if "://" in name:
            others += _find_at_url(name)
        elif shards := _find_record(name):
            others += shards
        elif (folder := _find_folder(name)) is not None:
            others += _find_split(folder, split, streaming)
        elif _is_hub_name(name):
            others += _find_split(name, split, streaming)
        else:
            patterns.append(name)
    return [_of_file(path) for path in find_files(patterns)] + others


def _of_file(path: Path) -> FileShard:
    status = path.stat()
    return FileShard(path, status.st_size, status.st_mtime_ns)


def _find_at_url(url: str) -> list[Shard]:
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ValueError(f"{url}: {error}") from None
    if glob.has_magic(path):
        found = system.glob(path)
    elif system.isdir(path):
        found = [
            one
            for one in system.find(path)
            if not any(part.startswith((".", BESIDE)) for part in one[len(path) :].split("/"))
        ]
    else:
        found = [path] if system.exists(path) else []
    found = sorted(one for one in found if not system.isdir(one))
    if not found:
        raise FileNotFoundError(f"no file matches {url!r}")
    return [
        FileShard(system.unstrip_protocol(one), system.info(one)["size"], system.ukey(one))
        for one in found
    ]


def _find_record(name: str) -> list[Shard]:
    """Returns the shards of a record on this machine, in their order; none of another folder.

    `datasets` would copy them, with all targets, and read those that were set aside too.
    """
    folder = Path(name).expanduser()
    if not (folder / BESIDE).is_dir():
        return []
    return [_of_file(path) for path in sorted(folder.glob("shard-*.parquet"))]


def _find_folder(name: str) -> str | None:
    """Returns the folder of a data set in Parquet files, with its configuration, if there is one."""
    for path, config in ((name, ""), (name.rpartition(":")[0], name.rpartition(":")[2])):
        folder = Path(path).expanduser()
        if path and folder.is_dir() and next(folder.rglob("*.parquet"), None) is not None:
            others = [one for one in find_files([str(folder)]) if one.suffix in (".txt", ".jsonl")]
            if others:
                raise ValueError(
                    f"{folder} has Parquet files and {others[0].name}: name those that should be read, "
                    f"such as {folder}/*.parquet"
                )
            return f"{folder}:{config}" if config else str(folder)
    return None


def _is_hub_name(name: str) -> bool:
    is_here = Path(name).expanduser().exists() or glob.has_magic(name)
    return not is_here and not name.endswith(SUFFIXES) and HUB_NAME.fullmatch(name) is not None


def _find_split(data_set: str, split: str, streaming: bool) -> Sequence[Shard]:
    if not split:
        raise ValueError(f"which split of the data set {data_set}? Give --held-out-split too")
    found = _load(data_set, split, streaming)
    if not streaming:
        return [SplitShard(data_set, split, streaming, found._fingerprint)]
    import datasets

    name, config = _name_and_config(data_set)
    version = str(datasets.load_dataset_builder(name, config).hash)
    count = max(found.num_shards, 1)
    return [
        SplitShard(data_set, split, streaming, version, number, count) for number in range(count)
    ]


def _load(data_set: str, split: str, streaming: bool) -> Any:
    """Loads a split of a data set. Raises ValueError, FileNotFoundError, saying what to do."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    name, config = _name_and_config(data_set)
    is_folder = Path(name).is_dir()
    try:
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except (DatasetNotFoundError, OSError) as error:  # also no network
        if is_folder:
            raise
        raise FileNotFoundError(
            f"no file matches {data_set!r}, and the data set {name} could not be fetched from the "
            f"Hugging Face hub: {_first_line(error)}. If it is one, download it where there is "
            f"network (hf download {name} --repo-type dataset --local-dir FOLDER) and give --data "
            "FOLDER; if it is private, log in (hf auth login)."
        ) from None
    except ValueError as error:  # no such configuration or split, which it lists
        raise ValueError(f"data set {data_set}, split {split!r}: {_first_line(error)}") from None


def _name_and_config(data_set: str) -> tuple[str, str | None]:
    name, _, config = data_set.partition(":")
    return name, config or None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _number_rows(found: Any, name: str) -> Rows:
    for number, row in enumerate(found, 1):
        yield f"row {number} of {name}", row
