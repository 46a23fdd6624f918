"""Lays sequences out back to back, so that one forward pass scores all of them without padding.

Letters: T tokens of a pack, N sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from teacher_server.engine.batch import RowRequest
from teacher_server.engine.products import LARGE, SMALL, Tiling

ROW_MULTIPLE = SMALL
"""A pack on a CPU is filled up to a multiple of this, so that short sequences need no other order
to fill their tiles. It must be a multiple of 64: elementwise functions are computed eight or sixteen
numbers at a time and the rest one by one, which rounds differently, and so the work of each of two
threads must be a whole number of vectors."""
SHORT = 256
"""Sequences of at most this many tokens have packs of their own on a GPU, of this many tokens: one
short request on an idle replica does not pay for a full pack."""
MIN_SEQUENCE_TOKENS = 2
"""Shortest sequence that has a row to score."""


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """Holds sequences that one forward pass scores."""

    token_ids: Tensor
    """(T,) int64; padding has id 0."""
    positions: Tensor
    """(T,) int64: the place of each token in its sequence. Padding has 0: larger ones may be outside
    of a model's context, or choose other frequencies of RoPE for all tokens."""
    cu_seqlens: Tensor
    """(N+1,) int32: where each sequence begins, and the end of the last; the end is repeated where
    the number of segments is fixed."""
    members: tuple[int, ...]
    """Which requests of the batch the sequences are of."""
    starts: tuple[int, ...]
    """First row of each sequence."""
    num_tokens: int
    """Without padding."""
    tiling: Tiling | None
    """How products are made; None: in one piece."""


class Packer:
    """Divides the sequences of a batch into packs.

    On a CPU all of them share one pack, of as many tokens as they have, and products are tiled. On a
    GPU a pack has `pack_tokens` tokens or, for sequences of up to SHORT tokens, SHORT, whatever is
    in it: so its graph is compiled once, and which shape computes a sequence depends on the sequence
    alone. `exact` is level `bytes`; without it, nothing is tiled, and an underfull pack has the next
    power of two of tokens.
    """

    def __init__(
        self,
        device_type: str,
        *,
        pack_tokens: int,
        exact: bool = True,
        divide_at: int | None = None,
        tiles: tuple[int, int] = (LARGE, SMALL),
    ) -> None:
        """divide_at: longer sequences never share a pack with others, which longrope needs.

        tiles: rows of a large and a small one.
        """
        self._tiles = tiles
        self.is_fixed = device_type != "cpu"
        self.pack_tokens = pack_tokens
        self._exact = exact
        self._divide_at = divide_at

    @property
    def shapes(self) -> list[int]:
        """Tokens of the packs of fixed size, and no others; none on a CPU."""
        if not self.is_fixed:
            return []
        sizes = {min(SHORT, self.pack_tokens), self.pack_tokens}
        if not self._exact:
            size = SHORT
            while size < self.pack_tokens:
                sizes.add(size)
                size *= 2
        return sorted(sizes)

    def pack(self, requests: Sequence[RowRequest]) -> list[Pack]:
        """Divides requests into packs; only sequences longer than a pack make one exceed it."""
        open_packs: dict[tuple[int, bool], list[int]] = {}
        room: dict[tuple[int, bool], int] = {}
        packs: list[Pack] = []
        for index, request in enumerate(requests):
            length = len(request.token_ids)
            size = self.pack_tokens
            if self.is_fixed and length <= SHORT:
                size = min(SHORT, size)
            key = (size, self._divide_at is not None and length > self._divide_at)
            if key in open_packs and length > room[key]:
                packs.append(self._lay_out(requests, open_packs.pop(key), size))
            if key not in open_packs:
                open_packs[key], room[key] = [], size
            open_packs[key].append(index)
            room[key] -= length
        packs += [self._lay_out(requests, some, size) for (size, _), some in open_packs.items()]
        return packs

    def _lay_out(self, requests: Sequence[RowRequest], members: list[int], size: int) -> Pack:
        sequences = [requests[index].token_ids for index in members]
        lengths = [len(sequence) for sequence in sequences]
        num_tokens = sum(lengths)
        num_rows = self._num_rows(num_tokens, size)
        padding = num_rows - num_tokens
        ends = torch.tensor([0, *lengths]).cumsum(0)
        starts = ends[:-1].tolist()
        if self.is_fixed:  # one more segment for the padding, and the same number in every pack
            most = size // SHORT if size > SHORT else size // MIN_SEQUENCE_TOKENS
            ends = torch.cat([ends, torch.full((most + 2 - len(ends),), num_rows)])
        is_whole = self.is_fixed or not self._exact
        filled = [*sequences, torch.zeros(padding, dtype=torch.int64)]
        return Pack(
            token_ids=torch.cat(filled),
            positions=torch.cat(
                [*(torch.arange(n) for n in lengths), torch.zeros(padding, dtype=torch.int64)]
            ),
            cu_seqlens=ends.to(torch.int32),
            members=tuple(members),
            starts=tuple(starts),
            num_tokens=num_tokens,
            tiling=None if is_whole else Tiling.of([*lengths, padding], *self._tiles),
        )

    def _num_rows(self, num_tokens: int, size: int) -> int:
        if not self.is_fixed:
            return -(-num_tokens // ROW_MULTIPLE) * ROW_MULTIPLE
        if self._exact:
            return size
        return min(size, max(SHORT, 1 << (num_tokens - 1).bit_length()))
