"""Writes the texts of one call of `LocalTeacher.generate`, in the caller's thread.

Several texts take part in every step, as at a service. A text enters when there are pages for all that
it may become, so that none has to make room for another.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from logit_codec import Targets, TargetSpec, TeacherHead, decode_parts, encode_parts
from student_trainer.errors import InvalidRequest, TeacherError, TeacherOverloaded
from student_trainer.teachers.generation import Finish, GenerateOptions, Generation, join_targets
from student_trainer.teachers.writing import Written

if TYPE_CHECKING:
    from teacher_server.engine.continuation import Continuation
    from teacher_server.engine.generate import Generator
    from teacher_server.engine.head import ScoredRows
    from teacher_server.engine.stops import StopRule

PART_NBYTES = 1 << 20
"""The size of the service's parts; where a text is split does not change what is decoded."""
PART_TOKENS = 64
"""After so many tokens their targets are encoded, so that what they were selected from can go."""


@dataclass(slots=True, eq=False)
class _Text:
    """Follows one text."""

    index: int
    continuation: "Continuation"
    rows: "list[ScoredRows]" = field(default_factory=list)
    """Of the tokens since the last payload."""
    payloads: list[bytes] = field(default_factory=list)


class LocalWriter:
    """Continues prompts with the model of this process."""

    def __init__(
        self,
        generator: "Generator",
        options: GenerateOptions,
        spec: TargetSpec | None,
        stop_rule: "StopRule",
        head: TeacherHead | None,
        compute: Callable[[], AbstractContextManager[None]],
        chunk_tokens: int,
    ) -> None:
        """spec: that of the options, complete. compute: a context in which
        the model may be used. chunk_tokens: most
        tokens of prompts that are computed at once."""
        self._generator = generator
        self._options = options
        self._spec = spec
        self._stop_rule = stop_rule
        self._head = head
        self._compute = compute
        self._chunk_tokens = chunk_tokens
        self._waiting: deque[tuple[int, int, Tensor]] = deque()
        """(index, sample, prompt) of texts that were not begun."""
        self._running: list[_Text] = []

    def ask(self, index: int, prompt_ids: Tensor) -> None:
        """Takes note of all samples of a prompt."""
        self._waiting.extend(
            (index, sample, prompt_ids) for sample in range(self._options.num_samples)
        )

    def take(self) -> list[Written]:
        """Computes until a text has ended."""
        while True:
            with self._compute():
                self._begin_texts()
                unready = [text for text in self._running if not text.continuation.is_ready]
                if unready:
                    self._compute_prompts(unready)
                elif ended := self._step():
                    return ended

    def close(self) -> None:
        """Gives back the pages of all texts."""
        self._waiting.clear()
        for text in self._running:
            self._generator.pool.give_back(text.continuation.pages)
        self._running.clear()

    def _begin_texts(self) -> None:
        """Lets waiting texts in, in order, while there are pages for all of their tokens."""
        from teacher_server.engine.continuation import Continuation, DrawRule

        options = self._options
        while self._waiting:
            index, sample, prompt_ids = self._waiting[0]
            sibling = next((text for text in self._running if text.index == index), None)
            if sibling and sibling.continuation.num_cached < len(prompt_ids) - 1:
                return  # what it computes of the prompt counts for this one too
            rule = DrawRule(
                options.temperature,
                options.top_k,
                options.top_p,
                options.seed,
                options.epoch,
                sample,
            )
            text = Continuation(prompt_ids, rule, self._spec, options.spec_temperature)
            if not self._find_pages(text, sibling and sibling.continuation):
                if not self._running:
                    raise TeacherOverloaded(
                        "other texts of this teacher hold its memory for keys: close the iterators that "
                        "`generate` returned before, or make LocalTeacher with a larger keys_mib"
                    )
                return
            self._waiting.popleft()
            self._running.append(_Text(index, text))

    def _find_pages(self, text: "Continuation", sibling: "Continuation | None") -> bool:
        """Takes pages for all tokens of a text; False if there are too few. Shares the prompt's."""
        from teacher_server.engine.key_pool import PAGE_TOKENS, pages_for

        pool, prefilled = self._generator.pool, len(text.prompt_ids) - 1
        shared = sibling.pages[: prefilled // PAGE_TOKENS] if sibling else []
        most = len(text.prompt_ids) + self._options.max_new_tokens
        own = pool.take(pages_for(most) - len(shared))
        if own is None:
            return False
        pool.share(shared)
        text.pages = [*shared, *own]
        if sibling:
            if prefilled % PAGE_TOKENS:
                pool.copy(sibling.pages[len(shared)], own[0])
            text.num_cached = prefilled
        return True

    def _compute_prompts(self, texts: "Sequence[_Text]") -> None:
        """Computes the next tokens of prompts, at least of the first, in one pack."""
        chunks, room = [], self._chunk_tokens
        for text in texts:
            count = self._generator.next_chunk(text.continuation)
            if chunks and count > room:
                break
            chunks.append((text.continuation, count))
            room -= count
        self._generator.result_of_chunks(self._generator.launch_chunks(chunks))

    def _step(self) -> list[Written]:
        """Draws a token of every text; returns those that end with it."""
        texts = list(self._running)
        try:
            launched = self._generator.launch_step([text.continuation for text in texts])
        except ValueError as error:  # targets that the model does not have
            raise InvalidRequest(str(error)) from None
        token_ids, rows, _ = self._generator.result_of_step(launched)
        ended: list[Written] = []
        for text, token_id, row in zip(texts, token_ids, rows, strict=True):
            continuation = text.continuation
            continuation.new_ids.append(token_id)
            if row is not None:
                text.rows.append(row)
            finish = self._stop_rule.check(continuation)
            try:
                if finish or len(text.rows) == PART_TOKENS:
                    self._encode(text)
                result = self._make_generation(text, finish) if finish else None
            except TeacherError as error:
                result = error
            if result is not None:
                self._running.remove(text)
                self._generator.pool.give_back(continuation.pages)
                ended.append(Written(text.index, continuation.rule.sample, result))
        return ended

    def _encode(self, text: _Text) -> None:
        """Turns the targets of the last tokens into what a service would send."""
        if self._spec is None or not text.rows:
            return
        pieces = tuple(piece for row in text.rows for piece in row.pieces)
        targets = type(text.rows[0])(pieces).compact()
        parts = encode_parts(targets, self._spec, max_nbytes=PART_NBYTES)
        text.payloads += [payload for _, _, payload in parts]
        text.rows.clear()

    def _make_generation(self, text: _Text, finish: Finish) -> Generation:
        continuation = text.continuation
        targets: Targets | None = None
        if self._spec is not None:
            targets = join_targets([decode_parts(text.payloads)], self._head)
        return Generation(
            prompt_ids=continuation.prompt_ids,
            token_ids=torch.tensor(continuation.new_ids),
            targets=targets,
            finish=finish,
            index=text.index,
            sample=continuation.rule.sample,
            payloads=tuple(text.payloads),
        )
