"""Makes the vocabulary head that clients multiply hidden states with.

What a model does to the product is read from its config, and verified against the model itself.
"""

import logging
from dataclasses import replace
from typing import Any

import torch

from logit_codec import TeacherHead
from logit_codec.teacher_head import DTYPES, HeadFile
from logitstream.head_arithmetic import read_head_arithmetic
from teacher_server.engine.tensor_parallel import join_head

logger = logging.getLogger(__name__)

NUM_TRIED = 16


@torch.inference_mode()
def make_client_head(model: Any, tolerance: float) -> TeacherHead | None:
    """Returns the head of a TeacherModel, whose weights it shares; None if it is not a plain product.

    tolerance: as a share of the largest logit.
    """
    embeddings = model.causal_lm.get_output_embeddings()
    config = model.causal_lm.config.get_text_config()
    if (
        not isinstance(embeddings, torch.nn.Linear)
        or embeddings.weight.dtype not in DTYPES.values()
    ):
        return None
    softcap, scale = read_head_arithmetic(config)
    weight, bias = embeddings.weight, embeddings.bias
    if model.part is not None:
        weight, bias = join_head(embeddings, model.part)
    head = TeacherHead(
        weight=weight,
        bias=bias,
        softcap=softcap,
        logit_scale=scale,
        effective_vocab_size=model.effective_vocab_size,
        fingerprint="",
    )
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_TRIED, head.hidden_size, generator=generator)
    hidden = hidden.to(model.device, model.dtype)
    real = slice(model.effective_vocab_size)
    expected = model.logits(hidden).float()[:, real].to(weight.device)
    error = (head.logits(hidden.to(weight.device))[:, real] - expected).abs().max()
    if not bool(error <= tolerance * expected.abs().max().clamp(min=1.0)):
        logger.warning(
            "%s does more to its logits than scale and cap them (error %.1e): targets of kind "
            "hidden are not offered",
            model.architecture,
            float(error),
        )
        return None
    return replace(head, fingerprint=HeadFile(head).digest().hex())
