"""Lets several processes select from logits whose columns are divided among them.

Letters: R rows, V ids of the whole vocabulary, P parts, B blocks of a part, H blocks picked from each
row, W columns of a block, M ids per row, N draws per row.

Each process holds the logits of consecutive ids. They tell each other the sums and maxima of their
blocks, then the logits of the few blocks that those point to; only the kind `dense`, which is all of
the logits, gathers all of them. Every part counts as many blocks as the largest one has: block b of
part p has the number p * B + b, and one that a part does not have holds no mass.
"""

from abc import ABC, abstractmethod
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from logit_codec.blocks import BLOCK, block_logits, num_blocks


class VocabularyPart(ABC):
    """Says which ids this process holds, and exchanges tensors with those that hold the others.

    Every process of a group makes the same calls in the same order, with tensors of the same shapes.
    """

    def __init__(self, index: int, bounds: tuple[int, ...]) -> None:
        """bounds: the first id of each part, and V. Raises ValueError unless they ascend from 0."""
        if len(bounds) < 2 or bounds[0] != 0 or list(bounds) != sorted(set(bounds)):
            raise ValueError(f"the bounds of parts must ascend from 0, got {bounds}")
        self.index = index
        self.bounds = bounds
        self.vocab_size = bounds[-1]
        self.first_id = bounds[index]
        self.num_ids = bounds[index + 1] - self.first_id
        self.most_ids = max(end - start for start, end in pairwise(bounds))
        self.num_blocks = num_blocks(self.most_ids)
        """B."""
        self._places_on: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    @abstractmethod
    def gather(self, tensor: Tensor) -> Tensor:
        """Returns (P, ...): the tensors of all parts, in the order of the parts."""

    @abstractmethod
    def add(self, tensor: Tensor) -> Tensor:
        """Adds up the tensors of all parts, in place, and returns the sum."""

    def gather_blocks(
        self, peak_R: Tensor, sums_RB: Tensor, maxima_RB: Tensor | None, plogp_RB: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Gathers (R, P) peaks and (R, P, B) of each of the others; all travel as one tensor.

        They are of the blocks that this part has; one that it lacks gets no mass.
        """
        missing = self.num_blocks - num_blocks(self.num_ids)
        fills = [(sums_RB, 0.0), (maxima_RB, -torch.inf), (plogp_RB, 0.0)]
        padded = [
            pad(values, (0, missing), value=fill) for values, fill in fills if values is not None
        ]
        all_RPC = self.gather(torch.cat([peak_R[:, None], *padded], 1)).transpose(0, 1)
        sizes = [1, *(0 if values is None else self.num_blocks for values, _ in fills)]
        peak_RP1, sums, maxima, plogp = all_RPC.split(sizes, 2)
        return (
            peak_RP1[:, :, 0],
            sums,
            None if maxima_RB is None else maxima,
            None if plogp_RB is None else plogp,
        )

    def blocks_of(self, ids_RM: Tensor) -> Tensor:
        """Returns (R, M) numbers of the blocks that hold these ids."""
        part_RM = self._parts_of(ids_RM)
        starts_P, *_ = self._places(ids_RM.device)
        return part_RM * self.num_blocks + (ids_RM - starts_P[part_RM]) // BLOCK

    def block_logits(
        self, logits: Tensor, blocks_RH: Tensor, *, is_shared: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Gathers what `blocks.block_logits` does, (R, H, W) float32 and (R, H) first ids.

        is_shared: from all parts; else the logits of blocks of other parts are 0.
        """
        part_RH, local_RH = blocks_RH // self.num_blocks, blocks_RH % self.num_blocks
        is_own_RH = part_RH == self.index
        most = num_blocks(self.num_ids) - 1
        values_RHW, _ = block_logits(logits, local_RH.clamp(max=most))
        values_RHW.masked_fill_((local_RH > most)[:, :, None], -torch.inf)
        values_RHW.masked_fill_(~is_own_RH[:, :, None], 0.0)
        # Where a last block would have fewer ids it begins earlier, as `blocks.block_logits` has it.
        starts_P, _, last_P = self._places(part_RH.device)
        first_RH = starts_P[part_RH] + torch.minimum(local_RH * BLOCK, last_P[part_RH])
        return (self.add(values_RHW) if is_shared else values_RHW), first_RH

    def keep_own(self, values_RN: Tensor, blocks_RN: Tensor) -> Tensor:
        """Returns (R, N): what the part that holds each of these blocks has found in it."""
        return self.add(values_RN.masked_fill(blocks_RN // self.num_blocks != self.index, 0))

    def logits_at(self, logits: Tensor, ids_RM: Tensor) -> Tensor:
        """Gathers (R, M) float32 logits of single ids."""
        local_RM = ids_RM - self.first_id
        is_own_RM = (local_RM >= 0) & (local_RM < self.num_ids)
        values_RM = logits.gather(1, local_RM.clamp(0, self.num_ids - 1)).float()
        return self.add(values_RM.masked_fill_(~is_own_RM, 0.0))

    def whole(self, logits: Tensor) -> Tensor:
        """Gathers all (R, V) logits."""
        padded = pad(logits, (0, self.most_ids - logits.shape[1]))
        parts = self.gather(padded).unbind(0)
        sizes = [end - start for start, end in pairwise(self.bounds)]
        return torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], 1)

    def _parts_of(self, ids_RM: Tensor) -> Tensor:
        _, ends_P, _ = self._places(ids_RM.device)
        return torch.searchsorted(ends_P, ids_RM.contiguous(), right=True)

    def _places(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (P,) first ids, ends, and the places of the last blocks counted from the first ids.

        They stay on the device: to make a tensor of numbers there would wait for it.
        """
        if device not in self._places_on:
            bounds = torch.tensor(self.bounds, device=device)
            last_P = bounds.diff().clamp(min=BLOCK) - BLOCK
            self._places_on[device] = bounds[:-1], bounds[1:], last_P
        return self._places_on[device]
