"""Sequences in, (sequence, targets) out, in the caller's order, with a window in flight.

What a teacher is to this module is one function that submits a sequence and returns a future; the
remote and the local teacher give it theirs and share everything else.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor

from logit_codec import Targets
from student_trainer.errors import InvalidRequest, TeacherError
from student_trainer.teachers.layout import as_token_ids, split_batch
from student_trainer.teachers.look_ahead import Window
from student_trainer.teachers.request import Answer, Wish

Item = TypeVar("Item")


class TargetStream(Iterator[tuple[Item, Targets]]):
    """What `stream` and `stream_batches` return: pairs in the caller's order, and a position.

    The position counts items that were handed out, not those that are in flight: saved after the
    optimizer step that used the last of them, it says where to go on. A source with a state of its
    own, such as torchdata's StatefulDataLoader, is put back there; of others, as many items are
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
        """Of the items in flight: the state of the source when each was pulled, or None."""

    def __next__(self) -> tuple[Item, Targets]:
        self._check_usable()  # a fork would wait for ever for what its parent asked for
        if self._pairs is None:
            restored = self._source_state is not None and is_stateful(self._source)
            skip = 0 if restored else self._handed_out
            numbered = _numbered(self._source, skip)
            if restored:
                numbered = ((self._handed_out + number, item) for number, item in numbered)
            self._pairs = self._make_pairs(_noted(numbered, self._source, self._pulled_states))
        pair = next(self._pairs)
        self._handed_out += 1
        self._source_state = self._pulled_states.popleft()
        return pair

    @property
    def in_flight(self) -> int:
        """Items that were taken from the source and not handed out yet."""
        return len(self._pulled_states)

    def state_dict(self) -> dict[str, Any]:
        """How many items were handed out, and where a stateful source was at the last of them."""
        state: dict[str, Any] = {"handed_out": self._handed_out}
        if self._source_state is not None:
            state["source"] = self._source_state
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on behind that many items of the same source; nothing is asked for those.

        Raises TeacherError after the first item was taken, InvalidRequest for another dict.
        """
        if self._pairs is not None:
            raise TeacherError("load_state_dict comes before the first item is taken")
        self._handed_out = position_in(state)
        self._source_state = state.get("source")
        if self._source_state is not None and is_stateful(self._source):
            self._source.load_state_dict(self._source_state)  # type: ignore[attr-defined]

    def close(self) -> None:
        """Gives up what is in flight."""
        close = getattr(self._pairs, "close", None)
        if close is not None:
            close()
        self._pulled_states.clear()


def position_in(state: Mapping[str, Any]) -> int:
    """How many items a state says were handed out. Raises InvalidRequest."""
    handed_out = state.get("handed_out")
    if not isinstance(handed_out, int) or handed_out < 0:
        raise InvalidRequest(f"a state is {{'handed_out': number of items}}, got {dict(state)!r}")
    return handed_out


def is_stateful(source: Any) -> bool:
    """Whether the source can say where it is and be put back there."""
    # accelerate's loaders have the methods in any case, and this to say whether they work.
    return (
        hasattr(source, "state_dict")
        and hasattr(source, "load_state_dict")
        and getattr(source, "use_stateful_dataloader", True)
    )


Submit = Callable[[Tensor, Tensor | None, Wish], "Future[Answer]"]
"""`Teacher.submit`."""


def stream_sequences(
    submit: Submit,
    sequences: Iterable[Any],
    wish: Wish,
    ahead: int,
    check_usable: Callable[[], None] = lambda: None,
) -> TargetStream[Tensor]:
    """`Teacher.stream` over a submit function."""
    if not isinstance(ahead, int) or ahead < 1:
        raise InvalidRequest(f"ahead must be a number of sequences, at least 1, got {ahead!r}")

    def requests(numbered: Iterator[tuple[int, Any]]) -> Iterator[_Request]:
        for number, sequence in numbered:
            token_ids = as_token_ids(sequence, number)
            where = f"stream item {number}"
            yield _Request(token_ids, wish, {where: (token_ids, None)}, token_ids.nbytes)

    def pairs(numbered: Iterator[tuple[int, Any]]) -> Iterator[tuple[Tensor, Targets]]:
        answers = _in_order(requests(numbered), submit, Window(ahead))
        for token_ids, (targets,) in answers:
            yield token_ids, targets

    return TargetStream(sequences, pairs, check_usable)


def stream_loader(
    submit: Submit,
    loader: Iterable[Mapping[str, Any]],
    wish: Wish,
    window: Window,
    check_usable: Callable[[], None] = lambda: None,
) -> TargetStream[Any]:
    """`Teacher.stream_batches` over a submit function; the window is of this stream alone."""

    def requests(numbered: Iterator[tuple[int, Any]]) -> Iterator[_Request]:
        for number, batch in numbered:
            pieces = enumerate(split_batch(batch, number))
            yield _Request(
                batch,
                wish if batch.get("epoch") is None else replace(wish, epoch=int(batch["epoch"])),
                {f"batch {number}, piece {i}": piece for i, piece in pieces},
                nbytes_of(batch),
            )

    def pairs(numbered: Iterator[tuple[int, Any]]) -> Iterator[tuple[Any, Targets]]:
        for batch, parts in _in_order(requests(numbered), submit, window):
            yield batch, Targets.cat(parts)

    return TargetStream(loader, pairs, check_usable)


def _numbered(items: Iterable[Item], skip: int) -> Iterator[tuple[int, Item]]:
    """The items with their numbers, without the first `skip`."""
    return itertools.islice(enumerate(items), skip, None)


def _noted(
    numbered: Iterator[tuple[int, Item]], source: Any, states: deque[Any]
) -> Iterator[tuple[int, Item]]:
    """The same items, with the state of the source after each appended to `states`."""
    snapshot = source.state_dict if is_stateful(source) else lambda: None
    for entry in numbered:
        states.append(snapshot())
        yield entry


@dataclass(slots=True, eq=False)
class _Request:
    """An item of the caller, and what is asked for it."""

    item: Any
    wish: Wish
    pieces: dict[str, tuple[Tensor, Tensor | None]]
    """Ids and wanted rows as for `Submit`, by the name that an error gives their place."""
    nbytes: int
    """Of the item."""
    futures: dict[str, "Future[Answer]"] = field(default_factory=dict)
    """Of the pieces that were asked for."""

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Tokens and rows of each piece."""
        return {
            where: (len(ids), len(ids) - 1 if rows is None else len(rows))
            for where, (ids, rows) in self.pieces.items()
        }


