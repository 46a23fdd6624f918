"""Turns text files into packed token sequences, and those into batches.

Shapes: N sequences of L tokens.
"""

import glob
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from tqdm import tqdm

from student_trainer.teachers.layout import Layout

logger = logging.getLogger(__name__)

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
TEXT_RULE = 'data is UTF-8 text, or .jsonl with a "text" in each line'


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
        text = read_text(path)
        if path.suffix != ".jsonl":
            yield text
            continue
        # Not splitlines(): other line separators may stand in a JSON string.
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                document = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError, RecursionError):
                document = None
            if not isinstance(document, str):
                raise ValueError(
                    f"{path}, line {number}: expected an object with a 'text', got {line[:60]!r}"
                )
            yield SURROGATE.sub("\ufffd", document)


def read_text(path: Path) -> str:
    """Returns the content of a file. Raises ValueError, naming the byte, if it is not UTF-8 text."""
    content = path.read_bytes()
    try:
        text = content.decode()
        where = content.find(0)  # valid UTF-8, but no text contains it
    except UnicodeDecodeError as error:
        text, where = "", error.start
    if where < 0:
        return text.replace("\r\n", "\n").replace("\r", "\n")
    what = next((kind for magic, kind in KNOWN_FORMATS.items() if content.startswith(magic)), None)
    if what is None and content[8:10] == b'{"':
        what = "a safetensors file"
    advice = "Leave it out, or write its text to a .jsonl file."
    if what is None and content[where]:
        advice = "Leave it out, or convert it: iconv -f latin1 -t utf-8 (if it is Latin-1)."
    elif what == "UTF-16":
        advice = "Convert it: iconv -f utf-16 -t utf-8."
    raise ValueError(
        f"{path} is not text{f' but {what}' if what else ''}: byte {where:,} is "
        f"0x{content[where]:02x}; {TEXT_RULE}. {advice}"
    )


def look_through(files: Sequence[Path], *, label: str) -> None:
    """Reads all files and logs how much text they hold. Raises what `documents` raises.

    Tokenizing takes a hundred times as long, so a mistake in the last file shows up before that.
    """
    with tqdm(documents(files), desc=f"reading {label}", unit=" texts", leave=False) as texts:
        lengths = [len(text) for text in texts]
    logger.info(
        "%s: %s in %s of %s",
        label,
        f"{sum(lengths):,} characters",
        "1 text" if len(lengths) == 1 else f"{len(lengths):,} texts",
        "1 file" if len(files) == 1 else f"{len(files):,} files",
    )


def pack(files: Sequence[Path], tokenizer: Any, sequence_length: int, *, label: str) -> Tensor:
    """Returns all documents, one after the other, cut into (N, L) int64 sequences.

    Each document is what the tokenizer makes of it (with its begin token, if it adds one) and the
    end token. Tokens that do not fill a last sequence are dropped. Raises ValueError if there are
    too few for one.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    with tqdm(documents(files), desc=f"tokens of {label}", unit=" texts", leave=False) as texts:
        pieces = [
            torch.tensor(tokenizer(text, verbose=False).input_ids + end, dtype=torch.int64)
            for text in texts
        ]
    tokens = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)
    count = len(tokens) // sequence_length
    if count == 0:
        raise ValueError(
            f"{label} has {len(tokens)} tokens; one sequence needs at least {sequence_length}"
        )
    return tokens[: count * sequence_length].view(count, sequence_length)


def digest(sequences: Tensor) -> str:
    """Returns a digest of (N, L) ids, which differs for another corpus or tokenizer."""
    return xxhash.xxh3_128_hexdigest(sequences.numpy().tobytes())


def batches(
    sequences: Tensor, *, batch_size: int, steps: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Yields `steps` batches of (batch_size, L) input_ids, reshuffled in each epoch.

    "epoch" in a batch is the epoch of its first sequence.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(sequences), generator=generator)])
        chosen, order = order[:batch_size], order[batch_size:]
        yield {"input_ids": sequences[chosen], "epoch": step * batch_size // len(sequences)}


def share(
    batches: Iterable[Mapping[str, Any]], *, rank: int, num_ranks: int
) -> Iterator[dict[str, Any]]:
    """Yields the part of each batch that one rank trains on: every `num_ranks`-th sequence.

    All ranks iterate over the same batches, so a position in them means the same on every rank and
    with any number of ranks. "num_items" is the number of trained positions in the whole batch, by
    which each rank divides its loss. Raises ValueError for a batch with too few sequences.
    """
    for batch in batches:
        size = len(batch["input_ids"])
        if size < num_ranks:
            raise ValueError(
                f"a batch of {size} sequences cannot be shared by {num_ranks} workers: give "
                "batches of at least one sequence for each"
            )
        mine = {
            name: value[rank::num_ranks]
            if hasattr(value, "__len__") and len(value) == size
            else value
            for name, value in batch.items()
        }
        yield {**mine, "num_items": int(Layout.of(batch).trained.sum())}


def _list_files(folder: Path) -> list[Path]:
    """Returns the files in a folder and its subfolders that are not hidden."""
    files = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(root, name) for name in names if not name.startswith("."))
        files += [path for path in paths if path.is_file()]
    return files
