"""What `teacher-server usage` shows, from a service and from the file that it left."""

import csv
import io
import json
from pathlib import Path

import grpc
import pytest
import torch

from protos import teacher_pb2, teacher_pb2_grpc
from student_trainer import connect
from teacher_server.commands.usage import show_usage
from teacher_server.config import UsageConfig

LENGTHS = [5, 40, 33, 64]


def searchers() -> None:
    """Runs in the service: everybody is of one team, without the scope admin."""
    from teacher_server.admission import access
    from teacher_server.teams import declaration as teams

    access.Caller.team = lambda self: teams.Team("search")


def reuse_an_id(address: str) -> int:
    """Five requests one after the other, all the same: returns how many rows came for each."""
    request = teacher_pb2.ScoreRequest(
        session_id=b"s" * 16,
        request_id=7,
        token_ids=torch.arange(8, dtype=torch.int32).numpy().tobytes(),
        lengths=[8],
        targets=teacher_pb2.TargetSpec(top_k=teacher_pb2.TopK(k=2, bits=8)),
    )
    with grpc.insecure_channel(address) as channel:
        stub = teacher_pb2_grpc.TeacherStub(channel)
        counts = {sum(r.part.num_rows for r in stub.Score(iter([request]))) for _ in range(5)}
    (count,) = counts
    return count


def test_usage_is_shown_to_its_team_and_read_from_the_file(
    serve, model_folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    ledger = tmp_path / "ledger"
    served = serve(model_folder("Gemma2", 1001), "--ledger", str(ledger), hook=searchers)

    def shown(**flags) -> str:
        address = "" if "ledger" in flags else served.address
        assert show_usage(UsageConfig(address=address, **flags)) == 0
        return capsys.readouterr().out

    def numbers() -> dict[str, int]:
        (row,) = json.loads(shown(as_json=True))
        assert row.pop("team") == "search"
        row.pop("day")
        return row

    assert shown().splitlines()[1:] == ["nothing was used"]
    nbytes = 0
    for _ in range(2):  # two clients, whose ids begin at the same number
        with connect(served.address) as teacher:
            rows = sum(t.num_rows for _, t in teacher.stream([torch.arange(n) for n in LENGTHS]))
            assert rows == sum(LENGTHS) - len(LENGTHS)
            nbytes += teacher.counters.payload_nbytes
    first = numbers()
    assert first.pop("tokens") == 2 * sum(LENGTHS)
    assert first == {
        "sequences": 8,
        "delivered_rows": 2 * (sum(LENGTHS) - len(LENGTHS)),
        "delivered_bytes": nbytes,
        "rejected": 0,
    }
    assert reuse_an_id(served.address) == 7
    second = numbers()
    assert second["sequences"] == 8 + 5  # every dispatch is paid for
    assert second["delivered_rows"] == first["delivered_rows"] + 7  # one piece of work

    assert show_usage(UsageConfig(address=served.address, team="ranking")) == 1
    assert "needs the scope admin" in capsys.readouterr().err
    assert show_usage(UsageConfig(address=served.address, since="yesterday")) == 2
    said = capsys.readouterr().err
    assert "2027-01-31" in said
    assert said.endswith("; see teacher-server usage --help\n")
    assert show_usage(UsageConfig(ledger=tmp_path)) == 1
    assert f"no ledger in {tmp_path}" in capsys.readouterr().err
    with pytest.raises(ValueError, match="HOST:PORT of a service or a --ledger"):
        UsageConfig()
    assert served.stop() == 0
    (row,) = csv.DictReader(io.StringIO(shown(ledger=ledger, as_csv=True)))
    assert int(row["delivered_rows"]) == second["delivered_rows"]
    assert not list((ledger / "journals").iterdir())
    assert not shown(ledger=ledger, team="ranking", as_csv=True).splitlines()[1:]
