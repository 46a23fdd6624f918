"""Arguments and files to a configuration: what is taken, and the line that each mistake gets."""

from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro
from pydantic import BaseModel, Field

from logitstream.command_line import Group, WrongUsage, parse


class Deep(BaseModel):
    most_tokens: int = 5


class Job(BaseModel):
    """Does it. And more."""

    target: tyro.conf.Positional[str]
    text: Path | None = None
    names: list[str] = []
    rate: float = Field(default=1.0, gt=0, le=10)
    size: int | None = Field(default=None, ge=1)
    kind: Literal["big", "small"] = "big"
    loud: tyro.conf.FlagCreatePairsOff[bool] = False
    as_json: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False
    deep: Deep = Deep()


class Other(BaseModel):
    """Another."""

    folders: tyro.conf.Positional[list[Path]]
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
    assert read("t", "--names", "a", "--names", "b").names == ["b"], "the last one wins"


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
    assert read("--size", "5", file).size == 4
    assert read(write(tmp_path, 'target = "t"\nnames = "a"\nkind = "small"')).names == ["a"]
    assert read(write(tmp_path, ""), "t") == Job(target="t")


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ("t --rat 2", "--rat is not an option of job (did you mean --rate?)"),
        ("t --target x", "--target is not an option of job"),
        ("t -v", "-v is not an option of job"),
        ("t --only-here 2", "--only-here is an option of other, not of job"),
        (
            "t --token lst_secret",
            "--token is not an option: set the environment variable TEACHER_T",
        ),
        ("t --rate", "--rate needs a number, got nothing"),
        ("t --loud=yes", "--loud takes no value, got 'yes'"),
        ("t --loud yes", "'yes' is one too many"),
        ("t --rate 0", "--rate must be more than 0, got 0"),
        ("t --rate 10.5", "--rate must be at most 10, got 10.5"),
        ("t --size 0", "--size must be at least 1, got 0"),
        ("t --size 1.5", "--size must be a whole number, got '1.5'"),
        ("t --rate fast", "--rate must be a number, got 'fast'"),
        ("t --kind huge", "--kind must be 'big' or 'small', got 'huge'"),
        ("t --deep.most-tokens x", "--deep.most-tokens must be a whole number, got 'x'"),
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
        ("size = [1, 2]", "size in FILE must be a whole number, got [1, 2]"),
        ("names = [[1]]", "names in FILE must be one or more values, got [[1]]"),
        ('size = "x"', "size in FILE must be a whole number, got 'x'"),
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
    class Plain(BaseModel):
        """It."""

        text: str

    path = write(tmp_path, "text = 'a'").removeprefix("@")
    with pytest.raises(WrongUsage) as caught:
        parse("prog", Group("Works.", {"plain": Plain}), ["plain", path])
    (said,) = caught.value.mistakes
    assert said.startswith(f"{path} is no option: give @{path} to read options from it")


def test_a_mistake_on_the_command_line_is_not_blamed_on_a_file_before(tmp_path: Path) -> None:
    assert mistakes("t", write(tmp_path, "size = 3"), "--size") == [
        "--size needs a whole number, got nothing"
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
    assert "usage: prog job" in said
    for shown in ("--text", "--names", "--rate", "--size", "--kind", "--loud", "--json"):
        assert f"{shown} " in said
    assert "--deep.most-tokens" in said
    assert "@FILE.toml" in said
    with pytest.raises(SystemExit):
        parse("prog", GROUP, ["--help"])
    said = capsys.readouterr().out
    assert "job    Does it.\n" in said
    assert "And more" not in said
