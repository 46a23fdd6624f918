"""Sequences in, (sequence, targets) out, in the caller's order, with a window in flight.

What a teacher is to this module is one function that submits a sequence and returns a future; the
remote and the local teacher give it theirs and share everything else.
"""

import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from logit_codec import IdTable, Targets, TargetSpec
from protos import teacher_pb2
from student_trainer.errors import InvalidRequest, TeacherError
from student_trainer.teachers.request import Answer, Wish
from student_trainer.teachers.window import Window, make_window

IGNORE_INDEX = -100

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


class Teacher(ABC):
    """Where targets come from: a service, a model in this process, a record; a context manager."""

    default_ahead: ClassVar[int] = 16
    """Sequences in flight in `stream` unless it says otherwise."""
    default_look_ahead: ClassVar[int | str] = "30s"
    """The same of `stream_batches`."""
    default_targets: str | TargetSpec = "sampled"
    id_tables: Sequence[IdTable] = ()
    """What payloads may be coded with, beside the built-in identity."""

    @property
    @abstractmethod
    def info(self) -> teacher_pb2.TeacherInfo:
        """Who the teacher is: what Describe says."""

    @abstractmethod
    def submit(self, token_ids: Tensor, rows: Tensor | None, wish: Wish) -> "Future[Answer]":
        """Asks for one sequence: (L,) int64 ids and, if not all rows are wanted, the (N,) int64
        wanted ones."""

    @abstractmethod
    def close(self) -> None:
        """Gives up what is in flight, and what the teacher holds."""

    @abstractmethod
    def check_usable(self) -> None:
        """Raises TeacherError if the teacher is closed, or was made in another process."""

    def make_wish(
        self, targets: str | TargetSpec | None, temperature: float, seed: int, epoch: int
    ) -> Wish:
        """What a stream asks for. Raises InvalidRequest for what is refused in any case."""
        return Wish.of(targets or self.default_targets, temperature, seed, epoch)

    def stream(
        self,
        sequences: Iterable[Any],
        *,
        targets: str | TargetSpec | None = None,
        temperature: float = 1.0,
        seed: int = 0,
        epoch: int = 0,
        ahead: int | None = None,
        interactive: bool = False,
    ) -> TargetStream[Tensor]:
        """(token_ids, targets) of each sequence, in order, with `ahead` sequences in flight.

        token_ids: (L,) int64; targets: L-1 rows, row i is the teacher's distribution of token i+1.
        targets and ahead: by default `default_targets` and `default_ahead` of the teacher.
        interactive: somebody waits for the answers, so a service puts them before the other work of
        the team and, as long as the team uses less than its share, before that of other teams. Raises
        InvalidRequest for what the teacher refuses, TeacherUnavailable after the patience.
        """
        self.check_usable()
        wish = replace(self.make_wish(targets, temperature, seed, epoch), interactive=interactive)
        ahead = self.default_ahead if ahead is None else ahead
        return stream_sequences(self.submit, sequences, wish, ahead, self.check_usable)

    def stream_batches(
        self,
        loader: Iterable[Mapping[str, Any]],
        *,
        targets: str | TargetSpec | None = None,
        temperature: float = 1.0,
        seed: int = 0,
        epoch: int = 0,
        ahead: int | str | Window | None = None,
    ) -> TargetStream[Any]:
        """(batch, targets) of each batch of a loader, in order.

        A batch is a mapping with input_ids and, if it is padded, packed or masked, attention_mask,
        position_ids, cu_seq_lens_q, seq_idx or labels (`Layout.of`); it comes back as it is. The rows
        of `targets` are its trained positions in reading order. A batch with a number under "epoch" is
        of that epoch. ahead: batches in flight, or "30s" for as many as the trainer uses up in that
        time, with at most 512 MiB of batches and targets ("30s,2048MiB": with at most 2 GiB), or a
        window; by default `default_look_ahead`.
        """
        self.check_usable()
        wish = self.make_wish(targets, temperature, seed, epoch)
        ahead = self.default_look_ahead if ahead is None else ahead
        window = make_window(ahead, wish.spec, self.info)
        return stream_loader(self.submit, loader, wish, window, self.check_usable)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


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


