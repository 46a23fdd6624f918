"""Files that others wrote, damaged or made up: each is the error that names it, whatever is in it."""

import functools
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import xxhash

from student_trainer import IncompatibleTeacher, LocalTeacher, Recorded, RecordError
from student_trainer.cli import main
from student_trainer.config import TrainConfig
from student_trainer.data import documents
from student_trainer.hf import checkpoints
from student_trainer.record.folder import BESIDE
from student_trainer.record.schema import METADATA, SCHEMA
from student_trainer.report import drawing, page
from student_trainer.report.build import make_report, write_report
from student_trainer.training import checkpoints as run_checkpoints
from student_trainer.training.corpus import read_tokenizer
from student_trainer.training.progress import Counts
from student_trainer.training.results import Results
from student_trainer.training.students import make_student
from tests.support import tiny
from tests.support.made_up import make_results

VOCAB = 301
DEEP = "[" * 100_000 + "]" * 100_000
DIGITS = "9" * 5000
VALUES = {
    "nested too deep": DEEP,
    "objects nested too deep": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "too many digits": DIGITS,
    "infinite": "1e999",
    "many digits": "9" * 400,
    "negative": "-1",
    "not a number": "NaN",
    "half a surrogate pair": '"\\ud800"',
    "a null byte": '"\\u0000"',
    "nothing": "null",
    "a list": "[]",
    "an object": "{}",
    "true": "true",
}
"""As JSON; in the place of a whole file or of a value in it."""
FILES = {
    **{name: text.encode() for name, text in VALUES.items()},
    "empty": b"",
    "null bytes": bytes(64),
    "not UTF-8": b'{"a": "\xff\xfe"}',
}


@pytest.fixture(scope="module")
def live() -> LocalTeacher:
    return LocalTeacher(tiny.make_model("Gemma2", VOCAB))


def record(folder: Path, live: LocalTeacher) -> Path:
    """Records one sequence; returns the shard."""
    with Recorded(folder, live) as made:
        list(made.stream([torch.arange(9)]))
    (shard,) = folder.glob("shard-*.parquet")
    return shard


@pytest.mark.parametrize("what", FILES)
def test_a_manifest_that_is_none_is_named_and_put_aside(
    live: LocalTeacher, tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
):
    record(tmp_path, live)
    path = tmp_path / BESIDE / "manifest-0badc0de.json"
    path.write_bytes(FILES[what])
    with caplog.at_level(logging.WARNING), Recorded(tmp_path) as replayed:
        assert replayed.get(torch.arange(9)).num_rows == 8
        assert f"{path.name} in {tmp_path} is damaged" in caplog.text
        assert replayed.counters.quarantined == 1
    with Recorded(tmp_path, live):
        assert not path.exists()


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("key", ["shards", "lost", "name"])
def test_a_manifest_of_wrong_values_is_named_or_taken_as_it_is(
    live: LocalTeacher, tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str, value: str
):
    record(tmp_path, live)
    path = tmp_path / BESIDE / "manifest-0badc0de.json"
    text = {
        "shards": f'{{"shards": {value}, "lost": []}}',
        "lost": f'{{"shards": [], "lost": {value}}}',
        "name": f'{{"shards": [{{"name": {value}}}], "lost": []}}',
    }[key]
    path.write_text(text)
    with caplog.at_level(logging.WARNING), Recorded(tmp_path) as replayed:
        assert replayed.get(torch.arange(9)).num_rows == 8
    is_text, is_list = value.startswith('"'), value == "[]"
    is_right = is_text if key == "name" else is_list
    assert (f"{path.name} in {tmp_path} is damaged" in caplog.text) == (not is_right)


def resealed(shard: Path, metadata: bytes | None = None, **columns: list[Any]) -> Path:
    """The shard with other content under the name that this content has: as if it was sealed so."""
    table = pq.read_table(shard)
    for name, values in columns.items():
        place = SCHEMA.get_field_index(name)
        table = table.set_column(
            place, SCHEMA.field(name), pa.array(values, SCHEMA.field(name).type)
        )
    kept = pq.read_metadata(shard).metadata[METADATA.encode()]
    with pq.ParquetWriter(shard, SCHEMA, store_schema=False, write_page_checksum=True) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({METADATA: kept if metadata is None else metadata})
    digest = xxhash.xxh3_128_hexdigest(shard.read_bytes())
    return shard.rename(shard.with_name(f"{shard.name.rpartition('-')[0]}-{digest}.parquet"))


