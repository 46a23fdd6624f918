"""Streams: nothing lost or repeated, whatever reads them, and the rest after a resume."""

from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from accelerate import skip_first_batches
from torch.utils.data import DataLoader

from student_trainer import LocalTeacher
from student_trainer.data import find_files
from student_trainer.data.columns import Columns, DocumentReader
from student_trainer.hf_trainer import DistillationArguments, DistillationTrainer
from tests.conftest import one_torch_thread
from tests.student_trainer.data.conftest import LENGTH, read, texts, write_jsonl
from tests.support import tiny

END = 1

one_thread = pytest.fixture(autouse=True)(one_torch_thread)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven files, the last of which has as much as all others."""
    found = tmp_path / "texts"
    found.mkdir()
    for number in range(7):
        rows = [{"text": one} for one in texts(12 if number < 6 else 72, number)]
        write_jsonl(found / f"{number}.jsonl", rows)
    return found


def stream(tokenizer: Any, folder: Path, repeat: bool = False, **settings: Any) -> Any:
    held_out = folder.parent / "held_out.jsonl"
    write_jsonl(held_out, [{"text": one} for one in texts(20, 99)])
    held = {"held_out": [str(held_out)]} if "held_out_split" not in settings else {}
    return read(tokenizer, folder, streaming=True, repeat=repeat, **held, **settings)


def load(corpus: Any, num_workers: int) -> DataLoader[Any]:
    return DataLoader(
        corpus.train, batch_size=4, num_workers=num_workers, collate_fn=corpus.collate
    )


def rows_of(batches: Any) -> list[tuple[int, ...]]:
    """The rows in batches, without what fills them up."""
    found = []
    for batch in batches:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        rows = zip(batch["input_ids"], mask, strict=True)
        found += [tuple(ids[real].tolist()) for ids, real in rows]
    return found


@pytest.mark.parametrize("packing", ["concatenate", "isolate", "pad"])
def test_each_token_of_a_stream_comes_once(tokenizer, folder, packing):
    corpus = stream(tokenizer, folder, packing=packing)
    assert corpus.is_stream
    assert corpus.num_tokens is corpus.num_sequences is None
    rows = rows_of([corpus.collate([row]) for row in corpus.train])
    documents = []
    for path in find_files([str(folder)]):
        lines = [("", {"text": one}) for one in datasets.Dataset.from_json(str(path))["text"]]
        columns = Columns("text", ("text",), "all")
        documents += list(DocumentReader(tokenizer).read(lines, columns))
    limit = LENGTH if packing == "pad" else None
    expected = Counter(id for one in documents for id in one.ids[:limit].tolist())
    lost = expected - Counter(id for row in rows for id in row)
    assert not lost or (packing, lost) == (
        "concatenate",
        Counter([END]),
    )  # a token alone at the end


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_two_workers_lose_and_repeat_nothing_and_a_resume_gives_the_rest(tokenizer, folder):
    corpus = stream(tokenizer, folder)
    alone = rows_of(load(corpus, 0))
    batches = list(load(corpus, 2))
    together = rows_of(batches)
    assert Counter(together) == Counter(alone)
    assert together == rows_of(load(corpus, 2))
    rest = skip_first_batches(load(stream(tokenizer, folder), 2), 5)
    assert rows_of(rest) == rows_of(batches[5:])
    assert rows_of(load(stream(tokenizer, folder, seed=1), 0)) != alone


class Watched(DistillationTrainer):
    """Keeps the rows that it was trained on."""

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.rows = [*getattr(self, "rows", []), *rows_of([inputs])]
        return super().training_step(model, inputs, *args, **kwargs)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_trainer_goes_on_in_a_stream_where_it_was(tokenizer, folder, tmp_path):
    teacher = LocalTeacher(tiny.make_model("Llama", 62, seed=1))

    def train(output: str, steps: int, resume: bool = False) -> tuple[list[Any], float]:
        corpus = stream(tokenizer, folder, repeat=True)
        trainer = Watched(
            tiny.make_model("Llama", 62),
            transformers.TrainingArguments(
                str(tmp_path / output),
                per_device_train_batch_size=4,
                max_steps=steps,
                save_steps=3,
                dataloader_num_workers=2,
                lr_scheduler_type="constant",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=corpus.train,
            data_collator=corpus.collate,
            teacher=teacher,
            distillation=DistillationArguments(targets="top_k:4", check_first_batch=False),
        )
        trainer.train(resume_from_checkpoint=resume)
        weights = sum(
            float(weight.detach().double().sum()) for weight in trainer.model.parameters()
        )
        return trainer.rows, weights

    num_rows = sum(1 for _ in stream(tokenizer, folder).train)
    steps = num_rows // 4 + 6  # into the second pass
    whole, weights = train("whole", steps)
    first, _ = train("parts", steps - 3)
    rest, resumed = train("parts", steps, resume=True)
    assert first + rest == whole
    assert resumed == weights
    assert len(rest) == 3 * 4


def test_a_stream_begins_again_with_the_same_rows(tokenizer, folder):
    once = [tuple(row["input_ids"].tolist()) for row in stream(tokenizer, folder).train]
    endless = stream(tokenizer, folder, repeat=True).train
    taken = [tuple(row["input_ids"].tolist()) for row in endless.take(2 * len(once) + 3)]
    assert taken == once * 2 + once[:3]


def test_a_mixture_of_streams_draws_by_weight(tokenizer, folder, tmp_path):
    chats = [
        {"prompt": one, "completion": f" {other}"}
        for one, other in zip(texts(60, 7), texts(60, 8), strict=True)
    ]
    write_jsonl(tmp_path / "chats.jsonl", chats)
    (tmp_path / "held_out.jsonl").write_text('{"text": "' + "w1 " * 40 + '"}\n')
    corpus = read(
        tokenizer,
        *(folder, tmp_path / "chats.jsonl"),
        streaming=True,
        data_weights=[1, 1],
        held_out=[str(tmp_path / "held_out.jsonl")],
    )
    batch = corpus.collate(list(corpus.train.take(200)))
    has_prompt = (batch["labels"] == -100)[:, 0]
    assert 70 < int(has_prompt.sum()) < 130
    assert (batch["labels"][~has_prompt][:, 0] >= 0).all()


def test_a_stream_is_told_apart_by_its_files_and_not_by_their_place(tokenizer, folder):
    corpus = stream(tokenizer, folder)
    moved = folder.rename(folder.with_name("moved"))
    assert stream(tokenizer, moved).digest == corpus.digest
    assert stream(tokenizer, moved, packing="pad").digest != corpus.digest
    write_jsonl(moved / "7.jsonl", [{"text": "w1 w2"}])
    assert stream(tokenizer, moved).digest != corpus.digest


def test_nothing_is_read_before_it_is_needed(tokenizer, folder):
    (folder / "9.jsonl").write_text("no JSON\n")
    corpus = stream(tokenizer, folder)
    with pytest.raises(ValueError, match=r"9.jsonl, line 1: expected an object"):
        list(corpus.train)


def test_a_stream_needs_something_to_be_measured_on(tokenizer, folder, tmp_path):
    with pytest.raises(ValueError, match="--streaming needs --held-out or --held-out-split"):
        read(tokenizer, folder, streaming=True)
    rows = [{"text": one} for one in texts(60, 1)]
    for name in ("train", "test"):
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "set" / f"{name}.parquet")
    corpus = stream(tokenizer, tmp_path / "set", held_out_split="test", held_out_sequences=5)
    assert len(corpus.held_out) == 5
    assert sum(1 for _ in corpus.train) > 20
