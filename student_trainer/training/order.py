"""Decides the order in which the sequences of an epoch are trained."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class EpochOrder(Sampler[int]):
    """Shuffles the sequences of each epoch by its seed and number, and yields whole steps of them.

    How a step is cut into batches, and how many processes share it, changes nothing. What does not
    fill a last step is left out, other sequences in each epoch; if there are fewer sequences than one
    step needs, they are repeated.
    """

    def __init__(self, num_sequences: int, per_step: int, seed: int) -> None:
        """per_step: sequences of one optimizer step."""
        self._num_sequences = num_sequences
        self._per_step = per_step
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration the one over this epoch, from 0."""
        self._epoch = epoch

    def __len__(self) -> int:
        return max(self._num_sequences // self._per_step, 1) * self._per_step

    def __iter__(self) -> Iterator[int]:
        chance = np.random.default_rng((self._seed, self._epoch))
        order = chance.permutation(self._num_sequences)
        yield from np.resize(order, len(self)).tolist()
