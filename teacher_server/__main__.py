"""The command `teacher-server`, which `python -m teacher_server` is too."""

import sys
from collections.abc import Sequence

from logitstream.extras import run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; a missing extra is one line. Returns the exit code."""
    return run("teacher-server", "teacher_server.cli", "server", argv)


if __name__ == "__main__":
    sys.exit(main())
