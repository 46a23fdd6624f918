"""Builds the messages that the service sends."""

import datetime
from collections.abc import Mapping

import grpc
from torch import Tensor

from logit_codec import CodecError
from protos import teacher_pb2
from teacher_server.errors import RequestRefused, incident, request_error
from teacher_server.ledger.lease import UsageRow
from teacher_server.monitoring.team_stats import TeamSnapshot
from teacher_server.pipeline import SequenceJob, WrittenPart
from teacher_server.teams.declaration import Team

EPOCH = datetime.date(1970, 1, 1)


def timing_message(job: SequenceJob) -> teacher_pb2.Timing:
    """Reports how long a scored job waited and computed; each part adds what encoding took."""
    forward_pass = job.forward_pass
    assert forward_pass is not None
    return teacher_pb2.Timing(
        queue_us=int(1e6 * job.waited_s),
        batch_sequences=forward_pass.num_sequences,
        batch_tokens=forward_pass.num_tokens,
        **_stage_fields(forward_pass.times.by_stage()),
    )


def text_timing(part: WrittenPart) -> teacher_pb2.Timing:
    """Reports how long a text waited for its first token, and what its last step took."""
    flush = part.flush
    return teacher_pb2.Timing(
        queue_us=int(1e6 * flush.waited_s),
        encode_us=int(1e6 * part.encode_s),
        compact_us=int(1e6 * part.compact_s),
        batch_sequences=flush.step_texts,
        batch_tokens=flush.step_texts,
        **_stage_fields(flush.times.by_stage()),
    )


def _stage_fields(seconds_of: Mapping[str, float]) -> dict[str, int]:
    return {f"{stage}_us": int(1e6 * seconds) for stage, seconds in seconds_of.items()}


def error_message(
    error: Exception, *, sequence: int | None = None, rows: Tensor | None = None
) -> teacher_pb2.RequestError:
    """Reports an error to the client, without a path, a pid or a traceback.

    sequence, rows: of the sequence at fault; a row of its targets is reported as a row of it.
    """
    if isinstance(error, CodecError):
        row = None
        if error.row is not None and rows is not None:
            row = int(rows[error.row])
        error = RequestRefused(
            grpc.StatusCode.DATA_LOSS,
            "BAD_ROW",
            f"the teacher's output for sequence {sequence} is not a distribution at row {row} "
            f"({error}). It was not sent; send the request again, and check the teacher if this "
            "happens again.",
            sequence=sequence,
            row=row,
        )
    if not isinstance(error, RequestRefused):
        error = incident(error)
    message = request_error(error)
    if error.sequence is None and sequence is not None:
        message.sequence = sequence
    return message


def select_usage(team: Team, name: str) -> str | None:
    """Returns the team whose usage the caller may read, or None for all. Raises RequestRefused."""
    if "admin" in team.scopes:
        return name or None
    if name not in ("", team.name):
        raise RequestRefused(
            grpc.StatusCode.PERMISSION_DENIED,
            "SCOPE_MISSING",
            f'team "{team.name}" may see its own usage; that of others needs the scope admin.',
            field="team",
        )
    return team.name


def caller_message(team: Team) -> teacher_pb2.Caller:
    """Describes the caller's team to the caller."""
    limits = team.limits
    return teacher_pb2.Caller(
        team=team.name,
        weight=team.weight,
        scopes=sorted(team.scopes),
        max_tokens_in_flight=limits.max_tokens_in_flight or 0,
        max_tokens_per_second=limits.max_tokens_per_second or 0,
        max_tokens_per_day=limits.max_tokens_per_day or 0,
        max_request_tokens=limits.max_request_tokens or 0,
    )


def team_status(
    standing: TeamSnapshot, team: Team, tokens_left_today: int | None
) -> teacher_pb2.TeamStatus:
    """Reports how this replica serves a team."""
    return teacher_pb2.TeamStatus(
        team=team.name,
        weight=team.weight,
        tokens_in_flight=standing.tokens_in_flight,
        queued_tokens=standing.queued_tokens,
        tokens_per_second=standing.tokens_per_s,
        share=standing.share,
        entitled=standing.entitled,
        waiting_p95_ms=1e3 * standing.waiting_p95_s,
        rejected=standing.rejected,
        tokens_left_today=tokens_left_today,
    )


def usage_row(row: UsageRow) -> teacher_pb2.UsageRow:
    """Builds the message of a row of the ledger."""
    return teacher_pb2.UsageRow(
        day=(EPOCH + datetime.timedelta(days=row.day)).isoformat(),
        team=row.team,
        sequences=row.sequences,
        tokens=row.tokens,
        delivered_rows=row.delivered_rows,
        delivered_bytes=row.delivered_bytes,
        rejected=row.rejected,
    )


def first_day(since: str) -> int:
    """Parses a date, or takes today's (UTC), as days since 1970-01-01. Raises ValueError."""
    try:
        first = (
            datetime.date.fromisoformat(since)
            if since
            else datetime.datetime.now(datetime.UTC).date()
        )
    except ValueError:
        raise ValueError(f'since is a day such as "2027-01-31", got "{since[:40]}".') from None
    return (first - EPOCH).days
