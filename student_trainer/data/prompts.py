"""Turns rows of data (text, chats, prompts, ids) into the prompts that a teacher continues.

P: tokens of a prompt.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
import xxhash

from student_trainer.data.columns import (
    WRITTEN,
    batch_texts,
    check_ids,
    check_template,
    get_value,
    write_chat,
)
from student_trainer.data.sources import Shard

Form = Literal["text", "messages", "input_ids", "written"]
PREFERRED = ("prompt", "messages", "text", "input_ids")
"""Columns that hold prompts."""


@dataclass(frozen=True, slots=True)
class PromptSettings:
    """Says what is made a prompt."""

    longest: int
    """Tokens that a prompt may have."""
    column: str = ""
    """Which column is read; "": it is found."""
    num_tokens: int = 0
    """Longer texts are cut to so many tokens; 0: to `longest`."""
    every: int = 0
    """Another prompt begins at every so many tokens of a text; 0: only at its beginning."""
    split_lines: bool = False
    """Whether each line of a .txt file is a text."""


@dataclass(slots=True)
class PromptCounts:
    """Counts what became a prompt as it was, and what did not."""

    texts: int = 0
    prompts: int = 0
    cut: int = 0
    empty: int = 0
    too_long: int = 0
    repeated: int = 0

    def describe(self, longest: int) -> list[str]:
        """Says in sentences what was cut and left out."""
        notes = []
        if self.cut:
            notes.append(
                f"{self.cut:,} of {self.texts:,} texts are longer than a prompt and were cut"
            )
        if self.too_long:
            notes.append(
                f"{self.too_long:,} of {self.texts:,} chats were left out: with max_new_tokens after it "
                f"a prompt may have {longest:,} tokens, and a chat is not cut"
            )
        if self.empty:
            notes.append(
                f"{self.empty:,} of {self.texts:,} texts were left out: they have no token"
            )
        if self.repeated:
            notes.append(
                f"{self.repeated:,} of {self.prompts + self.repeated:,} prompts are the same as one "
                "before and were left out"
            )
        return notes


class PromptReader:
    """Reads prompts with one tokenizer, each different one once."""

    def __init__(self, tokenizer: Any, settings: PromptSettings) -> None:
        self._tokenizer = tokenizer
        self._settings = settings
        self._end = tokenizer.eos_token_id
        self._seen: set[bytes] = set()
        self.counts = PromptCounts()

    def read(self, shards: Sequence[Shard]) -> Iterator[np.ndarray]:
        """Yields (P,) int32 prompts in the order of the data.

        Raises ValueError, naming the place, for what is no prompt.
        """
        forms: dict[str, tuple[Form, str]] = {}
        for shard in shards:
            rows = self._split(shard)
            for place, row in islice(shard.rows(), 1):
                if shard.group not in forms:
                    forms[shard.group] = find_form(row, place, self._settings.column)
            if shard.group not in forms:  # it is empty
                continue
            form, column = forms[shard.group]
            if form == "messages":
                check_template(self._tokenizer, needs_mask=False)
            read: Callable[..., Iterator[np.ndarray]] = {
                "text": self._read_texts,
                "messages": self._read_chats,
                "input_ids": self._read_ids,
                "written": self._read_written,
            }[form]
            for prompt in read(rows, column):
                digest = xxhash.xxh3_128_digest(prompt.tobytes())
                if digest in self._seen:
                    self.counts.repeated += 1
                    continue
                self._seen.add(digest)
                self.counts.prompts += 1
                yield prompt

    def _split(self, shard: Shard) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yields the rows of a shard; of a text file its lines, if that is wanted."""
        for place, row in shard.rows():
            if not (self._settings.split_lines and shard.group == ".txt"):
                yield place, row
                continue
            for number, line in enumerate(row["text"].split("\n"), 1):
                if line.strip():
                    yield f"{place}, line {number}", {"text": line}

    def _read_texts(
        self, rows: Iterable[tuple[str, Mapping[str, Any]]], column: str
    ) -> Iterator[np.ndarray]:
        texts = (get_value(row, column, str, place) for place, row in rows)
        for batch in batch_texts(texts):
            for ids in self._tokenizer(batch, verbose=False).input_ids:
                if ids and ids[-1] == self._end:  # the teacher goes on after it
                    ids = ids[:-1]
                yield from self._cut(np.asarray(ids, dtype=np.int32))

    def _read_chats(
        self, rows: Iterable[tuple[str, Mapping[str, Any]]], column: str
    ) -> Iterator[np.ndarray]:
        for place, row in rows:
            messages = list(get_value(row, column, list, place))
            while messages and _is_answer(messages[-1]):
                messages.pop()  # the teacher writes its own
            if not messages:
                raise ValueError(f"{place}: there is no message before the assistant's")
            ids, _ = write_chat(self._tokenizer, messages, row, place, add_generation_prompt=True)
            self.counts.texts += 1
            if len(ids) > self._settings.longest:
                self.counts.too_long += 1
            elif ids:
                yield np.asarray(ids, dtype=np.int32)

    def _read_ids(
        self, rows: Iterable[tuple[str, Mapping[str, Any]]], column: str
    ) -> Iterator[np.ndarray]:
        for place, row in rows:
            yield from self._cut(check_ids(get_value(row, column, list, place), place, 0))

    def _read_written(
        self, rows: Iterable[tuple[str, Mapping[str, Any]]], column: str
    ) -> Iterator[np.ndarray]:
        for place, row in rows:
            ids = check_ids(get_value(row, column, list, place), place, 0)
            yield from self._cut(ids[: get_value(row, "prompt_tokens", int, place)])

    def _cut(self, ids: np.ndarray) -> Iterator[np.ndarray]:
        """Yields the prompts in a text: its beginning, and others in it if that is wanted."""
        self.counts.texts += 1
        if not len(ids):
            self.counts.empty += 1
            return
        settings = self._settings
        size = min(settings.num_tokens or settings.longest, settings.longest)
        if not settings.every:
            self.counts.cut += len(ids) > size
            yield ids[:size]
            return
        yield ids[:size]
        for start in range(settings.every, len(ids) - size + 1, settings.every):
            yield ids[start : start + size]


def find_form(row: Mapping[str, Any], place: str, column: str) -> tuple[Form, str]:
    """Finds in the first row of data which column holds prompts, and as what.

    column: the one that the user names, or "". Raises ValueError if there is none, or not one alone.
    """
    there = ", ".join(row) or "none"
    if column and column not in row:
        raise ValueError(f"{place} has no column {column!r}; it has {there}")
    if not column and all(name in row for name in WRITTEN):
        return "written", WRITTEN[0]
    found = [column] if column else [name for name in PREFERRED if name in row]
    if len(found) > 1 and found[0] != "prompt":
        raise ValueError(
            f"{place} has {' and '.join(found)}, and only one of them can be the prompt. Name it: "
            "--prompt-column NAME."
        )
    if not found:
        raise ValueError(
            f"{place}: prompts are in 'prompt', 'messages', 'text' or 'input_ids'; the columns are "
            f"{there}. Name the one to read: --prompt-column NAME."
        )
    value = row[found[0]]
    if isinstance(value, str):
        return "text", found[0]
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return "messages", found[0]
    if isinstance(value, list) and all(isinstance(one, int) for one in value):
        return "input_ids", found[0]
    raise ValueError(
        f"{place}: column {found[0]!r} must hold text, a list of messages or a list of token ids, got "
        f"{type(value).__name__}"
    )


def _is_answer(message: Any) -> bool:
    return isinstance(message, Mapping) and message.get("role") == "assistant"
