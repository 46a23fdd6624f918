"""What gRPC logs by itself, without what callers sent and without tracebacks that they can cause.

gRPC logs a header that is not UTF-8 in full, a bearer token too, and a traceback for whatever a call
makes it stumble over. Here each kind of line comes once a minute, as a sentence of gRPC's with its
arguments left out. Failures of our own have an incident number and their traceback in the line
before (errors.py).
"""

import logging
import threading
import time

LOGGERS = ("grpc._cython.cygrpc", "grpc._common", "grpc._server", "grpc.aio._server")
EVERY_S = 60.0


class _Discreet(logging.Filter):
    """Strips records, and lets each kind of them through once in a while."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._last_s: dict[str, float] = {}
        self._held_back: dict[str, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        # With arguments the text is gRPC's; without, it may have been put together from anything.
        kind = str(record.msg).split("%")[0] if record.args else str(record.msg).split(":")[0]
        kind = kind.encode("ascii", "replace").decode()[:100].rstrip(" [(")
        now = time.monotonic()
        with self._lock:
            last_s = self._last_s.get(kind)
            if last_s is not None and now - last_s < EVERY_S:
                self._held_back[kind] = self._held_back.get(kind, 0) + 1
                return False
            if len(self._last_s) >= 64:
                self._last_s.clear()
            self._last_s[kind] = now
            before = self._held_back.pop(kind, 0)
        record.msg, record.args = "gRPC: %s (%d times more before)", (kind, before)
        record.exc_info = record.exc_text = record.stack_info = None
        return True


def keep_callers_out_of_the_log() -> None:
    """Does so for all of gRPC's loggers that a server writes to; calling it again changes nothing."""
    for name in LOGGERS:
        of_grpc = logging.getLogger(name)
        if not any(isinstance(one, _Discreet) for one in of_grpc.filters):
            of_grpc.addFilter(_Discreet())
