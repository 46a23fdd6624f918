"""What becomes a prompt: of text files, lines, columns, chats, ids, and texts that a teacher wrote."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from student_trainer.data.columns import Columns, DocumentReader
from student_trainer.data.prompts import PromptReader, PromptSettings
from student_trainer.data.sources import find_shards
from tests.student_trainer.data.conftest import write_jsonl
from tests.support import tiny


def read(tokenizer: Any, *sources: Path, **settings: Any) -> tuple[list[list[int]], PromptReader]:
    reader = PromptReader(tokenizer, PromptSettings(**{"longest": 8, **settings}))
    shards = find_shards([str(one) for one in sources], split="train", streaming=False)
    return [prompt.tolist() for prompt in reader.read(shards)], reader


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text).input_ids


def test_a_text_file_is_one_prompt_and_its_lines_are_several(tokenizer, tmp_path: Path):
    path = tmp_path / "some.txt"
    path.write_text("w1 w2 w3\n\nw4 w5\nw1 w2 w3\n")
    found, _ = read(tokenizer, path)
    assert found == [ids(tokenizer, "w1 w2 w3 w4 w5 w1 w2 w3")]
    found, reader = read(tokenizer, path, split_lines=True)
    assert found == [ids(tokenizer, "w1 w2 w3"), ids(tokenizer, "w4 w5")]
    assert reader.counts.repeated == 1
    assert "1 of 3 prompts are the same as one before" in reader.counts.describe(8)[0]


def test_long_texts_are_cut_or_give_several_prompts(tokenizer, tmp_path: Path):
    path = tmp_path / "long.txt"
    path.write_text(" ".join(f"w{number}" for number in range(20)))
    whole = ids(tokenizer, path.read_text())
    found, reader = read(tokenizer, path)
    assert found == [whole[:8]]
    assert reader.counts.cut == 1
    assert read(tokenizer, path, num_tokens=3)[0] == [whole[:3]]
    found, _ = read(tokenizer, path, num_tokens=4, every=6)
    assert found == [whole[0:4], whole[6:10], whole[12:16]]
    assert read(tokenizer, path, num_tokens=4, every=8)[0] == [
        whole[at : at + 4] for at in (0, 8, 16)
    ]


def test_columns_are_found_and_an_end_token_is_not_part_of_a_prompt(tokenizer, tmp_path: Path):
    rows = [{"prompt": "w1 w2 <eos>", "text": "w9", "answer": "w3"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read(tokenizer, path)[0] == [ids(tokenizer, "w1 w2")]
    assert read(tokenizer, path, column="answer")[0] == [ids(tokenizer, "w3")]
    of_ids = write_jsonl(tmp_path / "ids.jsonl", [{"input_ids": [5, 6, 7]}])
    assert read(tokenizer, of_ids)[0] == [[5, 6, 7]]
    table = datasets.Dataset.from_list([{"text": "w4 w5"}, {"text": "w6"}])
    table.to_parquet(tmp_path / "some.parquet")
    found, _ = read(tokenizer, tmp_path / "some.parquet")
    assert found == [ids(tokenizer, "w4 w5"), ids(tokenizer, "w6")]


def test_chats_end_where_the_assistant_begins(tokenizer, tmp_path: Path):
    tokenizer = tiny.make_tokenizer([f"w{number}" for number in range(60)])
    tokenizer.chat_template = (
        "{% for one in messages %}{{ one.content }} w0 {% endfor %}"
        "{% if add_generation_prompt %}w7{% endif %}"
    )
    first, answer, second = (
        {"role": role, "content": content}
        for role, content in (("user", "w1"), ("assistant", "w2"), ("user", "w3"))
    )
    rows = [
        {"messages": [first]},
        {"messages": [first, answer]},
        {"messages": [first, answer, second, answer]},
        {"messages": [first, answer] * 4 + [second]},
    ]
    path = write_jsonl(tmp_path / "chats.jsonl", rows)
    found, reader = read(tokenizer, path)
    assert found == [ids(tokenizer, "w1 w0 w7"), ids(tokenizer, "w1 w0 w2 w0 w3 w0 w7")]
    assert (reader.counts.repeated, reader.counts.too_long) == (1, 1)
    assert "a chat is not cut" in reader.counts.describe(8)[0]
    path = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": [first], "completion": [answer]}])
    assert read(tokenizer, path)[0] == [ids(tokenizer, "w1 w0 w7")]
    path = write_jsonl(tmp_path / "none.jsonl", [{"messages": [answer]}])
    with pytest.raises(ValueError, match="line 1: there is no message before the assistant's"):
        read(tokenizer, path)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="--chat-template FILE"):
        read(tokenizer, tmp_path / "chats.jsonl")


def test_prompts_of_written_texts_are_their_beginnings_and_what_follows_is_trained(
    tokenizer, tmp_path: Path
):
    row = {"input_ids": [4, 5, 6, 7], "prompt_tokens": 3, "token_ids": [7], "text": "w5"}
    path = write_jsonl(tmp_path / "written.jsonl", [row, {**row, "input_ids": [4, 5, 6, 8]}])
    found, reader = read(tokenizer, path)
    assert found == [[4, 5, 6]]
    assert reader.counts.repeated == 1
    columns = Columns.find(row, "row 1", "", "")
    assert (columns.form, columns.trained, columns.is_masked) == ("written", "completion", True)
    (document,) = DocumentReader(tokenizer).read([("row 1", row)], columns)
    assert document.labels is not None
    assert document.labels.tolist() == [-100, -100, -100, 7]
    assert not document.may_split
    columns = Columns.find(row, "row 1", "", "all")
    (document,) = DocumentReader(tokenizer).read([("row 1", row)], columns)
    assert document.labels is None
    with pytest.raises(ValueError, match="there it can be completion or all"):
        Columns.find(row, "row 1", "", "assistant")


@pytest.mark.parametrize(
    ("row", "column", "words"),
    [
        ({"text": "w1", "messages": []}, "", "has messages and text, and only one"),
        ({"question": "w1"}, "", "the columns are question. Name the one to read: --prompt-column"),
        ({"question": "w1"}, "prompt", "has no column 'prompt'; it has question"),
        ({"question": 3}, "question", "must hold text, a list of messages or a list of token ids"),
        ({"input_ids": [-1]}, "", "ids are 0 to"),
        ({"input_ids": []}, "", ""),
    ],
)
def test_what_is_no_prompt_is_named(tokenizer, tmp_path: Path, row, column, words):
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    if not words:
        found, reader = read(tokenizer, path)
        assert (found, reader.counts.empty) == ([], 1)
        assert "they have no token" in reader.counts.describe(8)[0]
        return
    with pytest.raises(ValueError, match=words):
        read(tokenizer, path, column=column)


def test_a_record_as_data_is_read_in_its_order_without_its_targets(tokenizer, tmp_path: Path):
    folder = tmp_path / "set"
    (folder / "__record__" / "quarantine").mkdir(parents=True)
    for number, start in ((1, 20), (0, 10)):
        rows = [
            {
                "key": b"k",
                "row_mask": None,
                "targets": [b"x" * 1000],
                "input_ids": [start, start + 1],
            }
        ]
        shard = datasets.Dataset.from_list(rows)
        shard.to_parquet(folder / f"shard-0000{number}-ab.parquet")
        shard.to_parquet(folder / "__record__" / "quarantine" / f"shard-0000{number}-ab.parquet")
    (folder / "__record__" / "manifest-1.json").write_text(json.dumps({}))
    for source in (str(folder), f"file://{folder}"):
        shards = find_shards([source], split="", streaming=False)
        found = [row for shard in shards for _, row in shard.rows()]
        assert [row["input_ids"] for row in found] == [[10, 11], [20, 21]]
        assert {*found[0]} == {"input_ids"}
