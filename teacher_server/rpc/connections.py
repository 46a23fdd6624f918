"""The TCP connections to a replica: how many there are, whose they are, and who has to go.

gRPC accepts every connection and tells nobody. So a thread looks regularly at the sockets of this
process, and shuts down those that are too many: first of all those of *strangers*, over which
nobody has come who was let in. What strangers may hold together is bounded in bytes; where it is not
enough the oldest has to go, because whoever comes to work has said who it is within milliseconds.

The event loop writes into the notes of its connections and the thread reads them; each field has one
writer, and a value that is a moment old does no harm.
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
from teacher_server.rpc.gate import Gate

logger = logging.getLogger(__name__)

LOOK_S, LOOK_WHEN_ATTACKED_S = 0.25, 0.03
CALM, HURRIED = 10, 2
"""The thread rests this many times as long as its last look took, at least; and in a hurry."""
TRIM_S = 5.0
"""How often memory of connections that were shut down is given back to the system."""
PIECE = 256
"""Sockets that are looked at in one go; the interpreter is free for others in between."""
PLAIN_NBYTES, TLS_NBYTES = 16 << 10, 64 << 10
"""What a connection without a call costs, about."""
CALL_NBYTES = 8 << 10
STRANGER_NBYTES, STRANGER_NBYTES_PER_S = 96 << 10, 4 << 10
"""What a stranger may send at once, and for how long it takes. To say who it is takes a few KiB, with
TLS too, and a health check 200 bytes; but who sends a message that is too large has sent a whole window
of it (64 KiB) when it is told."""
STEP_NBYTES = 32 << 10
"""Strangers that hold the same number of these are equals."""
STRANGER_CALLS, STRANGER_CALLS_PER_S = 64, 10.0
"""Calls that a stranger may make at once, and for how long it takes; health checks are calls."""
MAX_REFUSALS = 20
"""Calls of a stranger that are refused, until its connection is shut down."""
WHEN_ATTACKED = 1 / 4
"""Of these, what a stranger may do while the gate is narrow; and of what a connection costs without a
call, what it may send at once: a token fits in, and a client's certificate."""
MISBEHAVIOUR = ("calls", "stranger_bytes")
"""Reasons to shut a connection down of which the gate is told."""
GROWTH_NBYTES = 4 << 20
"""Strangers that have sent so much since the last look are looked at again soon."""
MAX_NOTES = 1 << 17
TELL_S = 60.0
FORGET_LOOKS = 4


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What connections to one replica may take."""

    max_connections: int = 16384
    max_per_address: int = 8192
    max_strangers_nbytes: int = 64 << 20
    """Of connections over which nobody was let in yet, all together."""
    max_unread_nbytes: int = 256 << 20
    """Of requests that have not come whole, of all other connections together."""
    max_message_nbytes: int = 16 << 20
    """Of one message, as the transport allows it."""


@dataclass(slots=True, eq=False)
class Note:
    """What the event loop knows of one connection."""

    vouched: bool = False
    """Somebody was let in over it."""
    since_s: float = field(default_factory=time.monotonic)
    begun: int = 0
    """Calls so far."""
    refusals: int = 0
    """Of these, calls that were refused."""
    calls: int = 0
    """Of these, those that are open now."""
    readers: int = 0
    """Of these, calls whose next message is waited for."""
    messages: int = 0
    """That came whole."""
    messages_nbytes: int = 0
    seen: int = 0
    """The number of the look that saw its socket last, or of the one at which it was made."""

    def is_tiresome(self, share: float) -> bool:
        """Whether a stranger makes more calls than it may, which is this share of the usual."""
        age_s = time.monotonic() - self.since_s
        return not self.vouched and (
            self.refusals > MAX_REFUSALS * share
            or self.begun > STRANGER_CALLS * share + STRANGER_CALLS_PER_S * age_s
        )


@dataclass(slots=True, eq=False)
class _Connection:
    """One socket."""

    peer: str
    """As gRPC writes it."""
    address: str
    since_s: float
    nbytes: int = 0
    """Received in all."""
    read_nbytes: int = 0
    """Of them, those that were surely read by somebody."""
    messages: int = 0
    messages_nbytes: int = 0
    """As its note said when `read_nbytes` was set."""
    going: bool = False


class _Listener:
    """A socket that listens at one of the ports."""


class Connections:
    """Watches the connections of this process to `ports`; `start` and `stop`.

    on_shutdown: told the reason whenever a connection is shut down.
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
        self._notes: dict[str, Note] = {}
        self._ports: frozenset[int] = frozenset()
        self._sockets: dict[int, _Connection | _Listener | None] = {}
        """By cookie; None: of no concern here."""
        self._look_number = 0
        self._held_nbytes = 0
        self._wake = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="connections", daemon=True)
        self._told_s = -TELL_S
        self._trimmed_s = -TRIM_S
        self._untold: Counter[str] = Counter()
        self.gate = Gate(clock)
        self.count = 0
        """Connections at the last look."""
        self.strangers = 0
        """Of these, those of strangers."""

    def note(self, peer: str) -> Note:
        """Of the connection whose other end gRPC calls `peer`."""
        note = self._notes.get(peer)
        if note is None:
            if len(self._notes) >= MAX_NOTES:  # where nobody looks, nobody forgets
                self._notes = {name: one for name, one in self._notes.items() if one.calls}
            note = self._notes[peer] = Note(seen=self._look_number)
        return note

    def start(self, ports: Collection[int]) -> None:
        """Begins to look, where the system says which sockets there are."""
        self._ports = frozenset(ports)
        if sockets.FILES.is_dir():
            self._thread.start()
        else:
            logger.warning("connections are not limited here: there is no %s", sockets.FILES)

    def hurry(self) -> None:
        """The next look comes as soon as the thread has rested."""
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
            rest_s = LOOK_WHEN_ATTACKED_S if self.gate.is_narrow else LOOK_S
            self._wake.wait(max(rest_s, CALM * took_s))
            self._wake.clear()
            began = time.monotonic()
            try:
                self.look()
            except Exception:  # whatever it is, the next look may be better than none
                logger.exception("the connections could not be looked at")
            took_s = time.monotonic() - began
            time.sleep(HURRIED * took_s)

    def look(self) -> None:
        """Looks at every socket, and shuts down the connections that have to go."""
        self._look_number += 1
        there: dict[int, tuple[int, _Connection]] = {}
        listeners: list[int] = []
        for number, (file, cookie) in enumerate(sockets.found()):
            if number % PIECE == PIECE - 1:
                time.sleep(0.001)
            if cookie not in self._sockets:
                self._sockets[cookie] = self._examine(file)
            connection = self._sockets[cookie]
            if isinstance(connection, _Listener):
                listeners.append(file)
            elif connection is not None:
                there[cookie] = file, connection
                connection.nbytes = sockets.received_nbytes(file)
                if (note := self._notes.get(connection.peer)) is not None:
                    note.seen = self._look_number
        # A listening or outgoing socket is remembered for as long as it is there, too.
        self._forget(set(there))
        self._judge(there)
        self.gate.adjust(listeners)
        if self._untold and self._clock() - self._trimmed_s > TRIM_S:
            self._trimmed_s = self._clock()
            if (trim := getattr(_libc, "malloc_trim", None)) is not None:
                trim(0)  # what glibc keeps for the next such crowd is of no use to anybody else
        self._tell()

    def _examine(self, file: int) -> "_Connection | _Listener | None":
        """A new socket: is it one of the ports, or a connection to one of them?"""
        own, other = sockets.own_address(file), sockets.other_address(file)
        if own is None or own[1] not in self._ports:
            return None
        if other is None:
            return _Listener() if sockets.is_listening(file) else None
        host, port = other
        return _Connection(peer_name(host, port), host, self._clock())

    def _forget(self, there: set[int]) -> None:
        """Of sockets and notes that are gone."""
        if len(self._sockets) > 2 * len(there) + 256:
            self._sockets = {i: one for i, one in self._sockets.items() if i in there}
        else:
            for cookie in [
                i
                for i, one in self._sockets.items()
                if isinstance(one, _Connection) and i not in there
            ]:
                del self._sockets[cookie]
        oldest = self._look_number - FORGET_LOOKS
        for peer, note in self._notes.copy().items():  # in one step: the event loop adds to it
            if note.seen < oldest and not note.calls:
                self._notes.pop(peer, None)

    def _judge(self, there: dict[int, tuple[int, _Connection]]) -> None:
        limits, now = self._limits, self._clock()
        nobody = Note()
        share, at_once_nbytes = 1.0, float(STRANGER_NBYTES)
        if self.gate.is_narrow:
            share, at_once_nbytes = WHEN_ATTACKED, WHEN_ATTACKED * self._base_nbytes
        strangers: list[tuple[int, _Connection, int]] = []
        known: list[tuple[int, _Connection, int]] = []
        per_address = Counter(connection.address for _, connection in there.values())
        for cookie, (_, connection) in there.items():
            note = self._notes.get(connection.peer, nobody)
            if note.vouched:
                known.append((cookie, connection, _unread_nbytes(connection, note)))
                continue
            allowed = at_once_nbytes + STRANGER_NBYTES_PER_S * (now - connection.since_s)
            allowed += limits.max_message_nbytes if note.readers else 0
            held = self._base_nbytes + note.calls * CALL_NBYTES
            held += _unread_nbytes(connection, note)
            if note.is_tiresome(share):
                self._shut_down(there, cookie, "calls")
            elif connection.nbytes - note.messages_nbytes > allowed:
                self._shut_down(there, cookie, "stranger_bytes")
            else:
                strangers.append((cookie, connection, held))
        self.count = len(there)
        self.strangers = len(strangers)
        held = sum(nbytes for *_, nbytes in strangers)
        if held > self._held_nbytes + GROWTH_NBYTES:
            self.hurry()
        self._held_nbytes = held
        # Those that hold much go first, and of equals the oldest.
        strangers.sort(key=lambda entry: (-(entry[2] // STEP_NBYTES), entry[1].since_s))
        total = len(there)
        for cookie, connection, nbytes in strangers:
            crowded = per_address[connection.address] > limits.max_per_address
            if held <= limits.max_strangers_nbytes and total <= limits.max_connections:
                if not crowded:
                    continue
                reason = "one_address"
            else:
                reason = "strangers"
            self._shut_down(there, cookie, reason)
            held -= nbytes
            total -= 1
            per_address[connection.address] -= 1
        unread = sum(nbytes for *_, nbytes in known)
        known.sort(key=lambda entry: -entry[2])
        for cookie, _, nbytes in known:
            if unread <= limits.max_unread_nbytes:
                break
            self._shut_down(there, cookie, "unfinished_requests")
            unread -= nbytes

    def _shut_down(
        self, there: dict[int, tuple[int, _Connection]], cookie: int, reason: str
    ) -> None:
        """gRPC sees the end of the connection, and forgets all that it had of it."""
        file, connection = there[cookie]
        if connection.going:
            return
        connection.going = True
        if reason in MISBEHAVIOUR:
            self.gate.report(connection.address)
        if sockets.shut_down(file, cookie):
            self._untold[reason] += 1
            self._on_shutdown(reason)

    def _tell(self) -> None:
        now = self._clock()
        if not self._untold or now - self._told_s < TELL_S:
            return
        self._told_s = now
        logger.warning(
            "connections shut down: %s (of %d there are now)",
            ", ".join(f"{count} ({reason})" for reason, count in self._untold.items()),
            self.count,
        )
        self._untold.clear()


def _unread_nbytes(connection: _Connection, note: Note) -> int:
    """What came over a connection and was read by nobody, at most, as far as is known."""
    if note.messages != connection.messages and note.readers <= 1:
        # The only one who reads has just had a whole message: nothing before it is left.
        connection.read_nbytes = connection.nbytes
        connection.messages = note.messages
        connection.messages_nbytes = note.messages_nbytes
    whole = note.messages_nbytes - connection.messages_nbytes
    return max(0, connection.nbytes - connection.read_nbytes - whole)


def peer_name(host: str, port: int) -> str:
    """The other end of a connection, as gRPC writes it."""
    host = host.removeprefix("::ffff:") if "." in host else host
    if ":" not in host:
        return f"ipv4:{host}:{port}"
    return f"ipv6:{quote(f'[{host}]', safe=':')}:{port}"


_libc = ctypes.CDLL(None)
