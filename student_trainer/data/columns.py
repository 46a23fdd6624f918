"""Turns rows of a data set (text, chats, prompts with completions, ids) into token ids and labels.

L: tokens of one document.
"""

import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import numpy as np

from student_trainer.teachers.layout import IGNORE_INDEX

Form = Literal["text", "messages", "prompt", "input_ids", "written"]
COLUMNS: dict[Form, tuple[str, ...]] = {
    "text": ("text",),
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "input_ids": ("input_ids",),
}
"""By which columns the form of a data set is found."""
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""What marks the assistant's turns in a chat template."""
_KINDS: dict[Form, Any] = {
    "text": str,
    "messages": list,
    "prompt": (str, list),
    "input_ids": list,
    "written": (list, int),
}
WRITTEN = ("input_ids", "prompt_tokens")
"""Columns of texts that a teacher wrote, as `student-trainer generate` stores them."""
BATCH_TEXTS, BATCH_CHARACTERS = 256, 1 << 20
"""How much text is given to the tokenizer at once."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Says which columns of a data set are read, as what, and which of their tokens are trained."""

    form: Form
    names: tuple[str, ...]
    trained: Literal["all", "assistant", "completion"]

    @property
    def is_masked(self) -> bool:
        """Whether some tokens are not trained."""
        return self.trained != "all" or "labels" in self.names

    @classmethod
    def find(cls, row: Mapping[str, Any], place: str, column: str, trained_rows: str) -> "Columns":
        """Finds the columns to read in the first row of a data set.

        column, trained_rows: what the user wants, or "". Raises ValueError if that is not there, or
        not clear.
        """
        form, names = _find_form(row, place, column)
        if form == "input_ids":
            has_labels = row.get("labels") is not None and trained_rows != "all"
            names = ("input_ids", "labels") if has_labels and not column else names
        is_chat = form == "messages" or (form == "prompt" and not isinstance(row["prompt"], str))
        allowed = {
            "text": ["all"],
            "messages": ["assistant", "all"],
            "prompt": ["completion", "all", *(["assistant"] if is_chat else [])],
            "input_ids": ["all"],
            "written": ["completion", "all"],
        }[form]
        trained: Any = trained_rows or allowed[0]
        if trained not in allowed:
            raise ValueError(
                f"--trained-rows {trained} does not fit {place}, which has {' and '.join(names)}: "
                f"there it can be {' or '.join(allowed)}"
            )
        return cls(form, names, trained)

    def check(self, row: Mapping[str, Any], place: str) -> None:
        """Raises ValueError, naming the place, for a row that lacks what is read."""
        for name in self.names:
            get_value(row, name, _KINDS[self.form], place)


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """Holds one document as a student reads it."""

    ids: np.ndarray
    """(L,) int32."""
    labels: np.ndarray | None = None
    """(L,) int32, IGNORE_INDEX where a token is not trained; None if all are."""
    may_split: bool = True
    """Whether its parts make sense alone: those of a text do, those of a chat do not."""
    teacher: str = ""
    """Which of several teachers is asked."""


