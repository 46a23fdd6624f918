"""Reads what a causal LM of transformers does to the product of its vocabulary head."""

from typing import Any


def read_head_arithmetic(config: Any) -> tuple[float | None, float]:
    """Returns softcap and logit_scale of a text config: Gemma 2 has the one, Cohere and Granite the other.

    logits = softcap * tanh(logit_scale * head(hidden) / softcap); without softcap (None), they are
    logit_scale * head(hidden). A model may do more: whoever relies on this tries it.
    """
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    return None if softcap is None else float(softcap), scale
