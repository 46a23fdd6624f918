"""Throttles new connections from addresses whose strangers misbehave, for as long as they do.

A client that was shut down can connect again at once, and a new connection may begin many calls before
the next look at it. So the kernel drops a part of the SYN segments from such addresses, before they
cost this process anything. The other system sends them again after 1, 2, 4... s: an honest client at
such an address connects late, and clients at other addresses notice nothing. Established connections
are left alone.

A classic BPF program on the listening sockets drops them, which needs no privileges; Linux only.
"""

import ipaddress
import logging
import struct
import time
from collections.abc import Callable, Iterable

from teacher_server.rpc import sockets

logger = logging.getLogger(__name__)

SMALLEST_SHARE = 0.2
"""The least share of new connections that is accepted: with less, honest ones come too late."""
ADJUST_S = 0.25
ATTACK, TOLERATED = 4, 8
"""Strangers shut down within `ADJUST_S` from which throttling begins, and becomes stronger."""
FASTER, SLOWER = 0.5, 1.19
"""Factors of the share every `ADJUST_S`: it falls in one second, and recovers in two to three."""
FORGET_S = 30.0
"""How long an address is remembered after its last stranger was shut down."""
MAX_ADDRESSES = 32
"""If more misbehave, all addresses are throttled."""
LOG_S = 60.0

INSTRUCTION = struct.Struct("HBBI")
"""Of classic BPF (linux/filter.h): code, jumps if true and if false, constant."""
LOAD_BYTE, LOAD_WORD, AND, RETURN = 0x30, 0x20, 0x54, 0x06
IF_EQUAL, IF_AT_LEAST = 0x15, 0x35
NETWORK_HEADER, RANDOM = 0xFFF00000, 0xFFFFF000 + 56
"""Offsets with a meaning of their own (SKF_NET_OFF, SKF_AD_OFF + SKF_AD_RANDOM)."""
DROP, KEEP = (RETURN, 0, 0, 0), (RETURN, 0, 0, 0xFFFFFFFF)
IS_REQUEST = ((LOAD_BYTE, 0, 0, 13), (AND, 0, 0, 0x12), (IF_EQUAL, 1, 0, 0x02), KEEP)
"""Keeps all segments except those with SYN and without ACK; 13 is where TCP has its flags."""


class SynThrottle:
    """Decides which share of new connections from misbehaving addresses is accepted.

    `report` every shutdown for misbehaviour and call `adjust` regularly, both from one thread.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._reported = 0
        self._seen_s: dict[str, float] = {}
        """When each address was reported last."""
        self._adjusted_s = self._logged_s = -LOG_S
        self.share = 1.0
        """Of new connections from such addresses that is accepted."""

    @property
    def is_active(self) -> bool:
        """Whether a new connection may have to wait."""
        return self.share < 1.0

    def report(self, address: str) -> None:
        """Counts a stranger at this address that was shut down for misbehaviour."""
        self._reported += 1
        self._seen_s[address] = self._clock()

    def adjust(self, listeners: Iterable[int]) -> None:
        """Changes the share, and the filter of these listening sockets, given by file descriptor."""
        now = self._clock()
        if now - self._adjusted_s < ADJUST_S:
            return
        self._adjusted_s = now
        was_active = self.is_active
        too_many = self._reported >= (TOLERATED if was_active else ATTACK)
        self.share = (
            max(SMALLEST_SHARE, self.share * FASTER) if too_many else min(1.0, self.share * SLOWER)
        )
        self._reported = 0
        self._seen_s = {a: seen_s for a, seen_s in self._seen_s.items() if now - seen_s < FORGET_S}
        if self.is_active:
            program = filter_program(self.share, self._seen_s)
            # Every time: a port that was reopened has a new socket, and the share has changed.
            for file in listeners:
                sockets.attach_filter(file, program)
        elif was_active:
            for file in listeners:
                sockets.detach_filter(file)
        if too_many and now - self._logged_s > LOG_S:
            self._logged_s = now
            logger.warning(
                "strangers at %s misbehave: fewer new connections from there are let in for a while",
                ", ".join(list(self._seen_s)[:4]) + ("..." if len(self._seen_s) > 4 else ""),
            )


def filter_program(share: float, addresses: Iterable[str]) -> bytes:
    """Returns a program that drops SYN segments from these addresses, except this share of them."""
    known = {_as_sent(address) for address in addresses}
    program = [*IS_REQUEST, (LOAD_WORD, 0, 0, RANDOM)]
    program += [(IF_AT_LEAST, 1, 0, int(share * 2**32)), KEEP]
    if len(known) > MAX_ADDRESSES:
        return b"".join(INSTRUCTION.pack(*line) for line in (*program, DROP))
    fours = sorted(address.packed for address in known if address.version == 4)
    sixes = sorted(address.packed for address in known if address.version == 6)
    for_four = [(LOAD_WORD, 0, 0, NETWORK_HEADER + 12)]
    for packed in fours:
        for_four += [(IF_EQUAL, 0, 1, int.from_bytes(packed, "big")), DROP]
    for_four.append(KEEP)
    for_six = []
    for packed in sixes:
        for word in range(4):
            constant = int.from_bytes(packed[4 * word : 4 * word + 4], "big")
            for_six.append((LOAD_WORD, 0, 0, NETWORK_HEADER + 8 + 4 * word))
            for_six.append((IF_EQUAL, 0, 2 * (3 - word) + 1, constant))
        for_six.append(DROP)
    for_six.append(KEEP)
    program += [(LOAD_BYTE, 0, 0, NETWORK_HEADER), (AND, 0, 0, 0xF0)]
    program += [(IF_EQUAL, 0, len(for_four), 0x40), *for_four, *for_six]
    return b"".join(INSTRUCTION.pack(*line) for line in program)


def _as_sent(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Returns the address in a caller's segments: IPv6 sockets write ::ffff:192.0.2.1 for IPv4."""
    parsed = ipaddress.ip_address(address)
    return getattr(parsed, "ipv4_mapped", None) or parsed
