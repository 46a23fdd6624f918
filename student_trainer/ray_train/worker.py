"""Runs one data parallel worker of `ray_train`."""

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from logitstream.connection import Connection
from logitstream.logs import log_to_stderr
from student_trainer import data
from student_trainer.config import TrainConfig
from student_trainer.errors import (
    AccessDenied,
)
from student_trainer.training import run as runs
from student_trainer.training.corpus import Corpus
from student_trainer.training.held_out import HeldOut
from student_trainer.training.shuffled_control import ShuffledTargets
from student_trainer.training.students import make_student

if TYPE_CHECKING:
    pass
from student_trainer.ray_train.checkpoints import _Checkpoints, _seed_of
from student_trainer.ray_train.job import _Job

logger = logging.getLogger(__name__)


RENDEZVOUS_S = 1800
"""How long ranks wait for each other; Ray's own number."""


def _meet(backend: str, file: str, rank: int, count: int) -> None:
    """Forms the process group of one machine, on loopback."""
    from datetime import timedelta

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        backend,
        init_method=f"file://{file}",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=RENDEZVOUS_S),
    )


def _work(job: _Job) -> tuple[dict[str, Any], float | None]:
    """What every worker does; the first one's StudentResults, as plain values, and bytes per token
    are the result."""
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    rank, num_ranks = context.get_world_rank(), context.get_world_size()
    config = job.config
    log = _log_to_stderr(config, rank)
    texts = load_file(job.texts)
    corpus = Corpus(job.tokenizer, texts["sequences"], texts["held_out"])
    device = ray.train.torch.get_device() if job.on_gpus else torch.device("cpu")
    student = make_student(config).to(device)
    if rank:  # else all would drop the same units
        torch.manual_seed(_seed_of(config.seed, rank))
    student = DistributedDataParallel(
        student, device_ids=[device] if job.on_gpus else None, forward_sync_buffers=False
    )
    checkpoints = _Checkpoints(job, rank)
    held_out = HeldOut(corpus.held_out, texts.get("best_ids"), num_ids=job.num_ids)
    shares = data.share(runs.batches(config, corpus), rank=rank, num_ranks=num_ranks)
    with ExitStack() as ending:
        ending.enter_context(_token_missed(config))
        if job.name == "control":
            made = None
            pairs = runs.control_pairs(shares)
        else:
            teacher = ending.enter_context(runs.open_teacher(config, job.tokenizer))
            made = runs.DistilledPairs(config, teacher, shares)
            pairs = made.stream
        if job.name == "shuffled":
            assert made is not None
            pairs = ShuffledTargets(made.stream, seed=config.seed)
        run = runs.train_student(
            *(config, student, pairs, job.name, checkpoints),
            held_out=held_out,
            also=made.measured if made and job.name == "distilled" else dict,
            log=log,
        )
        results = runs.results_of(run, held_out.measure(student, config.batch_size))
        nbytes = None if made is None else runs.bytes_per_token(made, run.history)
        return results.model_dump(), nbytes


@contextmanager
def _token_missed(config: TrainConfig) -> Iterator[None]:
    """Says where the token has to be. It is in no job: a worker has it from its environment."""
    try:
        yield
    except AccessDenied as error:
        seen = Connection.to(config.teacher, **config.credentials())
        if seen.token is not None or seen.cert is not None:
            raise
        raise AccessDenied(
            f"the worker on {socket.gethostname()} has no token in its environment: set "
            "TEACHER_TOKEN (or what the connection file names) where `ray start` is called, on every "
            f"machine of the cluster; it is not sent to them. {error}"
        ) from error


def _log_to_stderr(config: TrainConfig, rank: int) -> Callable[[str], None]:
    """Ray hands the stderr of a worker on; of the workers, only the first says how it goes."""
    log_to_stderr(config, name="student_trainer")
    if rank:
        logging.getLogger("student_trainer").setLevel(logging.WARNING)
    # Each worker would say so for each checkpoint.
    from ray.train.v2._internal.execution import context

    context.logger.setLevel(logging.WARNING)
    return logger.info
