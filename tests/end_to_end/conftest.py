"""A teacher that has learnt a little text, its service, and a student without weights."""

import json
import random
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from tests.conftest import Serve, Served
from tests.support import tiny

WORDS = [f"w{number}" for number in range(62)]
PADDED_IDS = 72


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text in which each word is followed by one of two: easy to learn, not trivial."""
    chance = random.Random(0)
    word, words = 0, []
    for _ in range(20_000):
        words.append(WORDS[word])
        word = (word * 5 + chance.choice((1, 1, 1, 7))) % len(WORDS)
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text(" ".join(words))
    return path


@pytest.fixture(scope="session")
def teacher_folder(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that has learnt the text a little."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second one waits longer than it helps
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = tiny.make_tokenizer(WORDS)
    model = tiny.make_model("Gemma2", len(tokenizer)).train()
    ids = torch.tensor(tokenizer(text.read_text()).input_ids)[: 64 * 300].view(-1, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in ids.repeat(3, 1).split(16):
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    torch.set_num_threads(threads)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teacher_model(teacher_folder: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(teacher_folder).eval()


@pytest.fixture(scope="session")
def padded_folder(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher with a head of 72 ids, of which the tokenizer uses 64."""
    folder = tmp_path_factory.mktemp("padded-teacher")
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher_folder)
    model.resize_token_embeddings(PADDED_IDS, mean_resizing=False)
    model.save_pretrained(folder)
    tiny.make_tokenizer(WORDS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def padded_service(serve: Serve, padded_folder: Path) -> Served:
    return serve(padded_folder)


@pytest.fixture(scope="session")
def rows(text: Path) -> list[dict[str, list[int]]]:
    """24 sequences of different lengths; of every third one, the first half is a prompt."""
    length = 12
    ids = tiny.make_tokenizer(WORDS)(text.read_text()).input_ids[: 24 * length]
    found = []
    for number in range(24):
        sequence = ids[number * length : (number + 1) * length - number % 5]
        labels = list(sequence)
        if number % 3 == 0:
            labels[: length // 2] = [-100] * (length // 2)
        found.append({"input_ids": sequence, "labels": labels})
    return found


@pytest.fixture(scope="session")
def trained_service(serve, teacher_folder: Path) -> Served:
    """A service of a teacher that has learnt something."""
    return serve(teacher_folder)


@pytest.fixture(scope="session")
def student_folder(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config and a tokenizer, no weights."""
    folder = tmp_path_factory.mktemp("student")
    config = transformers.AutoConfig.from_pretrained(teacher_folder)
    config.hidden_size, config.intermediate_size = 32, 64
    config.save_pretrained(folder)
    tiny.make_tokenizer(WORDS).save_pretrained(folder)
    return folder


def write_config(path: Path, **settings) -> str:
    path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))
    return f"@{path}"
