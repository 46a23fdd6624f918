"""Removes what callers sent, and the tracebacks that they can cause, from gRPC's own log.

gRPC logs a header that is not UTF-8 in full, a bearer token too, and a traceback for every call that
it fails to handle. Here each kind of line appears once a minute at most, as gRPC's sentence without
its arguments. Failures of our own have an incident number and their traceback in the line before
(errors.py).
"""

import logging
import threading
import time
from typing import Any, cast

LOGGERS = ("grpc._cython.cygrpc", "grpc._common", "grpc._server", "grpc.aio._server")
EVERY_S = 60.0


class _DiscreetLogger(logging.Logger):
    """Strips lines, and logs each kind of them once in EVERY_S.

    It decides before a record is made: making one, with the place that it comes from, took a quarter
    of the interpreter's time under a crowd whose headers were not UTF-8.
    """

    _lock: threading.Lock
    _last_s: dict[str, float]
    _held_back: dict[str, int]

    def _log(self, level: int, msg: object, args: Any, *_: object, **__: object) -> None:
        # With arguments the text is gRPC's; without, a caller's bytes may already be part of it.
        kind = str(msg).split("%")[0] if args else str(msg)[:200].split(":")[0]
        kind = kind.encode("ascii", "replace").decode()[:100].rstrip(" [(")
        now = time.monotonic()
        with self._lock:
            last_s = self._last_s.get(kind)
            if last_s is not None and now - last_s < EVERY_S:
                self._held_back[kind] = self._held_back.get(kind, 0) + 1
                return
            if len(self._last_s) >= 64:
                self._last_s.clear()  # a bound on memory, whatever callers make of the texts
            self._last_s[kind] = now
            before = self._held_back.pop(kind, 0)
        super()._log(level, "gRPC: %s (%d times more before)", (kind, before))


def keep_callers_out_of_the_log() -> None:
    """Strips all of gRPC's loggers that a server writes to; calling it again changes nothing."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if not isinstance(logger, _DiscreetLogger):
            # gRPC holds these objects already, so replacing them by others would change nothing.
            logger.__class__ = _DiscreetLogger
            discreet = cast(_DiscreetLogger, logger)
            discreet._lock, discreet._last_s, discreet._held_back = threading.Lock(), {}, {}
