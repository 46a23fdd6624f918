"""Runs one rank of a divided teacher; the replica starts it, as `python -m teacher_server.ranks`.

Orders come through stdin. On stdout the rank says every second that it is there, and why it fails.
Whatever else is printed goes to stderr.
"""

import logging
import os
import pickle
import queue
import signal
import sys
import threading
import time
from typing import Any, BinaryIO

from teacher_server.environment import set_environment
from teacher_server.errors import TeacherServerError

logger = logging.getLogger(__name__)

BEAT_S = 1.0


def main() -> None:
    """Loads a part of the teacher, and launches what it is told until stdin ends."""
    # The replica decides when to stop, and a terminal's Ctrl-C reaches every process.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    orders, reports = sys.stdin.buffer, os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    config, rank, store = pickle.load(orders)
    threading.Thread(target=_beat, args=(reports,), daemon=True).start()
    queued: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(orders, queued), daemon=True).start()
    try:
        _serve(config, rank, store, queued)
    except Exception as error:
        # What is wrong with a teacher every rank finds; the replica says it.
        if not isinstance(error, TeacherServerError):
            logger.exception("rank %d failed", rank.index)
        message = f"{type(error).__name__}: {error}".replace("\n", " ")
        reports.write(f"failed {message}\n".encode())
        threading.Event().wait()  # the replica ends this process, when it has read that


def _serve(config: Any, rank: Any, store: str, queued: queue.SimpleQueue) -> None:
    set_environment()
    import transformers

    from logitstream.logs import log_to_stderr
    from teacher_server.engine.follower import Follower
    from teacher_server.ranks.joining import join
    from teacher_server.startup import load_part, prepare_process

    log_to_stderr(config, logging.StreamHandler(sys.stderr), name="teacher_server")
    if config.log_level != "debug":  # the first rank finds the same, and says it once
        logging.getLogger("teacher_server").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    prepare_process(config)
    join(rank, config.device, store)
    follower = Follower(load_part(config, rank))
    logger.info("rank %d of %d is loaded", rank.index, rank.count)
    while True:
        follower.carry_out(queued.get())


def _beat(reports: BinaryIO) -> None:
    while True:
        reports.write(b".\n")
        time.sleep(BEAT_S)


def _read(orders: BinaryIO, queued: queue.SimpleQueue) -> None:
    """Reads orders; the end of them is the end of this process, whatever it is doing."""
    try:
        while True:
            queued.put(pickle.load(orders))
    except (EOFError, OSError, pickle.UnpicklingError):
        os._exit(0)


if __name__ == "__main__":
    main()
