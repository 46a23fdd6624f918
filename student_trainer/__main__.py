"""The command `student-trainer`, which `python -m student_trainer` is too."""

import sys
from collections.abc import Sequence

from logitstream.extras import run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; a missing extra is one line. Returns the exit code."""
    return run("student-trainer", "student_trainer.cli", "train", argv)


if __name__ == "__main__":
    sys.exit(main())
