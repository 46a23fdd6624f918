"""Shows how far the loading of weights is: a bar on a terminal, else a line every few seconds."""

import logging
import sys
import time
from typing import Any, Self

from tqdm import tqdm

logger = logging.getLogger(__name__)

LINE_S = 5.0
"""Seconds between two lines, where there is no terminal."""
GIB = 1 << 30


class Progress:
    """Counts bytes up to a total that is known; `with` it, and end what it shows.

    verb: what is done to the bytes, such as "loading".
    """

    def __init__(self, verb: str, total_nbytes: int) -> None:
        self._verb = verb
        self._total = total_nbytes
        self._done = 0
        self._start = self._shown = time.monotonic()
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> Self:
        if sys.stderr is not None and sys.stderr.isatty():
            self._bar = tqdm(
                total=self._total,
                desc=f"{self._verb} weights",
                unit="B",
                unit_scale=True,
                unit_divisor=1024,
                leave=False,
                file=sys.stderr,
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def add(self, nbytes: int) -> None:
        """Counts further bytes."""
        self._done += nbytes
        if self._bar is not None:
            self._bar.update(nbytes)
        elif time.monotonic() >= self._shown + LINE_S:
            self._shown = time.monotonic()
            logger.info(
                "%s weights: %.1f of %.1f GiB, %.0f s",
                self._verb,
                self._done / GIB,
                self._total / GIB,
                self.seconds,
            )
