"""Which request is where, and which parts of its answer have come: the resume protocol without I/O.

A request that was lost with its link is sent again under a new number, so that whatever still
arrives for the old number finds nobody, and its parts are collected anew: an answer is never made
of two attempts. Scoring is a pure function, so asking twice gives the same bytes.

`session.py` drives this over gRPC; the tests drive it over a simulated network.
"""

import heapq
import itertools
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum, auto

import xxhash

from logit_codec import IdTable, Targets, decode
from protos import teacher_pb2
from protos.answer_check import is_what_was_written, request_digest
from student_trainer.errors import IncompatibleTeacher, TargetsCorrupt
from student_trainer.teachers.request import Answer

Link = Hashable
"""Names one stream to one replica; never used again once it is lost."""


class Fate(Enum):
    """How a message ends a request."""

    ANSWERED = auto()
    REFUSED = auto()
    DAMAGED = auto()


@dataclass(slots=True, eq=False)
class Pending:
    """A request without its answer."""

    request: teacher_pb2.ScoreRequest
    num_rows: int
    future: "Future[Answer]" = field(default_factory=Future)
    keep_payloads: bool = False
    """Whether the answer is to have the bytes that it was decoded from."""
    order: int = 0
    """Its place among all requests: the oldest are sent again first."""
    number: int = 0
    """The request_id of the current attempt."""
    digest: bytes = b""
    """Of the current attempt's request."""
    link: Link | None = None
    """Where the current attempt is; None while it waits for a link."""
    parts: dict[int, teacher_pb2.TargetsPart] = field(default_factory=dict)
    """Of the current attempt, by first row."""
    written_s: float = 0.0
    """When the current attempt was given to its link's stream."""
    damaged: int = 0
    """How often its answer arrived damaged."""
    passed_s: float | None = None
    """Since when requests that were sent later on the same link have been answered."""
    waited_since_s: float | None = None
    """Since when the teacher has been asking to come back later."""
    failed_at: set[Link] = field(default_factory=set)
    """Links whose replica answered it with INTERNAL: it goes to others while there are any."""

    @property
    def num_tokens(self) -> int:
        return len(self.request.token_ids) // 4

    def is_complete(self) -> bool:
        return sum(part.num_rows for part in self.parts.values()) >= self.num_rows or any(
            part.last for part in self.parts.values()
        )


