"""Runs a record's reading, decoding and writing in one thread, and resolves futures from there."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from student_trainer.errors import TeacherError
from student_trainer.teachers.request import Answer

CLOSED = "this record is closed; open it again to use it"

Result = TypeVar("Result")


class Worker:
    """Owns the thread of one record. Files and unsealed rows need no lock: only it uses them."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="record")

    def submit(self, work: Callable[..., Result], *arguments: Any) -> "Future[Result]":
        """Runs `work` in the thread. Raises RuntimeError once the thread has ended."""
        return self._thread.submit(work, *arguments)

    def run_for(self, future: "Future[Answer]", work: Callable[..., None], *arguments: Any) -> None:
        """Runs `work` in the thread; an error that it raises becomes the future's."""

        def run() -> None:
            try:
                work(*arguments)
            except BaseException as error:  # a thread has no caller: only the future can pass it on
                fail(future, error)

        try:
            self._thread.submit(run)
        except RuntimeError:  # the record was closed, or the interpreter shuts down
            if not future.cancel():  # it is running already, so it still needs an outcome
                fail(future, TeacherError(CLOSED))

    def finish(self, last: Callable[[], None]) -> None:
        """Runs `last` after all that was submitted, and drops what is submitted later."""
        try:
            try:
                done = self._thread.submit(last)
            except RuntimeError:  # the interpreter shuts down, which emptied the thread's queue
                last()
            else:
                done.result()
        finally:
            self._thread.shutdown(cancel_futures=True)


def begin(future: "Future[Answer]") -> bool:
    """Marks a future as running; returns False if the caller gave it up.

    One that runs already keeps running: its shard was damaged, so it is answered another way.
    """
    return future.running() or future.set_running_or_notify_cancel()


def resolve(future: "Future[Answer]", work: Callable[[], Answer]) -> None:
    """Sets a future to what `work` returns or raises, unless the caller gave it up."""
    if begin(future):
        try:
            answer = work()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(answer)


def fail(future: "Future[Answer]", error: BaseException) -> None:
    """Sets a future to an error, unless it is done or the caller gave it up."""
    if not future.done() and begin(future):
        future.set_exception(error)
