"""Checks that a student predicts the next token from earlier ones only.

Row i of the targets is the teacher's distribution of token i+1 given tokens 0..i. A student that
sees later tokens, or has an encoder, would learn something else, with losses that look fine.

Letters: T tokens, V vocabulary.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

NUM_TOKENS = 8
TOLERANCE = 1e-4
"""Allowed change, as a share of the logits' spread, or 4 times the rounding of their dtype if that
is more: a mixture of experts adds up in another order when other tokens are in the batch."""


def refuse_encoder_decoder(config: Any, name: str) -> None:
    """Raises ValueError for a transformers config whose models have an encoder."""
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is an encoder-decoder ({type(config).__name__}): it predicts a text that "
            "follows its input, but the teacher's targets are for the input itself. Use a "
            "decoder-only causal LM, as AutoModelForCausalLM loads."
        )


def check_causal(student: nn.Module) -> None:
    """Raises ValueError if a later token changes an earlier logit of the student.

    Runs one forward pass of two sequences of 8 tokens, without dropout. A student that cannot be
    tried, because its parameters are elsewhere or its forward needs more than ids, passes.
    """
    name = f"the student {type(student).__name__}"
    refuse_encoder_decoder(getattr(student, "config", None), name)
    parameters = list(student.parameters())
    if not parameters or any(
        parameter.is_meta or hasattr(parameter, "ds_status") for parameter in parameters
    ):
        return
    get_embeddings = getattr(student, "get_input_embeddings", None)
    embeddings = None if get_embeddings is None else get_embeddings()
    size = getattr(embeddings, "num_embeddings", 0)
    if size < 2:
        return
    # From the middle: the first and the last ids are often special, images for example.
    ids_T = torch.arange(NUM_TOKENS, device=parameters[0].device) * 7 % size + size // 3
    ids_2T = (ids_T % size).repeat(2, 1)
    ids_2T[1, -1] = (ids_2T[1, -1] + 1) % size
    try:
        with evaluating(student), torch.no_grad():
            outputs: Any = student(input_ids=ids_2T)
        logits = outputs["logits"] if hasattr(outputs, "keys") else outputs[0]
    except Exception as error:  # training will report what its forward needs
        logger.info("%s was not checked for looking ahead: %s", name, error)
        return
    if not isinstance(logits, Tensor) or logits.shape[:2] != ids_2T.shape:
        return
    earlier_2TV = logits[:, :-1].double()
    tolerance = max(TOLERANCE, 4 * torch.finfo(logits.dtype).eps)
    change = float((earlier_2TV[0] - earlier_2TV[1]).abs().max())
    if change > tolerance * float(earlier_2TV[0].std()):
        raise ValueError(
            f"{name} looks ahead: changing a later token moves its earlier logits by {change:.2g}. "
            "Targets are for the next token given earlier ones: use a causal LM (for models like "
            "BERT, config.is_decoder=True)."
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts every module in eval mode, without dropout, and restores each one's mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
