"""Asks a teacher for several items at once and hands their targets out in the caller's order."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from logit_codec import Targets
from student_trainer.errors import TeacherError
from student_trainer.teachers.look_ahead import LookAhead
from student_trainer.teachers.request import Answer, Piece, ScoreOptions

Submit = Callable[[Piece, ScoreOptions], "Future[Answer]"]
"""`Teacher.submit`."""


@dataclass(slots=True, eq=False)
class Request:
    """Holds an item of the caller, and what is asked for it."""

    item: Any
    options: ScoreOptions
    pieces: dict[str, Piece]
    """By the name that errors give their place."""
    nbytes: int
    """The memory of the item."""
    futures: dict[str, "Future[Answer]"] = field(default_factory=dict)
    """The answers to the pieces that were asked for."""

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Returns the tokens and rows of each piece."""
        return {where: (each.num_tokens, each.num_rows) for where, each in self.pieces.items()}


def answer_in_order(
    requests: Iterator[Request], submit: Submit, look_ahead: LookAhead
) -> Iterator[tuple[Any, list[Targets]]]:
    """Yields each item with its results, in order, with as many in flight as look_ahead allows."""
    waiting: deque[Request] = deque()
    pulled: Request | None = None
    """Taken from the source when there was no room for it."""

    def ask() -> None:
        nonlocal pulled
        while len(waiting) < look_ahead.size:
            request = pulled or next(requests, None)
            if request is None:
                return
            sizes = request.sizes()
            tokens, rows = (sum(numbers) for numbers in zip(*sizes.values(), strict=True))
            # An item larger than all the room is asked for when nothing else is in flight.
            if waiting and not look_ahead.has_room(tokens, rows, request.nbytes):
                pulled = request
                return
            pulled = None
            waiting.append(request)
            look_ahead.hold(request.nbytes)
            for where, piece in request.pieces.items():
                request.futures[where] = submit(piece, request.options)
                look_ahead.add_request(request.futures[where], *sizes[where])

    try:
        while True:
            ask()
            if not waiting:
                return
            request = waiting[0]
            while not look_ahead.wait(request.futures.values()):
                ask()
            results = [_take_result(future, where) for where, future in request.futures.items()]
            waiting.popleft()
            look_ahead.hold(-request.nbytes)
            look_ahead.hand_out(sum(answer.nbytes for answer in results))
            yield request.item, [answer.targets for answer in results]
    finally:
        # Closed or failed: what is still in flight would be scored for nothing.
        for request in waiting:
            for future in request.futures.values():
                future.cancel()


def nbytes_of(item: Any) -> int:
    """Estimates the memory of a batch: tensors and arrays, also inside lists and mappings."""
    if isinstance(item, Mapping):
        return sum(map(nbytes_of, item.values()))
    if isinstance(item, list | tuple):
        return sum(map(nbytes_of, item))
    if isinstance(item, str | bytes):
        return len(item)
    return int(getattr(item, "nbytes", 8))


def _take_result(future: "Future[Answer]", where: str) -> Answer:
    """Returns an answer; an error gets the place of the request in front of its text."""
    try:
        return future.result()
    except TeacherError as error:
        raise type(error)(f"{where}: {error}") from error
