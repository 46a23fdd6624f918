"""Documents in rows: nothing lost but what is counted, and no document sees another."""

import numpy as np
import pytest
import torch

from student_trainer import LocalTeacher
from student_trainer.data.collate import Collator
from student_trainer.data.columns import Document
from student_trainer.data.packing import OPEN_ROWS, Counts, lay_out
from student_trainer.teachers.layout import Layout
from tests.conftest import one_torch_thread
from tests.support import tiny

one_thread = pytest.fixture(autouse=True)(one_torch_thread)
L = 16


def documents(count: int, longest: int = L, seed: int = 0) -> list[Document]:
    """Documents of 2 to `longest` tokens; every second one has a part that is not trained."""
    random = np.random.default_rng(seed)
    found = []
    for number in range(count):
        ids = random.integers(2, 64, random.integers(2, longest + 1), dtype=np.int32)
        labels = np.where(np.arange(len(ids)) < len(ids) // 2, np.int32(-100), ids)
        found.append(Document(ids, labels if number % 2 else None, may_split=number % 2 == 0))
    return found


def pairs(texts: list[Document], length: int = L) -> list[tuple[tuple[int, ...], int]]:
    """(context, label) of each trained row of documents that are cut after `length` tokens."""
    found = []
    for one in texts:
        for at in range(1, min(len(one.ids), length)):
            if one.labels is None or one.labels[at] != -100:
                found.append((tuple(one.ids[:at].tolist()), int(one.ids[at])))
    return sorted(found)


@pytest.mark.parametrize("packing", ["isolate", "pad"])
def test_what_is_trained_are_the_documents_rows_whatever_they_are_packed_in(packing):
    texts = documents(300)
    rows = list(lay_out(texts, L, packing, Counts(), has_labels=True))
    found = []
    for start in range(0, len(rows), 7):
        batch = Collator(0)(rows[start : start + 7])
        assert batch["input_ids"].shape == batch["labels"].shape
        for piece in Layout.of(batch).pieces():
            ids, trained = piece.token_ids, piece.rows
            found += [(tuple(ids[: at + 1].tolist()), int(ids[at + 1])) for at in trained.tolist()]
    assert sorted(found) == pairs(texts)
    assert all(len(row["input_ids"]) <= L for row in rows)


def test_isolated_documents_leave_little_room_and_are_never_cut():
    texts = documents(2000, seed=1)
    rows = list(lay_out(texts, L, "isolate", Counts(), has_labels=True))
    tokens = sum(len(one.ids) for one in texts)
    assert sum(len(row["input_ids"]) for row in rows) == tokens
    assert tokens / (len(rows) * L) > 0.95
    starts = sum(int((row["position_ids"] == 0).sum()) for row in rows)
    assert starts == len(texts)
    assert len(rows) > OPEN_ROWS


def test_a_student_and_a_teacher_see_each_isolated_document_alone():
    model = tiny.make_model("Qwen3", 64).eval()
    texts = documents(9, seed=2)
    batch = Collator(0)(list(lay_out(texts, L, "isolate", Counts())))
    assert "attention_mask" not in batch
    assert len(batch["input_ids"]) > 1
    assert int(batch["labels"].eq(-100).sum()) > 0  # a row that is not full
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    with torch.inference_mode():
        logits = model(**inputs, use_cache=False).logits
    layout = Layout.of(batch)
    alone = []
    for piece in layout.pieces():
        ids, rows = piece.token_ids, piece.rows
        alone.append(tiny.dense_logits(model, ids)[rows])
    rows = layout.trained.flatten().nonzero()[:, 0]
    torch.testing.assert_close(
        logits.flatten(0, 1)[rows].double(), torch.cat(alone), atol=1e-4, rtol=1e-4
    )
    ((_, targets),) = LocalTeacher(model).stream_batches([batch], targets="dense:f32")
    expected = torch.cat(alone).log_softmax(-1)
    torch.testing.assert_close(targets.logprobs.double(), expected, atol=1e-4, rtol=1e-4)


def test_a_teacher_is_asked_for_trained_rows_only():
    texts = [one for one in documents(40, seed=3) if one.labels is not None]
    batch = Collator(0)(list(lay_out(texts, L, "pad", Counts(), has_labels=True)))
    model = tiny.make_model("Qwen3", 64)
    ((_, targets),) = LocalTeacher(model).stream_batches([batch], targets="top_k:1")
    assert targets.num_rows == len(pairs(texts)) < sum(len(one.ids) - 1 for one in texts) * 0.7


def test_what_is_too_long_is_cut_or_split_and_said():
    text = Document(np.arange(2, 2 + 2 * L + 1, dtype=np.int32))
    late = np.where(np.arange(2 * L) < L, np.int32(-100), np.int32(5))
    chats = [
        Document(np.full(2 * L, 5, dtype=np.int32), may_split=False),
        Document(
            np.full(2 * L, 5, dtype=np.int32), late, may_split=False
        ),  # trained behind the cut
    ]
    counts = Counts()
    rows = list(lay_out([text, *chats], L, "isolate", counts, has_labels=True))
    # A token alone would train nothing, so the text is split one token earlier.
    assert [len(row["input_ids"]) for row in rows] == [L, L - 1, L, 2]
    assert counts.describe(L) == [
        "2 of 3 documents are longer than 16 tokens and were cut there; 32 of 97 tokens are not used",
        "1 of 3 documents are longer than 16 tokens and were split into several",
        "1 of 3 documents were left out: nothing in their first 16 tokens is to be trained",
    ]
    counts = Counts()
    assert len(list(lay_out([text], L, "pad", counts))) == 1
    assert counts.cut_tokens == L + 1


def test_concatenated_documents_are_cut_wherever_a_row_is_full():
    texts = documents(50, longest=3 * L, seed=4)
    whole = np.concatenate([one.ids for one in texts])
    rows = list(lay_out(texts, L, "concatenate", Counts()))
    kept = list(lay_out(texts, L, "concatenate", Counts(), keep_rest=True))
    found = np.concatenate([row["input_ids"] for row in rows])
    assert found.tolist() == whole[: len(found)].tolist()
    assert 0 < len(whole) - len(found) < L
    assert np.concatenate([row["input_ids"] for row in kept]).tolist() == whole.tolist()
    untrained = Document(np.full(L, 5, dtype=np.int32), np.full(L, -100, dtype=np.int32))
    counts = Counts()
    assert not list(lay_out([untrained], L, "concatenate", counts, has_labels=True))
    assert "1 rows of 16 tokens were left out" in counts.describe(L)[0]