def as_token_ids(sequence: Any, position: int) -> Tensor:
    """(L,) int64 on the CPU from a tensor, an array or a list. Raises InvalidRequest."""
    try:
        ids = torch.as_tensor(sequence)
    except (TypeError, ValueError, RuntimeError):
        raise InvalidRequest(
            f"sequence {position} must be a list or tensor of token ids, got "
            f"{type(sequence).__name__}"
        ) from None
    if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InvalidRequest(
            f"sequence {position} must be one row of whole numbers, got "
            f"{str(ids.dtype).removeprefix('torch.')} of shape {tuple(ids.shape)}"
        )
    if len(ids) < 2:
        raise InvalidRequest(
            f"sequence {position} has {len(ids)} tokens; at least 2 are needed for one row"
        )
    ids = ids.to("cpu", torch.int64)
    _check_ids(ids, f"sequence {position}")
    return ids


def _batch_ids(batch: Any, number: int) -> Tensor:
    """(B, T) int64 input_ids on the CPU. Raises InvalidRequest."""
    if not isinstance(batch, Mapping):
        raise InvalidRequest(
            f"batch {number} must be a mapping with input_ids, got {type(batch).__name__}"
        )
    if "input_ids" not in batch:
        raise InvalidRequest(f"batch {number} has no input_ids; it has {', '.join(batch)}")
    wanted = f"batch {number}: input_ids must be whole numbers of shape (B, T) or (T,)"
    try:
        ids = torch.atleast_2d(torch.as_tensor(batch["input_ids"]))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidRequest(f"{wanted}: {error}") from None
    if ids.dim() != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InvalidRequest(
            f"{wanted}, got {str(ids.dtype).removeprefix('torch.')} of shape {tuple(ids.shape)}"
        )
    return ids.to("cpu", torch.int64)


