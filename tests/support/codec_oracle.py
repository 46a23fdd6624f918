"""What select should keep, from a float64 softmax over the whole vocabulary and a stable sort."""

from itertools import pairwise

import torch
from torch import Tensor

from logit_codec import TopKTargets


def logprobs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """(R, V) float64 log softmax(logits / temperature)."""
    return torch.log_softmax(logits.double() / temperature, 1)


def log_z(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """(R,) float64 logsumexp(logits / temperature)."""
    return torch.logsumexp(logits.double() / temperature, 1)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """(R,) float64, nats."""
    return torch.special.entr(logprobs(logits, temperature).exp()).sum(1)


def ranking(logits: Tensor) -> Tensor:
    """(R, V) ids of each row from the most to the least likely, ties by lowest id."""
    return logits.double().sort(dim=1, descending=True, stable=True).indices


def top_ids(logits: Tensor, k: int) -> list[list[int]]:
    """The ids of the k largest logits of each row, ties to the lowest id, ascending."""
    return ranking(logits)[:, :k].sort(1).values.tolist()


def kept_ids(targets: TopKTargets) -> list[list[int]]:
    """The ids of each row of some targets."""
    splits = targets.row_splits.tolist()
    ids = targets.token_ids.tolist()
    return [ids[a:b] for a, b in pairwise(splits)]


def row_logprobs(targets: TopKTargets) -> list[Tensor]:
    """The logprobs of each row of some targets, float64."""
    return list(targets.logprobs.double().split(targets.row_splits.diff().tolist()))
