"""Tries an engine before it serves, and again when it seems broken.

What is promised in `Describe` is measured here: whether a sequence gives the same bytes whatever
else is in its pack.
"""

import logging
import time
from functools import partial

import torch

from logit_codec import Targets, TopKSpec, TopKTargets, encode
from teacher_server.engine.batch import RowRequest
from teacher_server.engine.engine import Engine
from teacher_server.engine.packing import SHORT
from teacher_server.engine.products import LARGE, SMALL
from teacher_server.engine.threads import compute_apart
from teacher_server.errors import ModelError

logger = logging.getLogger(__name__)

SPEC = TopKSpec(k=8, bits=16, entropy=True, log_z=True)
FEW = (9, 40)
"""Tokens of the sequences that are tried first."""
MANY = (SMALL + 57, LARGE + SMALL + 43)
"""Tokens of those that cover every size of product; tried if that is quick."""
LONG_PROBE_S = 10.0
"""A probe that would take longer is left out: a large teacher on a CPU."""


def make_requests(engine: Engine, lengths: tuple[int, ...], seed: int = 1) -> list[RowRequest]:
    """Makes sequences of random ids, each of at least two and at most as many as are served."""
    generator = torch.Generator().manual_seed(seed)
    vocab_size = engine.model.effective_vocab_size
    requests = []
    for length in lengths:
        length = max(2, min(length, engine.model.max_sequence_tokens))
        token_ids = torch.randint(vocab_size, (length,), generator=generator)
        requests.append(RowRequest(token_ids, torch.arange(length - 1), SPEC))
    return requests


def is_exact(engine: Engine) -> bool:
    """Whether the level is `bytes`: the engine was made for it, and it holds where it is tried."""
    # Which tokens share an expert's product depends on the neighbours.
    return engine.exact and not engine.model.has_experts and keeps_bytes(engine)


def keeps_bytes(engine: Engine) -> bool:
    """Tries whether a sequence gives the same bytes alone and among others, wherever it stands."""
    few = make_requests(engine, FEW)
    began = time.perf_counter()
    if not _keeps_bytes_of(engine, few):
        return False
    seconds_per_token = (time.perf_counter() - began) / sum(FEW)
    if seconds_per_token * sum(MANY) > LONG_PROBE_S:
        logger.info("only short sequences were probed for exactness: longer ones take too long")
        return True
    return _keeps_bytes_of(engine, make_requests(engine, MANY))


def _keeps_bytes_of(engine: Engine, requests: list[RowRequest]) -> bool:
    alone = [encode(engine.score([request])[0]) for request in requests]
    lengths: tuple[int, ...] = (7, 33)
    if not engine.model.is_packed:  # only sequences of one length then share a forward pass
        lengths = tuple(len(request.token_ids) for request in requests) * 3
    first, *others = make_requests(engine, lengths, seed=2)
    around = [first, *requests[::-1], *others]
    among = [encode(targets) for targets in engine.score(around)]
    return among[1 : 1 + len(requests)] == alone[::-1]


class KnownAnswer:
    """Remembers the answer to one sequence, so that a broken device can be told from bad input."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._requests = make_requests(engine, (SHORT // 2,), seed=3)
        self._log_z = self._compute()

    def repeats(self) -> bool:
        """Whether the answer still comes out; a few bits may differ. Raises what computing raises."""
        return torch.allclose(self._compute(), self._log_z, rtol=1e-2, atol=1e-2)

    def _compute(self) -> torch.Tensor:
        targets: Targets = self._engine.score(self._requests)[0]
        assert isinstance(targets, TopKTargets)
        assert targets.log_z is not None
        return targets.log_z


def warm_up(engine: Engine, limit_s: float) -> None:
    """Runs a pack of every shape, so that no client waits for what is done only once.

    Raises ModelError if that takes longer than `limit_s`, and what computing raises.
    """
    began = time.perf_counter()
    try:
        compute_apart(partial(_run_every_shape, engine), name="warm-up", limit_s=limit_s)
    except TimeoutError:
        raise ModelError(
            f"the first computations took longer than {limit_s:g} s. Raise --warm-up-s if this "
            "device needs longer, or lower --batch.max-tokens."
        ) from None
    shapes = ", ".join(map(str, engine.packer.shapes)) or "any"
    logger.info("warmed up pack_tokens=%s seconds=%.1f", shapes, time.perf_counter() - began)


def _run_every_shape(engine: Engine) -> None:
    # On a CPU a pack has any size: one that has tiles of both sizes stands for all.
    for tokens in engine.packer.shapes or [min(LARGE + SMALL, engine.pack_tokens)]:
        length = min(tokens, engine.model.max_sequence_tokens)
        engine.score(make_requests(engine, (length,) * max(1, tokens // length)))
