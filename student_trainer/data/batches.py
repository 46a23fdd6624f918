"""Cuts text into sequences of one length, in memory, and those into batches.

Shapes: N sequences of L tokens.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from tqdm import tqdm

from student_trainer.data.text import documents


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
