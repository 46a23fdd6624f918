"""Text files to packed sequences, and their order."""

import json
from pathlib import Path

import pytest
import torch

from student_trainer import data
from tests.support import tiny


@pytest.fixture
def tokenizer():
    return tiny.make_tokenizer(["a", "b", "c"])


def test_documents_are_joined_with_their_end_token_and_cut(tmp_path: Path, tokenizer):
    (tmp_path / "1.txt").write_text("a b c")
    lines = [{"text": "b b"}, {"text": "c"}]
    (tmp_path / "2.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    files = data.find_files([str(tmp_path)])
    packed = data.pack(files, tokenizer, 4, label="data")
    a, b, c, end = 2, 3, 4, 1
    assert packed.tolist() == [[a, b, c, end], [b, b, end, c]]  # the last end fills no sequence


def test_patterns_name_files_once_and_sorted(tmp_path: Path):
    for name in ("b.txt", "a.txt", "x/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = data.find_files([str(tmp_path / "*.txt"), str(tmp_path)])
    assert [path.name for path in found] == ["a.txt", "b.txt", "c.txt"]
    with pytest.raises(FileNotFoundError, match="nothing"):
        data.find_files([str(tmp_path / "nothing*")])


def test_too_little_text_is_said(tmp_path: Path, tokenizer):
    (tmp_path / "1.txt").write_text("a b")
    with pytest.raises(ValueError, match=r"held-out data has 3 tokens.*100"):
        data.pack([tmp_path / "1.txt"], tokenizer, 100, label="held-out data")


def test_a_bad_json_line_is_named(tmp_path: Path, tokenizer):
    (tmp_path / "1.jsonl").write_text('{"text": "a"}\n{"txt": "a"}\n')
    with pytest.raises(ValueError, match="line 2"):
        data.pack([tmp_path / "1.jsonl"], tokenizer, 2, label="data")


def test_the_order_is_the_seeds_and_every_epoch_sees_everything():
    sequences = torch.arange(10)[:, None].expand(10, 3)
    one, again, other = (
        torch.cat(
            [b["input_ids"][:, 0] for b in data.batches(sequences, batch_size=4, steps=5, seed=s)]
        )
        for s in (0, 0, 1)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert sorted(one[:10].tolist()) == list(range(10))
    assert sorted(one[10:].tolist()) == list(range(10))
