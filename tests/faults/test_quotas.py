"""A team that wants more than it may have (row 18 of the faults)."""

import json
import threading
import time
from functools import partial
from pathlib import Path

import grpc
import torch

from protos import teacher_pb2, teacher_pb2_grpc
from student_trainer import connect
from tests.faults.fleet import Fleet, wait_until

STREAMS, REQUESTS = 20, 10
TOKENS = 32


def limited(path: Path) -> None:
    """Runs in the service: everybody's limits are those in this file, as it is now."""
    from teacher_server import access, accounts, teams

    def team(self: access.Caller) -> teams.Team:
        limits = teams.TeamLimits(**json.loads(path.read_text()))
        return teams.Team("search", scopes=frozenset(teams.SCOPES), limits=limits)

    access.Caller.team = team
    accounts.HINT_S = 0.5  # a trainer looks again after a minute otherwise


def ask(address: str, received: list[teacher_pb2.ScoreResponse]) -> None:
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
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        received.extend(teacher_pb2_grpc.TeacherStub(channel).Score(iter(requests)))


def test_a_quota_that_twenty_streams_exhaust_at_once_and_the_trainer_that_waits(
    serve, folder, tmp_path: Path
):
    limits = tmp_path / "limits.json"
    quota = 50 * TOKENS + 7
    limits.write_text(json.dumps({"max_tokens_per_day": quota}))
    flags = ("--ledger", str(tmp_path / "ledger"))
    with Fleet(serve, folder, flags=flags, hook=partial(limited, limits)) as fleet:
        fleet.wait_known()
        received: list[teacher_pb2.ScoreResponse] = []
        threads = [
            threading.Thread(target=ask, args=(fleet.addresses[i % 2], received))
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

        with connect(fleet.addresses) as teacher:
            pairs = teacher.stream([torch.arange(TOKENS)] * 100, ahead=30)
            rows: list[int] = []
            trainer = threading.Thread(target=lambda: rows.extend(t.num_rows for _, t in pairs))
            trainer.start()
            wait_until(lambda: fleet.usage()[0].rejected > len(refused) + 30, "it is refused")
            assert len(rows) < 30
            # The operator raises the quota; a rate is left, at which the rest takes a second more.
            more = {"max_tokens_per_day": 1 << 20, "max_tokens_per_second": 40 * TOKENS}
            limits.write_text(json.dumps(more))
            began = time.monotonic()
            trainer.join(60)
            assert rows == [TOKENS - 1] * 100
            assert time.monotonic() - began > 0.5
        (row,) = fleet.usage()
        assert row.tokens == (len(parts) + 100) * TOKENS
        assert row.delivered_rows == (len(parts) + 100) * (TOKENS - 1)
        fleet.assert_nothing_left()
