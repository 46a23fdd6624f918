"""Who calls: every RPC finds its caller here."""

from contextvars import ContextVar

from teacher_server.teams import DEFAULT_TEAM, Team


class Caller:
    """Whoever makes one call; asked again for each request of a stream."""

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
