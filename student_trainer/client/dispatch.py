"""Decides which link a request goes to, and sends the requests of a lost link again; without I/O.

A request whose link was lost is sent again under a new number and its parts are collected from
scratch, so that what still arrives for the old number is dropped: an answer is never made of two
attempts. Scoring is a pure function, so asking twice gives the same bytes.

`session.py` drives this over gRPC; the tests drive it over a simulated network.
"""

import heapq
import itertools
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum, auto

import xxhash

from logit_codec import GivenIds, IdTable, Targets, decode
from protos import teacher_pb2
from protos.answer_check import is_what_was_written, request_digest
from student_trainer.errors import IncompatibleTeacher, TargetsCorrupt, TeacherError
from student_trainer.teachers.request import Answer

LinkKey = Hashable
"""Identifies one stream to one replica; never used again once it is lost."""


class Fate(Enum):
    """Says how a message ends a request."""

    ANSWERED = auto()
    REFUSED = auto()
    DAMAGED = auto()


@dataclass(slots=True, eq=False)
class Pending:
    """Holds a request that has no answer yet."""

    request: teacher_pb2.ScoreRequest
    num_rows: int
    future: "Future[Answer]" = field(default_factory=Future)
    given_ids: GivenIds | None = None
    """The ids that its rows were asked for; the answer does not repeat them."""
    keep_payloads: bool = False
    """Whether the answer also needs the bytes that it is decoded from."""
    order: int = 0
    """Its place among all requests: the oldest are sent again first."""
    number: int = 0
    """The request_id of the current attempt."""
    digest: bytes = b""
    """The digest of the current attempt's request."""
    link: LinkKey | None = None
    """Where the current attempt is; None while it waits for a link."""
    parts: dict[int, teacher_pb2.TargetsPart] = field(default_factory=dict)
    """The parts that the current attempt brought, by first row."""
    written_s: float = 0.0
    """When the current attempt was written to its link's stream."""
    num_damaged: int = 0
    """How often its answer arrived damaged."""
    passed_s: float | None = None
    """Since when requests that were sent later on the same link have been answered."""
    waited_since_s: float | None = None
    """Since when the teacher has been asking to come back later."""
    failed_at: set[LinkKey] = field(default_factory=set)
    """Links whose replica answered it with INTERNAL: it goes to others while there are any."""

    @property
    def num_tokens(self) -> int:
        return len(self.request.token_ids) // 4

    def is_complete(self) -> bool:
        """Whether the parts of the current attempt make a whole answer."""
        return sum(part.num_rows for part in self.parts.values()) >= self.num_rows or any(
            part.last for part in self.parts.values()
        )

    def resolve(self, result: Answer | TeacherError) -> None:
        """Hands the result to the caller, unless the caller gave up or has one already."""
        if self.future.done() or not self.future.set_running_or_notify_cancel():
            return
        if isinstance(result, TeacherError):
            self.future.set_exception(result)
        else:
            self.future.set_result(result)


