"""Multiplies few rows at the speed at which weights are read, on a CPU.

The product of 8 rows that torch calls for copies the weights into another order first, each time: that
takes two to four times as long as the product of one row, which only reads them. Here they are put
into oneDNN's order for so many rows once, and a product of 8 rows takes about as long as one of a
single row (docs/log.md, `python -m benchmarks.generate --products`). The ordered weights take as
much memory as the weights themselves, beside them, as soon as the first text is written.

Letters: R rows, K columns of the input, N columns of the output.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from teacher_server.engine.products import is_plain

Forward = Callable[[Tensor], Tensor]


def can_order(device_type: str) -> bool:
    """Whether weights are put into another order on such a device."""
    return device_type == "cpu" and torch.backends.mkldnn.is_available()


class PackedProducts:
    """Replaces the products of a model's linear layers as long as `use` lasts, if they have R rows."""

    def __init__(self, causal_lm: Any, num_rows: int) -> None:
        self._num_rows = num_rows
        self._forwards: dict[nn.Module, Forward] | None = None
        """Of each layer whose weights are in order; None before the first use."""
        self._ordered: list[tuple[nn.Module, tuple[int, int]]] = []
        """Of the same layers, the state of the weights that were put in order."""
        self._causal_lm = causal_lm

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Replaces them. Not for two threads at once."""
        # A model that is trained, and is its own teacher, changes its weights between two texts.
        if any(_state_of(module) != state for module, state in self._ordered):
            self._forwards = None
        if self._forwards is None:
            self._forwards = dict(self._order_weights())
            self._ordered = [(module, _state_of(module)) for module in self._forwards]
        # Straight into the dict: nn.Module's own way of setting an attribute takes ten times as long.
        for module, forward in self._forwards.items():
            module.__dict__["forward"] = forward
        try:
            yield
        finally:
            for module in self._forwards:
                module.__dict__.pop("forward", None)

    def _order_weights(self) -> Iterator[tuple[nn.Module, Forward]]:
        if not can_order(self._causal_lm.device.type):
            return
        ordered: dict[int, Tensor] = {}
        """By the memory of the weights, which layers may share."""
        for module in self._causal_lm.modules():
            if "forward" in module.__dict__:
                continue  # somebody has put one there, which does more: sums up parts, moves weights
            if type(module) is nn.Linear and is_plain(module.weight):
                weight_NK = module.weight
            elif type(module) is Conv1D:
                weight_NK = module.weight.t()
            else:
                continue
            place = module.weight.data_ptr()
            if place not in ordered:
                try:
                    ordered[place] = torch.ops.mkldnn._reorder_linear_weight(
                        weight_NK.detach().contiguous(), self._num_rows
                    )
                except RuntimeError:  # of a dtype that oneDNN does not multiply here
                    continue
            yield module, self._make_forward(module, ordered[place], weight_NK.shape[1])

    def _make_forward(self, module: Any, ordered: Tensor, num_inputs: int) -> Forward:
        own = type(module).forward
        num_numbers = self._num_rows * num_inputs
        multiply = torch.ops.mkldnn._linear_pointwise

        def forward(rows: Tensor) -> Tensor:
            if rows.numel() != num_numbers:  # such as those that an expert gets
                return own(module, rows)
            return multiply(rows, ordered, module.bias, "none", [], "")

        return forward


def _state_of(module: Any) -> tuple[int, int]:
    """Tells weights that have changed, or are others, from those that were seen."""
    weight = module.weight
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version
