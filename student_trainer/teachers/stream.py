"""Turns sequences or batches into (item, targets) pairs in the caller's order, with a position.

To this module a teacher is one function that submits a sequence and returns a future; remote, local
and recorded teachers pass theirs and share everything else.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from logit_codec import Targets
from student_trainer.errors import InvalidRequest, TeacherError
from student_trainer.teachers.in_order import Request, Submit, answer_in_order, nbytes_of
from student_trainer.teachers.layout import as_given_ids, as_token_ids
from student_trainer.teachers.look_ahead import LookAhead
from student_trainer.teachers.position import is_stateful, read_position
from student_trainer.teachers.request import Piece, ScoreOptions
from student_trainer.teachers.view import TeacherView, divide_batch

Item = TypeVar("Item")
Join = Callable[[list[Targets]], Targets]
"""Makes the targets of an item of the answers to its pieces."""
Assign = Callable[[Mapping[str, Any] | None, dict[str, Piece]], tuple[dict[str, Piece], Join]]
"""Takes a batch, or None for a single sequence, and its pieces; returns what is asked, and how the
answers are joined."""
GiveIds = Callable[[Any], Any]
"""Returns, for a batch, ids for each trained position: what `GivenIds.of` takes."""


class TargetStream(Iterator[tuple[Item, Targets]]):
    """Iterates over pairs in the caller's order; what `stream` and `stream_batches` return.

    The position counts items that were handed out, not those in flight: saved after the optimizer
    step that used the last of them, it says where to resume. A source with a state of its own, such
    as torchdata's StatefulDataLoader, is set back to it; from other sources that many items are
    skipped.
    """

    def __init__(
        self,
        source: Iterable[Any],
        pairs: Callable[[Iterator[tuple[int, Any]]], Iterator[tuple[Item, Targets]]],
        check_usable: Callable[[], None] = lambda: None,
    ) -> None:
        self._source = source
        self._make_pairs = pairs
        self._check_usable = check_usable
        self._pairs: Iterator[tuple[Item, Targets]] | None = None
        self._handed_out = 0
        self._source_state: Any = None
        self._pulled_states: deque[Any] = deque()
        """For each item in flight, the state of the source when it was pulled, or None."""

    def __next__(self) -> tuple[Item, Targets]:
        self._check_usable()  # a fork would wait for ever for what its parent asked for
        if self._pairs is None:
            restored = self._source_state is not None and is_stateful(self._source)
            skip = 0 if restored else self._handed_out
            numbered = _number_items(self._source, skip)
            if restored:
                numbered = ((self._handed_out + number, item) for number, item in numbered)
            self._pairs = self._make_pairs(
                _record_states(numbered, self._source, self._pulled_states)
            )
        pair = next(self._pairs)
        self._handed_out += 1
        self._source_state = self._pulled_states.popleft()
        return pair

    @property
    def in_flight(self) -> int:
        """Items that were taken from the source and not handed out yet."""
        return len(self._pulled_states)

    def state_dict(self) -> dict[str, Any]:
        """Returns how many items were handed out, and a stateful source's state at the last one."""
        state: dict[str, Any] = {"handed_out": self._handed_out}
        if self._source_state is not None:
            state["source"] = self._source_state
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes after that many items of the same source; nothing is asked for those.

        Raises TeacherError after the first item was taken, InvalidRequest for another dict.
        """
        if self._pairs is not None:
            raise TeacherError("load_state_dict must be called before the first item is taken")
        self._handed_out = read_position(state)
        self._source_state = state.get("source")
        if self._source_state is not None and is_stateful(self._source):
            self._source.load_state_dict(self._source_state)  # type: ignore[attr-defined]

    def close(self) -> None:
        """Gives up what is in flight."""
        close = getattr(self._pairs, "close", None)
        if close is not None:
            close()
        self._pulled_states.clear()


def ask_as_they_are(
    batch: Mapping[str, Any] | None, pieces: dict[str, Piece]
) -> tuple[dict[str, Piece], Join]:
    """Asks for the pieces themselves, whose answers follow one another."""
    return pieces, Targets.cat


def stream_sequences(
    submit: Submit,
    sequences: Iterable[Any],
    options: ScoreOptions,
    ahead: int,
    check_usable: Callable[[], None] = lambda: None,
    *,
    given_ids: Iterable[Any] | None = None,
    assign: Assign = ask_as_they_are,
) -> TargetStream[Tensor]:
    """Implements `Teacher.stream` over a submit function."""
    if not isinstance(ahead, int) or ahead < 1:
        raise InvalidRequest(f"ahead must be a number of sequences, at least 1, got {ahead!r}")

    def requests(numbered: Iterator[tuple[int, Any]]) -> Iterator[Request]:
        for number, item in numbered:
            sequence, ids = item if given_ids is not None else (item, None)
            token_ids = as_token_ids(sequence, f"sequence {number}")
            where = f"stream item {number}"
            piece = Piece(token_ids, None, as_given_ids(ids, where))
            pieces, join = assign(None, {where: piece})
            yield Request((token_ids, join), options, pieces, token_ids.nbytes)

    def pairs(numbered: Iterator[tuple[int, Any]]) -> Iterator[tuple[Tensor, Targets]]:
        answers = answer_in_order(requests(numbered), submit, LookAhead(ahead))
        for (token_ids, join), parts in answers:
            yield token_ids, join(parts)

    if given_ids is not None:
        sequences = _Zipped(sequences, given_ids)
    return TargetStream(sequences, pairs, check_usable)


def stream_loader(
    submit: Submit,
    loader: Iterable[Mapping[str, Any]],
    options: ScoreOptions,
    look_ahead: LookAhead,
    check_usable: Callable[[], None] = lambda: None,
    *,
    given_ids: GiveIds | None = None,
    view: TeacherView | None = None,
    tokenizer: Any = None,
    assign: Assign = ask_as_they_are,
) -> TargetStream[Any]:
    """Implements `Teacher.stream_batches` over a submit function.

    look_ahead: belongs to this stream alone. tokenizer: for the text in errors.
    """

    def requests(numbered: Iterator[tuple[int, Any]]) -> Iterator[Request]:
        for number, batch in numbered:
            pieces = divide_batch(batch, number, view, tokenizer)
            if given_ids is not None:
                try:
                    ids = given_ids(batch)
                except Exception as error:
                    error.add_note(f"raised by given_ids for batch {number}")
                    raise
                pieces = _with_given_ids(pieces, ids, f"batch {number}")
            asked, join = assign(batch, pieces)
            epoch = batch.get("epoch")
            yield Request(
                (batch, join),
                options if epoch is None else replace(options, epoch=int(epoch)),
                asked,
                nbytes_of(batch),
            )

    def pairs(numbered: Iterator[tuple[int, Any]]) -> Iterator[tuple[Any, Targets]]:
        for (batch, join), parts in answer_in_order(requests(numbered), submit, look_ahead):
            yield batch, join(parts)

    return TargetStream(loader, pairs, check_usable)


class _Zipped:
    """Iterates over sequences with their given ids.

    It has no state of its own, even if the sequences have one: both are resumed by skipping, in step.
    """

    def __init__(self, sequences: Iterable[Any], given_ids: Iterable[Any]) -> None:
        self._sequences, self._given_ids = sequences, given_ids

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        missing = object()
        pairs = itertools.zip_longest(self._sequences, self._given_ids, fillvalue=missing)
        for number, (sequence, ids) in enumerate(pairs):
            if sequence is missing or ids is missing:
                more, fewer = "given_ids", "sequences"
                if ids is missing:
                    more, fewer = fewer, more
                raise InvalidRequest(
                    f"there are more {more} than {fewer}: the latter ended after {number}"
                )
            yield sequence, ids


def _with_given_ids(pieces: dict[str, Piece], ids: Any, where: str) -> dict[str, Piece]:
    """Divides the ids that are given for the trained rows of a batch among its pieces."""
    given = as_given_ids(ids, where)
    num_rows = sum(piece.num_rows for piece in pieces.values())
    if given is None or given.num_rows != num_rows:
        got = "none" if given is None else given.num_rows
        raise InvalidRequest(
            f"{where}: given_ids must name ids for each of the {num_rows} trained positions, got "
            f"{got}"
        )
    ends = itertools.accumulate(piece.num_rows for piece in pieces.values())
    return {
        name: replace(piece, given_ids=given[end - piece.num_rows : end])
        for (name, piece), end in zip(pieces.items(), ends, strict=True)
    }


def _number_items(items: Iterable[Item], skip: int) -> Iterator[tuple[int, Item]]:
    """Yields the items with their numbers, without the first `skip`."""
    return itertools.islice(enumerate(items), skip, None)


def _record_states(
    numbered: Iterator[tuple[int, Item]], source: Any, states: deque[Any]
) -> Iterator[tuple[int, Item]]:
    """Yields the same items, and appends the state of the source after each to `states`."""
    snapshot = source.state_dict if is_stateful(source) else lambda: None
    for numbered_item in numbered:
        states.append(snapshot())
        yield numbered_item
