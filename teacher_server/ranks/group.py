"""Starts the other ranks of a divided teacher, tells them what to launch, and notices their end."""

import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from teacher_server.config import ServeConfig
from teacher_server.engine.orders import LostStep, Order
from teacher_server.engine.tensor_parallel import Rank
from teacher_server.ranks.joining import join, leave

logger = logging.getLogger(__name__)

SILENT_S = 10.0
"""A rank that computes or waits says every second that it is there. One that says nothing for so
long is frozen."""
SILENT_WHILE_LOADING_S = 60.0
"""The same while it loads: importing and reading can keep everything else in a process waiting."""
WATCH_S = 0.5
CLOSE_S = 5.0
"""How long ranks may take to end by themselves."""
SAME_ERROR_S = 3.0
"""How long the first rank has to find the error itself that another one reports while it loads."""


class RankGroup:
    """Holds the other ranks. `watch` has to be called once the teacher is loaded.

    A rank that is lost before ends this process: it waits for that rank where nothing wakes it up.
    """

    def __init__(self, config: ServeConfig) -> None:
        """Starts the processes, and waits until all of them have met."""
        count = config.tensor_parallel_size
        self.rank = Rank(0, count)
        self._folder = tempfile.TemporaryDirectory(prefix="teacher-ranks-")
        store = str(Path(self._folder.name, "store"))
        self._on_loss: Callable[[str], None] = self._end_process
        self._is_loading = True
        self._is_closing = False
        self._losing = threading.Lock()
        self._processes = [
            self._start(config, Rank(index, count), store) for index in range(1, count)
        ]
        self._heard_s = [time.monotonic()] * len(self._processes)
        for number in range(len(self._processes)):
            threading.Thread(target=self._listen, args=(number,), daemon=True).start()
        threading.Thread(target=self._watch_silence, daemon=True).start()
        join(self.rank, config.device, store)

    @property
    def pids(self) -> list[int]:
        """The processes of the other ranks."""
        return [process.pid for process in self._processes]

    def tell(self, order: Order) -> None:
        """Sends an order to all ranks. Raises LostStep if one is gone."""
        message = pickle.dumps(order, protocol=pickle.HIGHEST_PROTOCOL)
        try:
            for process in self._processes:
                assert process.stdin is not None
                process.stdin.write(message)
                process.stdin.flush()
        except OSError as error:
            raise LostStep(f"a rank takes no orders any more: {error}") from error

    def watch(self, on_loss: Callable[[str], None]) -> None:
        """Calls `on_loss`, once and in any thread, when a rank ends, fails or is frozen."""
        self._on_loss = on_loss
        self._is_loading = False

    def close(self) -> None:
        """Ends the ranks, when nothing is computed any more."""
        self._is_closing = True
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
        deadline = time.monotonic() + CLOSE_S
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        leave()
        self._folder.cleanup()

    def kill(self) -> None:
        """Ends the ranks at once; nothing else of them can be relied on any more."""
        self._is_closing = True
        for process in self._processes:
            process.kill()
        self._folder.cleanup()

    def _start(self, config: ServeConfig, rank: Rank, store: str) -> subprocess.Popen:
        # Not sys.argv: settings may be long, and the process list is everybody's.
        process = subprocess.Popen(
            [sys.executable, "-m", "teacher_server.ranks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "LOCAL_RANK": str(rank.index)},
        )
        assert process.stdin is not None
        pickle.dump((config, rank, store), process.stdin)
        process.stdin.flush()
        return process

    def _listen(self, number: int) -> None:
        """Reads what a rank says of itself, until it ends."""
        process = self._processes[number]
        assert process.stdout is not None
        for line in process.stdout:
            self._heard_s[number] = time.monotonic()
            if line.startswith(b"failed "):
                why = line.removeprefix(b"failed ").decode(errors="replace").strip()
                self._lose(f"rank {number + 1} of {self.rank.count} failed: {why}")
        code = process.wait()
        ended = (
            f"was ended by {signal.Signals(-code).name}"
            if code < 0
            else f"ended with exit code {code}"
        )
        self._lose(f"rank {number + 1} of {self.rank.count} {ended}")

    def _watch_silence(self) -> None:
        while not self._is_closing:
            time.sleep(WATCH_S)
            silent_s = time.monotonic() - min(self._heard_s)
            if silent_s > (SILENT_WHILE_LOADING_S if self._is_loading else SILENT_S):
                number = self._heard_s.index(min(self._heard_s))
                self._lose(
                    f"rank {number + 1} of {self.rank.count} has not been heard of for "
                    f"{silent_s:.0f} s"
                )
                return

    def _lose(self, why: str) -> None:
        if self._is_loading:
            time.sleep(SAME_ERROR_S)
        with self._losing:
            if self._is_closing:
                return
            self._is_closing = True
        self._on_loss(why)

    def _end_process(self, why: str) -> None:
        logger.critical("%s; this process ends", why)
        self.kill()
        os._exit(1)


def start_ranks(config: ServeConfig) -> tuple[ServeConfig, RankGroup | None]:
    """Starts the other ranks that a configuration asks for.

    Returns it with each rank's share of the cores, and None if there is a single rank.
    """
    count = config.tensor_parallel_size
    if count == 1:
        return config, None
    if config.threads is None and not torch.cuda.is_available():
        share = max(1, len(os.sched_getaffinity(0)) // count)
        config = config.model_copy(update={"threads": share})
        torch.set_num_threads(share)
    os.environ["LOCAL_RANK"] = "0"  # by which transformers chooses the device
    return config, RankGroup(config)
