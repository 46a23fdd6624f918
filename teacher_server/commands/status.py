"""`teacher-server status`: asks every replica of a service how it is doing, and sums up."""

import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from logitstream.connection import Connection
from protos import teacher_pb2
from teacher_server.commands.columns import format_columns
from teacher_server.commands.remote_call import NoAnswer, ask, ask_on, connection_of, report_failure
from teacher_server.config import StatusConfig

REFRESH_S = 2.0
REPLICA_S = 5.0
"""How long one replica may take to answer."""
MAX_ASKED_AT_ONCE = 32
CLEAR = "\x1b[H\x1b[2J"
INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class TeamLine:
    """One team, summed over the replicas that answered; rates and times are of the last minute."""

    team: str
    weight: float
    tokens_in_flight: int
    queued_tokens: int
    tokens_per_second: float
    share: float
    """Its part of the cost dispatched for all teams."""
    entitled: float
    waiting_p95_ms: float
    """The highest of all replicas."""
    rejected: int
    tokens_left_today: int | None
    """None: no quota, or it is unknown."""


@dataclass(frozen=True, slots=True)
class ReplicaNumbers:
    """How busy one replica is; means and rates are of the last minute."""

    streams: int
    queued_tokens: int
    batch_fill: float
    forward_ms: float
    head_ms: float
    encode_ms: float
    tokens_per_second: float
    busy: float
    memory_bytes: int
    device_memory_bytes: int
    fill_ms: float
    launch_ms: float
    wait_ms: float
    copy_ms: float
    compact_ms: float
    texts_running: int
    texts_waiting: int
    written_tokens_per_second: float


@dataclass(frozen=True, slots=True)
class ReplicaLine:
    """One replica that answered."""

    id: str
    address: str
    state: str
    numbers: ReplicaNumbers | None
    """None: the caller lacks the scope admin."""


@dataclass(frozen=True, slots=True)
class Unreachable:
    """A replica that the others know of and that did not answer."""

    id: str
    address: str
    state: str
    why: str


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """A whole service at one moment."""

    service_id: str
    model: str
    admin: bool
    """Whether the caller sees all teams, and the numbers of replicas."""
    teams: list[TeamLine]
    replicas: list[ReplicaLine]
    unreachable: list[Unreachable]


