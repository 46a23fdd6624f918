"""Lets the ranks of a divided teacher meet, in the process group of torch.distributed."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]

from teacher_server.engine.tensor_parallel import Rank

JOIN_S = 7200.0
"""How long a rank may wait for another one: loading a large teacher takes them unequally long. One
that is lost is noticed in another way."""


def join(rank: Rank, device: str, store: str) -> None:
    """Meets the other ranks through a file, so that nothing listens for strangers meanwhile."""
    is_cuda = device != "cpu" and torch.cuda.is_available()
    # All ranks are on this machine; looking its name up may lead elsewhere, or nowhere.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if is_cuda:
        torch.cuda.set_device(rank.index)
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        store=FileStore(store, rank.count),
        rank=rank.index,
        world_size=rank.count,
        timeout=timedelta(seconds=JOIN_S),
        device_id=torch.device("cuda", rank.index) if is_cuda else None,
    )


def leave() -> None:
    """Ends the membership, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
