"""The command line of `teacher-server`: parse first, then import the rest.

Exit codes: 0 done (also a drained serve), 1 something went wrong, 2 command line or configuration,
130 Ctrl-C in a client.
"""

import logging
import sys
from collections.abc import Sequence

from logitstream.command_line import Group, WrongUsage, parse
from teacher_server.config import (
    CertsConfig,
    DescribeConfig,
    FitIdsConfig,
    ServeConfig,
    StatusConfig,
    TeamAction,
    TeamAdd,
    TeamDisable,
    TeamList,
    TeamRotate,
    UsageConfig,
)

logger = logging.getLogger(__name__)

TEAM = Group(
    "Edit the file that declares who may use a teacher.",
    {"add": TeamAdd, "list": TeamList, "rotate": TeamRotate, "disable": TeamDisable},
)
COMMANDS = Group(
    "Serve a teacher model for knowledge distillation.",
    {
        "serve": ServeConfig,
        "describe": DescribeConfig,
        "fit-ids": FitIdsConfig,
        "status": StatusConfig,
        "usage": UsageConfig,
        "team": TEAM,
        "certs": CertsConfig,
    },
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    try:
        command = parse("teacher-server", COMMANDS, sys.argv[1:] if argv is None else argv)
    except WrongUsage as error:
        for mistake in error.mistakes:
            print(f"teacher-server: {mistake}", file=sys.stderr)
        return 2
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    # Each command imports what it needs: a mistake or a call for help loads nothing that takes seconds.
    if isinstance(command, ServeConfig):
        from teacher_server.commands.serve import serve

        return serve(command)
    if isinstance(command, FitIdsConfig):
        from teacher_server.commands.fit_ids import fit_ids

        return fit_ids(command)
    if isinstance(command, StatusConfig):
        from teacher_server.commands.status import show_status

        return show_status(command)
    if isinstance(command, UsageConfig):
        from teacher_server.commands.usage import show_usage

        return show_usage(command)
    if isinstance(command, TeamAction):
        from teacher_server.commands.team import team

        return team(command)
    if isinstance(command, CertsConfig):
        from teacher_server.commands.certs import make_certificates

        return make_certificates(command)
    from teacher_server.commands.describe import describe

    return describe(command)


if __name__ == "__main__":
    sys.exit(main())