class DocumentReader:
    """Reads rows with one tokenizer."""

    def __init__(self, tokenizer: Any, teacher_column: str = "") -> None:
        """teacher_column: names the teacher of each document; "" if there is one teacher."""
        self._tokenizer = tokenizer
        self._teacher_column = teacher_column
        self._end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def check(self, columns: Columns) -> None:
        """Raises ValueError if the tokenizer cannot write chats, or not say which part is the
        assistant's."""
        if columns.form == "messages" or columns.trained == "assistant":
            check_template(self._tokenizer, needs_mask=columns.trained == "assistant")

    def read(
        self, rows: Iterable[tuple[str, Mapping[str, Any]]], columns: Columns
    ) -> Iterator[Document]:
        """Yields the document of each row. Raises ValueError, naming the place, for a damaged row."""
        if columns.form == "text":
            teachers: deque[str] = deque()

            def read_texts() -> Iterator[str]:
                for place, row in rows:
                    teachers.append(self._read_teacher(row, place))
                    yield get_value(row, columns.names[0], str, place)

            for batch in batch_texts(read_texts()):
                for ids in self._tokenizer(batch, verbose=False).input_ids:
                    yield Document(_int32(ids + self._end), teacher=teachers.popleft())
            return
        read_row = {
            "messages": self._read_chat,
            "prompt": self._read_prompt,
            "input_ids": self._read_ids,
            "written": self._read_written,
        }[columns.form]
        for place, row in rows:
            document = read_row(row, place, columns)
            yield replace(document, teacher=self._read_teacher(row, place))

    def _read_teacher(self, row: Mapping[str, Any], place: str) -> str:
        if not self._teacher_column:
            return ""
        return get_value(row, self._teacher_column, str, place)

    def _read_chat(self, row: Mapping[str, Any], place: str, columns: Columns) -> Document:
        messages = get_value(row, columns.names[0], list, place)
        ids, mask = write_chat(
            self._tokenizer, messages, row, place, needs_mask=columns.trained != "all"
        )
        return _masked(ids, mask)

    def _read_prompt(self, row: Mapping[str, Any], place: str, columns: Columns) -> Document:
        prompt, completion = row.get("prompt"), row.get("completion")
        mask: Sequence[int] | None = None
        if isinstance(prompt, str) and isinstance(completion, str):
            start = self._tokenizer(prompt, verbose=False).input_ids
            ids = self._tokenizer(prompt + completion, verbose=False).input_ids
            ids += self._end if ids[-1:] != self._end else []
        elif isinstance(prompt, list) and isinstance(completion, list):
            start, _ = write_chat(self._tokenizer, prompt, row, place, add_generation_prompt=True)
            needs_mask = columns.trained == "assistant"
            ids, mask = write_chat(
                self._tokenizer, prompt + completion, row, place, needs_mask=needs_mask
            )
        else:
            raise ValueError(
                f"{place}: prompt and completion must both be text or both be lists of messages, got "
                f"{type(prompt).__name__} and {type(completion).__name__}"
            )
        if columns.trained == "completion":
            # A token that belongs to both, as a tokenizer may make one, is of the completion.
            pairs = zip(start, ids, strict=False)
            shared = next((at for at, (one, other) in enumerate(pairs) if one != other), len(start))
            shared = min(shared, len(ids))
            mask = [0] * shared + [1] * (len(ids) - shared)
        return _masked(ids, mask)

    def _read_ids(self, row: Mapping[str, Any], place: str, columns: Columns) -> Document:
        ids = check_ids(get_value(row, columns.names[0], list, place), place, 0)
        if "labels" not in columns.names:
            return Document(ids)
        labels = check_ids(get_value(row, "labels", list, place), place, IGNORE_INDEX)
        if len(labels) != len(ids):
            raise ValueError(f"{place}: {len(labels)} labels for {len(ids)} input_ids")
        return Document(ids, labels, may_split=False)

    def _read_written(self, row: Mapping[str, Any], place: str, columns: Columns) -> Document:
        ids = check_ids(get_value(row, "input_ids", list, place), place, 0)
        num_before = get_value(row, "prompt_tokens", int, place)
        if columns.trained == "all":
            return Document(ids, may_split=False)
        return _masked(ids.tolist(), [0] * num_before + [1] * (len(ids) - num_before))


def write_chat(
    tokenizer: Any,
    messages: list[Any],
    row: Mapping[str, Any],
    place: str,
    *,
    needs_mask: bool = False,
    add_generation_prompt: bool = False,
) -> tuple[list[int], Sequence[int] | None]:
    """Returns the ids of a chat, and 1 for each that is the assistant's, if that is needed.

    row: what the messages are from, which may have tools and arguments of the template too. Raises
    ValueError, naming the place.
    """
    import jinja2

    tools = row.get("tools") or None
    try:
        written = tokenizer.apply_chat_template(
            _drop_nulls(messages),
            tools=_drop_nulls(json.loads(tools) if isinstance(tools, str) else tools),
            return_dict=True,
            return_assistant_tokens_mask=needs_mask,
            add_generation_prompt=add_generation_prompt,
            **(row.get("chat_template_kwargs") or {}),
        )
    except (jinja2.TemplateError, TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{place}: the chat template cannot write these messages: {error}"
        ) from None
    return list(written["input_ids"]), written.get("assistant_masks")


