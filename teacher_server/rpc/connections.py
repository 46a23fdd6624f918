"""Counts the TCP connections to a replica, and shuts down those that go beyond its limits.

gRPC accepts every connection and reports none of them. So a thread regularly inspects the sockets of
this process, and shuts down those that are too many: first those of *strangers*, connections over
which no caller has been let in yet. All strangers together may hold a bounded number of bytes; beyond
that the oldest go first, because a caller that comes to work says who it is within milliseconds.

The event loop writes into the `PeerActivity` of its connections and the thread reads it; each field
has one writer, and a value that is a moment old does no harm.
"""

import ctypes
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from urllib.parse import quote

from teacher_server.rpc import sockets
from teacher_server.rpc.syn_throttle import SynThrottle

logger = logging.getLogger(__name__)

LOOK_S, LOOK_WHEN_ATTACKED_S = 0.25, 0.03
CALM, HURRIED = 10, 2
"""The thread rests at least this many times as long as its last look took; the latter when hurried."""
TRIM_S = 5.0
"""How often memory of connections that were shut down is given back to the system."""
PIECE = 256
"""Sockets that are inspected in one go; the interpreter is free for other threads in between."""
PLAIN_NBYTES, TLS_NBYTES = 16 << 10, 64 << 10
"""What a connection without a call costs, about."""
CALL_NBYTES = 8 << 10
STRANGER_NBYTES, STRANGER_NBYTES_PER_S = 96 << 10, 4 << 10
"""What a stranger may send at once, and per second of its age. To say who it is takes a few KiB, with
TLS too, and a health check 200 bytes; but a caller whose message is too large has already sent a whole
window of it (64 KiB) when it is refused."""
STEP_NBYTES = 32 << 10
"""Strangers that hold the same number of these steps count as equal."""
STRANGER_CALLS, STRANGER_CALLS_PER_S = 64, 10.0
"""Calls that a stranger may make at once, and per second of its age; health checks are calls."""
MAX_REFUSALS = 20
"""Refused calls after which a stranger's connection is shut down."""
WHEN_ATTACKED = 1 / 4
"""The part of these limits that holds while new connections are throttled. What a stranger may send
at once is then this part of the cost of a connection: a token fits in, and a client's certificate."""
MISBEHAVIOUR = ("calls", "stranger_bytes")
"""Reasons to shut a connection down that are reported to the throttle."""
GROWTH_NBYTES = 4 << 20
"""If strangers hold this much more than at the last look, the next look comes soon."""
MAX_ACTIVITIES = 1 << 17
LOG_S = 60.0
FORGET_LOOKS = 4
"""Looks without its socket after which the activity of a connection is forgotten."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What connections to one replica may take."""

    max_connections: int = 16384
    max_per_address: int = 8192
    max_strangers_nbytes: int = 64 << 20
    """Held by all strangers together."""
    max_unread_nbytes: int = 256 << 20
    """Of incomplete requests on all other connections together."""
    max_message_nbytes: int = 16 << 20
    """Of one message, as the transport allows it."""


@dataclass(slots=True, eq=False)
class PeerActivity:
    """What the event loop records about one connection."""

    trusted: bool = False
    """A caller was let in over it; until then it is a stranger's."""
    since_s: float = field(default_factory=time.monotonic)
    calls_begun: int = 0
    """Calls so far."""
    refusals: int = 0
    """Of these, calls that were refused."""
    calls_open: int = 0
    """Of these, calls that have not ended."""
    readers: int = 0
    """Of these, calls that wait for their next message."""
    messages: int = 0
    """Messages that arrived whole."""
    messages_nbytes: int = 0
    """Bytes of these messages."""
    last_look: int = 0
    """Number of the last look that saw its socket, or of the one before it was created."""

    def exceeds_calls(self, share: float) -> bool:
        """Whether it is a stranger's with more calls than this share of the limits allows."""
        age_s = time.monotonic() - self.since_s
        return not self.trusted and (
            self.refusals > MAX_REFUSALS * share
            or self.calls_begun > STRANGER_CALLS * share + STRANGER_CALLS_PER_S * age_s
        )


@dataclass(slots=True, eq=False)
class _Connection:
    """What the thread knows about one socket."""

    peer: str
    """As gRPC writes it."""
    address: str
    since_s: float
    nbytes: int = 0
    """Bytes received in total."""
    read_nbytes: int = 0
    """Of these, bytes that have certainly been read."""
    messages: int = 0
    messages_nbytes: int = 0
    """What its activity said when `read_nbytes` was set."""
    is_shut_down: bool = False


class _Listener:
    """A socket that listens at one of the ports."""


_Open = dict[int, tuple[int, _Connection]]
"""The connections that one look has seen: cookie -> file descriptor and connection."""
_Held = tuple[int, _Connection, int]
"""Cookie, connection, and the bytes that it holds."""


