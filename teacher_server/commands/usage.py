"""Shows what teams have used (`teacher-server usage`), from a service or its ledger's file."""

import csv
import json
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path

from protos import teacher_pb2
from teacher_server.commands.columns import format_columns
from teacher_server.commands.remote_call import NoAnswer, ask, connection_of, report_failure
from teacher_server.config import UsageConfig
from teacher_server.ledger.directory import FILE_NAME, read_usage
from teacher_server.rpc.messages import first_day, usage_row

COLUMNS = (
    *("day", "team", "sequences", "tokens"),
    *("delivered_rows", "delivered_bytes", "rejected"),
)


def show_usage(config: UsageConfig) -> int:
    """Prints usage as a table, CSV or JSON; returns the exit code."""
    try:
        since = first_day(config.since)
    except ValueError as error:
        mistake = str(error).rstrip(".")
        print(f"teacher-server: --{mistake}; see teacher-server usage --help", file=sys.stderr)
        return 2
    try:
        if config.ledger is not None:
            rows = _from_file(config.ledger, config.team, since)
        else:
            request = teacher_pb2.UsageRequest(team=config.team, since=config.since)
            rows = ask(connection_of(config), lambda stub: stub.Usage, request).rows
    except NoAnswer as error:
        return report_failure(error)
    except (OSError, ValueError, sqlite3.Error) as error:
        print(f"teacher-server: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    lines = [[getattr(row, name) for name in COLUMNS] for row in rows]
    if config.as_json:
        print(json.dumps([dict(zip(COLUMNS, line, strict=True)) for line in lines], indent=2))
    elif config.as_csv:
        csv.writer(sys.stdout, lineterminator="\n").writerows([COLUMNS, *lines])
    else:
        cells = ([f"{one:,}" if isinstance(one, int) else one for one in line] for line in lines)
        print(format_columns(COLUMNS, cells, num_left=2))
        if not lines:
            print("nothing was used")
    return 0


def _from_file(folder: Path, team: str, since: int) -> Sequence[teacher_pb2.UsageRow]:
    path = folder / FILE_NAME
    if not path.is_file():
        raise ValueError(f"there is no ledger in {folder} ({FILE_NAME})")
    return [usage_row(row) for row in read_usage(path, team or None, since)]
