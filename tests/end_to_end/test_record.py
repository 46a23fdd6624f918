"""`student-trainer record`, and `train --record`, against a live service and without one."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
import transformers

from student_trainer import Recorded, cli
from tests.conftest import Serve, Served, one_torch_thread
from tests.end_to_end.conftest import WORDS, write_config
from tests.faults.test_recording import rows_in
from tests.support import tiny

LENGTH = 32

one_thread = pytest.fixture(autouse=True)(one_torch_thread)


@pytest.fixture
def config(text: Path, student_folder: Path, tmp_path: Path) -> str:
    """Settings that `record` and `train` share: 40 sequences to train on, 2 held out."""
    few = tmp_path / "few.txt"
    few.write_text(" ".join(text.read_text().split()[: 42 * LENGTH]))
    return write_config(
        tmp_path / "config.toml",
        student=str(student_folder),
        data=[str(few)],
        sequence_length=LENGTH,
        seed=3,
    )


def trained(output: Path, config: str, *flags: str, batch_size: int = 8) -> dict[str, torch.Tensor]:
    """The weights after 15 steps: three epochs of 8 sequences a step, which leave out none."""
    command = ["train", config, "--output", str(output), "--batch-size", str(batch_size)]
    assert cli.main([*command, "--steps", "15", "--learning-rate", "1e-2", *flags]) == 0
    student = transformers.AutoModelForCausalLM.from_pretrained(output / "student")
    return dict(student.state_dict())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(weight, other[name]) for name, weight in one.items())


@pytest.mark.parametrize("flags", [("--draws", "2"), ("--targets", "top_k:16")])
def test_a_student_trained_from_a_record_is_the_one_of_the_run_that_recorded(
    trained_service: Served, config: str, tmp_path: Path, flags: tuple[str, ...], capsys
):
    live = "--teacher", trained_service.address, *flags
    through, before = tmp_path / "through", tmp_path / "before"
    recording = trained(tmp_path / "1", config, *live, "--record", str(through))
    replayed = trained(tmp_path / "2", config, *flags, "--record", str(through))
    assert same(recording, replayed)
    first, second = (json.loads((tmp_path / number / "report.json").read_text()) for number in "12")
    for name in ("teacher_loss", "distilled_loss", "teacher_fingerprint", "bytes_per_token"):
        assert first[name] == second[name]

    capsys.readouterr()
    assert cli.main(["record", config, *live, "--record", str(before), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["asked"], said["already_recorded"]) == (said["sequences"], 0)
    assert same(recording, trained(tmp_path / "3", config, *flags, "--record", str(before)))
    assert {*rows_in(through)} <= {*rows_in(before)}
    if "top_k:16" in flags:  # draws would be new in each epoch
        assert same(recording, trained(tmp_path / "live", config, *live))
    else:  # recorded for 8 sequences a step, replayed for 5
        fives = [
            trained(tmp_path / f"5-{one.name}", config, *flags, "--record", str(one), batch_size=5)
            for one in (through, before)
        ]
        assert same(*fives)


def test_a_second_record_command_asks_for_nothing_and_more_draws_for_the_rest(
    trained_service: Served, config: str, tmp_path: Path, capsys
):
    command = ["record", config, "--teacher", trained_service.address, "--json"]
    found = []
    for draws in ("1", "1", "3"):
        capsys.readouterr()
        assert cli.main([*command, "--record", str(tmp_path / "record"), "--draws", draws]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert [one["asked"] for one in found] == [42, 0, 84]
    assert [one["already_recorded"] for one in found] == [0, 42, 42]
    assert [one["sequences"] for one in found] == [42, 42, 126]
    draws = {(row[3], row[4]) for row in rows_in(tmp_path / "record")}
    assert draws == {(3, 0), (3, 1), (3, 2)}


@pytest.mark.parametrize("kind", ["hidden:int8", "features:layers=1+2", "realized"])
def test_targets_that_need_no_ids_are_recorded_by_a_command(
    trained_service: Served, config: str, tmp_path: Path, monkeypatch, capsys, kind: str
):
    monkeypatch.setenv("LOGITSTREAM_CACHE", str(tmp_path / "cache"))
    record = tmp_path / "record"
    command = ["record", config, "--teacher", trained_service.address, "--record", str(record)]
    assert cli.main([*command, "--targets", kind, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["asked"], said["targets"]) == (42, kind)
    with Recorded(record) as recorded:  # its head was kept when it was recorded
        assert len(recorded) == 42
        assert str(recorded.default_targets) == kind
        assert recorded.info.hidden_size == 64


def test_given_ids_are_not_recorded_by_a_command(config: str, tmp_path: Path, capsys):
    record = "--record", str(tmp_path / "record")
    flags = "--teacher", "127.0.0.1:1", "--targets", "given_ids:bits=32"
    assert cli.main(["record", config, *record, *flags]) == 1
    assert "needs ids for each row" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [("pad",), ("isolate",), ("isolate", "--streaming")])
def test_what_is_recorded_of_prompts_is_what_a_training_asks_for(
    trained_service: Served, text: Path, config: str, tmp_path: Path, flags: tuple[str, ...], capsys
):
    data, held_out, record = (
        tmp_path / name for name in ("data.jsonl", "held_out.jsonl", "record")
    )
    chance, words = random.Random(0), text.read_text().split()
    for path, starts in ((data, range(0, 6000, 100)), (held_out, range(6000, 6500, 100))):
        drawn = [words[start : start + chance.randint(8, 40)] for start in starts]
        rows = [
            {"prompt": " ".join(some[:4]), "completion": " " + " ".join(some[4:])} for some in drawn
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = "--data", str(data), "--held-out", str(held_out), "--packing", *flags
    live = "--teacher", trained_service.address, "--record", str(record)
    assert cli.main(["record", config, *live, *files, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["asked"] == said["sequences"] == 65  # each document by itself
    assert cli.main(["record", config, *live, *files, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["asked"], again["already_recorded"], again["tokens"]) == (0, 65, 0)
    trained(tmp_path / "out", config, "--record", str(record), *files)  # and nothing is missing
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["teacher_loss"] > 0


def test_what_does_not_fit_the_record_is_refused_in_one_line(
    trained_service: Served, serve: Serve, config: str, tmp_path: Path, capsys
):
    record = tmp_path / "record"
    live = "--teacher", trained_service.address
    assert cli.main(["record", config, *live, "--record", str(record)]) == 0
    other = tiny.save_model(tmp_path / "other", "Gemma2", len(WORDS) + 2, seed=1)
    tiny.make_tokenizer(WORDS).save_pretrained(other)
    another = serve(other)
    strange = tmp_path / "strange"
    tiny.make_model("Gemma2", len(WORDS) + 2).save_pretrained(strange)
    tiny.make_tokenizer([*WORDS[1:], "other"]).save_pretrained(strange)
    nothing = tmp_path / "nothing"
    output = "--output", str(tmp_path / "out")
    for arguments, words in (
        (("record", *live, "--record", str(record), "--targets", "top_k:4"), "holds sampled:64 at"),
        (("train", *output, "--record", str(record), "--temperature", "2"), "asked for sampled:64"),
        (("record", "--teacher", another.address, "--record", str(record)), "another folder"),
        (("train", *output, "--record", str(record), "--student", str(strange)), "tokenizers diff"),
        (("train", *output, "--record", str(nothing)), "there is no record in .*student-trainer r"),
        (
            ("train", *output, "--record", str(record), "--sequence-length", "16"),
            "this sequence is not in the record",
        ),
    ):
        capsys.readouterr()
        assert cli.main([arguments[0], config, *arguments[1:]]) == 1
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert re.search(words, last), last
    assert not nothing.exists()
    assert another.stop() == 0