class ConnectionLimiter:
    """Watches the connections of this process to some ports from `start` to `stop`.

    on_shutdown: called with the reason whenever a connection is shut down.
    """

    def __init__(
        self,
        limits: ConnectionLimits,
        *,
        tls: bool = False,
        on_shutdown: Callable[[str], None] = lambda reason: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._base_nbytes = TLS_NBYTES if tls else PLAIN_NBYTES
        self._on_shutdown = on_shutdown
        self._clock = clock
        self._activities: dict[str, PeerActivity] = {}
        """By peer, as gRPC writes it."""
        self._ports: frozenset[int] = frozenset()
        self._sockets: dict[int, _Connection | _Listener | None] = {}
        """By cookie; None: a socket of another kind."""
        self._look_number = 0
        self._held_nbytes = 0
        """Held by strangers at the last look."""
        self._wake = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="connections", daemon=True)
        self._logged_s = -LOG_S
        self._trimmed_s = -TRIM_S
        self._unlogged: Counter[str] = Counter()
        """Connections shut down since the last log line, by reason."""
        self.throttle = SynThrottle(clock)
        self.count = 0
        """Connections at the last look."""
        self.strangers = 0
        """Of these, those of strangers."""

    def activity(self, peer: str) -> PeerActivity:
        """Returns what is recorded about the connection to `peer`, as gRPC writes it."""
        activity = self._activities.get(peer)
        if activity is None:
            if len(self._activities) >= MAX_ACTIVITIES:  # without looks, nothing else forgets any
                self._activities = {p: a for p, a in self._activities.items() if a.calls_open}
            activity = self._activities[peer] = PeerActivity(last_look=self._look_number)
        return activity

    def start(self, ports: Collection[int]) -> None:
        """Begins to watch these ports, on systems that list the sockets of a process."""
        self._ports = frozenset(ports)
        if sockets.FILES.is_dir():
            self._thread.start()
        else:
            logger.warning("connections are not limited here: there is no %s", sockets.FILES)

    def look_soon(self) -> None:
        """Makes the next look come as soon as the thread has rested."""
        self._wake.set()

    def stop(self) -> None:
        """Ends the thread."""
        self._stopped = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        took_s = 0.0
        while not self._stopped:
            rest_s = LOOK_WHEN_ATTACKED_S if self.throttle.is_active else LOOK_S
            # However long looks take, they never cost more than a fraction of the interpreter's time.
            self._wake.wait(max(rest_s, CALM * took_s))
            self._wake.clear()
            began = time.monotonic()
            try:
                self.look()
            except Exception:  # whatever it is, the next look may succeed
                logger.exception("the connections could not be inspected")
            took_s = time.monotonic() - began
            time.sleep(HURRIED * took_s)

    def look(self) -> None:
        """Inspects every socket, and shuts down the connections that go beyond the limits."""
        self._look_number += 1
        connections: _Open = {}
        listeners: list[int] = []
        for number, (file, cookie) in enumerate(sockets.open_sockets()):
            if number % PIECE == PIECE - 1:
                time.sleep(0.001)
            if cookie not in self._sockets:
                self._sockets[cookie] = self._classify(file)
            connection = self._sockets[cookie]
            if isinstance(connection, _Listener):
                listeners.append(file)
            elif connection is not None:
                connections[cookie] = file, connection
                connection.nbytes = sockets.received_nbytes(file)
                if (activity := self._activities.get(connection.peer)) is not None:
                    activity.last_look = self._look_number
        self._forget(set(connections))
        self._enforce_limits(connections)
        self.throttle.adjust(listeners)
        if self._unlogged and self._clock() - self._trimmed_s > TRIM_S:
            self._trimmed_s = self._clock()
            if (trim := getattr(_libc, "malloc_trim", None)) is not None:
                trim(0)  # glibc would keep the memory of such a crowd for the next one
        self._log_shutdowns()

    def _classify(self, file: int) -> _Connection | _Listener | None:
        """Tells whether a new socket is one of the ports, or a connection to one of them."""
        own, other = sockets.own_address(file), sockets.other_address(file)
        if own is None or own[1] not in self._ports:
            return None
        if other is None:
            return _Listener() if sockets.is_listening(file) else None
        host, port = other
        return _Connection(peer_name(host, port), host, self._clock())

    def _forget(self, cookies: set[int]) -> None:
        """Forgets connections that are closed, and activities that no look has seen for a while.

        Other sockets are remembered, so that they are not classified again at every look, until
        they are many.
        """
        if len(self._sockets) > 2 * len(cookies) + 256:
            self._sockets = {i: entry for i, entry in self._sockets.items() if i in cookies}
        else:
            for cookie in [
                i
                for i, entry in self._sockets.items()
                if isinstance(entry, _Connection) and i not in cookies
            ]:
                del self._sockets[cookie]
        oldest = self._look_number - FORGET_LOOKS
        # `copy` is one step of the interpreter: the event loop adds entries meanwhile.
        for peer, activity in self._activities.copy().items():
            if activity.last_look < oldest and not activity.calls_open:
                self._activities.pop(peer, None)

    def _enforce_limits(self, connections: _Open) -> None:
        """Shuts down strangers that misbehave, and then what is too much in total."""
        now, no_activity = self._clock(), PeerActivity()
        share, at_once_nbytes = 1.0, float(STRANGER_NBYTES)
        if self.throttle.is_active:
            share, at_once_nbytes = WHEN_ATTACKED, WHEN_ATTACKED * self._base_nbytes
        strangers: list[_Held] = []
        trusted: list[_Held] = []
        # Counted before any is shut down: those that misbehave count towards their address too.
        per_address = Counter(connection.address for _, connection in connections.values())
        for cookie, (_, connection) in connections.items():
            activity = self._activities.get(connection.peer, no_activity)
            if activity.trusted:
                trusted.append((cookie, connection, _unread_nbytes(connection, activity)))
                continue
            allowed = at_once_nbytes + STRANGER_NBYTES_PER_S * (now - connection.since_s)
            allowed += self._limits.max_message_nbytes if activity.readers else 0
            held = self._base_nbytes + activity.calls_open * CALL_NBYTES
            held += _unread_nbytes(connection, activity)
            if activity.exceeds_calls(share):
                self._shut_down(connections, cookie, "calls")
            elif connection.nbytes - activity.messages_nbytes > allowed:
                self._shut_down(connections, cookie, "stranger_bytes")
            else:
                strangers.append((cookie, connection, held))
        self.count = len(connections)
        self.strangers = len(strangers)
        self._limit_strangers(connections, strangers, per_address)
        self._limit_unread(connections, trusted)

    def _limit_strangers(
        self, connections: _Open, strangers: list[_Held], per_address: Counter[str]
    ) -> None:
        """Shuts down strangers until the rest is within the limits."""
        limits = self._limits
        held = sum(nbytes for *_, nbytes in strangers)
        if held > self._held_nbytes + GROWTH_NBYTES:
            self.look_soon()
        self._held_nbytes = held
        # Those that hold much go first, and of equals the oldest.
        strangers.sort(key=lambda entry: (-(entry[2] // STEP_NBYTES), entry[1].since_s))
        total = len(connections)
        for cookie, connection, nbytes in strangers:
            crowded = per_address[connection.address] > limits.max_per_address
            if held <= limits.max_strangers_nbytes and total <= limits.max_connections:
                if not crowded:
                    continue
                reason = "one_address"
            else:
                reason = "strangers"
            self._shut_down(connections, cookie, reason)
            held -= nbytes
            total -= 1
            per_address[connection.address] -= 1

    def _limit_unread(self, connections: _Open, trusted: list[_Held]) -> None:
        """Shuts down the connections with most unread bytes until the rest is within the limit."""
        unread = sum(nbytes for *_, nbytes in trusted)
        trusted.sort(key=lambda entry: -entry[2])
        for cookie, _, nbytes in trusted:
            if unread <= self._limits.max_unread_nbytes:
                break
            self._shut_down(connections, cookie, "unfinished_requests")
            unread -= nbytes

    def _shut_down(self, connections: _Open, cookie: int, reason: str) -> None:
        """Ends a connection, whereupon gRPC drops all that it holds for it."""
        file, connection = connections[cookie]
        if connection.is_shut_down:
            return  # gRPC has not closed its socket yet; it counts once
        connection.is_shut_down = True
        if reason in MISBEHAVIOUR:
            self.throttle.report(connection.address)
        if sockets.shut_down(file, cookie):
            self._unlogged[reason] += 1
            self._on_shutdown(reason)

    def _log_shutdowns(self) -> None:
        now = self._clock()
        if not self._unlogged or now - self._logged_s < LOG_S:
            return
        self._logged_s = now
        logger.warning(
            "connections shut down: %s (of %d there are now)",
            ", ".join(f"{count} ({reason})" for reason, count in self._unlogged.items()),
            self.count,
        )
        self._unlogged.clear()


def _unread_nbytes(connection: _Connection, activity: PeerActivity) -> int:
    """Returns the most bytes that may have arrived over a connection without being read."""
    if activity.messages != connection.messages and activity.readers <= 1:
        # The only reader has just received a whole message: nothing before it is left.
        connection.read_nbytes = connection.nbytes
        connection.messages = activity.messages
        connection.messages_nbytes = activity.messages_nbytes
    whole = activity.messages_nbytes - connection.messages_nbytes
    return max(0, connection.nbytes - connection.read_nbytes - whole)


def peer_name(host: str, port: int) -> str:
    """Returns the other end of a connection as gRPC writes it."""
    host = host.removeprefix("::ffff:") if "." in host else host
    if ":" not in host:
        return f"ipv4:{host}:{port}"
    return f"ipv6:{quote(f'[{host}]', safe=':')}:{port}"


_libc = ctypes.CDLL(None)
