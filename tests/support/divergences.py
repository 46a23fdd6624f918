"""The divergences in float64, written with probabilities: what the losses are compared with.

A row of probabilities over cells: all V ids, then one cell for the tail. An id that is not kept on
its own has probability 0 on both sides, and is in the tail.
"""

import torch
from torch import Tensor

from logit_codec import DenseTargets, SampledTargets, Targets, TopKTargets

SMALLEST = 2.0**-149


def oracle(
    student: Tensor, targets: Targets, divergence: str, beta: float, temperature: float
) -> Tensor:
    """(R, V) float64 logits and targets -> (R,) D(p, q)."""
    q = (student / temperature).softmax(1)
    if isinstance(targets, SampledTargets):
        drawn = targets.to_dense().double()
        entropy = 0.0 if targets.entropy is None else targets.entropy
        return -(drawn * q.log()).sum(1) - entropy
    p = torch.zeros_like(q)
    if isinstance(targets, TopKTargets):
        rows = targets.entry_rows()
        p[rows, targets.token_ids] = targets.logprobs.double().exp()
        kept = torch.zeros_like(q, dtype=torch.bool)
        kept[rows, targets.token_ids] = True
        tail = targets.tail_logprob.double().exp() * ~kept.all(1)
        p = torch.cat([p, tail[:, None]], 1)
        q = torch.cat([q * kept, (q * ~kept).sum(1, keepdim=True)], 1)
    else:
        assert isinstance(targets, DenseTargets)
        p = targets.logprobs.double().exp()
    return divergence_of(p, q, divergence, beta)


def divergence_of(p: Tensor, q: Tensor, divergence: str, beta: float) -> Tensor:
    """(R, cells) probabilities -> (R,)."""
    m = beta * p + (1 - beta) * q
    if divergence == "forward_kl":
        each = kl(p, q)
    elif divergence == "reverse_kl":
        each = kl(q, p)
    elif divergence == "jsd":
        each = beta * kl(p, m) + (1 - beta) * kl(q, m)
    elif divergence == "skew_kl":
        each = kl(p, m)
    elif divergence == "skew_reverse_kl":
        each = kl(q, (1 - beta) * p + beta * q)
    else:
        assert divergence == "total_variation"
        each = 0.5 * (p - q).abs()
    return each.sum(1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """p log(p/q), 0 where p is 0; a q of 0 counts as the smallest float32."""
    return p * (p.clamp(min=1e-300).log() - q.clamp(min=SMALLEST).log())


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs, retain_graph=True)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Of a whole tensor."""
    norm = wanted.detach().double().norm()
    return float((found.detach().double() - wanted.detach()).norm() / norm.clamp(min=1e-30))
