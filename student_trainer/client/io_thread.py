"""Runs the asyncio loop of every client of this process in one thread."""

import asyncio
import atexit
import logging
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from student_trainer.errors import ForkedClient

T = TypeVar("T")

logger = logging.getLogger(__name__)


class IoThread:
    """Takes coroutines and calls from blocking callers; get it with `IoThread.shared()`."""

    _instance: "IoThread | None" = None
    _lock = threading.Lock()

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="teacher-io", daemon=True)
        self._thread.start()
        atexit.register(self._stop)

    @classmethod
    def shared(cls) -> "IoThread":
        """Returns this process's thread. Raises ForkedClient in a fork of a process that has one."""
        with cls._lock:
            if cls._instance is None or cls._instance.pid != os.getpid():
                if cls._instance is not None:
                    raise ForkedClient(
                        f"process {cls._instance.pid} used a teacher before it forked this one: "
                        "gRPC does not survive a fork. Start this process with the 'spawn' "
                        "method, or connect before anything else does in the parent."
                    )
                cls._instance = cls()
            return cls._instance

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine in the loop and waits for it; Ctrl-C cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def call(self, function: Any, *arguments: Any) -> None:
        """Calls a function in the loop soon, without waiting for it."""
        self._loop.call_soon_threadsafe(function, *arguments)

    def _run(self) -> None:
        while not self._stopped:
            try:
                self._loop.run_forever()
            except (
                BaseException
            ) as error:  # SystemExit ends a loop; other callers still wait for it
                logger.error("the client failed", exc_info=error)

    def _stop(self) -> None:
        if os.getpid() == self.pid:
            self._stopped = True
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(2.0)
