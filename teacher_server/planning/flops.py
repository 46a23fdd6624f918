"""Counts the arithmetic of one token.

Letters: L tokens of a sequence, W tokens of a window, D hidden size, V vocabulary.

A product with n weights takes 2 n operations. Norms, RoPE, softmax and activations are left out: they
are memory traffic, and part of why no device reaches its peak.
"""

from dataclasses import dataclass

from teacher_server.planning.sizes import ModelSizes

SELECTION_NBYTES = 74
"""Memory traffic of selecting from one logit on a GPU. 56 % of the head's product at a hidden size of
4,096 (scheduling/cost.py) is 4,600 operations at 3e14 per second, 15 ps, in which 4.8 TB/s move so much."""
SELECTION_FLOPS = 200
"""Arithmetic of the model that fits into the time of selecting from one logit on a CPU (the same)."""


@dataclass(frozen=True, slots=True)
class TokenFlops:
    """Holds operations per token of sequences of one length."""

    length: int
    body: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        return self.body + self.attention + self.head


def count_flops(sizes: ModelSizes, length: int, *, with_head: bool = True) -> TokenFlops:
    """Counts operations per token. Without head: for targets that read no logits."""
    attention = sum(
        # Scores, and their product with the values.
        2
        * layer.num_heads
        * (layer.keys.key_size + layer.keys.value_size)
        * count_pairs(length, layer.window)
        for layer in sizes.layers
    )
    return TokenFlops(
        length=length,
        body=2 * sizes.active_weights,
        attention=attention / length,
        head=2.0 * sizes.head_weights if with_head else 0.0,
    )


def count_pairs(length: int, window: int | None) -> int:
    """Counts the pairs of a token and one that it sees, itself among them, in a sequence."""
    if window is None or window >= length:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window
