"""The processes that take each step of a training together."""

from dataclasses import dataclass
from typing import Any, Self

import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True, slots=True, eq=False)
class Ranks:
    """This process among those that train the same student."""

    rank: int = 0
    count: int = 1
    group: Any = None
    """torch.distributed's, if there are several."""

    @classmethod
    def of(cls, student: nn.Module) -> Self:
        """Those of a student in DistributedDataParallel; of any other, this process alone."""
        if not isinstance(student, DistributedDataParallel):
            return cls()
        group = student.process_group
        return cls(
            torch.distributed.get_rank(group), torch.distributed.get_world_size(group), group
        )

    def add_up(self, values: Tensor) -> Tensor:
        """The sum over all ranks, which all have to ask for."""
        if self.count > 1:
            values = values.clone()
            torch.distributed.all_reduce(values, group=self.group)
        return values


def unwrapped(student: nn.Module) -> nn.Module:
    """The student itself, without DistributedDataParallel around it."""
    return student.module if isinstance(student, DistributedDataParallel) else student
