"""What is wrong with a student, a text, a service or a command is one line, before anything long runs;
and heads that differ in nothing but padding are not wrong."""

import gzip
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers

import teacher_server.cli
from student_trainer.cli import main
from tests.conftest import Serve, Served, one_torch_thread
from tests.end_to_end.conftest import WORDS
from tests.support import tiny
from tests.support.teams import add_team

NUM_IDS = len(WORDS) + 2
"""Of the tokenizer that all share."""

one_thread = pytest.fixture(autouse=True)(one_torch_thread)


@pytest.fixture(scope="module")
def few(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little of the text: 60 sequences of 16 tokens."""
    path = tmp_path_factory.mktemp("few") / "few.txt"
    path.write_text(" ".join(text.read_text().split()[: 60 * 16]))
    return path


@pytest.fixture(scope="module")
def student_of(
    student_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """student_of(number of ids) -> a folder of a student with weights and a head of that many."""

    def make(num_ids: int) -> Path:
        folder = tmp_path_factory.mktemp(f"student-{num_ids}")
        torch.manual_seed(3)
        student = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(student_folder)
        )
        student.resize_token_embeddings(num_ids, mean_resizing=False)
        with torch.no_grad():  # what padding holds must not matter
            student.get_output_embeddings().weight[NUM_IDS:] = 3.0
        student.save_pretrained(folder)
        tiny.make_tokenizer(WORDS).save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def arguments(trained_service: Served, student_folder: Path, few: Path, tmp_path: Path):
    """arguments(data=..., ...) -> those of a short run, with some of them replaced."""

    def make(**others: Any) -> list[str]:
        given = {
            "teacher": trained_service.address,
            "student": student_folder,
            "data": few,
            "output": tmp_path / "out",
            "sequence-length": 16,
            "batch-size": 4,
            "steps": 3,
            "learning-rate": 0.01,
            "targets": "top_k:8",
            **{name.replace("_", "-"): value for name, value in others.items()},
        }
        return [f"--{name}={value}" for name, value in given.items()]

    return make


def refused(capsys, caplog, *arguments: str, code: int = 1) -> str:
    """The one line that the command prints before it has read any text."""
    caplog.clear()
    capsys.readouterr()
    with caplog.at_level(logging.INFO):
        assert main([*arguments]) == code
    assert "characters" not in caplog.text
    printed = capsys.readouterr()
    assert "tokens of" not in printed.err  # the progress bar of the tokenizer
    lines = [one for one in printed.err.splitlines() if one.startswith("student-trainer: ")]
    assert len(lines) == 1, printed.err
    assert "Traceback" not in printed.err
    return lines[0]


# Vocabularies.


def test_heads_that_differ_in_padding_train_alike_and_check_says_so(
    trained_service, padded_service, student_of, arguments, tmp_path: Path, capsys
):
    """The first pair has no padding; then the student has, the teacher, and both."""
    found = []
    for service, size in (
        (trained_service, NUM_IDS),
        (trained_service, 80),
        (padded_service, NUM_IDS),
        (padded_service, 80),
    ):
        output = tmp_path / str(len(found))
        given = {"teacher": service.address, "student": student_of(size), "output": output}
        assert main(["train", *arguments(**given, ce_weight=0.5)]) == 0
        results = json.loads((output / "results.json").read_text())["students"]["distilled"]
        found.append([results["scores"]["loss"], *(one["loss"] for one in results["history"])])
    for losses in found[1:]:
        assert losses == pytest.approx(found[0], rel=1e-3), found
    capsys.readouterr()
    check = "check", padded_service.address, "--student", str(student_of(80)), "--json"
    assert main([*check, "--targets", "top_k:8"]) in (0, 1)
    said = json.loads(capsys.readouterr().out)["vocabulary"]
    assert said == "teacher 72 (64 in use), student 80: 64 shared, the rest is padding"


def test_a_student_without_the_teachers_ids_is_refused_with_both_numbers(
    trained_service, student_folder, arguments, capsys, caplog, tmp_path: Path
):
    small = shutil.copytree(student_folder, tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": NUM_IDS - 4}))
    for command in (
        ("train", *arguments(student=small)),
        (
            "record",
            *[one for one in arguments(student=small) if "=" in one][:3],
            f"--record={tmp_path / 'record'}",
            "--sequence-length=16",
        ),
        ("check", trained_service.address, "--student", str(small)),
    ):
        line = refused(capsys, caplog, *command)
        assert "vocab_size of its config.json is 60, the teacher" in line
        assert "uses ids 0 to 63. A student needs at least 64" in line


def test_a_special_token_that_a_head_lacks_is_warned_of(
    serve: Serve,
    teacher_folder: Path,
    student_folder: Path,
    arguments,
    few,
    caplog,
    capsys,
    tmp_path: Path,
):
    """As Gemma 3 1B lacks the token for images that its tokenizer has."""
    tokenizer = tiny.make_tokenizer(WORDS)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(teacher_folder)
    model.resize_token_embeddings(NUM_IDS + 8, mean_resizing=False)
    model.save_pretrained(teacher)
    shutil.copytree(student_folder, student)
    for folder in (teacher, student):
        tokenizer.save_pretrained(folder)
    service = serve(teacher)
    given = {"teacher": service.address, "student": student}
    with caplog.at_level(logging.WARNING):
        assert main(["train", *arguments(**given)]) == 0
    assert "the student has no row for <image> (id 64; it has ids 0 to 63)" in caplog.text
    with_image = tmp_path / "image.txt"
    with_image.write_text(f"<image> {few.read_text()}")
    capsys.readouterr()
    assert main(["train", *arguments(**given, data=with_image)]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "has token '<image>', id 64; student and teacher share ids 0 to 63" in last
    assert service.stop() == 0


@pytest.mark.parametrize("model", ["Gemma2", "Llama", "Qwen3"])
def test_a_student_without_a_tokenizer_is_refused_and_told_where_to_get_one(
    trained_service, arguments, capsys, caplog, tmp_path: Path, model: str
):
    """Some classes make an empty tokenizer of no files, others raise whole paragraphs."""
    bare = tmp_path / "bare"
    tiny.make_model(model, NUM_IDS).config.save_pretrained(bare)
    for command in (
        ("train", *arguments(student=bare)),
        ("check", trained_service.address, "--student", str(bare)),
    ):
        line = refused(capsys, caplog, *command)
        assert f"the student in {bare} has no tokenizer" in line
        assert "save_pretrained" in line


def test_an_encoder_decoder_is_refused_in_one_line(arguments, capsys, caplog, tmp_path: Path):
    config = transformers.T5Config(vocab_size=NUM_IDS, d_model=16, d_ff=32, num_layers=1)
    config.save_pretrained(tmp_path / "t5")
    tiny.make_tokenizer(WORDS).save_pretrained(tmp_path / "t5")
    line = refused(capsys, caplog, "train", *arguments(student=tmp_path / "t5"))
    assert f"the student in {tmp_path / 't5'} is an encoder-decoder (T5Config)" in line


# Commands and services.


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch) -> Path:
    """The cache of the hub's client, empty, on a machine without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_hub_id_and_a_wrong_path_as_student_are_told_apart(
    hub_cache: Path, arguments, capsys, caplog, tmp_path: Path
):
    for command in (
        ("train", *arguments(student="google/gemma-2-2b")),
        ("check", "127.0.0.1:1", "--student", "google/gemma-2-2b"),
    ):
        line = refused(capsys, caplog, *command)
        assert "there is no folder google/gemma-2-2b, where the student should be" in line
        assert "no model of that name could be fetched from the hub (LocalEntryNotFound" in line
        assert "hf download google/gemma-2-2b" in line
    line = refused(capsys, caplog, "train", *arguments(student=tmp_path / "nowhere"))
    assert line.endswith("should be. Give the path of a Hugging Face folder.")
    line = refused(capsys, caplog, "train", *arguments(student=tmp_path))
    assert line.endswith("is not a student folder: it has no config.json")