def _in_order(
    requests: Iterator[_Request], submit: Submit, window: Window
) -> Iterator[tuple[Any, list[Targets]]]:
    """Each item with its results, in order, with as many in flight as the window lets in."""
    waiting: deque[_Request] = deque()
    pulled: _Request | None = None
    """Taken from the source when the window had no room for it."""

    def ask() -> None:
        nonlocal pulled
        while len(waiting) < window.size:
            request = pulled or next(requests, None)
            if request is None:
                return
            sizes = request.sizes()
            tokens, rows = (sum(numbers) for numbers in zip(*sizes.values(), strict=True))
            # One that is larger than the window alone is asked for when nothing else is in flight.
            if waiting and not window.has_room(tokens, rows, request.nbytes):
                pulled = request
                return
            pulled = None
            waiting.append(request)
            window.hold(request.nbytes)
            for where, (ids, wanted) in request.pieces.items():
                request.futures[where] = submit(ids, wanted, request.wish)
                window.asked(request.futures[where], *sizes[where])

    try:
        while True:
            ask()
            if not waiting:
                return
            request = waiting[0]
            while not window.wait(request.futures.values()):
                ask()
            results = [_result(future, where) for where, future in request.futures.items()]
            waiting.popleft()
            window.hold(-request.nbytes)
            window.handed_out(sum(answer.nbytes for answer in results))
            yield request.item, [answer.targets for answer in results]
    finally:
        for request in waiting:
            for future in request.futures.values():
                future.cancel()


def nbytes_of(item: Any) -> int:
    """About the memory of what a batch holds: tensors and arrays, in lists and mappings too."""
    if isinstance(item, Mapping):
        return sum(map(nbytes_of, item.values()))
    if isinstance(item, list | tuple):
        return sum(map(nbytes_of, item))
    if isinstance(item, str | bytes):
        return len(item)
    return int(getattr(item, "nbytes", 8))


def _result(future: "Future[Answer]", where: str) -> Answer:
    try:
        return future.result()
    except TeacherError as error:
        raise type(error)(f"{where}: {error}") from error
