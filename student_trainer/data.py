"""Text files to packed token sequences.

Letters: N sequences, L tokens of each.
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
    b"\x93NUMPY": "an array of NumPy",
    b"SQLite": "a database of SQLite",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
"""How files begin that are given for text by mistake."""
TEXT_RULE = 'data is UTF-8 text, or .jsonl with a "text" in each line'


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Files named by paths, folders (all files below) and glob patterns, sorted, each once.

    Hidden files and folders (.git) below a folder are left out, unless they are named themselves.
    Raises FileNotFoundError for a pattern that names nothing.
    """
    found: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            matches = _below(path)
        else:  # which finds folders too
            named = (Path(one) for one in glob.glob(str(path), recursive=True))
            matches = [one for one in named if one.is_file()]
        if not matches:
            is_hidden = any(one.is_file() for one in path.rglob("*")) if path.is_dir() else False
            hidden = ": all files in it are hidden" if is_hidden else ""
            raise FileNotFoundError(f"no file matches {pattern!r}{hidden}")
        found.update(matches)
    return sorted(found)


def _below(folder: Path) -> list[Path]:
    """All files in a folder and those below it that are not hidden."""
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = [one for one in folders if not one.startswith(".")]
        paths = (Path(root, name) for name in names if not name.startswith("."))
        found += [path for path in paths if path.is_file()]
    return found


SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a pair, which JSON can write and no tokenizer takes."""


def documents(files: Sequence[Path]) -> Iterator[str]:
    """The texts of files: a .jsonl file holds one object with a "text" per line, others are one text.

    Raises ValueError, naming the place, for a file that is no UTF-8 text and a line that is no such
    object.
    """
    for path in files:
        text = read_text(path)
        if path.suffix != ".jsonl":
            yield text
            continue
        for number, line in enumerate(text.split("\n"), 1):  # others may stand in a JSON string
            if not line.strip():
                continue
            try:
                found = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError, RecursionError):
                found = None
            if not isinstance(found, str):
                raise ValueError(
                    f"{path}, line {number}: expected an object with a 'text', got {line[:60]!r}"
                )
            yield SURROGATE.sub("\ufffd", found)


def read_text(path: Path) -> str:
    """The content of a file. Raises ValueError, naming the byte, if it is no UTF-8 text."""
    content = path.read_bytes()
    try:
        text = content.decode()
        where = content.find(0)  # UTF-8 allows it, text has none
    except UnicodeDecodeError as error:
        text, where = "", error.start
    if where < 0:
        return text.replace("\r\n", "\n").replace("\r", "\n")
    what = next((one for begin, one in KNOWN_FORMATS.items() if content.startswith(begin)), None)
    if what is None and content[8:10] == b'{"':
        what = "a safetensors file"
    advice = "Leave it out, or write its text to a .jsonl file."
    if what is None and content[where]:
        advice = "Leave it out, or convert it: iconv -f latin1 -t utf-8 (if Latin-1 is what it is)."
    elif what == "UTF-16":
        advice = "Convert it: iconv -f utf-16 -t utf-8."
    raise ValueError(
        f"{path} is not text{f' but {what}' if what else ''}: byte {where:,} is "
        f"0x{content[where]:02x}; {TEXT_RULE}. {advice}"
    )


def look_through(files: Sequence[Path], *, label: str) -> None:
    """Reads all files and logs how much there is. Raises what `documents` does.

    So that the last file is known to be text before the first is tokenized, which takes a hundred
    times as long.
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
    """(N, L) int64: all documents, one after the other, cut into sequences of L tokens.

    Each document is what the tokenizer makes of it (with its begin token, if it adds one) and the
    end token. What does not fill a last sequence is left out. Raises ValueError if nothing is left.
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
            f"{label} has {len(tokens)} tokens; at least one sequence of {sequence_length} is needed"
        )
    return tokens[: count * sequence_length].view(count, sequence_length)


def digest(sequences: Tensor) -> str:
    """A short name of these (N, L) ids: another corpus or tokenizer has another."""
    return xxhash.xxh3_128_hexdigest(sequences.numpy().tobytes())


def batches(
    sequences: Tensor, *, batch_size: int, steps: int, seed: int
) -> Iterator[dict[str, Any]]:
    """`steps` batches of (batch_size, L) input_ids: shuffled, and shuffled anew in each epoch.

    Each says under "epoch" which one its first sequence is of.
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
    """Of each batch, the sequences of one rank: every `num_ranks`-th, beginning with its own.

    All ranks go through the same batches, so that a position in them means the same on each, and
    with any other number of ranks. Each share says under "num_items" how many positions of the
    whole batch are trained: the loss of a rank is to be divided by that. Raises ValueError for a
    batch with too few sequences.
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