def test_a_student_of_the_hub_is_trained_from_its_cache(
    hub_cache: Path, student_folder: Path, arguments, tmp_path: Path
):
    model, commit = hub_cache / "models--our--student", "0123456789" * 4
    shutil.copytree(student_folder, model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    assert main(["train", *arguments(student="our/student")]) == 0
    assert main(["train", *arguments(student=student_folder, output=tmp_path / "same")]) == 0
    of_hub, of_folder = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("out", "same")
    )
    assert of_hub["settings"]["student"] == "our/student"
    assert of_hub["students"]["distilled"]["scores"] == of_folder["students"]["distilled"]["scores"]


def test_processes_are_started_by_one_launcher(arguments, capsys, monkeypatch, tmp_path: Path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TQDM_DISABLE", "0")  # which a process that is not the first sets
    assert main(["train", *arguments(workers=2)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("student-trainer: process 1 of 2: --workers 2 starts processes with Ray")
    assert "torchrun or accelerate launch has started 2 already" in said
    assert main(["train", *arguments(workers=3)]) == 2
    assert "--batch-size must be a multiple of --workers 3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_service_is_asked_before_the_text_is_read(arguments, capsys, caplog, tmp_path: Path):
    for others, said in (
        ({"teacher": tmp_path / "team.toml"}, "cannot read the connection file"),
        ({"targets": "top_k:100000"}, "100000"),
        ({"sequence_length": 600}, "--sequence-length must be at most 256"),
        ({"data": tmp_path / "*.txt"}, "no file matches"),
        ({"held_out": tmp_path / "none"}, "no file matches"),
    ):
        assert said in refused(capsys, caplog, "train", *arguments(**others))
    record = arguments(record=tmp_path / "record", targets="top_k:100000")
    of_record = [
        one
        for one in record
        if one.split("=")[0] not in ("--output", "--batch-size", "--steps", "--learning-rate")
    ]
    assert "100000" in refused(capsys, caplog, "record", *of_record)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "record").exists()


def test_a_scope_that_is_missing_is_said_before_the_text_is_read(
    serve: Serve, teacher_folder: Path, arguments, capsys, caplog, monkeypatch, tmp_path: Path
):
    teams = tmp_path / "teams.toml"
    monkeypatch.setenv("TEACHER_TOKEN", add_team(teams, "search"))
    service = serve(teacher_folder, "--teams", str(teams))
    given = arguments(teacher=service.address, targets="dense:f32")
    assert "dense" in refused(capsys, caplog, "train", *given)
    assert service.stop() == 0


def test_a_token_comes_from_a_file_too(
    serve: Serve, teacher_folder: Path, arguments, capsys, caplog, monkeypatch, tmp_path: Path
):
    teams, token = tmp_path / "teams.toml", tmp_path / "token"
    monkeypatch.setenv("TEACHER_TOKEN", "lst_wrong")
    token.write_text(add_team(teams, "search") + "\n")
    service = serve(teacher_folder, "--teams", str(teams))
    given = arguments(teacher=service.address)
    assert "token" in refused(capsys, caplog, "train", *given)
    assert main(["train", *given, "--token-file", str(token)]) == 0
    assert teacher_server.cli.main(["describe", service.address, f"--token-file={token}"]) == 0
    assert " team search" in " ".join(capsys.readouterr().out.split())
    for content, said in (("", "is empty"), (None, "No such file or directory")):
        token.unlink() if content is None else token.write_text(content)
        line = refused(capsys, caplog, "train", *given, "--token-file", str(token))
        assert f"--token-file {token}" in line
        assert said in line
    assert service.stop() == 0


def test_a_checkpoint_of_another_run_is_refused_before_the_text_is_read(arguments, capsys, caplog):
    kept = arguments(checkpoint_every=1)
    assert main(["train", *kept]) == 0
    line = refused(capsys, caplog, "train", *kept, "--ce-weight", "0.5")
    assert "ce_weight was 0.3 and is 0.5. Give what it had" in line


# Texts.


def test_what_is_no_text_is_refused_by_name_byte_and_kind(
    arguments, few, capsys, caplog, tmp_path: Path
):
    table = pa.table({"text": ["w1 w2"]})
    pq.write_table(table, tmp_path / "a.pq")
    files = {
        "b.txt.gz": gzip.compress(b"w1 w2 w3"),
        "c.txt": "w1 caf\xe9 w2".encode("latin-1"),
        "d.txt": "w1 w2".encode("utf-16"),
        "e.safetensors": b'\x40\x00\x00\x00\x00\x00\x00\x00{"a": 1}',
        "f.jsonl": b'{"text": "w1"}\n\xff',
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name, said in (
        ("a.pq", ["a Parquet file", "Name it *.parquet"]),
        ("b.txt.gz", ["compressed by gzip", "byte 1 is 0x8b"]),
        ("c.txt", ["byte 6 is 0xe9", "iconv -f latin1 -t utf-8"]),
        ("d.txt", ["UTF-16", "byte 0 is 0xff"]),
        ("e.safetensors", ["a safetensors file", "byte 1 is 0x00"]),
        ("f.jsonl", ["byte 15 is 0xff"]),
    ):
        # The bad file is named although it comes last, and nothing was trained on.
        mixed = arguments(data=few)
        line = refused(capsys, caplog, "train", *mixed, "--data", str(few), str(tmp_path / name))
        assert f"{tmp_path / name} is not text" in line
        assert "data is UTF-8 text, .jsonl (an object in each line) or .parquet" in line
        assert all(words in line for words in said), line


def test_hidden_files_are_left_out_and_what_was_read_is_counted(
    arguments, few, capsys, caplog, tmp_path: Path
):
    folder = tmp_path / "text"
    for name in (".git/objects/x.txt", ".hidden.txt", "sub/.cache/y.txt", "sub/a.txt", "b.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(few, folder / name)
    with caplog.at_level(logging.INFO):
        assert main(["train", *arguments(data=folder)]) == 0
    count = 2 * len(few.read_text())
    assert f"data: {count:,} characters in 2 texts of 2 files" in caplog.text
    shutil.rmtree(folder / "sub")
    (folder / "b.txt").unlink()
    assert "all files in it are hidden" in refused(capsys, caplog, "train", *arguments(data=folder))
    named = arguments(data=folder / ".git", output=tmp_path / "named")
    assert main(["train", *named]) == 0  # who names it means it
