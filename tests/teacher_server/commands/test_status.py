from protos.teacher_pb2 import ReplicaStatus, StatusResponse, TeamStatus
from teacher_server.commands.status import ServiceStatus, TeamLine, Unreachable, merge_teams, table


def test_counts_are_summed_shares_averaged_by_cost_and_the_worst_wait_counts() -> None:
    answers = [
        StatusResponse(
            cost_per_second=300,
            teams=[
                TeamStatus(
                    team="a",
                    weight=3,
                    tokens_in_flight=10,
                    queued_tokens=4,
                    tokens_per_second=100,
                    share=1.0,
                    entitled=0.75,
                    waiting_p95_ms=5,
                    rejected=1,
                    tokens_left_today=90,
                )
            ],
        ),
        StatusResponse(
            cost_per_second=100,
            teams=[
                TeamStatus(
                    team="a",
                    weight=3,
                    tokens_in_flight=1,
                    tokens_per_second=10,
                    share=0.2,
                    entitled=0.6,
                    waiting_p95_ms=50,
                    rejected=2,
                    tokens_left_today=80,
                ),
                TeamStatus(team="b", weight=1, share=0.8, entitled=0.4),
            ],
        ),
    ]
    a, b = merge_teams(answers)
    assert (a.tokens_in_flight, a.queued_tokens, a.tokens_per_second) == (11, 4, 110)
    assert (a.share, b.share) == (0.75 * 1.0 + 0.25 * 0.2, 0.25 * 0.8)
    assert (a.entitled, b.entitled) == (0.75 * 0.75 + 0.25 * 0.6, 0.25 * 0.4)
    assert (a.waiting_p95_ms, a.rejected, a.tokens_left_today) == (50, 3, 80)
    assert b.tokens_left_today is None


def test_shares_of_a_caller_that_is_told_no_cost_are_averaged_by_its_own_tokens() -> None:
    answers = [
        StatusResponse(teams=[TeamStatus(team="a", tokens_per_second=60, share=0.2, entitled=0.5)]),
        StatusResponse(teams=[TeamStatus(team="a", tokens_per_second=90, share=0.9, entitled=0.9)]),
    ]
    (line,) = merge_teams(answers)
    # 60 of 300 tokens at one replica, 90 of 100 at the other.
    assert abs(line.share - 150 / 400) < 1e-12
    assert abs(line.entitled - (0.5 * 300 + 0.9 * 100) / 400) < 1e-12
    (line,) = merge_teams([*answers, StatusResponse(teams=[TeamStatus(team="a")])])
    assert abs(line.share - 150 / 600) < 1e-12, "200 at one where it did nothing"


def test_a_service_without_any_work_has_no_shares() -> None:
    (line,) = merge_teams([StatusResponse(replica=ReplicaStatus(id="r"), teams=[{"team": "a"}])])
    assert (line.share, line.entitled) == (0.0, 0.0)


def test_the_table_is_aligned() -> None:
    line = TeamLine("search", 3.0, 32768, 0, 29_800.0, 0.74, 0.75, 12.3, 0, None)
    away = Unreachable("r2", "host:2", "ready", "no answer from host:2")
    text = table(ServiceStatus("id", "model", False, [line], [], [away]))
    assert text.splitlines() == [
        "team    in flight  tokens/s  share  entitled  waiting p95  rejected  left today",
        "search     32,768    29,800   74 %      75 %        12 ms         0           -",
        "",
        "replica  address  state",
        "",
        "not reached: r2: no answer from host:2",
    ]
