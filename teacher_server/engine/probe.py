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
from teacher_server.engine.continuation import Continuation, DrawRule
from teacher_server.engine.engine import Engine
from teacher_server.engine.generate import Generator
from teacher_server.engine.key_pool import PAGE_TOKENS, pages_for
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
WRITTEN_PROMPT, NUM_WRITTEN = 40, 6
"""Tokens of the text that is written to see whether it always has the same bytes, and after it."""
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


def is_exact(engine: Engine, generator: Generator | None = None) -> bool:
    """Whether the level is `bytes`: the engine was made for it, and it holds where it is tried.

    generator: what writes texts, if anything does.
    """
    # Which tokens share an expert's product depends on the neighbours.
    if not engine.exact or engine.model.has_experts or not keeps_bytes(engine):
        return False
    if generator is None:
        return True
    is_same = writes_same_bytes(engine, generator)
    generator.release_weights()  # a teacher that only scores should not keep them twice
    if not is_same:
        logger.warning("texts do not have the same bytes in any company here: level tolerance")
        return False
    return True


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


def writes_same_bytes(engine: Engine, generator: Generator) -> bool:
    """Tries whether a text has the same bytes alone, among others, and after it was interrupted."""
    prompts = [min(n, generator.max_tokens - NUM_WRITTEN) for n in (1, 2 * PAGE_TOKENS, 9)]
    prompt = min(WRITTEN_PROMPT, generator.max_tokens - NUM_WRITTEN)
    needed = sum(pages_for(length + NUM_WRITTEN) for length in (*prompts, prompt))
    if prompt < 1 or needed > generator.pool.num_pages:
        logger.info("texts were not probed for exactness: there is no room for several")
        return True
    began = time.perf_counter()
    alone = _write(engine, generator, [_begin_text(engine, prompt)])[0]
    if time.perf_counter() - began > LONG_PROBE_S / 3:
        logger.info("texts were not probed for exactness: writing them takes too long")
        return True
    others = [_begin_text(engine, length, seed=2) for length in (1, 2 * PAGE_TOKENS, 9)]
    among = _write(
        engine, generator, [*others[:2], _begin_text(engine, WRITTEN_PROMPT), *others[2:]]
    )
    resumed = _begin_text(engine, WRITTEN_PROMPT)
    resumed.new_ids += alone[0][: NUM_WRITTEN // 2]
    rest = _write(engine, generator, [resumed])[0]
    kept = alone[0], alone[1][NUM_WRITTEN // 2 :]
    return among[2] == alone and rest == kept


def _begin_text(engine: Engine, num_tokens: int, seed: int = 1) -> Continuation:
    request = make_requests(engine, (num_tokens + 1,), seed)[0]
    rule = DrawRule(seed=seed)
    return Continuation(request.token_ids[:num_tokens], rule, SPEC)


def _write(
    engine: Engine, generator: Generator, texts: list[Continuation]
) -> list[tuple[list[int], list[bytes]]]:
    """Writes texts of NUM_WRITTEN tokens; returns the ids of each, and the targets of those drawn."""
    found: list[list[bytes]] = [[] for _ in texts]
    for text in texts:
        pages = generator.pool.take(pages_for(len(text.prompt_ids) + NUM_WRITTEN))
        assert pages is not None, "their number was checked, and nobody else writes yet"
        text.pages += pages
    while chunks := [(text, count) for text in texts if (count := generator.next_chunk(text))]:
        with engine.launching():
            launched = generator.launch_chunks(chunks)
        generator.result_of_chunks(launched)
    while some := [i for i, text in enumerate(texts) if len(text.new_ids) < NUM_WRITTEN]:
        with engine.launching():
            step = generator.launch_step([texts[i] for i in some])
        token_ids, rows, _ = generator.result_of_step(step)
        for i, token_id, row in zip(some, token_ids, rows, strict=True):
            assert row is not None
            texts[i].new_ids.append(token_id)
            found[i].append(encode(row.compact()))
    for text in texts:
        generator.pool.give_back(text.pages)
    return [(text.new_ids, rows) for text, rows in zip(texts, found, strict=True)]


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
