"""Arguments and files to a configuration: what is taken, and the line that each mistake gets."""

import re
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from logitstream.command_line import Group, WrongUsage, parse, read_settings
from logitstream.options import Json, Settings


class Deep(Settings):
    most_tokens: int = 5


class Job(Settings):
    """Does it. And more."""

    target: str = Field(kw_only=False)
    """What to work on; the rest is optional."""
    text: Path | None = None
    names: list[str] = Field(default=[])
    rate: float = Field(default=1.0, gt=0, le=10)
    size: int | None = Field(default=None, ge=1)
    kind: Literal["big", "small"] = "big"
    loud: bool = False
    as_json: Json = False
    deep: Deep = Deep()


class Other(Settings):
    """Another."""

    folders: list[Path] = Field(kw_only=False)
    only_here: int = 0


GROUP = Group("Works.", {"job": Job, "other": Other}, files_of={"job": "other"})


def read(*arguments: str) -> Job:
    return parse("prog", GROUP, ["job", *arguments])


def mistakes(*arguments: str) -> list[str]:
    with pytest.raises(WrongUsage) as caught:
        read(*arguments)
    assert all(one.endswith("; see prog job --help") for one in caught.value.mistakes)
    return [one.removesuffix("; see prog job --help") for one in caught.value.mistakes]


def write(folder: Path, text: str) -> str:
    path = folder / "job.toml"
    path.write_text(text)
    return f"@{path}"


def test_every_way_to_give_an_option_is_read() -> None:
    config = read(
        *("--names", "a", "b c", "--rate=2.5", "--loud", "x@y", "--json"),
        *("--deep.most_tokens", "-3", "--size", "None", "--text", "~", "--kind", "small"),
    )
    assert config == Job(
        target="x@y",
        names=["a", "b c"],
        rate=2.5,
        loud=True,
        as_json=True,
        deep=Deep(most_tokens=-3),
        text=Path("~"),
        kind="small",
    )
    other = parse("prog", GROUP, ["other", "a", "--only-here", "1", "b"])
    assert other.folders == [Path("a"), Path("b")]
    assert read("t", "--names", "a", "--names", "b").names == ["a", "b"]
    assert read("--rate", "2", "--target", "t", "--rate", "3").rate == 3, "the last one wins"
    assert read("--loud=false", "--", "--t").target == "--t"


