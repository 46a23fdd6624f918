"""Who calls, and what that caller may do: one rule for every RPC, asked at each call.

With teams declared, the interceptor has the caller's team found here, from the bearer token, or
without one from the client certificate of the connection, and the call held against the one table below. The
handlers then find their caller in a context variable. A stream is asked about again and again: when
its caller is not let in any more, its requests end, what was read is answered, and the status says
why.
"""

import asyncio
import contextlib
import hmac
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import grpc

from logitstream.messages import scope_of
from protos import teacher_pb2
from teacher_server.errors import RequestRefused, invalid
from teacher_server.teams.declaration import DEFAULT_TEAM, Declared, Team, TeamsFile, token_digest

logger = logging.getLogger(__name__)

LOOK_S = 1.0
"""How often the teams file is looked at, and the callers of open streams are asked about again."""
GRACE_S = 20.0
"""How long a call may take to write its last answers when its caller is let in no more."""
SERVICE_METADATA = "logitstream-service"
"""Trailing metadata of refusals: the service's id, so that replicas know each other without a token."""
IDENTITIES = ("x509_subject_alternative_name", "x509_common_name")
"""Of gRPC's authentication context: where the names of a client certificate are."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Who may call one RPC."""

    scope: str | None = None
    """What the caller's team needs; None: nothing beyond being a team."""
    everybody: bool = False
    """Also who shows no token: probes."""


TEACHER = "/logitstream.v1.Teacher"
RULES: Mapping[str, Rule] = {
    f"{TEACHER}/Describe": Rule(),
    f"{TEACHER}/Score": Rule(scope="score"),
    f"{TEACHER}/FetchIdTable": Rule(),
    f"{TEACHER}/Usage": Rule(),  # whose usage: the handler asks for the scope admin
    f"{TEACHER}/Status": Rule(),  # likewise
    "/grpc.health.v1.Health/Check": Rule(everybody=True),
    "/grpc.health.v1.Health/Watch": Rule(everybody=True),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Rule(),
}
"""Every RPC there is; one that is missing here is refused."""


class Caller:
    """Whoever makes one call; asked again for each request of a stream."""

    def __init__(self) -> None:
        self.refused: RequestRefused | None = None
        """Why it is not let in any more."""
        self.reader: asyncio.Task[Any] | None = None
        """The task that waits for the next request of its stream."""

    def team(self) -> Team:
        """The caller's team as it is declared now.

        Raises RequestRefused if the caller is not let in any more: a token expired or was revoked.
        """
        return DEFAULT_TEAM


EVERYBODY = Caller()
CURRENT: ContextVar[Caller] = ContextVar("caller", default=EVERYBODY)


def current_caller() -> Caller:
    """Of the RPC that this task answers."""
    return CURRENT.get()


def check_request(team: Team, request: teacher_pb2.ScoreRequest) -> None:
    """Raises RequestRefused if this team may not ask for this; reads nothing of the tokens."""
    scope = scope_of(request.targets)
    if scope != "score" and scope not in team.scopes:
        kind = request.targets.WhichOneof("kind")
        raise _scope_missing(team, scope, f"targets of kind {kind}", field="targets")
    limit = team.limits.max_request_tokens
    num_tokens = len(request.token_ids) // 4
    if limit is not None and num_tokens > limit:
        raise invalid(
            "TOO_MANY_TOKENS",
            f"{num_tokens} tokens in one request; team {team.name} may send at most {limit}. Send "
            "fewer sequences per request.",
            field="lengths",
        )


@dataclass(frozen=True, slots=True)
class Credential:
    """How a caller showed who it is."""

    digest: bytes | None = None
    """SHA-256 of its token; None: its certificate counts."""
    names: tuple[str, ...] = ()
    """Of its client certificate."""
    expires: datetime | None = None
    """Of its client certificate."""


class KnownCaller(Caller):
    """A caller with a token or a certificate that belonged to a team when the call began."""

    def __init__(self, access: "Access", credential: Credential, rule: Rule, method: str) -> None:
        super().__init__()
        self._access = access
        self._credential = credential
        self._rule = rule
        self._method = method
        self._call = asyncio.current_task()
        self._refused_s = 0.0

    def team(self) -> Team:
        team = self._access.team(self._credential)
        if self._rule.scope is not None and self._rule.scope not in team.scopes:
            raise _scope_missing(team, self._rule.scope, self._method.rpartition("/")[2])
        return team

    def check(self) -> None:
        """Ends its stream's requests if it is not let in any more, and later what is left of it."""
        if self.refused is not None:
            if time.monotonic() - self._refused_s > GRACE_S and self._call is not None:
                self._call.cancel()  # it does not read what it asked for
            return
        try:
            self.team()
        except RequestRefused as refused:
            self.refused, self._refused_s = refused, time.monotonic()
            if self.reader is not None:
                self.reader.cancel()


