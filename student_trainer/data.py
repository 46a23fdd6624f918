"""Text files to packed token sequences.

Letters: N sequences, L tokens of each.
"""

import glob
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from tqdm import tqdm

from student_trainer.streaming import Layout


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Files named by paths, folders (all files below) and glob patterns, sorted, each once.

    Raises FileNotFoundError for a pattern that names nothing.
    """
    found: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            matches = [one for one in path.rglob("*") if one.is_file()]
        else:
            matches = [Path(one) for one in glob.glob(str(path), recursive=True)]
        if not matches:
            raise FileNotFoundError(f"no file matches {pattern!r}")
        found.update(matches)
    return sorted(found)


SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a pair, which JSON can write and no tokenizer takes; bytes that are no text become the same."""


def documents(files: Sequence[Path]) -> Iterator[str]:
    """The texts of files: a .jsonl file holds one object with a "text" per line, others are one text."""
    for path in files:
        text = path.read_text(encoding="utf-8", errors="replace")
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
