"""What `serve` says of its certificate before clients do."""

from datetime import timedelta
from pathlib import Path

import pytest

from teacher_server import cli
from teacher_server.commands import certs
from teacher_server.errors import ServeError
from teacher_server.rpc.tls import Tls


def made(folder: Path, *hosts: str, days: int = 365) -> Tls:
    """A certificate for these hosts and no others."""
    certs.make(folder, hosts, [], days=days, replace=False, with_local=False)
    return Tls(folder / "server.pem", folder / "server-key.pem")


@pytest.mark.parametrize(
    ("host", "covered"),
    [
        ("teacher.lab", True),
        ("TEACHER.lab.", True),
        ("one.gpu.lab", True),
        ("10.0.0.7", True),
        ("2001:db8::0007", True),
        ("[2001:db8::7]", True),
        ("other.lab", False),
        ("gpu.lab", False),
        ("a.one.gpu.lab", False),
        ("10.0.0.8", False),
        ("127.0.0.1", False),
    ],
)
def test_a_name_that_clients_are_told_and_the_certificate_does_not_have_is_warned_of(
    tmp_path: Path, host: str, covered: bool
):
    tls = made(tmp_path, "teacher.lab", "*.gpu.lab", "10.0.0.7", "2001:db8::7")
    found = tls.read().warnings(host)
    assert bool(found) != covered
    if found:
        (warning,) = found
        assert f"is not for {host}" in warning
        assert "teacher.lab, *.gpu.lab, 10.0.0.7, 2001:db8::7" in warning


@pytest.mark.parametrize(("days", "soon"), [(13, True), (15, False)])
def test_a_certificate_that_ends_within_two_weeks_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, days: int, soon: bool
):
    tls = made(tmp_path, "a", days=days)
    tls.warn("a")
    assert ("expires at" in caplog.text) == soon
    assert (str(tls.cert) in caplog.text) == soon


def test_a_certificate_that_is_not_valid_yet_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(certs, "BACKDATE", timedelta(days=-1))
    (warning,) = made(tmp_path, "a").read().warnings("a")
    assert "not valid before" in warning


def test_serve_refuses_a_certificate_that_has_expired(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tls = made(tmp_path, "127.0.0.1", days=0)
    with pytest.raises(ServeError, match="expired at"):
        tls.read()
    flags = ["--tls-cert", str(tls.cert), "--tls-key", str(tls.key)]
    assert cli.main(["serve", "--model", str(tmp_path), *flags]) == 2
    err = capsys.readouterr().err
    assert f"--tls-cert {tls.cert}" in err
    assert "expired at" in err
