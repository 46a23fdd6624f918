"""The divergences in float64, written with probabilities: what the losses are compared with.

A row of probabilities over cells: all V ids, then one cell for the tail. An id that is not kept on
its own has probability 0 on both sides, and is in the tail.
"""

import torch
from torch import Tensor

from logit_codec import (
    DenseTargets,
    HiddenTargets,
    SampledTargets,
    Targets,
    TeacherHead,
    parse_targets,
    select,
)
from logit_codec.kinds.tail import TailTargets

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
    if isinstance(targets, TailTargets):
        rows = targets.entry_rows()
        p[rows, targets.token_ids] = targets.logprobs.double().exp()
        kept = torch.zeros_like(q, dtype=torch.bool)
        kept[rows, targets.token_ids] = True
        tail = targets.tail_logprob.double().exp() * ~kept.all(1)
        p = torch.cat([p, tail[:, None]], 1)
        q = torch.cat([q * kept, (q * ~kept).sum(1, keepdim=True)], 1)
    elif isinstance(targets, HiddenTargets):
        p = (targets.logits(slice(None)).double() / temperature).softmax(1)
    else:
        assert isinstance(targets, DenseTargets)
        p = targets.logprobs.double().exp()
    return divergence_of(p, q, divergence, beta)


def select_any(logits: Tensor, spec: str, temperature: float = 1.0) -> Targets:
    """(R, V) logits -> targets of any kind: draws and given ids are random, 1 to 5 of a row.

    Hidden ones have nothing to do with the logits; their head has a softcap, a scale and a bias, and
    products that are exact in float32, in whatever order they are added up.
    """
    rows, vocab = logits.shape
    if spec.startswith("hidden"):
        return make_hidden(rows, vocab, parse_targets(spec).bits, temperature)
    given = torch.randint(vocab, (rows, 5))
    given[:, 1:][torch.rand(rows, 4) < 0.3] = -1
    return select(
        logits,
        f"{spec},realized=0",
        temperature=temperature,
        uniforms=torch.rand(rows, dtype=torch.float64),
        given_ids=given if "given_ids" in spec else None,
    )


def make_hidden(rows: int, vocab: int, bits: int, temperature: float) -> HiddenTargets:
    """Hidden targets with their head, of whole numbers and powers of 2."""
    size = 3
    head = TeacherHead(
        weight=torch.randint(-8, 9, (vocab, size)) / 8.0,
        bias=torch.randint(-8, 9, (vocab,)) / 4.0,
        softcap=4.0,
        logit_scale=0.5,
        effective_vocab_size=vocab,
        fingerprint="ab" * 16,
    )
    values = torch.randint(-9, 10, (rows, size))
    return HiddenTargets(
        vocab_size=vocab,
        temperature=temperature,
        values=values.to(torch.int8 if bits == 8 else torch.bfloat16),
        scale=torch.randint(1, 4, (rows,)) / 4.0 if bits == 8 else None,
        head_fingerprint=head.fingerprint,
        head=head,
    )


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