class Dispatch:
    """Spreads requests over links by outstanding tokens and keeps those without an answer."""

    def __init__(self, send: Callable[[LinkKey, int], None]) -> None:
        """send: gets (link, number) when a request should be written to a link;
        `find_to_write(number)` returns that request, or None if it is no longer wanted by then."""
        self._send = send
        self._numbers = itertools.count(1)
        self._orders = itertools.count(1)
        self._sent: dict[LinkKey, dict[int, Pending]] = {}
        self._by_number: dict[int, Pending] = {}
        self._tokens: dict[LinkKey, int] = {}
        self._paused: set[LinkKey] = set()
        self._distrusted: set[LinkKey] = set()
        self._waiting: list[tuple[int, Pending]] = []

    @property
    def num_unanswered(self) -> int:
        """How many requests are sent or wait for a link."""
        return len(self._by_number) + len(self._waiting)

    def outstanding(self, link: LinkKey) -> dict[int, Pending]:
        """Returns the unanswered requests of a link by number, in the order of sending."""
        return self._sent[link]

    def oldest(self, link: LinkKey) -> Pending | None:
        """Returns the unanswered request of a link that was sent first."""
        return next(iter(self._sent[link].values()), None)

    def submit(self, pending: Pending) -> None:
        """Sends a new request, or one that is asked again and may go to any link."""
        pending.order = pending.order or next(self._orders)
        # However often it is sent, it is one piece of work, and is billed as one.
        pending.request.item_id = pending.order
        self._place(pending, avoid=None)

    def add_link(self, link: LinkKey) -> None:
        """Lets a new link take requests, first those that wait."""
        self._sent[link] = {}
        self._tokens[link] = 0
        self._place_waiting()

    def set_paused(self, link: LinkKey, paused: bool) -> None:
        """Keeps further requests from a link, which may still answer; or lets it take them again."""
        if paused:
            self._paused.add(link)
        else:
            self._paused.discard(link)
            self._place_waiting()

    def set_trusted(self, link: LinkKey, trusted: bool) -> None:
        """Lets a link take requests like any other, or only where no other link can.

        A replica that fails every request at once always has the fewest outstanding tokens.
        """
        if trusted:
            self._distrusted.discard(link)
        elif link in self._sent:
            self._distrusted.add(link)

    def resend_lost(self, link: LinkKey) -> int:
        """Sends the unanswered requests of a lost link to others; returns how many there were."""
        # The link is forgotten first, so that none of its requests is placed on it again.
        lost = self._sent.pop(link)
        del self._tokens[link]
        self._paused.discard(link)
        self._distrusted.discard(link)
        for number in lost:
            del self._by_number[number]
        for pending in sorted(lost.values(), key=lambda pending: pending.order):
            self._place(pending, avoid=None)
        return len(lost)

    def find_to_write(self, number: int) -> Pending | None:
        """Returns the request to write; None if it was given up or has moved to another link."""
        pending = self._by_number.get(number)
        if pending is None:
            return None
        if pending.future.cancelled():
            self._forget(pending)
            return None
        return pending

    def receive(
        self, link: LinkKey, response: teacher_pb2.ScoreResponse
    ) -> tuple[Pending, Fate] | None:
        """Takes one message; returns the request that it ends, and how.

        ANSWERED: its `parts` hold a whole answer. REFUSED: the message is its error. DAMAGED: the
        message is not what the teacher wrote. The request is forgotten in each case; `resend` asks
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

    def resend(self, pending: Pending) -> None:
        """Asks once more, through another link if there is one; also for a request just returned."""
        link = pending.link
        if pending.number in self._by_number:
            self._forget(pending)
        self._place(pending, avoid=link)

    def has_another(self, pending: Pending) -> bool:
        """Whether a link takes requests whose replica did not fail on this one."""
        return any(link not in pending.failed_at for link in self._ready())

    def fail_all(self, error: TeacherError) -> None:
        """Ends every request that has no answer with an error."""
        unanswered = [pending for _, pending in self._waiting]
        unanswered += self._by_number.values()
        self._waiting.clear()
        self._by_number.clear()
        for link, sent in self._sent.items():
            sent.clear()
            self._tokens[link] = 0
        for pending in unanswered:
            # A copy for each: one exception raised in several places would mix its tracebacks.
            own = type(error)(str(error))
            own.__cause__ = error.__cause__
            pending.resolve(own)

    def _place_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        while waiting:
            self._place(heapq.heappop(waiting)[1], avoid=None)

    def _place(self, pending: Pending, *, avoid: LinkKey | None) -> None:
        """Gives a request to the link with the fewest outstanding tokens, if possible a trusted one."""
        if pending.future.cancelled():
            return
        ready = self._ready()
        unwanted = {avoid, *pending.failed_at}
        links = [link for link in ready if link not in unwanted] or ready
        # A new attempt: parts of the one before must not end up in its answer.
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

    def _ready(self) -> list[LinkKey]:
        return [link for link in self._sent if link not in self._paused]

    def _forget(self, pending: Pending) -> None:
        assert pending.link is not None
        del self._by_number[pending.number]
        del self._sent[pending.link][pending.number]
        self._tokens[pending.link] -= pending.num_tokens


def assemble(pending: Pending, fingerprint: str, id_tables: Sequence[IdTable] = ()) -> Answer:
    """Checks and decodes a whole answer.

    Raises CodecError, TargetsCorrupt or IncompatibleTeacher.
    """
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
            raise TargetsCorrupt("the scored ids are not the ids that were sent: digests differ")
        given = pending.given_ids
        if given is not None:
            given = given[row : row + part.num_rows]
        targets = decode(part.payload, id_tables=id_tables, given_ids=given)
        if part.first_row != row or part.num_rows != targets.num_rows:
            raise TargetsCorrupt(f"row {row} was expected, got rows from {part.first_row} on")
        row += targets.num_rows
        decoded.append(targets)
    if row != pending.num_rows:
        raise TargetsCorrupt(f"{pending.num_rows} rows were requested, got {row}")
    payloads = ()
    if pending.keep_payloads:
        payloads = tuple(part.payload for _, part in sorted(pending.parts.items()))
    return Answer(Targets.cat(decoded), payloads)