def test_a_file_stands_for_its_options_where_it_stands(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
        target = "t"
        text = "here"
        names = ["a", "b"]
        rate = 3
        size = 4
        loud = false
        json = true
        only_here = 1 # of `other`, whose files serve here too
        [deep]
        most_tokens = 7
        """,
    )
    config = read(file)
    assert (config.target, config.text, config.names) == ("t", Path("here"), ["a", "b"])
    assert (config.rate, config.size, config.loud, config.as_json) == (3.0, 4, False, True)
    assert config.deep.most_tokens == 7
    assert read(file, "--size", "5").size == 5
    assert read("--size", "5", file).size == 5
    assert read(file, "--loud", "--size=None", "--names", "c").names == ["c"]
    assert read(write(tmp_path, 'target = "t"\nnames = "a"\nkind = "small"')).names == ["a"]
    assert read(write(tmp_path, ""), "t") == Job(target="t")


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ("t --rat 2", "--rat is not an option of job (did you mean --rate?)"),
        ("t --targets x", "--targets is not an option of job (did you mean --target?)"),
        ("t --target x", "unexpected argument 't'"),
        ("t -v", "-v is not an option of job"),
        ("t --only-here 2", "--only-here is an option of other, not of job"),
        (
            "t --token lst_secret",
            "--token is not an option: give --token-file FILE, or set ",
        ),
        ("t --rate", "--rate needs a number, got nothing"),
        ("t --loud=maybe", "--loud must be true or false, got 'maybe'"),
        ("t --loud yes", "unexpected argument 'yes': --loud takes no value"),
        ("t --rate 0", "--rate must be greater than 0, got 0"),
        ("t --rate 10.5", "--rate must be less than or equal to 10, got 10.5"),
        ("t --size 0", "--size must be greater than or equal to 1, got 0"),
        ("t --size 1.5", "--size must be a valid integer, got '1.5'"),
        ("t --rate fast", "--rate must be a valid number, got 'fast'"),
        ("t --kind huge", "--kind must be 'big' or 'small', got 'huge'"),
        ("t --deep.most-tokens x", "--deep.most-tokens must be a valid integer, got 'x'"),
        ("--rate 2", "TARGET is missing: "),
        ("--lod t", "--lod is not an option of job (did you mean --loud?)"),
    ],
)
def test_a_wrong_flag_gets_a_line_that_says_what_is_allowed(arguments: str, wanted: str) -> None:
    (said,) = mistakes(*arguments.split())
    assert said.startswith(wanted)
    assert "secret" not in said


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('loud = "yes"', 'loud in FILE must be true or false, got "yes"'),
        ("rate = true", "rate in FILE must be a number, got true"),
        ("size = [1, 2]", "size in FILE must be an integer, got [1, 2]"),
        ("names = [[1]]", "names in FILE must be one or more values, got [[1]]"),
        ('size = "x"', "size in FILE must be a valid integer, got 'x'"),
        ("siz = 1", "siz in FILE is not an option of job (did you mean size?)"),
        (
            "[dep]\nmost_tokens = 1",
            "dep.most_tokens in FILE is not an option of job (did you mean de",
        ),
        ("[rate]\nx = 1", "rate.x in FILE is not an option of job"),
        ("rate = {}", "rate in FILE must be a number, got a table"),
    ],
)
def test_a_wrong_setting_in_a_file_names_the_file(tmp_path: Path, text: str, wanted: str) -> None:
    (said,) = mistakes("t", write(tmp_path, text))
    assert said.startswith(wanted.replace("FILE", str(tmp_path / "job.toml")))


def test_a_file_that_cannot_be_read_is_the_only_mistake(tmp_path: Path) -> None:
    (said,) = mistakes(f"@{tmp_path}/no.toml")
    assert said == f"cannot read {tmp_path}/no.toml: No such file or directory"
    assert mistakes(f"@{tmp_path}") == [f"cannot read {tmp_path}: Is a directory"]
    for text in (b"a = ", b"[a\n", b"a = 1\na = 2", b"just words", b"a = \xff\xfe"):
        path = tmp_path / "bytes.toml"
        path.write_bytes(text)
        (said,) = mistakes(f"@{path}")
        assert said.startswith(f"{path} is not TOML: ")


def test_a_file_without_its_sign_is_the_only_mistake(tmp_path: Path) -> None:
    class Plain(Settings):
        """It."""

        text: str

    path = write(tmp_path, "text = 'a'").removeprefix("@")
    with pytest.raises(WrongUsage) as caught:
        parse("prog", Group("Works.", {"plain": Plain}), ["plain", path])
    (said,) = caught.value.mistakes
    assert said.startswith(
        f"unexpected argument {path[:40]!r}: give @{path} to read options from it"
    )


def test_a_mistake_on_the_command_line_is_not_blamed_on_a_file_before(tmp_path: Path) -> None:
    assert mistakes("t", write(tmp_path, "size = 3"), "--size") == [
        "--size needs an integer, got nothing"
    ]


def test_the_version_is_told(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        parse("prog", GROUP, ["--version"])
    assert not ended.value.code
    assert capsys.readouterr().out == f"prog {version('logitstream')}\n"


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    file = write(tmp_path, "loud = 1\nsiz = 2")
    assert len(mistakes(file, "--rate", "x", "--kind", "y", "--what")) == 6


def test_help_shows_the_options_and_every_option_it_shows_is_read(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        read("--rate", "wrong", "--help")
    assert not ended.value.code
    said = capsys.readouterr().out
    assert "Usage: prog job" in said
    for shown in ("--text", "--names", "--rate", "--size", "--kind", "--loud", "--json"):
        assert f"{shown} " in said
    assert "--deep.most-tokens" in said
    assert "@FILE or --config FILE" in said
    with pytest.raises(SystemExit):
        parse("prog", GROUP, ["--help"])
    said = capsys.readouterr().out
    assert re.search(r"job +Does it\. ", said)
    assert "And more" not in said


def test_the_command_line_wins_over_the_environment_that_over_files_and_the_later_file(
    tmp_path: Path, monkeypatch
) -> None:
    first, second = tmp_path / "first.toml", tmp_path / "second.toml"
    first.write_text('target = "t"\nrate = 1\nsize = 1\nkind = "small"\n[deep]\nmost_tokens = 1')
    second.write_text('rate = 2\nsize = 2\nnames = ["a", "b"]\nloud = true')
    for name, value in (
        ("LOGITSTREAM_JOB_RATE", "3"),
        ("LOGITSTREAM_JOB_DEEP_MOST_TOKENS", "3"),
        ("LOGITSTREAM_JOB_JSON", "true"),
        ("LOGITSTREAM_JOB_NAMES", "c d"),
        ("LOGITSTREAM_JOB_NO_OPTION", "x"),
        ("LOGITSTREAM_OTHER_TEXT", "x"),
    ):
        monkeypatch.setenv(name, value)
    config = read(f"@{first}", "--config", str(second), "--rate", "4", "--loud=false")
    assert (config.rate, config.size, config.kind, config.target) == (4, 2, "small", "t")
    assert (config.deep.most_tokens, config.as_json, config.loud) == (3, True, False)
    assert (config.names, config.text) == (["c", "d"], None)
    monkeypatch.setenv("LOGITSTREAM_JOB_CONFIG", str(first))
    monkeypatch.setenv("LOGITSTREAM_JOB_RATE", "x")
    assert mistakes() == ["LOGITSTREAM_JOB_RATE must be a valid number, got 'x'"]


def test_a_yaml_file_says_the_same_as_a_toml_file(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("target: t\nnames: [a, b]\nsize: null\nloud: true\ndeep:\n  most_tokens: 7\n")
    wanted = Job(target="t", names=["a", "b"], loud=True, deep=Deep(most_tokens=7))
    assert read(f"@{path}") == read("--config", str(path)) == wanted
    for text, said in (
        ("size: [1]", f"size in {path} must be an integer, got [1]"),
        ("loud: null", f"loud in {path} must be true or false, got null"),
        ("siz: 1", f"siz in {path} is not an option of job (did you mean size?)"),
        ("a: [", f"{path} is not YAML: "),
        ("just words", f"{path} is not YAML: it holds no settings, such as `steps: 100`"),
    ):
        path.write_text(text)
        (mistake,) = mistakes("t", "--config", str(path))
        assert mistake.startswith(said)


def test_the_resolved_configuration_is_printed_and_can_be_read_again(
    tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setenv("TEACHER_TOKEN", "lst_secret")
    monkeypatch.setenv("LOGITSTREAM_JOB_SIZE", "3")
    given = 'a "quoted" b\\c\u00e9\n', "--names", "x", "y", "--json", "--deep.most-tokens", "9"
    config = read(*given)
    with pytest.raises(SystemExit) as ended:
        read(*given, "--print-config")
    assert not ended.value.code
    printed = capsys.readouterr().out
    assert "size = 3\n" in printed
    assert "\n[deep]\nmost_tokens = 9\n" in printed
    assert "lst_secret" not in printed
    monkeypatch.delenv("LOGITSTREAM_JOB_SIZE")
    assert read(write(tmp_path, printed)) == config
    assert mistakes("t", "--rate", "x", "--print-config") == [
        "--rate must be a valid number, got 'x'"
    ]


def test_a_table_is_checked_like_a_file_and_the_environment_has_no_say(monkeypatch) -> None:
    monkeypatch.setenv("LOGITSTREAM_JOB_RATE", "3")
    config = read_settings("prog", "job", Job, {"target": "t", "deep": {"most_tokens": 2}}, "args")
    assert config == Job(target="t", deep=Deep(most_tokens=2))
    with pytest.raises(WrongUsage) as caught:
        read_settings("prog", "job", Job, {"size": "x", "siz": 1}, "args")
    assert [one.partition(";")[0] for one in caught.value.mistakes] == [
        "siz in args is not an option of job (did you mean size?)",
        "TARGET is missing: What to work on",
        "size in args must be a valid integer, got 'x'",
    ]
