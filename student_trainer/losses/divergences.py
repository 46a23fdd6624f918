"""Computes divergences and their gradients, one cell at a time.

A divergence is a sum over cells of a function of log p (teacher) and log q (student);
docs/losses.md has the formulas. `DIVERGENCES` holds the functions, `PULLS` their gradients.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from logit_codec.kinds.base import LOWEST

FLOOR = -149 * math.log(2)
"""Log of float32's smallest number. Reverse KL divides by p, and reads a p of 0 as this."""


def compute_cells(divergence: str, beta: float, logp: Tensor, logq: Tensor) -> Tensor:
    """Computes what each cell adds to the divergence; logp and logq may be -inf."""
    return DIVERGENCES[divergence](logp.clamp(min=LOWEST), logq.clamp(min=LOWEST), beta)


def _forward_kl(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    return logp.exp() * (logp - logq)


def _reverse_kl(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    return logq.exp() * (logq - logp.clamp(min=FLOOR))


def _jsd(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    logm = log_mixture(logp, logq, beta)
    return beta * logp.exp() * (logp - logm) + (1 - beta) * logq.exp() * (logq - logm)


def _skew_kl(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    return logp.exp() * (logp - log_mixture(logp, logq, beta))


def _skew_reverse_kl(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    return logq.exp() * (logq - log_mixture(logq, logp.clamp(min=FLOOR), beta))


def _total_variation(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    return 0.5 * (logp.exp() - logq.exp()).abs()


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "total_variation": _total_variation,
}


def compute_corrected_cells(logp: Tensor, logq: Tensor) -> Tensor:
    """Computes q log(q / p) + p - q of each cell, which is never negative; 0 only where q = p.

    Summed over the ids that are kept, it is the reverse KL truncated to them, plus the teacher's
    mass on them minus the student's: the correction of MOPD (arXiv:2606.30406). Without it the
    truncated sum falls when the student moves all of its mass off the kept ids, and its gradient
    does not vanish where q = p.
    """
    logp, logq = logp.clamp(min=FLOOR), logq.clamp(min=LOWEST)
    q = logq.exp()
    return q * (logq - logp) + logp.exp() - q


def compute_corrected_pulls(logp: Tensor, logq: Tensor) -> Tensor:
    """Computes q * dD/dq of `compute_corrected_cells`."""
    logq = logq.clamp(min=LOWEST)
    return logq.exp() * (logq - logp.clamp(min=FLOOR))


def log_mixture(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Computes log(share * exp(first) + (1 - share) * exp(second)), for a share below 1."""
    if share == 0:
        return second
    return torch.logaddexp(first + math.log(share), second + math.log1p(-share))


def compute_pulls(divergence: str, beta: float, logp: Tensor, logq: Tensor) -> Tensor:
    """Computes a = q * dD/dq of each cell; logp and logq may be -inf."""
    return PULLS[divergence](logp.clamp(min=LOWEST), logq.clamp(min=LOWEST), beta)


def _pull_forward_kl(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    return -logp.exp()


def _pull_reverse_kl(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    return logq.exp() * (logq - logp.clamp(min=FLOOR) + 1)


def _pull_jsd(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    return (1 - beta) * logq.exp() * (logq - log_mixture(logp, logq, beta))


def _pull_skew_kl(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    return -(1 - beta) * (logp + (logq - log_mixture(logp, logq, beta))).exp()


def _pull_skew_reverse_kl(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    ratio = logq - log_mixture(logq, logp.clamp(min=FLOOR), beta)
    pull = ratio + 1
    if beta > 0:
        pull = pull - (ratio + math.log(beta)).exp()  # at most 1; ratio.exp() may be infinite
    return logq.exp() * pull


def _pull_total_variation(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    q = logq.exp()
    return 0.5 * q * (q - logp.exp()).sign()


PULLS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "forward_kl": _pull_forward_kl,
    "reverse_kl": _pull_reverse_kl,
    "jsd": _pull_jsd,
    "skew_kl": _pull_skew_kl,
    "skew_reverse_kl": _pull_skew_reverse_kl,
    "total_variation": _pull_total_variation,
}
