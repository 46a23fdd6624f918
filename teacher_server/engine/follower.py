"""Carries out what the first rank of a divided teacher orders."""

import contextlib

from teacher_server.engine.engine import Engine
from teacher_server.engine.generate import CannotGenerate, Generator
from teacher_server.engine.orders import (
    CopyPage,
    OpenGeneration,
    Order,
    Score,
    TextMirror,
    WriteChunks,
    WriteStep,
)


class Follower:
    """Launches on one rank what the first one launches on its own; an error ends the rank."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._texts = TextMirror()
        self._generator: Generator | None = None

    def carry_out(self, order: Order) -> None:
        """Launches what an order says. Raises whatever launching raises."""
        if isinstance(order, Score):
            self._engine.launch(order.read())
        elif isinstance(order, OpenGeneration):
            # The first rank finds the same, and says so.
            with contextlib.suppress(CannotGenerate, ValueError):
                self._generator = self._engine.open_generation(order.pool_nbytes)
        else:
            assert self._generator is not None
            with self._engine.launching():
                self._write(self._generator, order)

    def _write(self, generator: Generator, order: WriteChunks | WriteStep | CopyPage) -> None:
        if isinstance(order, CopyPage):
            generator.copy_page(order.source, order.target)
            return
        texts = [self._texts.read(news) for news in order.texts]
        if isinstance(order, WriteChunks):
            generator.launch_chunks(list(zip(texts, order.counts, strict=True)))
        else:
            generator.launch_step(texts)
        self._texts.forget(order.gone)
