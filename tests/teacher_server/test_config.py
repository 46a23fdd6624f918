from pathlib import Path

import pytest
import tyro

from teacher_server.config import ServeConfig, expand_files, is_loopback


def write(folder: Path, text: str) -> str:
    path = folder / "teacher.toml"
    path.write_text(text)
    return f"@{path}"


def test_arguments_without_a_file_pass_through_unchanged() -> None:
    arguments = ["serve", "--model", "a@b", "--port", "0"]
    assert expand_files(arguments) == arguments


def test_nested_tables_become_dotted_flags_with_dashes(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
        model = "/models/gemma"
        head_chunk_mib = 64
        drain_s = 2.5
        [batch]
        max_tokens = 128
        [a.very_deep]
        table_here = "x"
        """,
    )
    assert expand_files([file]) == [
        *("--model", "/models/gemma"),
        *("--head-chunk-mib", "64"),
        *("--drain-s", "2.5"),
        *("--batch.max-tokens", "128"),
        *("--a.very-deep.table-here", "x"),
    ]


def test_lists_become_one_flag_with_many_values(tmp_path: Path) -> None:
    file = write(tmp_path, 'names = ["a", "b c"]\nports = [1, 2]')
    assert expand_files([file]) == ["--names", "a", "b c", "--ports", "1", "2"]


def test_true_is_the_bare_flag_and_false_is_none(tmp_path: Path) -> None:
    file = write(tmp_path, "standalone = true\nallow_public = false")
    assert expand_files([file]) == ["--standalone"]


def test_a_file_is_expanded_where_it_stands(tmp_path: Path) -> None:
    file = write(tmp_path, "port = 1")
    assert expand_files(["serve", file, "--port", "2"]) == ["serve", "--port", "1", "--port", "2"]


def test_an_empty_file_stands_for_no_flags(tmp_path: Path) -> None:
    assert expand_files([write(tmp_path, "")]) == []


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
    config = tyro.cli(ServeConfig, args=expand_files([file]))
    assert (config.model, config.port, config.standalone) == ("/models/gemma", 0, True)
    assert (config.allow_public, config.dtype, config.threads) == (False, "bfloat16", 3)
    assert config.batch.max_queued_tokens == 5000
    assert config.batch.max_tokens == ServeConfig(model="m").batch.max_tokens
    assert (config.targets.max_top_k, config.admission.max_sequence_tokens) == (7, 99)


def test_flags_after_a_file_win(tmp_path: Path) -> None:
    file = write(tmp_path, 'model = "a"\nport = 1\n[batch]\nmax_tokens = 64')
    arguments = expand_files([file, "--port", "2", "--batch.max-tokens", "32"])
    config = tyro.cli(ServeConfig, args=arguments)
    assert (config.model, config.port, config.batch.max_tokens) == ("a", 2, 32)


def test_a_missing_file_is_named_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "no.toml"
    with pytest.raises(ValueError, match=r"^cannot read .*no\.toml: No such file or directory$"):
        expand_files([f"@{path}"])


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^cannot read .*: Is a directory$"):
        expand_files([f"@{tmp_path}"])


@pytest.mark.parametrize("text", ["model = ", "[batch\n", "a = 1\na = 2", "just words"])
def test_what_is_not_toml_is_refused_with_its_place(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"^.*teacher\.toml is not TOML: .*\(at .*\)$"):
        expand_files([write(tmp_path, text)])


def test_bytes_that_are_no_text_are_not_toml(tmp_path: Path) -> None:
    path = tmp_path / "teacher.toml"
    path.write_bytes(b"model = \xff\xfe")
    with pytest.raises(ValueError, match="is not TOML"):
        expand_files([f"@{path}"])


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
        (["--device", "cuda:1"], "--device cuda"),
        (["--name", "two words"], "name"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags, words: str, capsys) -> None:
    with pytest.raises((SystemExit, ValueError)) as caught:
        tyro.cli(ServeConfig, args=["--model", "m", *flags])
    printed = capsys.readouterr()
    assert words in str(caught.value) + printed.out + printed.err


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
    config = tyro.cli(ServeConfig, args=["--model", "m", "--host", "0.0.0.0", *flags])
    problem = config.exposure()
    if missing is None:
        assert problem is None
        return
    assert problem is not None
    for words in (missing, "teacher-server certs", "team add", "--tls-cert", "--allow-public"):
        assert words in problem
