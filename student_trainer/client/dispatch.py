"""Decides which link a request goes to, and sends the requests of a lost link again; without I/O.

A request whose link was lost is sent again under a new number, so that what still arrives for the old
number is dropped.

`session.py` drives this over gRPC; the tests drive it over a simulated network.
"""

import heapq
import itertools
from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import TypeVar

import xxhash

from logit_codec import IdTable, Targets, decode
from protos import teacher_pb2
from protos.answer_check import is_what_was_written, request_digest
from student_trainer.client.pending import Attempts, LinkKey, Pending, PendingTexts
from student_trainer.errors import IncompatibleTeacher, TargetsCorrupt, TeacherError
from student_trainer.teachers.request import Answer

T = TypeVar("T", bound=Attempts)
Unanswered = Pending | PendingTexts
"""What a link can be given."""


class Fate(Enum):
    """Says how a message ends a request."""

    ANSWERED = auto()
    REFUSED = auto()
    DAMAGED = auto()


class Dispatch:
    """Spreads requests over links by outstanding tokens and keeps those without an answer."""

    def __init__(self, send: Callable[[LinkKey, int], None]) -> None:
        """send: gets (link, number) when a request should be written to a link;
        `find_to_write(number)` returns that request, or None if it is no longer wanted by then."""
        self._send = send
        self._numbers = itertools.count(1)
        self._orders = itertools.count(1)
        self._sent: dict[LinkKey, dict[int, Unanswered]] = {}
        self._by_number: dict[int, Unanswered] = {}
        self._tokens: dict[LinkKey, int] = {}
        self._paused: set[LinkKey] = set()
        self._distrusted: set[LinkKey] = set()
        self._waiting: list[tuple[int, Unanswered]] = []

    @property
    def num_unanswered(self) -> int:
        """How many requests are sent or wait for a link."""
        return len(self._by_number) + len(self._waiting)

    def outstanding(self, link: LinkKey, kind: type[T] = Attempts) -> dict[int, T]:
        """Returns the unanswered requests of a link by number, in the order of sending.

        kind: only these. A link that was lost has none.
        """
        sent = self._sent.get(link, {})
        return {number: one for number, one in sent.items() if isinstance(one, kind)}

    def oldest(self, link: LinkKey, kind: type[T] = Attempts) -> T | None:
        """Returns the unanswered request of a link that was sent first."""
        sent = self._sent.get(link, {}).values()
        return next((one for one in sent if isinstance(one, kind)), None)

    def find(self, link: LinkKey, number: int) -> Unanswered | None:
        """Returns an unanswered request of a link."""
        return self._sent.get(link, {}).get(number)

    def submit(self, pending: Unanswered) -> None:
        """Sends a new request, or one that is asked again and may go to any link.

        Does nothing for one that has been sent again while it waited for this.
        """
        if pending.is_out:
            return
        pending.order = pending.order or next(self._orders)
        # However often it is sent, it is one piece of work, and is billed as one.
        pending.request.item_id = pending.order
        self._place(pending, avoid=None)

    def add_link(self, link: LinkKey) -> None:
        """Lets a new link take requests, first those that wait."""
        self._sent[link] = {}
        self._tokens[link] = 0
        self.set_paused(link, False)

    def set_paused(self, link: LinkKey, paused: bool) -> None:
        """Keeps further requests from a link, which may still answer; or lets it take them again."""
        if paused:
            self._paused.add(link)
        else:
            self._paused.discard(link)
            waiting, self._waiting = self._waiting, []
            while waiting:
                self._place(heapq.heappop(waiting)[1], avoid=None)

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

    def find_to_write(self, number: int) -> Unanswered | None:
        """Returns the request to write; None if it was given up or has moved to another link."""
        pending = self._by_number.get(number)
        if pending is None:
            return None
        if pending.future.cancelled():
            self.forget(pending)
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
        pending = self.find(link, response.request_id)
        if not isinstance(pending, Pending):
            return None
        if not is_what_was_written(pending.digest, response):
            self.forget(pending)
            return pending, Fate.DAMAGED
        if pending.future.cancelled():
            self.forget(pending)
            return None
        if response.HasField("part"):
            pending.parts.setdefault(response.part.first_row, response.part)
            if not pending.is_complete():
                return None
        self.forget(pending)
        return pending, Fate.ANSWERED if response.HasField("part") else Fate.REFUSED

    def resend(self, pending: Unanswered) -> None:
        """Asks once more, through another link if there is one; also for a request just returned."""
        link = pending.link
        if pending.number in self._by_number:
            self.forget(pending)
        self._place(pending, avoid=link)

    def has_another(self, pending: Unanswered) -> bool:
        """Whether a link takes requests whose replica did not fail on this one."""
        return any(link not in pending.failed_at for link in self._ready())

    def fail_all(self, error: TeacherError, *, texts_only: bool = False) -> None:
        """Ends every request that has no answer with an error."""
        unanswered = [pending for _, pending in self._waiting]
        unanswered += self._by_number.values()
        if texts_only:
            unanswered = [one for one in unanswered if isinstance(one, PendingTexts)]
        self._waiting = [entry for entry in self._waiting if entry[1] not in unanswered]
        heapq.heapify(self._waiting)
        for pending in unanswered:
            if pending.number in self._by_number:
                self.forget(pending)
            # A copy for each: one exception raised in several places would mix its tracebacks.
            own = type(error)(str(error))
            own.__cause__ = error.__cause__
            pending.resolve(own)

    def _place(self, pending: Unanswered, *, avoid: LinkKey | None) -> None:
        """Gives a request to the link with the fewest outstanding tokens, if possible a trusted one."""
        if pending.future.cancelled():
            return
        ready = self._ready()
        unwanted = {avoid, *pending.failed_at}
        links = [link for link in ready if link not in unwanted] or ready
        pending.begin_attempt()
        pending.is_out = True
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

    def forget(self, pending: Unanswered) -> None:
        """Stops waiting for the current attempt of a request."""
        pending.is_out = False
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
