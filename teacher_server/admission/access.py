"""Identifies the caller of each RPC and checks what it may do: one rule per RPC, in one table.

With teams declared, the interceptor asks here for the caller's team, which follows from the bearer
token, or without one from the client certificate of the connection. The handlers then find their
caller in a context variable. The caller of a stream is checked again and again: when it is no longer
allowed, its requests end, those that were read are answered, and the status says why.
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

from teacher_server.errors import RequestRefused
from teacher_server.teams.declaration import DEFAULT_TEAM, Declared, Team, TeamsFile, token_digest

logger = logging.getLogger(__name__)

LOOK_S = 1.0
"""How often the teams file is read, and the callers of open streams are checked again."""
GRACE_S = 20.0
"""How long a call may take to write its last answers when its caller is no longer allowed."""
SERVICE_METADATA = "logitstream-service"
"""Trailing metadata of refusals: the service's id, by which replicas know each other without a
token."""
IDENTITIES = ("x509_subject_alternative_name", "x509_common_name")
"""Keys of gRPC's authentication context that hold the names of a client certificate."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Says who may call one RPC."""

    scope: str | None = None
    """Scope that the caller's team needs; None: any team may call."""
    everybody: bool = False
    """Whether callers without a token may call too, as probes do."""


TEACHER = "/logitstream.v1.Teacher"
RULES: Mapping[str, Rule] = {
    f"{TEACHER}/Describe": Rule(),
    f"{TEACHER}/Score": Rule(scope="score"),
    f"{TEACHER}/Generate": Rule(scope="generate"),
    f"{TEACHER}/FetchIdTable": Rule(),
    f"{TEACHER}/FetchHead": Rule(scope="hidden"),
    f"{TEACHER}/Usage": Rule(),  # whose usage: the handler asks for the scope admin
    f"{TEACHER}/Status": Rule(),  # likewise
    "/grpc.health.v1.Health/Check": Rule(everybody=True),
    "/grpc.health.v1.Health/Watch": Rule(everybody=True),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Rule(),
}
"""Lists every RPC; one that is missing here is refused."""


class Caller:
    """Stands for the maker of one call; its team is asked for at each request of a stream."""

    def __init__(self) -> None:
        self.refused: RequestRefused | None = None
        """Why it is no longer allowed."""
        self.reader: asyncio.Task[Any] | None = None
        """The task that waits for the next request of its stream."""

    def team(self) -> Team:
        """Returns the caller's team as it is declared now.

        Raises RequestRefused if the caller is no longer allowed: a token expired or was revoked.
        """
        return DEFAULT_TEAM


EVERYBODY = Caller()
CURRENT: ContextVar[Caller] = ContextVar("caller", default=EVERYBODY)


def current_caller() -> Caller:
    """Returns the caller of the RPC that this task answers."""
    return CURRENT.get()


@dataclass(frozen=True, slots=True)
class Credential:
    """Holds how a caller identified itself."""

    digest: bytes | None = None
    """SHA-256 of its token; None: its certificate counts."""
    names: tuple[str, ...] = ()
    """Names in its client certificate."""
    expires: datetime | None = None
    """End of its client certificate."""


class KnownCaller(Caller):
    """Stands for a caller whose token or certificate belonged to a team when the call began."""

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
            raise scope_missing(team, self._rule.scope, self._method.rpartition("/")[2])
        return team

    def check(self) -> None:
        """Ends its stream's requests once it is no longer allowed, and later the call itself."""
        if self.refused is not None:
            if time.monotonic() - self._refused_s > GRACE_S and self._call is not None:
                self._call.cancel()  # it does not read the answers that it is still given
            return
        try:
            self.team()
        except RequestRefused as refused:
            self.refused, self._refused_s = refused, time.monotonic()
            if self.reader is not None:
                self.reader.cancel()  # the stream ends with `refused` after what was read


