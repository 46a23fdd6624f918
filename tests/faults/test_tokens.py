"""Tokens that are foreign, expired, revoked or malformed, and certificates that change (row 17)."""

from pathlib import Path

import pytest

from student_trainer import AccessDenied, connect
from tests import tiny
from tests.faults.oracle import VOCAB
from tests.teams import add_team, make_certs

SEQUENCES = tiny.random_sequences(40, VOCAB, seed=31)


def test_a_token_lets_in_and_others_do_not(serve, folder, tmp_path: Path):
    teams = tmp_path / "teams.toml"
    token = add_team(teams, "search", "--weight", 3)
    tls = make_certs(tmp_path)
    served = serve(folder, "--teams", str(teams), *tls)
    ca = tmp_path / "ca.pem"
    with connect(served.address, token=token, ca=ca) as teacher:
        assert teacher.info.team == "search"
        assert teacher.info.caller.weight == 3
        assert len(list(teacher.stream(SEQUENCES))) == len(SEQUENCES)
    with pytest.raises(AccessDenied, match="belongs to no team"):
        connect(served.address, token="x" * 43, ca=ca)
    with pytest.raises(AccessDenied, match="needs a token"):
        connect(served.address, ca=ca)
    served.stop()
