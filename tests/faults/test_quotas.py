"""A team that wants more than it may have (row 18 of the faults)."""

import threading
import time
from pathlib import Path

import grpc
import torch

from logitstream.connection import Connection
from protos import teacher_pb2, teacher_pb2_grpc
from student_trainer import connect
from tests.support.fleet import Fleet, wait_until
from tests.support.teams import add_team, make_certs

STREAMS, REQUESTS = 20, 10
TOKENS = 32


def hinted() -> None:
    """Runs in the service: a trainer looks again after half a second; a minute otherwise."""
    from teacher_server.ledger import quota

    quota.HINT_S = 0.5


def ask(connection: Connection, address: str, received: list[teacher_pb2.ScoreResponse]) -> None:
    """One stream that asks for everything at once, with ids like those of all the others."""
    requests = [
        teacher_pb2.ScoreRequest(
            request_id=number,
            token_ids=torch.arange(TOKENS, dtype=torch.int32).numpy().tobytes(),
            lengths=[TOKENS],
            targets=teacher_pb2.TargetSpec(top_k=teacher_pb2.TopK(k=2, bits=8)),
        )
        for number in range(REQUESTS)
    ]
    own = [("grpc.use_local_subchannel_pool", 1)]
    with connection.blocking_channel(address, own) as channel:
        stub = teacher_pb2_grpc.TeacherStub(channel)
        received.extend(stub.Score(iter(requests), metadata=connection.metadata))


def test_a_quota_that_twenty_streams_exhaust_at_once_and_the_trainer_that_waits(
    serve, folder, tmp_path: Path
):
    teams, quota = tmp_path / "teams.toml", 50 * TOKENS + 7
    operator = add_team(teams, "operator", "--scopes", "admin")
    token = add_team(teams, "search")
    limits = f"limits = {{ max_tokens_per_day = {quota} }}\n"
    teams.write_text(teams.read_text() + limits)
    flags = ("--teams", str(teams), "--ledger", str(tmp_path / "ledger"), *make_certs(tmp_path))
    ca = tmp_path / "ca.pem"
    with Fleet(serve, folder, flags=flags, hook=hinted, token=operator, ca=ca) as fleet:
        fleet.wait_known()
        search = Connection.to(fleet.addresses, token=token, ca=ca)
        received: list[teacher_pb2.ScoreResponse] = []
        threads = [
            threading.Thread(target=ask, args=(search, fleet.addresses[i % 2], received))
            for i in range(STREAMS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        refused = [one.error for one in received if one.HasField("error")]
        parts = [one.part for one in received if one.HasField("part")]
        assert len(refused) + len(parts) == STREAMS * REQUESTS
        for error in refused:
            assert error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
            assert error.reason == "QUOTA_USED_UP"
            assert error.retry_after_ms > 0
        (row,) = fleet.usage()
        assert quota - 15 * TOKENS < row.tokens <= quota  # what one had leased, the other had not
        assert row.tokens == len(parts) * TOKENS
        assert row.delivered_rows == len(parts) * (TOKENS - 1)  # although all have the same ids
        assert row.rejected == len(refused)

        with connect(fleet.addresses, token=token, ca=ca) as teacher:
            pairs = teacher.stream([torch.arange(TOKENS)] * 100, ahead=30)
            rows: list[int] = []
            trainer = threading.Thread(target=lambda: rows.extend(t.num_rows for _, t in pairs))
            trainer.start()
            wait_until(lambda: fleet.usage()[0].rejected > len(refused) + 30, "it is refused")
            assert len(rows) < 30
            # The operator raises the quota; a rate is left, at which the rest takes a second more.
            more = f"max_tokens_per_day = {1 << 20}, max_tokens_per_second = {40 * TOKENS}"
            teams.write_text(teams.read_text().replace(limits, f"limits = {{ {more} }}\n"))
            began = time.monotonic()
            trainer.join(60)
            assert rows == [TOKENS - 1] * 100
            assert time.monotonic() - began > 0.5
        (row,) = fleet.usage()
        assert row.tokens == (len(parts) + 100) * TOKENS
        assert row.delivered_rows == (len(parts) + 100) * (TOKENS - 1)
        fleet.assert_nothing_left()
