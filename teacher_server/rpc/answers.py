"""Follows the requests of one client stream until each is answered: what is started, written and failed.

Score and Generate differ in what they read and write; that each request ends once, that one part is written at a
time, and what is held meanwhile is the same for both.
"""

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import grpc

from protos import teacher_pb2
from protos.answer_check import request_digest
from teacher_server.admission.access import Caller
from teacher_server.admission.requests import SESSION_ID_NBYTES, Request
from teacher_server.errors import RequestRefused, invalid
from teacher_server.ledger.accounts import Accounts, origin
from teacher_server.ledger.book import Reservation
from teacher_server.monitoring.metrics import Metrics
from teacher_server.monitoring.team_stats import TeamStats
from teacher_server.rpc.answer_budget import StreamBudget
from teacher_server.teams.declaration import Team

UNKNOWN_TEAM = Team("", scopes=frozenset())
"""The team of a request until its caller is known."""

Response = teacher_pb2.ScoreResponse | teacher_pb2.GenerateResponse
R = TypeVar("R", teacher_pb2.ScoreResponse, teacher_pb2.GenerateResponse)
J = TypeVar("J", bound=Reservation)


@dataclass(slots=True, eq=False)
class Answer:
    """Tracks what is outstanding of one request."""

    request_id: int
    request_digest: bytes
    origin: bytes
    """Names the request in the ledger."""
    team: Team = UNKNOWN_TEAM
    unfinished: int = 0
    """Sequences or texts whose last part has not been encoded."""
    is_over: bool = False
    """Whether its last part or an error was written, or nothing may be any more."""
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    """One for each sequence or text that is being answered."""
    tokens: int = 0
    """Tokens of these."""
    progress: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when one of the tasks ends."""

    async def wait_below(self, tokens: int) -> None:
        """Waits until at most `tokens` are being answered, or none at all."""
        while self.tasks and self.tokens > tokens:
            self.progress.clear()
            await self.progress.wait()


class Bind(Protocol):
    """Sets the checks that bind an answer to the digest of its request."""

    def __call__(self, digest: bytes, response: Any, /) -> None: ...


class Answers(Generic[R]):
    """Holds the unanswered requests of one stream, and lets one part be written at a time."""

    def __init__(
        self,
        context: grpc.aio.ServicerContext,
        caller: Caller,
        budget: StreamBudget,
        *,
        accounts: Accounts,
        metrics: Metrics,
        team_stats: TeamStats,
        response_type: type[R],
        bind: Bind,
    ) -> None:
        self._context = context
        self._caller = caller
        self._budget = budget
        self._accounts = accounts
        self._metrics = metrics
        self._team_stats = team_stats
        self._response_type = response_type
        self._bind = bind
        self._session_id = secrets.token_bytes(SESSION_ID_NBYTES)
        """The session of requests that name none."""
        self._unanswered: dict[int, Answer] = {}
        self._writing = asyncio.Lock()

    def begin(self, request: Request) -> Answer:
        """Makes what follows a request, before it is admitted."""
        return Answer(
            request.request_id,
            request_digest(request),
            origin(request.session_id or self._session_id, request.item_id or request.request_id),
        )

    def identify(self, answer: Answer) -> Team:
        """Finds whose request it is. Raises RequestRefused if the caller is not allowed any more."""
        # Asked for each request: a token may have expired, a team changed, since the stream began.
        answer.team = self._caller.team()
        return answer.team

    def check_id(self, answer: Answer) -> None:
        """Raises RequestRefused if an unanswered request has the same id."""
        if answer.request_id in self._unanswered:
            raise invalid(
                "DUPLICATE_REQUEST_ID",
                f"request {answer.request_id} is not answered yet and was sent again. Give every "
                "request of a stream an id of its own.",
                field="request_id",
            )

    def admit(self, answer: Answer, num_jobs: int) -> None:
        """Counts a request as unanswered: it has so many sequences or texts."""
        answer.unfinished = num_jobs
        self._unanswered[answer.request_id] = answer

    def find(self, request_id: int) -> Answer | None:
        """Returns the unanswered request with this id."""
        return self._unanswered.get(request_id)

    async def start(
        self,
        answer: Answer,
        jobs: Sequence[J],
        tasks: asyncio.TaskGroup,
        *,
        nbytes: Callable[[J], int],
        run: Callable[[J], Coroutine[Any, Any, None]],
        max_tokens: int | None = None,
    ) -> None:
        """Starts each job when the budget has bytes for what it may have unread.

        Their tokens are reserved: those that are not started are settled here. nbytes: what a job may have
        unread. run: answers one. max_tokens: of the jobs that are being answered, unless one has more.
        """
        waiting = deque(jobs)
        team = answer.team.name
        try:
            while waiting:
                job = waiting[0]
                if max_tokens is not None:
                    await answer.wait_below(max_tokens - job.num_tokens)
                await self._budget.acquire(nbytes(job), team)
                if answer.is_over:
                    self._budget.release(nbytes(job), team)
                    return
                waiting.popleft()
                task = tasks.create_task(run(job))
                answer.tasks.add(task)
                answer.tokens += job.num_tokens
                self._team_stats.admitted(team, job.num_tokens)
                # Not in a finally of the task: one that is cancelled before it begins has none.
                task.add_done_callback(partial(self._end, answer, job, nbytes(job)))
        finally:
            for job in waiting:
                self._accounts.settle(job)

    def _end(self, answer: Answer, job: Reservation, nbytes: int, task: asyncio.Task[None]) -> None:
        """Gives back what a job held, once it is answered or never will be."""
        team = answer.team.name
        answer.tasks.discard(task)
        answer.tokens -= job.num_tokens
        answer.progress.set()
        self._budget.release(nbytes, team)
        self._team_stats.answered(team, job.num_tokens)
        self._accounts.settle(job)

    def count_rejection(self, answer: Answer, error: Exception, reason: str) -> None:
        """Counts a request that is about to be refused or failed."""
        self._metrics.rejected.labels(answer.team.name, reason).inc()
        if answer.team is not UNKNOWN_TEAM:
            self._team_stats.rejected(answer.team.name)
            if isinstance(error, RequestRefused):
                self._accounts.record_rejection(answer.team)

    async def fail(self, answer: Answer, message: teacher_pb2.RequestError) -> None:
        """Answers a request with an error, once, and drops its other jobs."""
        await self.write(answer, self._response_type(request_id=answer.request_id, error=message))
        current = asyncio.current_task()
        for task in answer.tasks:
            if task is not current:
                task.cancel()

    async def write(
        self, answer: Answer, response: R, *, before: Callable[[], None] | None = None
    ) -> None:
        """Writes one part or error; after the last part or an error of a request nothing of it is written.

        before: called just before the write, if there is one.
        """
        async with self._writing:
            if answer.is_over:
                return  # it ended while this one waited for its turn
            answer.is_over = response.HasField("error") or response.part.last
            # A second request with the same id must not end the first one's entry.
            if answer.is_over and self._unanswered.get(answer.request_id) is answer:
                del self._unanswered[answer.request_id]
            self._bind(answer.request_digest, response)
            if before is not None:
                before()
            # While this is set and old, the budget may end the stream: its reader has stopped.
            self._budget.blocked_s = time.monotonic()
            try:
                await self._context.write(response)
            finally:
                self._budget.blocked_s = 0.0
