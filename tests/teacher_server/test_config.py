import socket
from pathlib import Path

import pytest

from logitstream.command_line import WrongUsage, parse
from logitstream.connection import is_loopback
from teacher_server.cli import COMMANDS, main
from teacher_server.config import ServeConfig, TeamAdd


def write(folder: Path, text: str) -> str:
    path = folder / "teacher.toml"
    path.write_text(text)
    return f"@{path}"


def serve(*arguments: str) -> ServeConfig:
    return parse("teacher-server", COMMANDS, ["serve", *arguments])


def test_every_section_of_the_configuration_can_be_set_in_a_file(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
        model = "/models/gemma"
        port = 0
        standalone = true
        allow_public = false
        dtype = "bfloat16"
        threads = 3
        [batch]
        max_queued_tokens = 5000
        [targets]
        max_top_k = 7
        [admission]
        max_sequence_tokens = 99
        """,
    )
    config = serve(file)
    assert (config.model, config.port, config.standalone) == ("/models/gemma", 0, True)
    assert (config.allow_public, config.dtype, config.threads) == (False, "bfloat16", 3)
    assert config.batch.max_queued_tokens == 5000
    assert config.batch.max_tokens == ServeConfig(model="m").batch.max_tokens
    assert (config.targets.max_top_k, config.admission.max_sequence_tokens) == (7, 99)


def test_flags_after_a_file_win(tmp_path: Path) -> None:
    file = write(tmp_path, 'model = "a"\nport = 1\n[batch]\nmax_tokens = 64')
    config = serve(file, "--port", "2", "--batch.max-tokens", "32")
    assert (config.model, config.port, config.batch.max_tokens) == ("a", 2, 32)
    assert serve("--port", "2", file).port == 2


def test_teams_have_commands_of_their_own() -> None:
    added = parse(
        "teacher-server", COMMANDS, ["team", "add", "search", "--teams", "t", "--scopes", "score"]
    )
    assert isinstance(added, TeamAdd)
    assert (added.name, added.scopes) == ("search", ("score",))
    with pytest.raises(WrongUsage, match=r"give add or list or rotate or disable; see .* team --h"):
        parse("teacher-server", COMMANDS, ["team"])
    with pytest.raises(
        WrongUsage, match=r"--scopes must be 'score', .*, got 'all'; see .* team add"
    ):
        parse(
            "teacher-server",
            COMMANDS,
            ["team", "add", "a", "--teams", "t", "--scopes", "score", "all"],
        )


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.10", "::1", "[::1]"])
def test_loopback_addresses_are_known(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host",
    [
        *("0.0.0.0", "::", "[::]", "", "10.0.0.1", "128.0.0.1", "2001:db8::1", "example.com"),
        # Names that only look like loopback could resolve to anything.
        *("localhost.example.com", "127.0.0.1.example.com", "127.1", "*"),
    ],
)
def test_everything_else_counts_as_reachable(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--standalone", "--replicas", "2"], "--replicas"),
        (["--standalone", "--name", "a"], "--name"),
        (["--standalone", "--ray-address", "auto"], "--ray-address"),
        (["--standalone", "--max-replicas", "2"], "--max-replicas"),
        (["--peers", "a:1", "--service-id", "x"], "--standalone"),
        (["--service-id", "x"], "--standalone"),
        (["--update"], "--ray-address"),
        (["--tls-cert", "x"], "--tls-key"),
        (["--tls-client-ca", "x"], "--tls-cert"),
        (["--replicas", "3", "--max-replicas", "2"], "--max-replicas"),
        (["--target-queue-s", "5"], "--target-queue-s 5 says"),
        (["--replicas", "3", "--scale-down-after-s", "60"], "--max-replicas"),
        (["--device", "cuda:1"], "--device cuda"),
        (["--name", "two words"], "name"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags, words: str) -> None:
    with pytest.raises(WrongUsage) as caught:
        serve("--model", "m", *flags)
    (mistake,) = caught.value.mistakes
    assert words in mistake
    assert mistake.endswith("; see teacher-server serve --help")


TLS = ["--tls-cert", "c", "--tls-key", "k"]


@pytest.mark.parametrize(
    ("flags", "missing"),
    [
        ([], "TLS and teams"),
        (TLS, "missing: teams"),
        (["--teams", "t"], "missing: TLS"),
        ([*TLS, "--teams", "t"], None),
        (["--allow-public"], None),
        (["--host", "127.0.0.1"], None),
    ],
)
def test_a_public_address_needs_tls_and_teams(flags: list[str], missing: str | None) -> None:
    config = serve("--model", "m", "--host", "0.0.0.0", *flags)
    problem = config.exposure()
    if missing is None:
        assert problem is None
        return
    assert problem is not None
    for words in (missing, "teacher-server certs", "team add", "--tls-cert", "--allow-public"):
        assert words in problem


def test_a_port_of_the_metrics_that_is_taken_is_told_before_the_model_is_looked_for(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        flags = "--standalone", "--port", "0", "--metrics-port", port
        assert main(["serve", "--model", "no-model", *flags]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"teacher-server: cannot listen on 127.0.0.1:{port}: Address already in")
    assert "choose another port with --metrics-port" in line
