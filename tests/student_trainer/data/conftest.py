"""Data of every kind on disk, and a tokenizer that knows its words."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from student_trainer.config import RecordConfig
from student_trainer.training.corpus import Corpus, read_corpus
from tests.support import tiny

WORDS = [f"w{number}" for number in range(60)]
LENGTH = 16


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    tokenizer = tiny.make_tokenizer(WORDS)
    tokenizer.chat_template = (
        "{% for one in messages %}{% if one.role == 'assistant' %}{% generation %}"
        "{{ one.content }} w1{% endgeneration %}{% else %}{{ one.content }} w0{% endif %} {% endfor %}"
    )
    return tokenizer


def texts(count: int, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(2, 30))) for _ in range(count)]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(tokenizer: Any, *data: Any, repeat: bool = True, **settings: Any) -> Corpus:
    config = RecordConfig(
        teacher="127.0.0.1:1",
        record="nowhere",
        student=Path("nowhere"),
        data=[str(one) for one in data],
        sequence_length=LENGTH,
        **settings,
    )
    return read_corpus(config, tokenizer, repeat=repeat)
