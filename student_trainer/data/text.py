"""Finds text files and reads the documents in them."""

import glob
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

KNOWN_FORMATS = {
    b"PAR1": "a Parquet file",
    b"\x1f\x8b": "compressed by gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"PK\x03\x04": "a zip archive",
    b"%PDF": "a PDF",
    b"ARROW1": "an Arrow file",
    b"\x93NUMPY": "a NumPy array",
    b"SQLite": "an SQLite database",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
"""First bytes of files that are passed as text by mistake."""
SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a surrogate pair, which JSON can contain and no tokenizer accepts."""
TEXT_RULE = "data is UTF-8 text, .jsonl (an object in each line) or .parquet"


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Returns the files that paths, folders and glob patterns name, sorted, each once.

    A folder stands for all files in it and in its subfolders, except hidden ones (.git); those must
    be named themselves. Raises FileNotFoundError for a pattern that names nothing.
    """
    files: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            matches = _list_files(path)
        else:
            named = (Path(match) for match in glob.glob(str(path), recursive=True))
            matches = [match for match in named if match.is_file()]  # glob finds folders too
        if not matches:
            is_hidden = path.is_dir() and any(entry.is_file() for entry in path.rglob("*"))
            hidden = ": all files in it are hidden" if is_hidden else ""
            raise FileNotFoundError(f"no file matches {pattern!r}{hidden}")
        files.update(matches)
    return sorted(files)


def documents(files: Sequence[Path]) -> Iterator[str]:
    """Yields the texts in files: of a .jsonl file the "text" of each line, of others the content.

    Raises ValueError, naming the place, for a file that is not UTF-8 text and for a line that is
    not an object with a text.
    """
    for path in files:
        if path.suffix != ".jsonl":
            yield read_text(path)
            continue
        for place, row in read_json_lines(path):
            if not isinstance(row.get("text"), str):
                raise ValueError(f"{place}: expected an object with a 'text', got {_show(row)}")
            yield row["text"]


def read_json_lines(path: Path | str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the object in each line of a .jsonl file or URL, with the place where it stands.

    Raises ValueError, naming the place, for what is not UTF-8 text and for a line that is no object.
    """
    with open_binary(path) as file:
        head, start = b"", 0
        # Not splitlines(): other line separators may stand in a JSON string.
        for number, line in enumerate(file, 1):
            head = head or line
            text = _decode(line, path, start, head)
            start += len(line)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError):
                row = None
            place = f"{path}, line {number}"
            if not isinstance(row, dict):
                shown = text.rstrip("\r\n")[:60]
                raise ValueError(f"{place}: expected an object with a 'text', got {shown!r}")
            yield place, _without_surrogates(row) if "\\ud" in text.lower() else row


def read_text(path: Path | str) -> str:
    """Returns the content of a file or URL. Raises ValueError, naming the byte, if it is not UTF-8
    text."""
    with open_binary(path) as file:
        content = file.read()
    text = _decode(content, path, 0, content)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def open_binary(path: Path | str) -> Any:
    """Opens a file, or a URL that fsspec knows, for reading bytes. Raises OSError."""
    if isinstance(path, Path):
        return path.open("rb")
    import fsspec

    opened: Any = fsspec.open(path, "rb")
    return opened.open()


def _decode(content: bytes, path: Path | str, start: int, head: bytes) -> str:
    """Returns the text of a part of a file that begins at byte `start`; head: the file's first bytes.

    Raises ValueError if it is not UTF-8 text.
    """
    try:
        text = content.decode()
        where = content.find(0)  # valid UTF-8, but no text contains it
    except UnicodeDecodeError as error:
        text, where = "", error.start
    if where < 0:
        return text
    what = next((kind for magic, kind in KNOWN_FORMATS.items() if head.startswith(magic)), None)
    if what is None and head[8:10] == b'{"':
        what = "a safetensors file"
    advice = "Leave it out, or write its text to a .jsonl file."
    if what == "a Parquet file":
        advice = "Name it *.parquet."
    elif what is None and content[where]:
        advice = "Leave it out, or convert it: iconv -f latin1 -t utf-8 (if it is Latin-1)."
    elif what == "UTF-16":
        advice = "Convert it: iconv -f utf-16 -t utf-8."
    raise ValueError(
        f"{path} is not text{f' but {what}' if what else ''}: byte {start + where:,} is "
        f"0x{content[where]:02x}; {TEXT_RULE}. {advice}"
    )


def _show(row: Any) -> str:
    """Returns the beginning of a row as JSON."""
    return repr(json.dumps(row, ensure_ascii=False)[:60])


def _without_surrogates(value: Any) -> Any:
    """Returns a JSON value whose strings any tokenizer accepts."""
    if isinstance(value, str):
        return SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_without_surrogates(one) for one in value]
    if isinstance(value, dict):
        return {_without_surrogates(k): _without_surrogates(v) for k, v in value.items()}
    return value


def _list_files(folder: Path) -> list[Path]:
    """Returns the files in a folder and its subfolders that are not hidden."""
    files = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(root, name) for name in names if not name.startswith("."))
        files += [path for path in paths if path.is_file()]
    return files
