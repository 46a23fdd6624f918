"""Keeps the states after chosen layers while a model runs.

Letters: B sequences, T tokens, D hidden size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def find_layers(causal_lm: Any) -> nn.ModuleList | None:
    """Finds the layers of a causal LM of transformers; None if none of its lists has as many."""
    count = getattr(causal_lm.config.get_text_config(), "num_hidden_layers", None)
    for module in causal_lm.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    return None


@contextmanager
def watch_layers(causal_lm: Any, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Fills a dict, while a model runs, with the (B * T, D) states that go into some of its layers.

    What goes into layer n, counted from 0, has come out of n layers. The number of all layers is not
    kept: that state is what the base model returns.
    """
    kept: dict[int, Tensor] = {}
    modules = find_layers(causal_lm) if layers else None
    handles = []
    for number in layers:
        if modules is not None and number < len(modules):
            handles.append(
                modules[number].register_forward_pre_hook(_Keeper(kept, number), with_kwargs=True)
            )
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


class _Keeper:
    """Is called with the arguments of a layer, and keeps its states."""

    def __init__(self, kept: dict[int, Tensor], number: int) -> None:
        self._kept, self._number = kept, number

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        self._kept[self._number] = states.flatten(0, -2)
