"""Ends a training at Ctrl-C in such a way that it can be resumed."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class CtrlC:
    """Turns the first Ctrl-C into a wish that the training fulfils at the end of its step.

    A second one, or one while nothing is computed, raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.was_pressed = False
        self._is_idle = False

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Takes over from Python's own handler, if that is in force, until the block ends."""
        own = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if not own or threading.current_thread() is not threading.main_thread():
            yield
            return
        signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Marks a block that only waits: a Ctrl-C in it takes effect at once."""
        self._is_idle = True
        try:
            if self.was_pressed:
                raise KeyboardInterrupt
            yield
        finally:
            self._is_idle = False

    def _handle(self, number: int, frame: FrameType | None) -> Any:
        if self.was_pressed or self._is_idle:
            raise KeyboardInterrupt
        self.was_pressed = True