def _check_ids(ids: Tensor, whose: str) -> None:
    """Raises InvalidRequest for what is no token id."""
    if not ids.numel():
        return
    low, high = (int(value) for value in ids.aminmax())
    if low < 0 or high >= 2**31:
        raise InvalidRequest(
            f"{whose} has id {low if low < 0 else high}; ids are 0 to 2**31-1 "
            "(is this padded with labels such as -100?)"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Which positions of a batch are trained, and which belong together; all (B, T), on the CPU."""

    ids: Tensor
    """int64."""
    real: Tensor
    """bool: not padding."""
    document: Tensor
    """int64: equal within a document of a row."""
    trained: Tensor
    """bool: position t is trained on predicting token t+1."""
    labels: Tensor
    """int64: the batch's own, or its ids."""

    @classmethod
    def of(cls, batch: Mapping[str, Any], number: int = 0) -> "Layout":
        """Of a padded or packed batch, input_ids (B, T) or (T,).

        Position t is trained on predicting token t+1 if both are real (attention_mask, where
        given), belong to one document and labels[t+1] is not -100 (where given). A document begins
        where position_ids do not go up by one, where seq_idx changes and where cu_seq_lens_q says so.
        Raises InvalidRequest for shapes that do not fit; `number` is the batch's, for that message.
        """
        ids = _batch_ids(batch, number)

        def beside(name: str) -> Tensor | None:
            """What the batch has of that name, of the shape of its ids."""
            if batch.get(name) is None:
                return None
            found = torch.atleast_2d(torch.as_tensor(batch[name])).cpu()
            if found.shape != ids.shape:
                raise InvalidRequest(
                    f"batch {number}: {name} must have the shape of input_ids "
                    f"{tuple(ids.shape)}, got {tuple(found.shape)}"
                )
            return found

        mask = beside("attention_mask")
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask == 1
        if mask is not None and bool((~real & (mask != 0)).any()):
            odd = mask[~real & (mask != 0)][0].item()
            raise InvalidRequest(
                f"batch {number}: attention_mask must be 1 for a token and 0 for padding, got {odd}"
            )
        _check_ids(ids[real], f"batch {number}")
        document = _starts(batch, ids, number).cumsum(1)
        trained = torch.zeros_like(real)
        trained[:, :-1] = real[:, :-1] & real[:, 1:] & (document[:, :-1] == document[:, 1:])
        labels = beside("labels")
        if labels is None:
            return cls(ids, real, document, trained, ids)
        trained[:, :-1] &= labels[:, 1:] != IGNORE_INDEX
        return cls(ids, real, document, trained, labels)

    def pieces(self) -> list[tuple[Tensor, Tensor]]:
        """The sequences with something to train, each (L,) ids and its (N,) trained rows."""
        num_rows, num_tokens = self.ids.shape
        # One run per (row, document): where either changes, and where padding begins or ends.
        run = self.document + torch.arange(num_rows)[:, None] * (num_tokens + 1)
        edges = torch.ones_like(self.real)
        edges[:, 1:] = (run[:, 1:] != run[:, :-1]) | (self.real[:, 1:] != self.real[:, :-1])
        first = edges.flatten().nonzero()[:, 0]
        lengths = torch.diff(first, append=torch.tensor([self.ids.numel()]))
        flat_ids, flat_trained = self.ids.flatten(), self.trained.flatten()
        flat_real = self.real.flatten()
        pieces = []
        for start, length in zip(first.tolist(), lengths.tolist(), strict=True):
            rows = flat_trained[start : start + length].nonzero()[:, 0]
            if flat_real[start] and len(rows):
                pieces.append((flat_ids[start : start + length], rows))
        return pieces


def _starts(batch: Mapping[str, Any], ids: Tensor, number: int) -> Tensor:
    """(B, T) bool: where the batch says that a document begins. Raises InvalidRequest."""
    starts = torch.zeros(ids.shape, dtype=torch.bool)
    # A position goes up by one within a document, and the index of a sequence stays.
    for name, step in (("position_ids", 1), ("seq_idx", 0)):
        if batch.get(name) is None:
            continue
        found = torch.atleast_2d(torch.as_tensor(batch[name])).cpu()
        if found.shape not in (ids.shape, (1, ids.shape[1])):
            raise InvalidRequest(
                f"batch {number}: {name} must have the shape of input_ids {tuple(ids.shape)}, or one "
                f"row for all, got {tuple(found.shape)}"
            )
        starts[:, 1:] |= found[:, 1:] != found[:, :-1] + step
    if batch.get("cu_seq_lens_q") is not None:
        ends = torch.as_tensor(batch["cu_seq_lens_q"]).cpu().flatten().long()
        if not len(ends) or ends[0] != 0 or (ends.diff() < 0).any() or ends[-1] > ids.numel():
            raise InvalidRequest(
                f"batch {number}: cu_seq_lens_q must go up from 0 to at most the {ids.numel()} tokens "
                f"of input_ids, got {ends.tolist()[:8]}"
            )
        starts.view(-1)[ends[ends < ids.numel()]] = True
    return starts


def split_batch(batch: Mapping[str, Any], number: int) -> list[tuple[Tensor, Tensor]]:
    """The sequences of a padded or packed batch, each with the rows that are trained.

    Raises InvalidRequest if nothing is trained; `Layout.of` has the rules.
    """
    pieces = Layout.of(batch, number).pieces()
    if not pieces:
        raise InvalidRequest(f"batch {number} has no position to train on")
    return pieces


def _result(future: "Future[Answer]", where: str) -> Answer:
    try:
        return future.result()
    except TeacherError as error:
        raise type(error)(f"{where}: {error}") from error