@pytest.mark.parametrize("what", FILES)
def test_a_shard_whose_metadata_is_none_is_a_record_error_that_names_it(
    live: LocalTeacher, tmp_path: Path, what: str
):
    shard = resealed(record(tmp_path, live), FILES[what])
    with pytest.raises(RecordError, match=shard.name):
        Recorded(tmp_path)


def signed(content: dict[str, Any], key: str, value: str) -> bytes | None:
    """The provenance with another value, and the digest of that; None if it can have none."""
    try:
        changed = {**content, key: json.loads(value)}
        digest = xxhash.xxh3_128_hexdigest(json.dumps(changed, sort_keys=True).encode())
    except (ValueError, RecursionError):
        changed, digest = {}, ""
    kept = {name: json.dumps(one) for name, one in {**content, "digest": digest}.items()}
    kept[key] = value
    return ("{" + ", ".join(f'"{name}": {text}' for name, text in kept.items()) + "}").encode()


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("key", ["teacher", "spec", "temperature", "id_tables"])
def test_a_shard_of_another_provenance_is_a_record_error_that_names_it(
    live: LocalTeacher, tmp_path: Path, key: str, value: str
):
    shard = record(tmp_path, live)
    content = json.loads(pq.read_metadata(shard).metadata[METADATA.encode()])
    del content["digest"]
    shard = resealed(shard, signed(content, key, value))
    if (key, value) == ("id_tables", "[]"):
        Recorded(tmp_path).close()
        return
    if (key, value) == ("teacher", "{}"):
        with pytest.raises(IncompatibleTeacher, match="format versions"):
            Recorded(tmp_path)
        return
    with pytest.raises(RecordError, match=shard.name):
        Recorded(tmp_path)


@pytest.mark.parametrize("column", ["key", "seed", "epoch"])
def test_a_shard_with_a_row_of_nobody_is_a_record_error_that_names_it(
    live: LocalTeacher, tmp_path: Path, column: str
):
    shard = resealed(record(tmp_path, live), **{column: [None]})
    with pytest.raises(RecordError, match=shard.name):
        Recorded(tmp_path)


def test_a_shard_with_a_row_without_targets_is_a_record_error_that_names_it(
    live: LocalTeacher, tmp_path: Path
):
    shard = resealed(record(tmp_path, live), targets=[None])
    with Recorded(tmp_path) as replayed, pytest.raises(RecordError, match=shard.name):
        replayed.get(torch.arange(9))


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one file."""
    checkpoint = tmp_path_factory.mktemp("run") / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "weights").write_bytes(b"weights")
    run_checkpoints.seal(checkpoint, {"seed": 1}, Counts())
    return checkpoint


@pytest.mark.parametrize("what", FILES)
def test_a_checkpoint_whose_run_json_is_none_is_named(sealed: Path, tmp_path: Path, what: str):
    checkpoint = Path(shutil.copytree(sealed, tmp_path / sealed.name))
    (checkpoint / "run.json").write_bytes(FILES[what])
    with pytest.raises(ValueError, match=rf"{checkpoint / 'run.json'} is damaged"):
        run_checkpoints.check(checkpoint, {"seed": 1})


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("key", ["file_digests", "counts", "run", "seed"])
def test_a_checkpoint_with_wrong_values_is_named(
    sealed: Path, tmp_path: Path, key: str, value: str
):
    checkpoint = Path(shutil.copytree(sealed, tmp_path / sealed.name))
    document = json.loads((checkpoint / "run.json").read_text())
    text = json.dumps({**document, key: MARK}).replace(f'"{MARK}"', value)
    (checkpoint / "run.json").write_text(text)
    with pytest.raises(ValueError, match=rf"{checkpoint / 'run.json'} is damaged"):
        run_checkpoints.check(checkpoint, {"seed": 1})
    assert run_checkpoints.find_newest(tmp_path) == checkpoint, "nothing was removed"


@pytest.mark.parametrize("what", FILES)
def test_results_that_are_none_are_named(tmp_path: Path, what: str):
    (tmp_path / "results.json").write_bytes(FILES[what])
    with pytest.raises(ValueError, match=r"results\.json is damaged, or of another version"):
        Results.load(tmp_path)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the values of a JSON document are, of lists the first only."""
    found = [path]
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else list(enumerate(value))[:1]
        for key, one in items:
            found += places(one, (*path, key))
    return found


MARK = "0d15ea5e"
DOCUMENT = json.loads(make_results(shuffled=5.0).model_dump_json())


