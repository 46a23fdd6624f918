"""Prices a sequence: what it costs the teacher, known before it is dispatched.

The unit is the arithmetic of one token in the base model, without attention. Everything else is
expressed in it: attention, which grows with the square of the length; the vocabulary head and the
selection, per requested row; the bytes of the answer, which are encoded and sent while other work
waits. Nothing is timed: the same request costs the same on every replica, however busy it is.
"""

from dataclasses import dataclass
from typing import Any, Self

SELECTION_FLOPS = 200
"""Arithmetic per logit that `logit_codec.select` is charged: its time on a CPU (docs/log.md: 122 us
for 32,000) at the speed of the head. With a hidden size of 512 that is a fifth of the head's."""
DEVICE_FLOPS_PER_S = {"cpu": 1e11}
"""Rough speed of a device on the model's arithmetic; it only sets the price of a byte."""
ACCELERATOR_FLOPS_PER_S = 3e14
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
        vocab_size = causal_lm.get_output_embeddings().weight.shape[0]
        token_flops = 2 * _count_weights_per_token(causal_lm)
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        row_flops = vocab_size * (2 * config.hidden_size + SELECTION_FLOPS)
        flops_per_s = DEVICE_FLOPS_PER_S.get(causal_lm.device.type, ACCELERATOR_FLOPS_PER_S)
        return cls(
            # Scores and their product with the values, 2 operations each; masked pairs count too.
            per_token_pair=4 * heads * head_dim * config.num_hidden_layers / token_flops,
            per_row=row_flops / token_flops,
            per_reply_byte=flops_per_s / REPLY_NBYTES_PER_S / token_flops,
        )

    def cost(self, num_tokens: int, num_rows: int, reply_nbytes: int) -> float:
        """Prices a sequence by its tokens, its rows and the bound of its answer."""
        return (
            num_tokens
            + self.per_token_pair * num_tokens**2
            + self.per_row * num_rows
            + self.per_reply_byte * reply_nbytes
        )


def _count_weights_per_token(causal_lm: Any) -> float:
    """Counts the base model's weights that one token is multiplied with.

    Leaves out the embeddings and the experts that a token does not use.
    """
    config = causal_lm.config.get_text_config()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    fraction = chosen / experts if experts and chosen else 1.0
    return sum(
        weight.numel() * (fraction if ".experts." in name else 1.0)
        for name, weight in causal_lm.base_model.named_parameters()
        if weight.dim() > 1 and "embed" not in name and name not in ("wte.weight", "wpe.weight")
    )
