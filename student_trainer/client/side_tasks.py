"""Runs work on the side in the io thread; each failure is logged and reported."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from student_trainer.errors import ProtocolError, TeacherError

logger = logging.getLogger(__name__)

CLOSED = "this teacher was closed while answers were outstanding"


class SideTasks:
    """Holds the running tasks that are not awaited by their caller."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()

    def spawn(
        self,
        work: Coroutine[Any, Any, None],
        on_failure: Callable[[TeacherError], None] | None = None,
    ) -> "asyncio.Task[None]":
        """Starts the work; `on_failure` gets the reason if the work is cancelled or fails."""
        task = asyncio.create_task(work)
        # The loop itself keeps only weak references to its tasks.
        self._running.add(task)

        def finish(task: "asyncio.Task[None]") -> None:
            self._running.discard(task)
            failure = TeacherError(CLOSED)
            if not task.cancelled():
                cause = task.exception()
                if cause is None:
                    return
                logger.error("the client failed", exc_info=cause)
                failure = unexpected(cause)
            if on_failure is not None:
                on_failure(failure)

        task.add_done_callback(finish)
        return task

    async def cancel(self) -> None:
        """Cancels every task and waits until all of them have ended."""
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def unexpected(error: BaseException) -> ProtocolError:
    """Wraps an exception that this client was not written to handle; keeps it as the cause."""
    failure = ProtocolError(f"the client failed on an answer: {error!r}")
    failure.__cause__ = error
    return failure
