"""How much memory the tensors that a computation makes hold at once."""

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Follows how many bytes all tensors made inside it hold, and the most of it."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.sizes = dict.fromkeys((tensor.untyped_storage()._cdata for tensor in known), 0)
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._forget, storage._cdata)
        return result

    def _forget(self, storage: int) -> None:
        self.now -= self.sizes.pop(storage)
