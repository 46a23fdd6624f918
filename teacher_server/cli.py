"""The command line of `teacher-server`: parses first, then imports what the command needs.

Exit codes: 0 done (also a drained serve), 1 something went wrong, 2 command line or configuration,
130 Ctrl-C in a client.
"""

import sys
from collections.abc import Sequence
from importlib import import_module

from logitstream.command_line import Group, WrongUsage, parse
from logitstream.logs import log_to_stderr
from teacher_server.compare_config import CompareConfig
from teacher_server.config import (
    CertsConfig,
    DescribeConfig,
    FitIdsConfig,
    ServeConfig,
    StatusConfig,
    TeamAdd,
    TeamDisable,
    TeamList,
    TeamRotate,
    UsageConfig,
)
from teacher_server.plan_config import PlanConfig

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
        "compare": CompareConfig,
        "plan": PlanConfig,
        "status": StatusConfig,
        "usage": UsageConfig,
        "team": TEAM,
        "certs": CertsConfig,
    },
)
RUNNERS = {
    ServeConfig: "serve.serve",
    DescribeConfig: "describe.describe",
    FitIdsConfig: "fit_ids.fit_ids",
    CompareConfig: "compare.run_compare",
    PlanConfig: "plan.plan",
    StatusConfig: "status.show_status",
    UsageConfig: "usage.show_usage",
    **dict.fromkeys((TeamAdd, TeamList, TeamRotate, TeamDisable), "team.team"),
    CertsConfig: "certs.make_certificates",
}
"""Modules and functions in `commands` that run a command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    try:
        config = parse("teacher-server", COMMANDS, sys.argv[1:] if argv is None else argv)
    except WrongUsage as error:
        for mistake in error.mistakes:
            print(f"teacher-server: {mistake}", file=sys.stderr)
        return 2
    log_to_stderr(config)
    module, _, function = RUNNERS[type(config)].partition(".")
    return getattr(import_module(f"teacher_server.commands.{module}"), function)(config)


if __name__ == "__main__":
    sys.exit(main())
