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

SMALLEST = 2
"""Rows of the smallest product. That of a single row is added up in another order for some shapes."""


def can_order(device_type: str) -> bool:
    """Whether weights are put into another order on such a device."""
    return device_type == "cpu" and torch.backends.mkldnn.is_available()


class PackedProducts:
    """Replaces the products of a model's linear layers as long as `use` lasts, if they have few rows."""

    def __init__(self, causal_lm: Any, num_rows: int) -> None:
        """num_rows: R, of the largest product; a power of two."""
        self._causal_lm = causal_lm
        self._num_rows = num_rows
        self._forwards: dict[nn.Module, Forward] | None = None
        """Of each layer whose weights are in order; None before the first use."""
        self._ordered: list[tuple[Tensor, tuple[int, int]]] = []
        """The weights of these layers, and the state in which they were put in order."""
        self._sizes: tuple[int, ...] = (num_rows,)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of rows of products that round alike, ascending; the last is R.

        Smaller ones than R are tried where all weights are in order: there each row is added up in
        the same order. Where they are not, the product of a few rows rounds differently.
        """
        self._keep_ordered()
        return self._sizes

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Replaces them. Not for two threads at once."""
        forwards = self._keep_ordered()
        # Straight into the dict: nn.Module's own way of setting an attribute takes ten times as long.
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        try:
            yield
        finally:
            for module in forwards:
                module.__dict__.pop("forward", None)

    def release(self) -> None:
        """Drops the ordered weights; the next use puts them in order again."""
        self._forwards, self._ordered = None, []

    def _keep_ordered(self) -> dict[nn.Module, Forward]:
        # A model that is trained, and is its own teacher, changes its weights between two texts.
        if any(_state_of(weight) != state for weight, state in self._ordered):
            self.release()
        if self._forwards is None:
            self._order_weights()
        assert self._forwards is not None
        return self._forwards

    def _order_weights(self) -> None:
        self._forwards, self._ordered, self._sizes = {}, [], (self._num_rows,)
        if not can_order(self._causal_lm.device.type):
            return
        by_place: dict[int, Tensor] = {}
        """By the memory of the weights, which layers may share."""
        tried: dict[tuple, bool] = {}
        """Whether products of fewer rows round alike, by what decides it."""
        for module in self._causal_lm.modules():
            if not isinstance(module, nn.Linear | Conv1D):
                continue
            ordered = self._order(module, by_place)
            if ordered is None:
                tried[()] = False
                continue
            weight: Tensor = module.weight
            num_inputs = weight.shape[1] if isinstance(module, nn.Linear) else weight.shape[0]
            shape = (weight.dtype, *weight.shape)
            if shape not in tried:
                tried[shape] = self._rounds_alike(ordered, num_inputs, weight.dtype)
            self._forwards[module] = self._make_forward(module, ordered, num_inputs)
            self._ordered.append((weight, _state_of(weight)))
        if tried and all(tried.values()):
            self._sizes = tuple(
                SMALLEST << n for n in range((self._num_rows // SMALLEST).bit_length())
            )

    def _order(self, module: Any, by_place: dict[int, Tensor]) -> Tensor | None:
        """Puts the weights of a layer in order; returns None for a layer that is left alone."""
        if "forward" in module.__dict__:
            return None  # somebody has put one there, which does more: sums up parts, moves weights
        if type(module) is nn.Linear and is_plain(module.weight):
            weight_NK = module.weight
        elif type(module) is Conv1D:
            weight_NK = module.weight.t()
        else:
            return None
        place = module.weight.data_ptr()
        if place not in by_place:
            try:
                by_place[place] = torch.ops.mkldnn._reorder_linear_weight(
                    weight_NK.detach().contiguous(), self._num_rows
                )
            except RuntimeError:  # of a dtype that oneDNN does not multiply here
                return None
        return by_place[place]

    def _rounds_alike(self, ordered: Tensor, num_inputs: int, dtype: torch.dtype) -> bool:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(self._num_rows, num_inputs, generator=generator).to(dtype)
        whole = _multiply(rows, ordered, None)
        size = self._num_rows
        while (size := size // 2) >= SMALLEST:
            parts = [_multiply(some, ordered, None) for some in rows.split(size)]
            if not torch.equal(torch.cat(parts), whole):
                return False
        return True

    def _make_forward(self, module: Any, ordered: Tensor, num_inputs: int) -> Forward:
        own = type(module).forward

        def forward(rows: Tensor) -> Tensor:
            if rows.numel() // num_inputs not in self._sizes:  # such as those that an expert gets
                return own(module, rows)
            return _multiply(rows, ordered, module.bias)

        return forward


def _multiply(rows: Tensor, ordered: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(rows, ordered, bias, "none", [], "")


def _state_of(weight: Tensor) -> tuple[int, int]:
    """Tells weights that have changed, or are elsewhere, from those that were seen."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version
