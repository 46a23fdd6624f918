"""Estimates how large answers are, and how fast a thread encodes them, by encoding some.

Letters: R rows, V vocabulary, D hidden size.

The rows are made up: probabilities fall with a power of the rank, and are as uncertain as a large
teacher's on text. What their ids are is random, as without a fitted id table.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from logit_codec import RowInputs, Selection, TargetSpec, encode_parts, parse_targets, select_rows

ENTROPY = 2.4
"""Nats: the mean of benchmarks/codec's distributions with V = 262,144."""
SPREAD = 0.5
"""Standard deviation of the logarithm of rows' temperatures, which makes some certain and some flat; as
there."""
GIVEN_IDS = 16
"""Ids that a client names for each row, where it names any."""
LOGITS_NBYTES = 64 << 20
MIN_ROWS, MAX_ROWS = 32, 1024
PART_NBYTES = 1 << 20
"""Of an encoded part, as in the service."""


@dataclass(frozen=True, slots=True)
class AnswerSize:
    """Describes the answers to requests for one kind of targets."""

    targets: str
    reads_logits: bool
    """Whether rows go through the vocabulary head."""
    nbytes_per_token: float
    encode_tokens_per_s: float
    """Of one thread of this machine, compaction included."""


@torch.inference_mode()
def estimate_answers(targets: Sequence[str], vocab_size: int, hidden_size: int) -> list[AnswerSize]:
    """Encodes made-up rows for some kinds of targets.

    Raises ValueError for targets that cannot be asked for.
    """
    num_rows = max(MIN_ROWS, min(MAX_ROWS, LOGITS_NBYTES // (4 * vocab_size)))
    logits_RV = make_logits(num_rows, vocab_size, torch.Generator().manual_seed(0))
    return [_estimate(each, logits_RV, hidden_size) for each in targets]


def _estimate(targets: str, logits_RV: Tensor, hidden_size: int) -> AnswerSize:
    num_rows, vocab_size = logits_RV.shape
    spec = parse_targets(targets).for_head("0" * 32, hidden_size)
    spec.check_vocabulary(vocab_size)
    generator = torch.Generator().manual_seed(1)
    inputs = _make_inputs(spec, logits_RV, hidden_size, generator)
    if spec.needs_given_ids:
        spec = spec.for_rows(GIVEN_IDS)
    tensors: dict[str, Any] = inputs.tensors()
    selected = select_rows(logits_RV, spec, **tensors)
    # Whole answers: few rows would pay for the frame of a container alone.
    selection = Selection.cat([selected] * (MAX_ROWS // num_rows))
    num_rows = len(selection)
    seconds, nbytes = math.inf, 0
    for _ in range(3):  # the first call loads what the others find
        began = time.perf_counter()
        parts = encode_parts(selection.compact(), spec, max_nbytes=PART_NBYTES)
        nbytes = sum(len(payload) for _, _, payload in parts)
        seconds = min(seconds, time.perf_counter() - began)
    return AnswerSize(targets, spec.reads_logits, nbytes / num_rows, num_rows / seconds)


def make_logits(num_rows: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """Makes (R, V) logits of ENTROPY nats on average."""
    log_ranks_V = torch.arange(1, vocab_size + 1).log()
    sharpness_R = torch.randn(num_rows, generator=generator).mul_(-SPREAD).exp_()
    low, high, power = 0.01, 100.0, 1.0
    sample_S = sharpness_R[:32]
    for _ in range(20):
        power = math.sqrt(low * high)
        sample_SV = torch.outer(sample_S, -power * log_ranks_V)
        entropy = torch.special.entr(sample_SV.softmax(1)).sum(1).mean()
        low, high = (power, high) if entropy > ENTROPY else (low, power)
    logits_RV = torch.empty(num_rows, vocab_size)
    for row_V, sharpness in zip(logits_RV, sharpness_R, strict=True):
        order_V = torch.randperm(vocab_size, generator=generator)
        row_V[order_V] = -float(sharpness) * power * log_ranks_V
    return logits_RV


def _make_inputs(
    spec: TargetSpec, logits_RV: Tensor, hidden_size: int, generator: torch.Generator
) -> RowInputs:
    num_rows = len(logits_RV)
    realized = torch.multinomial(logits_RV.softmax(1), 1, generator=generator)[:, 0]
    layers = len(spec.feature_layers)
    given = None
    if spec.needs_given_ids:
        given = logits_RV.topk(GIVEN_IDS).indices.sort(1).values
    uniforms = None
    if spec.needs_uniforms:
        uniforms = torch.rand(num_rows, generator=generator, dtype=torch.float64)
    return RowInputs(
        realized_ids=realized,
        uniforms=uniforms,
        given_ids=given,
        hidden=torch.randn(num_rows, hidden_size, generator=generator)
        if spec.needs_hidden
        else None,
        features=torch.randn(num_rows, layers, hidden_size, generator=generator).bfloat16()
        if layers
        else None,
    )
