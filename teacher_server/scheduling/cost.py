"""Prices a sequence: what it costs the teacher, known before it is dispatched.

The unit is the arithmetic of one token in the base model, without attention. Everything else is
expressed in it: attention, which grows with the square of the length; the vocabulary head and the
selection, per requested row; the bytes of the answer, which are encoded and sent while other work
waits. Nothing is timed: the same request costs the same on every replica, however busy it is.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from torch import nn


class DeviceKind(NamedTuple):
    """Holds what the prices need to know of a kind of device."""

    flops_per_s: float
    """Rough speed on the model's arithmetic; it only sets the price of a byte."""
    selection_flops: float
    """Arithmetic of the model that fits into the time in which one logit is selected from."""


CPU = DeviceKind(1e11, 200)
"""Selection: 122 us for 32,000 logits (docs/log.md) at the speed of the head. With a hidden size of
512 that is a fifth of the head's product."""
ACCELERATOR = DeviceKind(3e14, 4600)
"""Selection: 56 % of the head's product, measured with a hidden size of 4,096 (Llama 3.1 8B)."""
REPLY_NBYTES_PER_S = 3e8
"""Rough speed at which dense answers, the largest, are encoded and written (benchmarks/codec)."""


@dataclass(frozen=True, slots=True)
class CostModel:
    """Holds the prices, in tokens of the base model."""

    per_token_pair: float
    """Attention, for each pair of tokens."""
    per_row: float
    """Vocabulary head and selection."""
    per_reply_byte: float

    @classmethod
    def of(cls, causal_lm: Any) -> Self:
        """Derives the prices from the shapes of a transformers model and the kind of its device."""
        config = causal_lm.config.get_text_config()
        device = CPU if causal_lm.device.type == "cpu" else ACCELERATOR
        token_flops = 2 * _count_weights_per_token(causal_lm)
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        vocabulary_head = causal_lm.get_output_embeddings()
        logit_flops = 2 * vocabulary_head.in_features + device.selection_flops
        return cls(
            # Scores and their product with the values, 2 operations each; masked pairs count too.
            per_token_pair=4 * heads * head_dim * config.num_hidden_layers / token_flops,
            per_row=vocabulary_head.out_features * logit_flops / token_flops,
            per_reply_byte=device.flops_per_s / REPLY_NBYTES_PER_S / token_flops,
        )

    def cost(self, num_tokens: int, num_rows: int, reply_nbytes: int) -> float:
        """Prices a sequence by its tokens, its rows and the bound of its answer.

        num_rows: those that go through the vocabulary head; states are copied for next to nothing.
        """
        return (
            num_tokens
            + self.per_token_pair * num_tokens**2
            + self.per_row * num_rows
            + self.per_reply_byte * reply_nbytes
        )

    def chunk(self, first: int, last: int) -> float:
        """Prices the tokens `first` to `last` - 1 of a text whose earlier ones are kept."""
        return last - first + self.per_token_pair * (last**2 - first**2)

    def row(self, place: int, reply_nbytes: int) -> float:
        """Prices a token that is drawn: it looks back at `place` others, and is answered."""
        return self.empty_row + self.per_token_pair * place + self.per_reply_byte * reply_nbytes

    @property
    def empty_row(self) -> float:
        """Prices a row that fills a launch up: it is computed like any other."""
        return 1 + self.per_row


def _count_weights_per_token(causal_lm: Any) -> float:
    """Counts the base model's weights that one token is multiplied with.

    Leaves out the embeddings and the experts that a token does not use.
    """
    config = causal_lm.config.get_text_config()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    fraction = chosen / experts if experts and chosen else 1.0
    return sum(
        _count_weights(module) * (fraction if ".experts." in f"{name}." else 1.0)
        for name, module in causal_lm.base_model.named_modules()
    )


def _count_weights(module: nn.Module) -> int:
    """Counts the weights that a module itself, without its children, multiplies with."""
    if isinstance(module, nn.Embedding):
        return 0  # it is looked up
    if isinstance(module, nn.Linear):
        # Its weights may be packed, 2 in a byte, and are multiplied one by one all the same.
        return module.in_features * module.out_features
    return sum(each.numel() for each in module.parameters(recurse=False) if each.dim() > 1)
