"""Makes the engine that a configuration asks for: in a replica, and in each of its ranks."""

import logging
import os
import sys

import torch

from teacher_server.config import ServeConfig
from teacher_server.engine.engine import Engine
from teacher_server.engine.loading import load
from teacher_server.engine.model import TeacherModel
from teacher_server.engine.orders import Followers
from teacher_server.engine.probe import warm_up
from teacher_server.engine.tensor_parallel import Rank
from teacher_server.monitoring.memory import keep_freed_memory

logger = logging.getLogger(__name__)

SWITCH_INTERVAL_S = 5e-5
"""How long a Python thread runs before it lets another one run, where a GPU is fed."""


def prepare_process(config: ServeConfig) -> None:
    """Sets what holds for the whole process: memory and threads."""
    # Faulting in fresh pages for a chunk of logits costs several times the work on them, unless
    # the pages are huge; torch reads this at its first large allocation (docs/log.md).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    keep_freed_memory()
    if config.threads:
        torch.set_num_threads(config.threads)


def load_engine(
    config: ServeConfig, rank: Rank | None = None, followers: Followers | None = None
) -> Engine:
    """Loads the teacher and returns an engine that has run it. Raises ModelError.

    rank, followers: of a teacher that is divided, which rank this is and all others.
    """
    engine = make_engine(_load(config, rank), config, followers=followers)
    warm_up(engine, config.warm_up_s)
    return engine


def load_part(config: ServeConfig, rank: Rank) -> Engine:
    """Loads a rank's part of the teacher and returns an engine that waits for orders.

    Raises ModelError.
    """
    return make_engine(_load(config, rank), config)


def _load(config: ServeConfig, rank: Rank | None) -> TeacherModel:
    model = load(
        config.model,
        revision=config.revision,
        device=config.device,
        dtype=config.dtype,
        quantization=config.quantization,
        attention=config.attention,
        max_sequence_tokens=config.admission.max_sequence_tokens,
        load_format=config.load_format,
        rank=rank,
    )
    if model.device.type != "cpu":
        # The launcher runs Python beside the encoders and the event loop; each waits for the
        # others' turns, which last 5 ms by default, as long as a whole launch.
        sys.setswitchinterval(SWITCH_INTERVAL_S)
    return model


def make_engine(
    model: TeacherModel, config: ServeConfig, *, followers: Followers | None = None
) -> Engine:
    """Returns the engine that a configuration asks for."""
    engine = Engine(
        model,
        chunk_nbytes=config.head_chunk_mib << 20,
        pack_tokens=config.batch.max_tokens,
        exact=config.exactness == "bytes",
        followers=followers,
    )
    if engine.model.max_sequence_tokens < model.max_sequence_tokens:
        logger.warning(
            "sequences may have %d tokens, as many as a pack; the model takes %d: raise "
            "--batch.max-tokens to serve longer ones",
            engine.model.max_sequence_tokens,
            model.max_sequence_tokens,
        )
    return engine