@pytest.mark.parametrize("value", [*VALUES.values(), None], ids=[*VALUES, "left out"])
def test_results_of_wrong_values_are_named_or_can_be_shown(
    tmp_path: Path, value: str | None, monkeypatch: pytest.MonkeyPatch
):
    told = []
    # Most pictures are the same whatever is wrong: each is drawn once.
    drawn = functools.cache(lambda picture, key: drawing.draw_svg(json.loads(picture), key))
    monkeypatch.setattr(page, "draw_svg", lambda picture, key: drawn(json.dumps(picture), key))
    for place in places(DOCUMENT)[1:]:
        document = json.loads(json.dumps(DOCUMENT))
        inner = document
        for key in place[:-1]:
            inner = inner[key]
        if value is None:
            del inner[place[-1]]
        else:
            inner[place[-1]] = MARK
        text = json.dumps(document)
        (tmp_path / "results.json").write_text(text.replace(f'"{MARK}"', value or ""))
        try:
            results = Results.load(tmp_path)
        except ValueError as error:
            told.append(str(error))
            continue
        write_report(tmp_path / "report.html", make_report({f"{place} is {value}": results}))
    assert all("results.json is damaged" in one for one in told)


@pytest.mark.parametrize("what", [name for name in FILES if name != "empty"])
def test_a_line_of_text_that_is_none_is_named(tmp_path: Path, what: str):
    path = tmp_path / "text.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + FILES[what] + b"\n")
    line = rf"{path}, line 2: expected an object with a 'text'"
    no_text = rf"{path} is not text: byte \d+ is 0x(00|ff)"
    with pytest.raises(ValueError, match=f"{line}|{no_text}"):
        list(documents([path]))


@pytest.mark.parametrize("value", [*VALUES.values()], ids=VALUES)
def test_a_text_that_is_none_is_named(tmp_path: Path, value: str):
    path = tmp_path / "text.jsonl"
    path.write_text(f'{{"text": {value}}}\n')
    if value.startswith('"'):
        (text,) = documents([path])
        text.encode()  # what cannot be encoded, no tokenizer takes
        return
    with pytest.raises(ValueError, match=rf"{path}, line 1: expected an object with a 'text'"):
        list(documents([path]))


def test_a_text_with_unusual_line_ends_is_one_text(tmp_path: Path):
    texts = ["one\u2028two\u2029three\x85four", "five"]
    path = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_bytes("\r\n".join(lines).encode())
    assert list(documents([path])) == texts


@pytest.mark.parametrize("what", [name for name in FILES if name != "an object"])
def test_a_checkpoint_that_does_not_say_its_teacher_is_named(tmp_path: Path, what: str):
    path = tmp_path / checkpoints.IDENTITY_FILE
    path.write_bytes(FILES[what])
    with pytest.raises(ValueError, match=rf"{path} is damaged"):
        checkpoints.check_identity(tmp_path, {"teacher_fingerprint": "a"})


@pytest.mark.parametrize("what", ["nested too deep", "too many digits", "empty", "not UTF-8"])
def test_a_trainers_checkpoint_that_cannot_be_read_is_left_out(tmp_path: Path, what: str):
    for step, content in ((1, b"{}"), (2, FILES[what])):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_bytes(content)
    assert checkpoints.find_newest_complete(tmp_path) == str(tmp_path / "checkpoint-1")


@pytest.mark.parametrize(
    "read",
    [
        read_tokenizer,
        lambda folder: make_student(
            TrainConfig(student=folder, data=["*"], output=folder, record="targets")
        ),
    ],
    ids=["tokenizer", "model"],
)
def test_a_student_whose_config_is_nested_too_deep_is_named(
    tmp_path: Path, read: Callable[[Path], object]
):
    (tmp_path / "config.json").write_text(DEEP)
    with pytest.raises(ValueError, match=str(tmp_path)):
        read(tmp_path)


@pytest.mark.parametrize("value", ["[" * 5000, "0x" + "f" * 5000, "1e999", "9" * 5000, '"\\u0000"'])
@pytest.mark.parametrize("key", ["learning_rate", "steps", "device", "data"])
def test_a_file_of_options_says_what_is_wrong_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: str
):
    path = tmp_path / "distill.toml"
    path.write_text(f"{key} = {value}\n")
    assert main(["train", f"@{path}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("student-trainer: ") for line in lines)
    taken = {("data", '"\\u0000"'), ("device", '"\\u0000"'), ("device", "1e999"), ("data", "1e999")}
    if (key, value) not in taken:  # a text is any text
        assert any(str(path) in line for line in lines)
