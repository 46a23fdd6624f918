"""A CUDA device without a GPU: its tensors have shapes and types, and no values.

    with FakeCuda() as cuda:
        loss = compute(tensor.to(cuda.device))
        backward(loss)

Host tensors stay real inside. What has to do with the device runs on fake tensors, which raise what
a GPU would raise, and for what it would wait for:

- operations on tensors of the host and of the device together (FakeTensorDeviceMismatchError; as
  on a GPU, a host tensor without dimensions, and host indices into a device tensor, are allowed)
- reading a value, such as `item()` or `bool()` (DataDependentOutputException)
- results whose shape depends on values, such as `nonzero()` (DynamicOutputShapeException)

`pin_memory()` and `pin_memory=True` return host memory that is remembered as pinned. A copy from the
device has no values either: a fresh host tensor is fake, an existing one keeps what it held.

`Waits` (waits.py) adds what a GPU would wait for without raising: copies. Enter it inside.

A mode belongs to its thread. Other threads must enter the mode too; in a thread that only calls an
iterator, the iterator may do it. `torch.cuda`'s streams and events do not exist here: what uses them
needs a seam.
"""

import ctypes
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda", 0)


class FakeCuda:
    """Makes `device` usable in a `with` block of this thread."""

    device = DEVICE

    def __init__(self) -> None:
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._split = _Split()

    def __enter__(self) -> Self:
        _register_guard()
        self._fake.__enter__()
        self._split.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._split.__exit__(kind, error, traceback)
        self._fake.__exit__(kind, error, traceback)


class _Split(TorchDispatchMode):
    """Runs operations on host tensors for real, and others on fake tensors."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self._pinned: dict[int, Tensor] = {}
        """By the address of the memory; held, so that no other memory gets the address."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if isinstance(func, HigherOrderOperator):
            return func(*args, **kwargs)
        if is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        name = func.name().split(".")[0]
        if name == "aten::is_pinned":
            return self._is_pinned(args[0])
        if name == "aten::_pin_memory":
            with unset_fake_temporarily():
                return self._pin(args[0].clone())
        if _concerns_device(args, kwargs):
            if name == "aten::copy_" and not isinstance(args[0], FakeTensor):
                return args[0]
            return func(*args, **kwargs)
        is_pinned = kwargs.pop("pin_memory", False)
        with unset_fake_temporarily():
            result = func(*args, **kwargs)
        return self._pin(result) if is_pinned else result

    def _pin(self, tensor: Tensor) -> Tensor:
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def _is_pinned(self, tensor: Tensor) -> bool:
        if isinstance(tensor, FakeTensor):
            return False
        return tensor.untyped_storage().data_ptr() in self._pinned


def is_composite(func: Any) -> bool:
    """Says whether an operation consists of others; modes see such ones in torch.inference_mode()."""
    return not func.name().startswith("prim::") and func._can_decompose()


def _concerns_device(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return any(
        isinstance(value, FakeTensor)
        or (isinstance(value, torch.device) and value.type == DEVICE.type)
        for value in tree_leaves((args, kwargs))
    )


def backward(*outputs: Tensor) -> None:
    """Does what `torch.autograd.backward` of scalars does, on devices that this build does not have.

    torch's own engine asks for the device's streams. This one calls the same nodes in the same
    order, without them. Hooks of tensors are not called.
    """
    gradients: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    for output in outputs:
        gradients[output.grad_fn][0] = torch.ones_like(output)
    with torch.no_grad():
        for node in _topological([output.grad_fn for output in outputs]):
            given = gradients.pop(node, {})
            arguments = [given.get(index) for index in range(len(node._input_metadata))]
            if hasattr(node, "variable"):
                leaf, gradient = node.variable, arguments[0]
                if gradient is not None:
                    leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
                continue
            call: Callable[..., Any] = getattr(node, "apply", node)
            found = call(*arguments)
            found = found if isinstance(found, tuple) else (found,)
            for (after, index), gradient in zip(node.next_functions, found, strict=False):
                if after is not None and gradient is not None:
                    gradient = _fit(gradient, after._input_metadata[index])
                    before = gradients[after].get(index)
                    gradients[after][index] = gradient if before is None else before + gradient


def _fit(gradient: Tensor, wanted: Any) -> Tensor:
    """Sums and casts a gradient to what the next node takes, and checks it, as torch's engine does."""
    assert gradient.device == wanted.device, f"a gradient on {gradient.device} for {wanted.device}"
    return gradient.sum_to_size(wanted.shape).to(wanted.dtype)


def _topological(roots: Sequence[Any]) -> list[Any]:
    """Lists the nodes of a graph: each one before those that it leads to."""
    order: list[Any] = []
    seen: set[Any] = set()
    stack = [(root, False) for root in roots]
    while stack:
        node, is_done = stack.pop()
        if is_done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(after, False) for after, _ in node.next_functions if after is not None]
    return order[::-1]


def _register_guard() -> None:
    """Tells autograd that there is such a device: without it, a build for CPUs aborts the process.

    torch has a guard that does nothing, and puts it in place of one that says it has no devices.
    """
    if torch.backends.cuda.is_built() or _KEPT:
        return
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    register = (
        library._ZN3c104impl19registerDeviceGuardENS_10DeviceTypeEPKNS0_24DeviceGuardImplInterfaceE
    )
    register.argtypes, register.restype = [ctypes.c_byte, ctypes.c_void_p], None
    no_devices = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)
    methods = (ctypes.c_void_p * 64)(*[ctypes.cast(no_devices, ctypes.c_void_p).value] * 64)
    guard = ctypes.c_void_p(ctypes.addressof(methods))
    _KEPT.extend((no_devices, methods, guard))
    register(1, ctypes.addressof(guard))  # 1: DeviceType::CUDA
    torch._C._ensureCUDADeviceGuardSet()


_KEPT: list[Any] = []
"""What the guard points to."""