def show_status(config: StatusConfig) -> int:
    """Prints the status of a service, with --watch repeatedly; returns the exit code."""
    try:
        connection = connection_of(config)
        status = look(connection)
        if not config.watch:
            print(json.dumps(asdict(status), indent=2) if config.as_json else table(status))
            return 0
        _watch(connection, status, config)
    except NoAnswer as error:
        return report_failure(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _watch(connection: Connection, status: ServiceStatus, config: StatusConfig) -> None:
    """Prints a status, and a new one every REFRESH_S, for ever."""
    clear = CLEAR if sys.stdout.isatty() and not config.as_json else ""
    while True:
        next_s = time.monotonic() + REFRESH_S
        if config.as_json:
            print(json.dumps(asdict(status)), flush=True)
        else:
            now = time.strftime("%H:%M:%S")
            print(f"{clear}{connection.addresses[0]}  {now}\n\n{table(status)}\n", flush=True)
        while True:
            time.sleep(max(0.0, next_s - time.monotonic()))
            next_s = time.monotonic() + REFRESH_S
            try:
                status = look(connection)
                break
            except NoAnswer as error:  # it may be restarting
                report_failure(error)


def look(connection: Connection) -> ServiceStatus:
    """Asks the service which replicas it has, and each how it is doing. Raises NoAnswer."""
    address = connection.addresses[0]
    # Both calls over one connection reach one replica, also where the others cannot be reached.
    with connection.blocking_channel(address) as channel:
        info = ask_on(
            channel, connection, address, lambda stub: stub.Describe, teacher_pb2.DescribeRequest()
        )
        own = ask_on(
            channel, connection, address, lambda stub: stub.Status, teacher_pb2.StatusRequest()
        )
    others = [card for card in info.replicas if card.id != own.replica.id]
    with ThreadPoolExecutor(min(MAX_ASKED_AT_ONCE, max(1, len(others)))) as pool:
        results = list(pool.map(lambda card: _ask_replica(connection, card), others))
    answers = [own, *(result for result in results if not isinstance(result, Unreachable))]
    unreachable = [result for result in results if isinstance(result, Unreachable)]
    admin = "admin" in info.caller.scopes
    return ServiceStatus(
        service_id=info.service_id,
        model=info.model,
        admin=admin,
        teams=merge_teams(answers),
        replicas=sorted(
            (_replica_line(answer.replica, admin) for answer in answers),
            key=lambda line: line.address,
        ),
        unreachable=unreachable,
    )


def _ask_replica(
    connection: Connection, card: teacher_pb2.Replica
) -> teacher_pb2.StatusResponse | Unreachable:
    try:
        answer = ask(
            connection,
            lambda stub: stub.Status,
            teacher_pb2.StatusRequest(),
            address=card.address,
            timeout_s=REPLICA_S,
        )
    except NoAnswer as error:
        return Unreachable(card.id, card.address, card.state, str(error))
    if answer.replica.id != card.id:
        why = f"{card.address} was answered by another replica ({answer.replica.id})"
        return Unreachable(card.id, card.address, card.state, why)
    return answer


def merge_teams(answers: Sequence[teacher_pb2.StatusResponse]) -> list[TeamLine]:
    """Merges the teams of several replicas, by name.

    Counts are summed and shares averaged by the cost that each replica dispatched; waiting times are
    the highest ones, what is left of a quota the smallest, which is the latest one known.
    """
    total_cost = sum(answer.cost_per_second for answer in answers)
    lines = []
    for name in sorted({team.team for answer in answers for team in answer.teams}):
        costs = _costs(name, answers)
        whole = total_cost or sum(cost for _, cost in costs)
        parts = [(team, cost / whole) for team, cost in costs]
        teams = [team for team, _ in parts]
        left = [t.tokens_left_today for t in teams if t.HasField("tokens_left_today")]
        lines.append(
            TeamLine(
                team=name,
                weight=max(team.weight for team in teams),
                tokens_in_flight=sum(team.tokens_in_flight for team in teams),
                queued_tokens=sum(team.queued_tokens for team in teams),
                tokens_per_second=sum(team.tokens_per_second for team in teams),
                share=sum(team.share * part for team, part in parts),
                entitled=sum(team.entitled * part for team, part in parts),
                waiting_p95_ms=max(team.waiting_p95_ms for team in teams),
                rejected=sum(team.rejected for team in teams),
                tokens_left_today=min(left, default=None),
            )
        )
    return lines


def _costs(
    name: str, answers: Sequence[teacher_pb2.StatusResponse]
) -> list[tuple[teacher_pb2.TeamStatus, float]]:
    """Returns a team's status at each replica, and the cost that the replica dispatched in total.

    Only the scope admin sees that cost. For other callers it is estimated from their own tokens and
    share; replicas at which they did nothing count as the average of the others.
    """
    is_known = any(answer.cost_per_second for answer in answers)
    costs = [
        (team, answer.cost_per_second if is_known else _cost_by_share(team))
        for answer in answers
        for team in answer.teams
        if team.team == name
    ]
    if is_known:
        return costs
    estimates = [cost for _, cost in costs if cost]
    average = sum(estimates) / len(estimates) if estimates else 1.0
    return [(team, cost or average) for team, cost in costs]


def _cost_by_share(team: teacher_pb2.TeamStatus) -> float:
    """Estimates what a replica dispatched for all teams, in tokens like those of this one."""
    return team.tokens_per_second / team.share if team.share else 0.0


def _replica_line(replica: teacher_pb2.ReplicaStatus, admin: bool) -> ReplicaLine:
    numbers = None
    if admin:
        names = ReplicaNumbers.__dataclass_fields__
        numbers = ReplicaNumbers(**{name: getattr(replica, name) for name in names})
    return ReplicaLine(replica.id, replica.address, replica.state, numbers)


def table(status: ServiceStatus) -> str:
    """Formats a status for people."""
    texts = []
    if status.teams:
        header = ("team", "in flight", "tokens/s", "share", "entitled")
        header += ("waiting p95", "rejected", "left today")
        texts.append(format_columns(header, map(_team_cells, status.teams), num_left=1))
    else:
        texts.append("no team did anything in the last minute")
    header = ("replica", "address", "state")
    if status.admin:
        header += ("streams", "queued", "tokens/s", "texts", "written/s", "busy")
        header += ("batch fill",)
        header += ("forward", "head", "encode", "memory", "device")
    texts.append(format_columns(header, map(_replica_cells, status.replicas), num_left=3))
    if status.unreachable:
        lines = (f"not reached: {replica.id}: {replica.why}" for replica in status.unreachable)
        texts.append("\n".join(lines))
    return "\n\n".join(texts)


def _team_cells(team: TeamLine) -> tuple[str, ...]:
    left = team.tokens_left_today
    return (
        team.team,
        f"{team.tokens_in_flight:,}",
        f"{team.tokens_per_second:,.0f}",
        f"{100 * team.share:.0f} %",
        f"{100 * team.entitled:.0f} %",
        f"{team.waiting_p95_ms:,.0f} ms",
        f"{team.rejected:,}",
        "-" if left is None else f"{left:,}",
    )


def _replica_cells(replica: ReplicaLine) -> tuple[str, ...]:
    who = (replica.id, replica.address, replica.state)
    numbers = replica.numbers
    if numbers is None:
        return who
    device = numbers.device_memory_bytes
    return (
        *who,
        f"{numbers.streams:,}",
        f"{numbers.queued_tokens:,}",
        f"{numbers.tokens_per_second:,.0f}",
        f"{numbers.texts_running:,}+{numbers.texts_waiting:,}",
        f"{numbers.written_tokens_per_second:,.0f}",
        f"{100 * numbers.busy:.0f} %",
        f"{100 * numbers.batch_fill:.0f} %",
        f"{numbers.forward_ms:,.1f} ms",
        f"{numbers.head_ms:,.1f} ms",
        f"{numbers.encode_ms:,.1f} ms",
        f"{numbers.memory_bytes / (1 << 30):,.1f} GiB",
        f"{device / (1 << 30):,.1f} GiB" if device else "-",
    )