class Access:
    """Finds the team of a caller, by a teams file that may change at any time."""

    def __init__(
        self,
        file: TeamsFile,
        *,
        service_id: str = "",
        on_refusal: Callable[[str, str], None] = lambda team, reason: None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """on_refusal: called with the team and the reason of every refused call."""
        self._file = file
        self._now = now
        self._on_refusal = on_refusal
        self.service_id = service_id
        self._calls: set[KnownCaller] = set()

    async def watch(self) -> None:
        """Keeps the teams up to date and ends the streams of callers no longer allowed."""
        while True:
            await asyncio.sleep(LOOK_S)
            # In a thread: reading a file on a network may take long.
            await asyncio.to_thread(self._file.look)
            for caller in list(self._calls):
                caller.check()

    def enter(
        self, context: grpc.aio.ServicerContext, rule: Rule | None, method: str
    ) -> KnownCaller:
        """Returns the caller. Raises RequestRefused if it is unknown, or may not make this call."""
        try:
            if rule is None:
                raise RequestRefused(
                    grpc.StatusCode.PERMISSION_DENIED,
                    "SCOPE_MISSING",
                    f"{method} may not be called",
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
        """Returns the team as it is declared now. Raises RequestRefused."""
        now = datetime.fromtimestamp(self._now(), UTC)
        if credential.digest is not None:
            return self._team_of_token(credential.digest, now)
        return self._team_of_certificate(credential, now)

    def _team_of_token(self, digest: bytes, now: datetime) -> Team:
        known = self._file.teams.by_digest.get(digest)
        if known is None:
            raise _unauthenticated("TOKEN_UNKNOWN", "this token was revoked")
        declared, token = known
        if token.expires is not None and now >= token.expires:
            raise _unauthenticated(
                "TOKEN_EXPIRED",
                f"this token of team {declared.team.name} expired at "
                f"{token.expires:%Y-%m-%d %H:%M} UTC",
            )
        return _check_enabled(declared)

    def _team_of_certificate(self, credential: Credential, now: datetime) -> Team:
        if credential.expires is not None and now >= credential.expires:
            raise _unauthenticated(
                "TOKEN_EXPIRED",
                f"this client certificate expired at {credential.expires:%Y-%m-%d %H:%M} UTC",
            )
        for name in credential.names:
            if (declared := self._file.teams.by_certificate.get(name)) is not None:
                return _check_enabled(declared)
        if credential.names:
            raise _unauthenticated(
                "TOKEN_UNKNOWN",
                f"this client certificate ({', '.join(credential.names)[:200]}) belongs to no team "
                "here, and there is no token",
            )
        raise _unauthenticated("TOKEN_MISSING", "this service is shared by teams and needs a token")

    @contextlib.contextmanager
    def watched(self, caller: Caller) -> Iterator[None]:
        """Checks the caller regularly in the meantime, if its permission can end."""
        if not isinstance(caller, KnownCaller):
            yield
            return
        self._calls.add(caller)
        try:
            yield
        finally:
            self._calls.discard(caller)


def _certificate(context: Mapping[str, Iterable[bytes]]) -> Credential:
    """Returns the client certificate, which TLS has verified; without one it is empty."""
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


def _check_enabled(declared: Declared) -> Team:
    if declared.disabled:
        raise RequestRefused(
            grpc.StatusCode.UNAUTHENTICATED,
            "TEAM_DISABLED",
            f"team {declared.team.name} is disabled. The operator can enable it with "
            "teacher-server team disable --undo.",
        )
    return declared.team


def _unauthenticated(reason: str, message: str) -> RequestRefused:
    """Builds the refusal of an unknown caller; it says how to get a token."""
    return RequestRefused(
        grpc.StatusCode.UNAUTHENTICATED,
        reason,
        f"{message}. Ask the operator for a token (teacher-server team add, or rotate) and put it "
        "into the environment variable TEACHER_TOKEN, or give it to connect(token=...).",
    )


def scope_missing(team: Team, scope: str, what: str, *, field: str = "") -> RequestRefused:
    have = ", ".join(sorted(team.scopes)) or "none"
    return RequestRefused(
        grpc.StatusCode.PERMISSION_DENIED,
        "SCOPE_MISSING",
        f'{what} needs the scope "{scope}"; team {team.name} has: {have}. The operator can add it '
        "to the team's scopes in the teams file.",
        field=field,
    )
