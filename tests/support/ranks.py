"""Data parallel processes on one machine: gloo, CPU, no ports (ranks meet at a file)."""

import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from tests.conftest import FORKSERVER


def run_ranks(
    target: Callable[..., None], *args: Any, num_ranks: int = 2, seconds: float = 120.0
) -> list[int | None]:
    """The exit codes of `target(*args)` in `num_ranks` processes that form one process group.

    A rank that fails prints its traceback. Ranks that still run after `seconds`, or five seconds
    behind one that failed, are killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            FORKSERVER.Process(
                target=_run, args=(rank, num_ranks, folder, target, args), daemon=True
            )
            for rank in range(num_ranks)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + seconds
        while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
            if any(process.exitcode not in (None, 0) for process in processes):
                deadline = min(deadline, time.monotonic() + 5.0)
            time.sleep(0.02)
        for process in processes:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def _run(
    rank: int, num_ranks: int, folder: str, target: Callable[..., None], args: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    store = torch.distributed.FileStore(str(Path(folder) / "store"), num_ranks)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=60)
    )
    try:
        target(*args)
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # a process group whose other ranks wait cannot be taken down
    if torch.distributed.is_initialized():  # a command has parted already
        torch.distributed.destroy_process_group()
