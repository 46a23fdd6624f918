"""Hands what is written of a text to its reader, in flushes of some tokens.

A flush is encoded like an answer of its own. Its parts come in order, and a reader that is behind makes
its text pause: at most MAX_UNREAD flushes of a text exist that were not read.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from logit_codec import IdTable, TargetSpec
from teacher_server.engine.batch import PackTimes
from teacher_server.pipeline.encoding import Encoding
from teacher_server.scheduling.generation_job import Finish, GenerationJob
from teacher_server.teams.declaration import Team


@dataclass(slots=True, eq=False)
class Flush:
    """Holds some new tokens of a text, whose targets are encoded together."""

    first: int
    """Place of its first token in the text, the prompt included."""
    token_ids: list[int]
    finish: Finish
    """Set if its last token ends the text."""
    seconds: float
    """From when the text was queued until this flush."""
    waited_s: float
    """From when the text was queued until its first token was drawn."""
    times: PackTimes
    """Of the step that drew its last token."""
    step_texts: int
    """Texts that took part in that step."""
    spec: TargetSpec | None
    team: Team
    level: int
    reply_nbytes: int
    id_table: IdTable | None
    encoding: Encoding | None = field(default=None, init=False)
    """What its payloads come through; None: it has no targets."""


@dataclass(frozen=True, slots=True, eq=False)
class WrittenPart:
    """Holds some consecutive new tokens of a text, with the container of their targets."""

    first: int
    """Place of the first of them in the text, the prompt included."""
    token_ids: list[int]
    payload: bytes
    """A row for each token; empty for a text without targets."""
    finish: Finish
    """Set on the last part of the text: why it ended."""
    flush: Flush
    encode_s: float = 0.0
    compact_s: float = 0.0

    @property
    def ends_flush(self) -> bool:
        """Whether it is the last part of its flush."""
        flush = self.flush
        return self.first + len(self.token_ids) == flush.first + len(flush.token_ids)


class WrittenParts:
    """Iterates over the parts of one text, in order, as they are written.

    Call `mark_read` whenever a part was dealt with, so that the text goes on. Raises what computing or
    encoding raised. A reader that does not iterate to the end calls `close`.
    """

    def __init__(
        self,
        job: GenerationJob,
        *,
        on_read: Callable[[GenerationJob], None],
        on_close: Callable[["WrittenParts"], None],
    ) -> None:
        """Call it in the event loop of the reader. on_read: called when a whole flush was read."""
        self.job = job
        self.loop = asyncio.get_running_loop()
        self._on_read, self._on_close = on_read, on_close
        self._ready: asyncio.Queue[Flush | Exception] = asyncio.Queue()
        self.flushes: set[Flush] = set()
        """Those that were not read to their ends."""
        self._flush: Flush | None = None
        """The one whose parts are read."""
        self._part: WrittenPart | None = None
        """The one that was given out last, until it is marked."""
        self._is_over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> WrittenPart:
        if self._flush is None:
            if self._is_over:
                raise StopAsyncIteration
            result = await self._ready.get()
            if isinstance(result, Exception):
                self._is_over = True
                raise result
            self._flush = result
        part = await self._next_part(self._flush)
        if part.ends_flush:
            self._flush = None
            self._is_over = bool(part.finish)
        self._part = part
        return part

    def mark_read(self) -> None:
        """Says that the reader is done with the part that it got last."""
        part, self._part = self._part, None
        if part is not None and part.ends_flush:
            self.flushes.discard(part.flush)
            self._on_read(self.job)

    def close(self) -> None:
        """Ends the text, wherever it is: its slot and pages are free before the next launch."""
        self._is_over = True
        self._on_close(self)

    def deliver(self, result: Flush | Exception) -> None:
        """Gives the reader a flush, or the error that ends the text; any thread may call it."""
        if isinstance(result, Flush):
            self.flushes.add(result)
        self.loop.call_soon_threadsafe(self._ready.put_nowait, result)

    async def _next_part(self, flush: Flush) -> WrittenPart:
        if flush.encoding is None:
            return WrittenPart(flush.first, flush.token_ids, b"", flush.finish, flush)
        part = await anext(flush.encoding)
        end = part.first_row + part.num_rows
        return WrittenPart(
            first=flush.first + part.first_row,
            token_ids=flush.token_ids[part.first_row : end],
            payload=part.payload,
            finish=flush.finish if end == len(flush.token_ids) else "",
            flush=flush,
            encode_s=part.seconds,
            compact_s=part.compact_s,
        )
