"""The negative control: a teacher's targets in the wrong places."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from logit_codec import Targets
from student_trainer.teachers.stream import TargetStream


class ShuffledTargets(Iterator[tuple[Any, Targets]]):
    """The pairs of `Teacher.stream_batches`, the rows of each batch's targets in another order.

    Same loss, same bytes, same tokens, but no row has the targets that belong to it. A student of
    these must be worse than one of the targets as they are; if it is not, what helped was not what
    the teacher knows about the text.
    """

    def __init__(self, pairs: TargetStream[Any], *, seed: int) -> None:
        self._pairs = pairs
        self._seed = seed

    def __next__(self) -> tuple[Any, Targets]:
        """Raises ValueError for a batch of one row, which has no other place."""
        batch, targets = next(self._pairs)
        if targets.num_rows < 2:
            raise ValueError("targets of a single row cannot be shuffled: make batches larger")
        number = self._pairs.state_dict()["handed_out"]
        # Of the seed and the batch alone, so that a run that goes on shuffles as it would have.
        # Not torch's generator: that one looks at the low 32 bits of a seed only.
        chance = np.random.default_rng((self._seed, number))
        cycle_R = torch.from_numpy(chance.permutation(targets.num_rows))
        order_R = torch.empty_like(cycle_R)
        order_R[cycle_R] = cycle_R.roll(1)  # one cycle through all rows: none stays where it is
        return batch, targets[order_R]

    def state_dict(self) -> dict[str, Any]:
        """Of the stream."""
        return self._pairs.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Of the stream."""
        self._pairs.load_state_dict(state)
