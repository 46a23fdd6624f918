"""The command line of `student-trainer`: parses first, then imports what the command needs.

Exit codes: 0 done, 1 something went wrong, 2 command line or configuration, 130 Ctrl-C.
"""

import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from logitstream.command_line import Group, WrongUsage, parse
from logitstream.logs import log_to_stderr
from student_trainer.check_config import CheckConfig
from student_trainer.config import RecordConfig, ReportConfig, TrainConfig
from student_trainer.generate_config import GenerateConfig

COMMANDS = Group(
    "Train students on a served teacher's distributions.",
    {
        "train": TrainConfig,
        "report": ReportConfig,
        "record": RecordConfig,
        "generate": GenerateConfig,
        "check": CheckConfig,
    },
    files_of={"record": "train"},
)
RUNNERS = {
    TrainConfig: "train.run_train",
    ReportConfig: "report.run_report",
    RecordConfig: "record.run_record",
    GenerateConfig: "generate.run_generate",
    CheckConfig: "check.run_check",
}
"""Modules and functions in `commands` that run a command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    # Of several processes that torchrun or accelerate launch started, all but the first say so.
    rank, count = (int(os.environ.get(key, "0")) for key in ("RANK", "WORLD_SIZE"))
    name = f"student-trainer: process {rank} of {count}" if rank else "student-trainer"
    try:
        config = parse("student-trainer", COMMANDS, sys.argv[1:] if argv is None else argv)
    except WrongUsage as error:
        for mistake in error.mistakes:
            print(f"{name}: {mistake}", file=sys.stderr)
        return 2
    if rank:
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
    log_above_bars(config)
    if rank:
        logging.getLogger().setLevel(logging.WARNING)
    from student_trainer.errors import FailedElsewhere, TeacherError, TrainingFailed

    try:
        module, _, function = RUNNERS[type(config)].partition(".")
        return getattr(import_module(f"student_trainer.commands.{module}"), function)(config)
    except KeyboardInterrupt:
        if not rank:
            print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except FailedElsewhere:
        return 1
    except (TeacherError, TrainingFailed, OSError, ValueError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1


def log_above_bars(config: object = None) -> None:
    """Logs to stderr, with each message on a line of its own while a progress bar is shown."""
    from tqdm import tqdm

    class AboveBars(logging.StreamHandler):
        def emit(self, record: logging.LogRecord) -> None:
            with tqdm.external_write_mode(file=self.stream):
                super().emit(record)

    log_to_stderr(config, AboveBars(sys.stderr))


if __name__ == "__main__":
    sys.exit(main())
