"""Counts the operations for which the host would wait for a device.

    with FakeCuda(), Waits() as waits:
        launch()
    assert waits.found == []

What counts:

- reading a value: `item()`, `bool()`, `tolist()`, `equal`, and what torch reads by itself
- a result whose shape depends on values: `nonzero`, boolean indices, `masked_select`, `unique`,
  `bincount`, and `repeat_interleave` without `output_size`
- a copy from the host that is not both `non_blocking` and from pinned memory. Copies from other
  memory wait in any case: they pass through a small buffer of the driver's. `torch.tensor([..],
  device=..)` is such a copy; a number as an argument, `fill_` and `full` are none
- indices on the host into a tensor of the device: torch copies them, and waits
- a copy to the host that is not `non_blocking`, or that goes into memory that is not pinned

What does not: host tensors among themselves, a host tensor without dimensions beside device tensors
(it becomes an argument of the kernel), and copies within the device. Waiting for an event, a stream
or the device is no operation, and is not seen.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.fake_cuda import is_composite

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
WAITING = frozenset(
    f"aten::{name}"
    for name in (
        *("_local_scalar_dense", "equal"),
        *("nonzero", "masked_select", "bincount"),
        *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"),
    )
)
INDEXING = frozenset(
    f"aten::{name}"
    for name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
)
COPYING = frozenset(f"aten::{name}" for name in ("_to_copy", "copy_", "copy", "lift_fresh"))


@dataclass(frozen=True, slots=True)
class Wait:
    """One operation that waits."""

    operation: str
    """Such as `aten::nonzero`, or what is copied from where."""
    where: str
    """The line of this project that led to it: `student_trainer/losses/fused.py:95 function`, and
    that of the library in between: `, through transformers/masking_utils.py:90 function`."""

    def __str__(self) -> str:
        return f"{self.operation} at {self.where}"


class Waits(TorchDispatchMode):
    """Notes in `found` each operation in a `with` block that would wait, in order.

    device: the type of device that is waited for; tensors elsewhere are not looked at. With "cpu",
    the CPU stands in for the device: every tensor counts, and there are no copies to count.
    """

    supports_higher_order_operators = True

    def __init__(self, device: str = "cuda") -> None:
        super().__init__()
        self._type = device
        self.found: list[Wait] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if isinstance(func, HigherOrderOperator):  # flex_attention: no operation of its own waits
            return func(*args, **kwargs)
        if is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        name = func.name().split(".")[0]
        why = self._why(name, args, kwargs)
        if why is not None:
            self.found.append(Wait(why, _find_line()))
        return func(*args, **kwargs)

    def _why(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
        """Says what waits; None if nothing does."""
        if name in WAITING:
            return name if self._has_device_tensor((args, kwargs)) else None
        if name in INDEXING:
            return self._why_index(name, args)
        if name == "aten::repeat_interleave":
            is_known = kwargs.get("output_size") is not None
            return None if is_known or not self._has_device_tensor(args) else name
        if name in COPYING:
            return self._why_copy(name, args, kwargs)
        return None

    def _why_index(self, name: str, args: Sequence[Any]) -> str | None:
        if not self._is_device(args[0]):
            return None
        for index in args[1]:
            if index is None:
                continue
            if index.dtype in (torch.bool, torch.uint8):
                return f"{name} with a mask"
            if not self._is_device(index):
                return f"{name} with indices on the host"
        return None

    def _why_copy(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
        if name == "aten::_to_copy":
            source, into = args[0], None
            to_device = (kwargs.get("device") or source.device).type == self._type
            is_async = kwargs.get("non_blocking", False)
        elif name in ("aten::copy_", "aten::copy"):
            into, source = args[0], args[1]
            to_device = self._is_device(into)
            is_async = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        else:
            return None
        if to_device == self._is_device(source) or not source.numel():
            return None
        if to_device:
            if is_async and source.is_pinned():
                return None
            kind = "pinned memory" if source.is_pinned() else "pageable memory"
            return f"{name} to the device from {kind}{', blocking' * (not is_async)}"
        # torch makes the result of a copy that does not block in pinned memory.
        if is_async and (into is None or into.is_pinned()):
            return None
        return f"{name} from the device{', blocking' if not is_async else ' to pageable memory'}"

    def _is_device(self, value: Tensor) -> bool:
        return value.device.type == self._type

    def _has_device_tensor(self, values: Any) -> bool:
        return any(
            isinstance(value, Tensor) and self._is_device(value) for value in tree_leaves(values)
        )


def _find_line() -> str:
    """Returns the innermost line of the project, and that of the library which it calls, if any.

    Lines of torch are left out, and lines of tests if the project has others on the stack.
    """
    stack = [
        (Path(frame.f_code.co_filename), f"{frame.f_lineno} {frame.f_code.co_name}")
        for frame in _frames()
    ]
    stack = [(path, line) for path, line in stack if "torch" not in path.parts]
    own = [(path, line) for path, line in stack if _is_own(path)]
    tests = ROOT / "tests"
    path, line = next(
        iter([each for each in own if not each[0].is_relative_to(tests)] or own or stack)
    )
    found = f"{path.relative_to(ROOT) if _is_own(path) else path}:{line}"
    through, line = stack[0]
    if _is_own(through):
        return found
    parts = through.parts
    start = parts.index("site-packages") + 1 if "site-packages" in parts else 0
    return f"{found}, through {Path(*parts[start:])}:{line}"


def _is_own(path: Path) -> bool:
    return path.is_relative_to(ROOT) and ".venv" not in path.parts


def _frames() -> Iterator[Any]:
    frame: Any = sys._getframe()
    while frame is not None:
        if Path(frame.f_code.co_filename).parent != HERE:
            yield frame
        frame = frame.f_back
