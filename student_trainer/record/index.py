"""Finds recorded sequences by key, in arrays that hold millions of them in memory."""

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from student_trainer.teachers.request import Answer


@dataclass(slots=True, eq=False)
class Entry:
    """One draw of a sequence: sealed, in memory until it is sealed, or awaited."""

    seed: int
    epoch: int
    row_mask: bytes | None
    shard: str = ""
    row: int = 0
    """Row in the shard."""
    payloads: tuple[bytes, ...] = ()
    """The targets, until they are sealed."""
    pending: "Future[Answer] | None" = None
    """Future of the request that waits for the live teacher; None once the answer is here."""


@dataclass(slots=True, eq=False)
class Index:
    """Arrays of all rows in sealed shards, sorted by key; 40 bytes per row."""

    names: list[str] = field(default_factory=list)
    dropped: set[int] = field(default_factory=set)
    masks: dict[tuple[int, int], bytes] = field(default_factory=dict)
    """Row masks by shard and row; rows that were recorded whole have none."""
    high: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    low: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    draws: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.uint64))
    """(N, 2): seed and epoch."""
    places: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.int32))
    """(N, 2): number of the shard, and row in it."""
    num_draws: int = 1
    """Draws per sequence, from the highest recorded epoch."""
    parts: list[tuple[np.ndarray, ...]] = field(default_factory=list)
    """Arrays of the shards added since the last `build`."""

    def add(self, name: str, identities: Any) -> None:
        """Adds the rows of a shard from its IDENTITY columns; `find` sees them after `build`."""
        number = len(self.names)
        keys = b"".join(identities.column("key").to_pylist())
        halves = np.frombuffer(keys, "<u8").reshape(-1, 2)
        draws = [identities.column(column).to_numpy() for column in ("seed", "epoch")]
        places = np.stack([np.full(len(halves), number), np.arange(len(halves))], 1)
        mask = identities.column("row_mask")
        for row in np.flatnonzero(mask.is_valid().to_numpy()):
            self.masks[number, int(row)] = mask[int(row)].as_py()
        self.names.append(name)
        self.parts.append((halves[:, 0], halves[:, 1], np.stack(draws, 1), places.astype(np.int32)))

    def build(self) -> None:
        """Sorts the rows that were added."""
        if not self.parts:
            return
        high, low, draws, places = (np.concatenate(part) for part in zip(*self.parts, strict=True))
        order = np.argsort(high, kind="stable")
        self.high, self.low, self.draws, self.places = (
            array[order] for array in (high, low, draws, places)
        )
        self.num_draws = 1 + int(self.draws[:, 1].max(initial=0))
        self.parts.clear()

    def find(self, key: bytes) -> list[Entry]:
        """Returns every draw of the sequence with this key."""
        high, low = np.frombuffer(key, "<u8")
        entries = []
        start = int(np.searchsorted(self.high, high))
        for index in range(start, len(self.high)):
            if self.high[index] != high:
                break
            shard, row = self.places[index].tolist()
            if self.low[index] == low and shard not in self.dropped:
                seed, epoch = self.draws[index].tolist()
                mask = self.masks.get((shard, row))
                entries.append(Entry(seed, epoch, mask, self.names[shard], row))
        return entries

    def drop(self, name: str) -> bool:
        """Forgets the rows of a shard. Returns whether there were any."""
        if name not in self.names or self.names.index(name) in self.dropped:
            return False
        self.dropped.add(self.names.index(name))
        return True

    def __len__(self) -> int:
        if not self.dropped:
            return len(self.places)
        return int((~np.isin(self.places[:, 0], list(self.dropped))).sum())