class Dispatch:
    """Spreads requests over links by outstanding tokens and keeps those without an answer.

    send: told (link, number) when a request is to be written to a link; `to_write(number)` is
    that request, or None if it is no longer wanted by then.
    """

    def __init__(self, send: Callable[[Link, int], None]) -> None:
        self._send = send
        self._numbers = itertools.count(1)
        self._orders = itertools.count(1)
        self._sent: dict[Link, dict[int, Pending]] = {}
        self._by_number: dict[int, Pending] = {}
        self._tokens: dict[Link, int] = {}
        self._paused: set[Link] = set()
        self._distrusted: set[Link] = set()
        self._waiting: list[tuple[int, Pending]] = []

    @property
    def unanswered(self) -> int:
        """Requests that are sent or wait for a link."""
        return len(self._by_number) + len(self._waiting)

    def outstanding(self, link: Link) -> dict[int, Pending]:
        """The unanswered requests of a link by number, in the order of sending."""
        return self._sent[link]

    def submit(self, pending: Pending) -> None:
        """A new request, or one that is to be asked again."""
        pending.order = pending.order or next(self._orders)
        pending.request.item_id = pending.order  # however often it is sent, it is one piece of work
        self._place(pending, avoid=None)

    def open(self, link: Link) -> None:
        """A link can take requests, first those that wait."""
        self._sent[link] = {}
        self._tokens[link] = 0
        self._place_waiting()

    def pause(self, link: Link) -> None:
        """The link takes no further requests, but may still answer."""
        self._paused.add(link)

    def unpause(self, link: Link) -> None:
        """The link takes requests again."""
        self._paused.discard(link)
        self._place_waiting()

    def distrust(self, link: Link) -> None:
        """The link takes requests only where no other one does.

        A replica that fails at once on every request always has the fewest outstanding tokens.
        """
        if link in self._sent:
            self._distrusted.add(link)

    def trust(self, link: Link) -> None:
        """The link takes requests like any other again."""
        self._distrusted.discard(link)

    def close(self, link: Link) -> int:
        """The link is lost: its unanswered requests go to others; returns how many there were."""
        lost = self._sent.pop(link)
        del self._tokens[link]
        self._paused.discard(link)
        self._distrusted.discard(link)
        for number in lost:
            del self._by_number[number]
        for pending in sorted(lost.values(), key=lambda pending: pending.order):
            self._place(pending, avoid=None)
        return len(lost)

    def to_write(self, number: int) -> Pending | None:
        """The request to write; None if it was given up or has moved."""
        pending = self._by_number.get(number)
        if pending is None:
            return None
        if pending.future.cancelled():
            self._forget(pending)
            return None
        return pending

    def receive(
        self, link: Link, response: teacher_pb2.ScoreResponse
    ) -> tuple[Pending, Fate] | None:
        """Takes one message; returns the request that it ends, and how.

        ANSWERED: its `parts` hold a whole answer. REFUSED: the message is its error. DAMAGED: the
        message is not what the teacher wrote. The request is forgotten in each case; `again` asks
        once more. Messages for old numbers are dropped.
        """
        pending = self._sent[link].get(response.request_id)
        if pending is None:
            return None
        if not is_what_was_written(pending.digest, response):
            self._forget(pending)
            return pending, Fate.DAMAGED
        if pending.future.cancelled():
            self._forget(pending)
            return None
        if response.HasField("part"):
            pending.parts.setdefault(response.part.first_row, response.part)
            if not pending.is_complete():
                return None
        self._forget(pending)
        return pending, Fate.ANSWERED if response.HasField("part") else Fate.REFUSED

    def again(self, pending: Pending) -> None:
        """Asks once more, elsewhere if there is another link; also for a request just returned."""
        link = pending.link
        if pending.number in self._by_number:
            self._forget(pending)
        self._place(pending, avoid=link)

    def has_another(self, pending: Pending) -> bool:
        """Whether a link takes requests whose replica did not fail on this one."""
        return any(link not in pending.failed_at for link in self._ready())

    def take_all(self) -> list[Pending]:
        """Forgets every request that has no answer, and returns them."""
        everything = [pending for _, pending in self._waiting]
        everything += self._by_number.values()
        self._waiting.clear()
        self._by_number.clear()
        for link, sent in self._sent.items():
            sent.clear()
            self._tokens[link] = 0
        return [pending for pending in everything if not pending.future.cancelled()]

    def _place_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        while waiting:
            self._place(heapq.heappop(waiting)[1], avoid=None)

    def _place(self, pending: Pending, *, avoid: Link | None) -> None:
        """Gives a request to the link with the fewest outstanding tokens, a trusted one if it can."""
        if pending.future.cancelled():
            return
        ready = self._ready()
        unwanted = {avoid, *pending.failed_at}
        links = [link for link in ready if link not in unwanted] or ready
        pending.parts = {}
        pending.passed_s = None
        pending.link = None
        if not links:
            heapq.heappush(self._waiting, (pending.order, pending))
            return
        link = min(links, key=lambda link: (link in self._distrusted, self._tokens[link]))
        pending.number = pending.request.request_id = next(self._numbers)
        pending.digest = request_digest(pending.request)
        pending.link = link
        self._sent[link][pending.number] = pending
        self._by_number[pending.number] = pending
        self._tokens[link] += pending.num_tokens
        self._send(link, pending.number)

    def _ready(self) -> list[Link]:
        return [link for link in self._sent if link not in self._paused]

    def _forget(self, pending: Pending) -> None:
        assert pending.link is not None
        del self._by_number[pending.number]
        del self._sent[pending.link][pending.number]
        self._tokens[pending.link] -= pending.num_tokens


def assemble(pending: Pending, fingerprint: str, id_tables: Sequence[IdTable] = ()) -> Answer:
    """A whole answer, checked and decoded. Raises CodecError, TargetsCorrupt or IncompatibleTeacher."""
    digest = xxhash.xxh3_128_digest(pending.request.token_ids)
    row = 0
    decoded = []
    for _, part in sorted(pending.parts.items()):
        if part.teacher_fingerprint != fingerprint:
            raise IncompatibleTeacher(
                f"an answer came from teacher {part.teacher_fingerprint}, this run began with "
                f"{fingerprint}"
            )
        if part.ids_digest != digest:
            raise TargetsCorrupt("the digest of the scored ids is not that of the ids sent")
        targets = decode(part.payload, id_tables=id_tables)
        if part.first_row != row or part.num_rows != targets.num_rows:
            raise TargetsCorrupt(f"row {row} was expected, rows from {part.first_row} came")
        row += targets.num_rows
        decoded.append(targets)
    if row != pending.num_rows:
        raise TargetsCorrupt(f"{pending.num_rows} rows were asked for, {row} came")
    payloads = ()
    if pending.keep_payloads:
        payloads = tuple(part.payload for _, part in sorted(pending.parts.items()))
    return Answer(Targets.cat(decoded), payloads)
