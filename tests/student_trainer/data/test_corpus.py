"""Data as people have it, as the rows of a run: read once, held out, mixed, from anywhere."""

import sys
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pytest
import torch
import transformers

from student_trainer import data
from student_trainer.data import sources
from student_trainer.data.columns import DocumentReader
from student_trainer.training.corpus import Corpus, check_ids
from tests.conftest import FORKSERVER
from tests.student_trainer.data.conftest import LENGTH, read, texts, write_jsonl

CHATS = [
    {"messages": [{"role": "user", "content": one}, {"role": "assistant", "content": other}]}
    for one, other in zip(texts(80, 1), texts(80, 2), strict=True)
]


def ids_of(rows: Any) -> list[list[int]]:
    return [row["input_ids"].tolist() for row in rows]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Text in two files, and a line of JSON per text in a third."""
    found = tmp_path / "texts"
    found.mkdir()
    (found / "a.txt").write_text("\n".join(texts(40, 3)))
    (found / "c.txt").write_text("\n".join(texts(40, 4)))
    write_jsonl(found / "b.jsonl", [{"text": one} for one in texts(60, 5)])
    return found


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """A folder that is laid out like a data set of the hub: a split in two files, and another."""
    found = tmp_path / "set"
    found.mkdir()
    rows = [{"text": one} for one in texts(90, 6)]
    for name, some in (("train-0", rows[:40]), ("train-1", rows[40:80]), ("test-0", rows[80:])):
        datasets.Dataset.from_list(some).to_parquet(found / f"{name}0000-of-00002.parquet")
    return found


def test_text_is_packed_and_held_out_as_ever(tokenizer, folder):
    corpus = read(tokenizer, folder)
    sequences = data.pack(data.find_files([str(folder)]), tokenizer, LENGTH, label="data")
    is_held_out = torch.arange(len(sequences)) % 20 == 19
    assert ids_of(corpus.train) == sequences[~is_held_out].tolist()
    assert ids_of(corpus.held_out) == sequences[is_held_out].tolist()
    assert corpus.digest == data.digest(sequences[~is_held_out])
    assert corpus.held_out_digest == data.digest(sequences[is_held_out])
    assert corpus.num_tokens == sequences[~is_held_out].numel()
    assert corpus.num_trained_tokens == sequences[~is_held_out][:, 1:].numel()
    (batch,) = (corpus.collate([corpus.train[number] for number in range(5)]),)
    assert {*batch} == {"input_ids"}
    assert batch["input_ids"].dtype == torch.int64
    check_ids(corpus, 62)
    with pytest.raises(ValueError, match=r"data has token 'w59', id 61; .* ids 0 to 60"):
        check_ids(corpus, 61)


def test_what_was_tokenized_once_is_not_read_again(tokenizer, folder, tmp_path, monkeypatch):
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [{"text": one} for one in texts(60, 8)])
    first = read(tokenizer, folder, held_out=[str(held_out)])

    def never(*_: Any) -> Any:
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr(DocumentReader, "read", never)
        patch.setattr(sources.FileShard, "rows", never)
        again = read(tokenizer, folder, held_out=[str(held_out)])
        assert (again.digest, again.held_out_digest) == (first.digest, first.held_out_digest)
        assert ids_of(again.train) == ids_of(first.train)
        for changed in ({"packing": "isolate"}, {"held_out_sequences": 2}):
            with pytest.raises(AssertionError, match="read again"):
                read(tokenizer, folder, held_out=[str(held_out)], **changed)
        tokenizer.add_tokens(["w60"])
        with pytest.raises(AssertionError, match="read again"):
            read(tokenizer, folder, held_out=[str(held_out)])
    (folder / "a.txt").write_text("w1 w2 w3")
    assert read(tokenizer, folder, held_out=[str(held_out)]).digest != first.digest


def read_elsewhere(folder: Path, tokenizer: Path, found: Any) -> None:
    """Runs in a process of its own: says what was read, and which files were opened for it."""
    opened: list[str] = []
    sys.addaudithook(lambda event, args: event == "open" and opened.append(str(args[0])))
    corpus = read(transformers.AutoTokenizer.from_pretrained(tokenizer), folder)
    found.put((corpus.digest, {Path(one).name for one in opened if one.startswith(str(folder))}))


def test_another_process_finds_what_this_one_tokenized(tokenizer, folder, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    expected = read(transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer"), folder)
    found = FORKSERVER.Queue()
    process = FORKSERVER.Process(
        target=read_elsewhere, args=(folder, tmp_path / "tokenizer", found)
    )
    process.start()
    assert found.get(timeout=300) == (expected.digest, set())
    process.join()


def test_chats_are_padded_and_only_the_assistant_is_trained(tokenizer, tmp_path, caplog):
    path = write_jsonl(tmp_path / "chats.jsonl", CHATS)
    corpus = read(tokenizer, path)
    assert len(corpus.train) + len(corpus.held_out) < len(CHATS)
    assert any(
        "documents are longer than 16 tokens and were cut there" in one for one in corpus.notes
    )
    assert any("were left out: nothing in their first 16" in one for one in corpus.notes)
    assert all(note in caplog.messages for note in corpus.notes)
    assert read(tokenizer, path).notes == corpus.notes  # from the cache too
    rows = [row for row in corpus.train]
    batch = corpus.collate(rows)
    assert batch["input_ids"].shape == (len(rows), LENGTH)
    assert batch["attention_mask"].sum() == corpus.num_tokens
    assert (batch["labels"] >= 0).sum() == corpus.num_trained_tokens
    everything = read(tokenizer, path, trained_rows="all", packing="isolate")
    assert everything.digest != corpus.digest
    rows = list(everything.train)
    assert "labels" not in rows[0]
    assert everything.num_trained_tokens == sum(
        int((row["position_ids"] > 0).sum()) for row in rows
    )


def test_a_template_of_ones_own_is_used_and_goes_with_the_student(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "chats.jsonl", CHATS)
    template = tmp_path / "template.jinja"
    template.write_text(tokenizer.chat_template.replace("w1", "w2 w2"))
    corpus = read(tokenizer, path, chat_template=str(template))
    assert corpus.tokenizer.chat_template == template.read_text() != tokenizer.chat_template
    assert corpus.digest != read(tokenizer, path).digest
    with pytest.raises(ValueError, match="--chat-template nowhere cannot be read"):
        read(tokenizer, path, chat_template="nowhere")


def test_parquet_and_urls_give_what_local_text_gives(tokenizer, folder, tmp_path):
    lines = folder / "b.jsonl"
    expected = read(tokenizer, lines).digest
    rows = datasets.Dataset.from_list([{"text": one} for one in texts(60, 5)])
    rows.to_parquet(tmp_path / "b.parquet")
    assert read(tokenizer, tmp_path / "b.parquet").digest == expected
    for path in (lines, tmp_path / "b.parquet"):
        with fsspec.open(f"memory://bucket/{path.suffix[1:]}/{path.name}", "wb") as file:
            file.write(path.read_bytes())
    names = "bucket/jsonl", "bucket/jsonl/*", "bucket/jsonl/b.jsonl", "bucket/parquet/b.parquet"
    for name in names:
        assert read(tokenizer, f"memory://{name}").digest == expected, name
    with pytest.raises(FileNotFoundError, match="no file matches 'memory://bucket/none'"):
        read(tokenizer, "memory://bucket/none")
    with pytest.raises(ValueError, match="nosuch"):
        read(tokenizer, "nosuch://bucket/none")


def test_splits_of_a_data_set_are_read_by_name(tokenizer, parquet):
    corpus = read(tokenizer, parquet, held_out_split="test")
    names = [f"train-{number}0000-of-00002.parquet" for number in (0, 1)]
    parts = [read(tokenizer, parquet / name) for name in names]
    assert abs(corpus.num_tokens - sum(map(num_tokens, parts))) < 2 * LENGTH
    both = read(tokenizer, parquet, split="train", held_out=[str(parquet)], held_out_split="test")
    assert (both.digest, both.held_out_digest) == (corpus.digest, corpus.held_out_digest)
    with pytest.raises(ValueError, match=r"split 'dev': .*dev"):
        read(tokenizer, parquet, split="dev")
    with pytest.raises(ValueError, match="--held-out-split"):
        read(tokenizer, parquet, held_out=[str(parquet)])
    with pytest.raises(ValueError, match="--held-out-split test is for data sets"):
        read(tokenizer, parquet / "test-00000-of-00002.parquet", held_out_split="test")
    (parquet / "notes.txt").write_text("w1")
    with pytest.raises(ValueError, match=r"has Parquet files and notes.txt"):
        read(tokenizer, parquet)


def num_tokens(corpus: Corpus) -> int:
    return sum(len(ids) for ids in ids_of(corpus.train) + ids_of(corpus.held_out))


def test_a_mixture_draws_by_weight_and_leaves_nothing_out(tokenizer, folder, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", CHATS)
    corpus = read(tokenizer, folder, other, data_weights=[1, 3])
    apart = [read(tokenizer, folder), read(tokenizer, other)]
    rows = [tuple(ids) for ids in ids_of(corpus.train)]
    of_each = [{tuple(ids) for ids in ids_of(one.train)} for one in apart]
    assert {*rows} == of_each[0] | of_each[1]
    share = sum(row in of_each[1] for row in rows) / len(rows)
    assert 0.6 < share < 0.9
    held_out = {tuple(ids) for ids in ids_of(corpus.held_out)}
    assert held_out
    assert not held_out & {*rows}
    batch = corpus.collate([corpus.train[number] for number in range(len(corpus.train))])
    assert (batch["labels"] >= 0).sum() > 0
    text = next(number for number, row in enumerate(rows) if row in of_each[0])
    assert batch["labels"][text].tolist() == list(rows[text])
    assert read(tokenizer, folder, other, data_weights=[1, 3], seed=1).digest == corpus.digest
    with pytest.raises(ValueError, match="one number for each --data: 1, got 2"):
        read(tokenizer, folder, data_weights=[1, 3])


@pytest.mark.parametrize("name", ["made/up-data", "made/up-data:small", "made-up-data"])
def test_without_a_network_a_name_of_the_hub_says_what_to_do(tokenizer, monkeypatch, name):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"could not be fetched .*hf download made.*--data"):
        read(tokenizer, name)
    with pytest.raises(FileNotFoundError, match=r"no file matches 'corpus.txt'"):
        read(tokenizer, "corpus.txt")


def test_a_data_set_of_the_hub_in_the_cache_needs_no_network(
    tokenizer, parquet, tmp_path, monkeypatch
):
    """The cache is laid out as a download leaves it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    files = {"train": str(parquet / "train*.parquet"), "test": str(parquet / "test*.parquet")}
    builder = datasets.load_dataset_builder("parquet", data_files=files)
    builder.download_and_prepare()
    cached = tmp_path / "cache" / "org___texts" / "default" / "0.0.0" / ("0" * 40)
    cached.parent.mkdir(parents=True)
    Path(builder.cache_dir).rename(cached)
    for file in cached.glob("parquet-*"):
        file.rename(file.with_name(file.name.replace("parquet-", "texts-")))
    corpus = read(tokenizer, "org/texts", held_out_split="test")
    expected = read(tokenizer, parquet, held_out_split="test")
    assert corpus.digest == expected.digest
    assert corpus.held_out_digest == expected.held_out_digest
    with pytest.raises(ValueError, match="data set org/texts, split 'dev'"):
        read(tokenizer, "org/texts", split="dev")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "w1"}\n{"txt": "w1"}\n', "a.jsonl, line 2: expected text in 'text'"),
        ("a.jsonl", b'{"text": "w1"}\nno\n', "a.jsonl, line 2: expected an object"),
        ("a.txt", b"PAR1\x00", "is not text but a Parquet file.* Name it"),
        ("a.jsonl", b"", "data has 0 tokens; one sequence needs at least 16"),
        ("a.jsonl", b'{"text": "w1 w2"}\n', "data has 3 tokens; one sequence needs at least 16"),
        ("a.jsonl", b'{"text": "' + b"w1 " * 90 + b'"}\n', "data is too short to hold some out"),
        ("a.jsonl", b'{"input_ids": [5], "labels": [5]}\n', "1 documents, and none with anything"),
    ],
)
def test_damaged_or_too_little_data_is_named(tokenizer, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    packing = {"packing": "pad"} if b"labels" in content else {}
    with pytest.raises(ValueError, match=words):
        read(tokenizer, tmp_path / name, **packing)