def check_template(tokenizer: Any, *, needs_mask: bool) -> None:
    """Raises ValueError if the tokenizer has no chat template, or none that marks the assistant."""
    try:
        template = tokenizer.get_chat_template()
    except ValueError:
        raise ValueError(
            "the data are chats, and the student's tokenizer has no chat template: give one, "
            "--chat-template FILE (Jinja, such as the teacher's chat_template.jinja)"
        ) from None
    if not needs_mask:
        return
    if not GENERATION.search(template):
        raise ValueError(
            "the student's chat template does not say which tokens are the assistant's: it has no "
            "{% generation %} ... {% endgeneration %} around what the assistant writes. Give a "
            "template that has, --chat-template FILE, or train on all rows, --trained-rows all."
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"the student's tokenizer ({type(tokenizer).__name__}) cannot say which tokens are the "
            "assistant's, as fast ones can: use one with a tokenizer.json, or train on all rows, "
            "--trained-rows all."
        )


def _find_form(row: Mapping[str, Any], place: str, column: str) -> tuple[Form, tuple[str, ...]]:
    there = ", ".join(row) or "none"
    if column:
        if column not in row:
            raise ValueError(f"{place} has no column {column!r}; it has {there}")
        if column in COLUMNS["prompt"] and all(name in row for name in COLUMNS["prompt"]):
            return "prompt", COLUMNS["prompt"]
        value = row[column]
        if isinstance(value, str):
            return "text", (column,)
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            return "messages", (column,)
        if isinstance(value, list) and all(isinstance(one, int) for one in value):
            return "input_ids", (column,)
        raise ValueError(
            f"{place}: column {column!r} must hold text, a list of messages or a list of token ids, "
            f"got {type(value).__name__}"
        )
    found: list[Form] = [
        form for form, names in COLUMNS.items() if all(name in row for name in names)
    ]
    if len(found) == 1:
        (form,) = found
        return form, COLUMNS[form]
    if all(name in row for name in WRITTEN):  # beside which there is the text too
        return "written", WRITTEN
    known = "'text', 'messages', 'prompt' with 'completion', or 'input_ids'"
    if not found:
        raise ValueError(
            f"{place}: expected {known}; the columns are {there}. Name the one to read: "
            "--text-column NAME."
        )
    several = " and ".join(COLUMNS[form][0] for form in found)
    raise ValueError(
        f"{place} has {several}, and only one of {known} can be read (columns: {there}). Name it: "
        "--text-column NAME."
    )


def batch_texts(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yields as much text at once as a tokenizer reads quickly."""
    texts = iter(texts)
    while batch := list(islice(texts, 1)):
        size = len(batch[0])
        while (
            size < BATCH_CHARACTERS and len(batch) < BATCH_TEXTS and (more := [*islice(texts, 1)])
        ):
            batch += more
            size += len(more[0])
        yield batch


def _masked(ids: Sequence[int], mask: Sequence[int] | None) -> Document:
    """Makes a document of which the tokens with mask 1 are trained; all, without a mask."""
    array = _int32(ids)
    labels = None
    if mask is not None:
        labels = np.where(np.asarray(mask) == 1, array, _int32(IGNORE_INDEX))
    return Document(array, labels, may_split=False)


def _int32(values: Any) -> np.ndarray:
    return np.asarray(values, dtype=np.int32)


def check_ids(values: list[Any], place: str, lowest: int) -> np.ndarray:
    """Returns ids of a row as (L,) int32. Raises ValueError, naming the place."""
    ids = np.asarray(values)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"{place}: token ids must be a list of whole numbers")
    if ids.size and not (lowest <= ids.min() and ids.max() < 2**31):
        wrong = ids.min() if ids.min() < lowest else ids.max()
        raise ValueError(f"{place}: ids are {lowest} to 2**31-1, got {wrong}")
    return _int32(ids)


def get_value(row: Mapping[str, Any], column: str, kind: Any, place: str) -> Any:
    """Returns a value of a row. Raises ValueError, naming the place, if it is not of its kind."""
    value = row.get(column)
    if not isinstance(value, kind):
        wanted = {str: "text", list: "a list"}.get(kind, "text or a list")
        raise ValueError(f"{place}: expected {wanted} in {column!r}, got {str(dict(row))[:60]}")
    return value


def _drop_nulls(value: Any) -> Any:
    """Returns messages or tools without the nulls with which Arrow fills up unequal objects.

    The content of a message may be null by itself: templates know that.
    """
    if isinstance(value, Mapping):
        return {
            key: _drop_nulls(inner)
            for key, inner in value.items()
            if inner is not None or key == "content"
        }
    if isinstance(value, list):
        return [_drop_nulls(inner) for inner in value]
    return value
