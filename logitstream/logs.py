"""Sets up logging for both programs, and says errors in one line.

Logs are lines for people, or JSON for a log collector.
"""

import json
import logging
import sys
import time
from typing import Literal

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["text", "json"]


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON: `time` (UTC), `level`, `logger`, `message`, `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line, without its end."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


def log_to_stderr(
    options: object = None, handler: logging.Handler | None = None, *, name: str | None = None
) -> None:
    """Sends the messages of the logger `name` to stderr only; None: those of all loggers.

    All loggers: unless logging is set up already, as in a program that imports this one.

    options: a configuration whose `log_level` and `log_format` are used, if it has them.
    handler: writes the messages; by default lines to stderr.
    """
    handler = handler or logging.StreamHandler(sys.stderr)
    is_json = getattr(options, "log_format", "text") == "json"
    handler.setFormatter(
        JsonFormatter() if is_json else logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    )
    level = getattr(options, "log_level", "info").upper()
    if name is None:
        logging.basicConfig(level=level, handlers=[handler])  # leaves a host program's setup alone
        return
    logger = logging.getLogger(name)
    logger.handlers = [handler]
    logger.setLevel(level)
    logger.propagate = False


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text, or its type if it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
