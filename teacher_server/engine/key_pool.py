"""Keeps the keys and values of texts that are being written, in pages that texts take as they grow.

Letters: G key heads, D size of a head, S tokens whose keys are written.
"""

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PAGE_TOKENS = 64
"""Tokens of a page. Texts with as many pages share one product of attention, which reads whole pages."""


class KeyShape(NamedTuple):
    """Describes what one layer keeps of a token."""

    num_heads: int
    key_size: int
    value_size: int


class KeyPool:
    """Holds pages of keys and values for all layers, and counts who uses each page.

    Several texts may share a page whose tokens they have in common. Thread-safe.
    """

    def __init__(
        self,
        shapes: Sequence[KeyShape],
        dtype: torch.dtype,
        device: torch.device,
        nbytes: int,
    ) -> None:
        """nbytes: bound of the memory of all pages. Raises ValueError if no page fits into it."""
        self.token_nbytes = page_nbytes(shapes, dtype) // PAGE_TOKENS
        self.num_pages = nbytes // page_nbytes(shapes, dtype)
        if self.num_pages < 1:
            raise ValueError(
                f"{nbytes} bytes hold no page of {PAGE_TOKENS} tokens, which takes "
                f"{self.token_nbytes * PAGE_TOKENS}"
            )

        def allocate(num_heads: int, size: int) -> Tensor:
            # Memory that nobody has written to costs nothing on a CPU; zeros would be written.
            shape = (self.num_pages, PAGE_TOKENS, num_heads, size)
            return torch.empty(shape, dtype=dtype, device=device)

        self.keys = [allocate(shape.num_heads, shape.key_size) for shape in shapes]
        self.values = [allocate(shape.num_heads, shape.value_size) for shape in shapes]
        self._lock = threading.Lock()
        self._free = list(range(self.num_pages))
        self._users = [0] * self.num_pages

    @property
    def num_free(self) -> int:
        """Pages that nobody uses."""
        return len(self._free)

    @property
    def max_tokens(self) -> int:
        """Tokens of all pages."""
        return self.num_pages * PAGE_TOKENS

    def take(self, count: int) -> list[int] | None:
        """Returns this many free pages, or None if there are fewer."""
        with self._lock:
            if count > len(self._free):
                return None
            pages = [self._free.pop() for _ in range(count)]
            for page in pages:
                self._users[page] = 1
            return pages

    def share(self, pages: Sequence[int]) -> None:
        """Counts one more user of pages that are in use. Raises ValueError for a free one."""
        with self._lock:
            if unused := [page for page in pages if not self._users[page]]:
                raise ValueError(f"nobody uses the pages {unused}")
            for page in pages:
                self._users[page] += 1

    def give_back(self, pages: Sequence[int]) -> None:
        """Ends one use of each page. Raises ValueError for a page that nobody uses."""
        with self._lock:
            for page in pages:
                if not self._users[page]:
                    raise ValueError(f"nobody uses the page {page}")
                self._users[page] -= 1
                if not self._users[page]:
                    self._free.append(page)

    def copy(self, source: int, target: int) -> None:
        """Makes a page hold what another one holds, so that two texts go on differently in it."""
        for kept in (*self.keys, *self.values):
            kept[target] = kept[source]

    def write(
        self, layer: int, slots_S: Tensor, keys_SGD: Tensor, values_SGD: Tensor, begun: Tensor
    ) -> None:
        """Stores keys and values of tokens; slots: page * PAGE_TOKENS + place in the page.

        begun: pages that hold nothing of their text yet and are not filled now. Whole pages are read,
        and what does not count is multiplied by 0: it must be finite, whoever had the page before.
        """
        if len(begun):
            self.keys[layer].index_fill_(0, begun, 0)
            self.values[layer].index_fill_(0, begun, 0)
        self.keys[layer].flatten(0, 1).index_copy_(0, slots_S, keys_SGD)
        self.values[layer].flatten(0, 1).index_copy_(0, slots_S, values_SGD)


def page_nbytes(shapes: Sequence[KeyShape], dtype: torch.dtype) -> int:
    """Returns the size of a page of all layers."""
    numbers = sum(shape.num_heads * (shape.key_size + shape.value_size) for shape in shapes)
    return numbers * dtype.itemsize * PAGE_TOKENS


def pages_for(num_tokens: int) -> int:
    """Returns how many pages hold this many tokens."""
    return -(-num_tokens // PAGE_TOKENS)


def slots_of(pages: Sequence[int], first: int, last: int) -> Tensor:
    """Returns (S,) int64: where the tokens `first` to `last` - 1 of a text are in its pages."""
    places = torch.arange(first, last)
    return torch.tensor(pages)[places // PAGE_TOKENS] * PAGE_TOKENS + places % PAGE_TOKENS