class Access:
    """Which team a caller belongs to, by a teams file that may change at any time."""

    def __init__(
        self,
        file: TeamsFile,
        *,
        service_id: str = "",
        on_refusal: Callable[[str, str], None] = lambda team, reason: None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """on_refusal: told the reason of every call that is refused, for the metrics."""
        self._file = file
        self._now = now
        self._on_refusal = on_refusal
        self.service_id = service_id
        self._calls: set[KnownCaller] = set()

    async def watch(self) -> None:
        """Keeps the teams up to date and ends the streams of callers that are let in no more."""
        while True:
            await asyncio.sleep(LOOK_S)
            # In a thread: a file on a network may take its time.
            await asyncio.to_thread(self._file.look)
            for caller in list(self._calls):
                caller.check()

    def enter(
        self, context: grpc.aio.ServicerContext, rule: Rule | None, method: str
    ) -> KnownCaller:
        """Who makes this call. Raises RequestRefused if that is nobody, or may not do this."""
        try:
            if rule is None:
                raise RequestRefused(
                    grpc.StatusCode.PERMISSION_DENIED, "SCOPE_MISSING", f"{method} is for nobody"
                )
            caller = KnownCaller(self, self._credential(context), rule, method)
            caller.team()
        except RequestRefused as refused:
            self._on_refusal("", refused.reason)
            raise
        return caller

    def _credential(self, context: grpc.aio.ServicerContext) -> Credential:
        given = [
            value if isinstance(value, str) else value.decode("latin-1")
            for key, value in context.invocation_metadata() or ()
            if key == "authorization"
        ]
        if not given:
            return _certificate(context.auth_context())
        scheme, _, token = given[0].partition(" ")
        if len(given) > 1 or scheme.lower() != "bearer" or not token.strip():
            raise _unauthenticated(
                "TOKEN_UNKNOWN",
                'the metadata entry "authorization" must be there once, as "Bearer TOKEN"',
            )
        digest = token_digest(token.strip())
        known = None
        # Every token is compared, each in constant time: how long this takes tells nothing about
        # how close a guess came, nor whose token it nearly was.
        for other in self._file.teams.by_digest:
            if hmac.compare_digest(other, digest):
                known = other
        if known is None:
            raise _unauthenticated("TOKEN_UNKNOWN", "this token belongs to no team here")
        return Credential(digest=known)

    def team(self, credential: Credential) -> Team:
        """The team as it is declared now. Raises RequestRefused."""
        now = datetime.fromtimestamp(self._now(), UTC)
        teams = self._file.teams
        if credential.digest is not None:
            found = teams.by_digest.get(credential.digest)
            if found is None:
                raise _unauthenticated("TOKEN_UNKNOWN", "this token was revoked")
            declared, token = found
            if token.expires is not None and now >= token.expires:
                raise _unauthenticated(
                    "TOKEN_EXPIRED",
                    f"this token of team {declared.team.name} expired at "
                    f"{token.expires:%Y-%m-%d %H:%M} UTC",
                )
            return _enabled(declared)
        if credential.expires is not None and now >= credential.expires:
            raise _unauthenticated(
                "TOKEN_EXPIRED",
                f"this client certificate expired at {credential.expires:%Y-%m-%d %H:%M} UTC",
            )
        for name in credential.names:
            if name in teams.by_certificate:
                return _enabled(teams.by_certificate[name])
        if credential.names:
            raise _unauthenticated(
                "TOKEN_UNKNOWN",
                f"this client certificate ({', '.join(credential.names)[:200]}) belongs to no team "
                "here, and there is no token",
            )
        raise _unauthenticated("TOKEN_MISSING", "this service is shared by teams and needs a token")

    @contextlib.contextmanager
    def watched(self, caller: Caller) -> Iterator[None]:
        """Meanwhile the caller is asked about regularly, if it is one that may be let in no more."""
        if not isinstance(caller, KnownCaller):
            yield
            return
        self._calls.add(caller)
        try:
            yield
        finally:
            self._calls.discard(caller)


def _certificate(context: Mapping[str, Iterable[bytes]]) -> Credential:
    """The client certificate of a connection, which TLS has verified; empty without one."""
    names = tuple(
        dict.fromkeys(
            name.decode(errors="replace") for key in IDENTITIES for name in context.get(key, ())
        )
    )
    pem = list(context.get("x509_pem_cert", ()))
    if not names or not pem:
        return Credential(names=names)
    from cryptography import x509  # needed with client certificates only

    return Credential(
        names=names, expires=x509.load_pem_x509_certificate(pem[0]).not_valid_after_utc
    )


def _enabled(declared: Declared) -> Team:
    if declared.disabled:
        raise RequestRefused(
            grpc.StatusCode.UNAUTHENTICATED,
            "TEAM_DISABLED",
            f"team {declared.team.name} is disabled. The operator lets it in again with "
            "teacher-server team disable --undo.",
        )
    return declared.team


def _unauthenticated(reason: str, message: str) -> RequestRefused:
    """Who calls is not known; says to the reader, who may be let in, what to do."""
    return RequestRefused(
        grpc.StatusCode.UNAUTHENTICATED,
        reason,
        f"{message}. Ask the operator for a token (teacher-server team add, or rotate) and put it "
        "into the environment variable TEACHER_TOKEN, or give it to connect(token=...).",
    )


def _scope_missing(team: Team, scope: str, what: str, *, field: str = "") -> RequestRefused:
    have = ", ".join(sorted(team.scopes)) or "none"
    return RequestRefused(
        grpc.StatusCode.PERMISSION_DENIED,
        "SCOPE_MISSING",
        f'{what} needs the scope "{scope}"; team {team.name} has: {have}. The operator can add it '
        "to the team's scopes in the teams file.",
        field=field,
    )
