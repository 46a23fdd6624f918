"""What a sequence costs the teacher, as a number that is known before it is dispatched.

The unit is the arithmetic of one token in the base model, attention left out. The rest is counted
in it: attention, which grows with the square of the length; the vocabulary head and the selection,
for each wanted row; the answer's bytes, which are encoded and sent while other work waits. Nothing
is timed: the same request costs the same on every replica, whatever else the machine does.

Letters: D hidden size, L padded length, V vocabulary.
"""

from dataclasses import dataclass
from typing import Self

from teacher_server.engine.model import TeacherModel

SELECTION_FLOPS = 200
"""Per logit, for what `logit_codec.select` does with it: its time on a CPU (docs/log.md: 122 us for
32,000) as arithmetic at the same speed. With D = 512 that is a fifth of the head's."""
DEVICE_FLOPS_PER_S = {"cpu": 1e11}
"""What a device does of the model's arithmetic, roughly; it only sets the price of a byte."""
ACCELERATOR_FLOPS_PER_S = 3e14
REPLY_NBYTES_PER_S = 3e8
"""How fast answers are encoded and written, roughly: dense ones, the largest (benchmarks/codec)."""


@dataclass(frozen=True, slots=True)
class CostModel:
    """Prices in tokens of the base model."""

    per_token_pair: float
    """Attention: of each of the L * L pairs."""
    per_row: float
    """Vocabulary head and selection."""
    per_reply_byte: float

    @classmethod
    def of(cls, model: TeacherModel) -> Self:
        """Prices from the model's shapes and the kind of its device."""
        config = model.causal_lm.config.get_text_config()
        token_flops = 2 * _weights_per_token(model)
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        row_flops = model.vocab_size * (2 * config.hidden_size + SELECTION_FLOPS)
        flops_per_s = DEVICE_FLOPS_PER_S.get(model.device.type, ACCELERATOR_FLOPS_PER_S)
        return cls(
            # Scores and their product with the values, 2 operations each; also of masked pairs.
            per_token_pair=4 * heads * head_dim * config.num_hidden_layers / token_flops,
            per_row=row_flops / token_flops,
            per_reply_byte=flops_per_s / REPLY_NBYTES_PER_S / token_flops,
        )

    def cost(self, num_tokens: int, num_rows: int, reply_nbytes: int) -> float:
        """Of a sequence: padded tokens, wanted rows, upper bound of its answer."""
        return (
            num_tokens
            + self.per_token_pair * num_tokens**2
            + self.per_row * num_rows
            + self.per_reply_byte * reply_nbytes
        )


def _weights_per_token(model: TeacherModel) -> float:
    """Weights of the base model that a token is multiplied with: no embeddings, chosen experts."""
    config = model.causal_lm.config.get_text_config()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    fraction = chosen / experts if experts and chosen else 1.0
    return sum(
        weight.numel() * (fraction if ".experts." in name else 1.0)
        for name, weight in model.causal_lm.base_model.named_parameters()
        if weight.dim() > 1 and "embed" not in name and name not in ("wte.weight", "wpe.weight")
    )
